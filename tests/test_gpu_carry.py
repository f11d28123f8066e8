"""What travels to a GPU machine without network: clips of MIR-1K, and wheels."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tfswa_lab import audio
from tfswa_lab.data.mir1k import HOP, MIR1K, RATE, find_clips

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.append(str(CHECKOUT / "benchmarks"))

import mir1k_carry  # noqa: E402
import wheels  # noqa: E402

STEP = 1 / 32_768
NAMES = ("abjones_1_01", "amy_2_03", "Kenshin_3_11")


def clip_samples(seed: int) -> np.ndarray:
    """Two seconds of a tone over noise, in all residues modulo 4, and full scale both ways."""
    generator = np.random.default_rng(seed)
    tone = 8000 * np.sin(2 * np.pi * 220 / RATE * np.arange(2 * RATE + 100 * seed))
    samples = tone[:, None] + generator.normal(0, 300, (len(tone), 2))
    samples[:4] = np.array([-32_768, -32_767, 32_766, 32_767])[:, None]
    return samples.astype(np.int16)


LAYOUTS = {
    "original": ("Wavfile/{}.wav", "PitchLabel/{}.pv", "vocal-nonvocalLabel/{}.vocal"),
    "flac": ("train/{}.flac", "train/{}.f0.txt", "train/{}.vocal.txt"),
}


@pytest.fixture(params=list(LAYOUTS))
def root(request, tmp_path, monkeypatch) -> Path:
    """MIR-1K in miniature, in either layout, beside a checkout of 5000 bytes with its wheels."""
    root = tmp_path / "mir1k"
    for seed, name in enumerate(NAMES):
        paths = [root / pattern.format(name) for pattern in LAYOUTS[request.param]]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        samples = clip_samples(seed)
        soundfile.write(paths[0], samples, RATE, subtype="PCM_16")
        frames = range(len(samples) // HOP - 1)
        pitch = "".join(f"{40 + i / 4 if i % 5 else 0:g} \r\n" for i in frames)
        paths[1].write_bytes(pitch.encode())
        paths[2].write_text("".join(f"{int(i % 5 > 0)} \n" for i in frames))
    core = tmp_path / "checkout" / ".whl" / "core"
    core.mkdir(parents=True)
    (core / "some-1.0-py3-none-any.whl").write_bytes(bytes(700))
    monkeypatch.setattr(mir1k_carry, "CHECKOUT", tmp_path / "checkout")
    monkeypatch.setattr(mir1k_carry, "tree_bytes", lambda: 5000)
    return root


def contents_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder; an empty folder counts too."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in paths
    }


def test_the_pack_reads_back_as_the_training_clips_with_labels_unchanged(root, tmp_path, capsys):
    folder = tmp_path / "gpu" / "mir1k"
    mir1k_carry.carry(root, folder)
    assert "2 clips 0.1 = 0.1 MiB of 64.0" in capsys.readouterr().out
    originals, packed = MIR1K(root, "train").clips, MIR1K(folder).clips
    assert [clip.name for clip in packed] == [clip.name for clip in originals] == list(NAMES[:2])
    for before, after in zip(originals, packed, strict=True):
        assert after.pitch_path.read_bytes() == before.pitch_path.read_bytes()
        assert after.vocal_path.read_bytes() == before.vocal_path.read_bytes()
        assert before.pitch_path.read_bytes().count(b"\r\n")
        error = audio.read(after.path)[0] - audio.read(before.path)[0]
        assert error[:, 4:].abs().max() == 2 * STEP
        assert error.abs().max() == 3 * STEP  # 32767, which has no multiple of 4 above it
        # errors 0, ±1, 2, ±1 of a step are equally frequent: a mean square of 1.5 steps
        assert audio.rms_db(error) == pytest.approx(10 * np.log10(1.5 * STEP**2), abs=0.1)
        assert abs(error.mean()) < 0.05 * STEP  # and they have no direction
    card = (folder / "README.md").read_text()
    assert "rounded off" in card
    assert "-88.6 dB" in card
    assert "MIR-1K, Chao-Ling Hsu" in card


def test_two_bits_less_take_two_bits_less(root, tmp_path):
    mir1k_carry.carry(root, tmp_path / "pack")
    for before, after in zip(
        MIR1K(root, "train").clips, find_clips(tmp_path / "pack"), strict=True
    ):
        whole = tmp_path / "whole.flac"
        samples, _ = soundfile.read(before.path, dtype="int16")
        soundfile.write(whole, samples, RATE, compression_level=1.0)
        saved_bits = 8 * (whole.stat().st_size - after.path.stat().st_size) / (2 * after.samples)
        assert 1.7 < saved_bits < 2.1


def test_a_pack_is_replaced_and_packed_again_it_is_the_same(root, tmp_path):
    folder = tmp_path / "pack"
    mir1k_carry.carry(root, folder)
    first = contents_of(tmp_path)
    (folder / "train" / "stale.flac").write_bytes(b"of an earlier pack")
    mir1k_carry.carry(root, folder)
    assert contents_of(tmp_path) == first
    mir1k_carry.carry(folder, folder)  # from itself: multiples of 4 stay as they are
    assert contents_of(tmp_path) == first


@pytest.mark.parametrize("there_before", [False, True])
def test_more_than_travels_is_refused_and_nothing_changes(root, tmp_path, there_before):
    folder = tmp_path / "gpu" / "pack"
    if there_before:
        mir1k_carry.carry(root, folder)
    before = contents_of(tmp_path)
    files = mir1k_carry.pack(MIR1K(root, "train").clips)
    travels = 5000 + 700 + sum(map(len, files.values()))
    with pytest.raises(ValueError, match=r"checkout 0\.0 \+ \.whl/core 0\.0 \+ 2 clips 0\.\d"):
        mir1k_carry.carry(root, folder, limit=travels)
    assert contents_of(tmp_path) == before
    mir1k_carry.carry(root, folder, limit=travels + 1)
    assert contents_of(folder).keys() == {*files, "train"}


def test_a_folder_of_something_else_is_refused(root, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("of mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_bytes("# Café\n".encode("latin-1"))
    before = contents_of(tmp_path)
    for folder in (root, tmp_path / "empty", tmp_path / "file", tmp_path / "mine"):
        with pytest.raises(FileExistsError, match=f"{folder.name} is there and no pack of MIR-1K"):
            mir1k_carry.carry(root, folder)
    assert contents_of(tmp_path) == before


def test_a_full_disk_leaves_the_old_pack_and_nothing_else(root, tmp_path, monkeypatch):
    mir1k_carry.carry(root, tmp_path / "pack")
    (tmp_path / "pack" / "train" / "extra.txt").write_text("tells the old pack from a new one")
    before = contents_of(tmp_path)
    write_bytes = Path.write_bytes

    def write_until_full(path: Path, content: bytes) -> int:
        if path.name == "amy_2_03.flac":
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        mir1k_carry.carry(root, tmp_path / "pack")
    assert contents_of(tmp_path) == before


def test_a_broken_clip_is_named_and_leaves_nothing(root, tmp_path):
    clip = MIR1K(root, "train").clips[1]
    clip.path.write_bytes(clip.path.read_bytes()[:200])
    before = contents_of(tmp_path)
    with pytest.raises(ValueError, match="amy_2_03"):
        mir1k_carry.carry(root, tmp_path / "gpu" / "pack")
    assert contents_of(tmp_path) == before


def test_the_tree_is_what_git_tracks_or_does_not_ignore(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "CHECKOUT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ValueError, match="no git checkout"):
        wheels.tree_bytes()
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    for name, size in {"tracked": 10, "gone": 20, "new ü": 300, "ignored.log": 4000}.items():
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / ".git" / "info" / "exclude").write_text("*.log\n")
    subprocess.run([*git, "add", "tracked", "gone"], check=True)
    (tmp_path / "gone").unlink()
    assert wheels.tree_bytes() == 310


@pytest.fixture
def names() -> dict[str, set[str]]:
    return wheels.contents(wheels.GPU_MACHINE, "3.12")


def test_each_folder_of_wheels_holds_what_its_commands_need(names):
    assert names["core"] >= {"soundfile", "cffi", "musdb", "mir-eval", "museval", "auraloss"}
    assert names["core"] >= {"lightning-fabric", "pooch", "stempeg"}
    assert names["lessons"] >= {"papermill", "ipykernel", "ipython", "nbclient", "nbformat"}
    assert names["lessons"] >= {"ipywidgets", "comm", "pyzmq", "matplotlib-inline"}
    assert not names["core"] & names["lessons"]


def test_no_wheel_is_for_a_browser_or_there_already(names):
    both = names["core"] | names["lessons"]
    browser = {"jupyterlab", "jupyter-server", "jupyterlab-widgets", "widgetsnbextension", "babel"}
    assert not both & (browser | {"notebook-shim", "nbconvert", "debugpy"})
    assert not both & {"torch", "torchaudio", "numpy", "pytest", "matplotlib", "triton"}


def test_a_bare_machine_with_torch_gets_the_rest(names, tmp_path):
    (tmp_path / "have.txt").write_text("# nothing but\nSoundFile==0.13.1\n")
    bare = wheels.contents(tmp_path / "have.txt", "3.12")
    assert bare["core"] >= (names["core"] - {"soundfile", "cffi", "pycparser"}) | {
        "numpy",
        "pytest",
    }
    assert not bare["core"] & {"soundfile", "torch"}


def test_what_exceeds_its_limit_is_named(tmp_path, monkeypatch, capsys):
    sizes = {"core": 6 * wheels.MIB + 1, "lessons": 1000}
    for name, size in sizes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "some-1.0-py3-none-any.whl").write_bytes(bytes(size))
    monkeypatch.setattr(wheels, "CLIPS", tmp_path / "clips")
    monkeypatch.setattr(wheels, "tree_bytes", lambda: 57 * wheels.MIB)
    (problem,) = wheels.too_much(tmp_path)
    assert "core: 1 wheels, 6.0 MiB of 6.0" in problem
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.flac").write_bytes(bytes(wheels.MIB))
    _, problem = wheels.too_much(tmp_path)
    assert problem.startswith("tests and benchmarks: checkout 57.0 + ")
    assert "+ .gpu/mir1k 1.0 = 64.0 MiB of 64.0" in problem
    assert "lessons: checkout 57.0 + " in capsys.readouterr().out
