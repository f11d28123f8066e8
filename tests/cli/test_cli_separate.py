"""`tfswa-lab separate` as a user types it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import nn
from typer.testing import CliRunner

from tfswa_lab import audio
from tfswa_lab.cli import app
from tfswa_lab.models import storage
from tfswa_lab.models.separator import build_separator
from tfswa_lab.models.storage import load_separator, save_separator

MINI = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}


FLOATS = ("--bits", "32f")


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    separator = build_separator(
        ("vocals", "other"), n_fft=512, hop_length=128, mixture_consistency=True, **MINI
    )
    return save_separator(separator, tmp_path / "model")


def run(*arguments):
    return CliRunner().invoke(app, ["separate", *map(str, arguments)])


@pytest.mark.parametrize(
    ("rate", "samples", "channels"), [(44_100, 60_001, 2), (48_000, 30_000, 1), (16_000, 1, 2)]
)
def test_any_rate_and_length_gives_stems_of_that_rate_and_length(
    model, tmp_path, rate, samples, channels
):
    song = audio.write(tmp_path / "song.wav", 0.1 * torch.randn(channels, samples), rate)
    result = run(song, "--model", model, "--out", tmp_path / "out", "--segment-seconds", 0.5)
    assert result.exit_code == 0, result.output
    mixture, _ = audio.read(song)
    stems = [audio.read(tmp_path / "out" / f"{s}.wav") for s in ("vocals", "other")]
    assert [r for _, r in stems] == [rate, rate]
    assert all(stem.shape == (2, samples) for stem, _ in stems)
    if rate == 44_100:  # consistent, and not resampled: the stems sum to the song
        total = stems[0][0] + stems[1][0]
        torch.testing.assert_close(total, mixture, atol=3 / 32_768, rtol=0)


def test_a_model_of_mono_mixtures_gives_mono_stems(tmp_path):
    separator = build_separator(
        ("voice",), n_fft=512, hop_length=128, sample_rate=16_000, audio_channels=1, **MINI
    )
    mono = save_separator(separator, tmp_path / "mono")
    song = audio.write(tmp_path / "song.wav", 0.1 * torch.randn(2, 30_000))
    result = run(song, "--model", mono, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    voice, rate = audio.read(tmp_path / "out" / "voice.wav")
    assert (voice.shape, rate) == ((1, 30_000), 44_100)


def test_a_missing_song_and_a_missing_model_are_named(model, tmp_path):
    result = run(tmp_path / "no.wav", "--model", model, "--out", tmp_path)
    assert result.exit_code == 1
    assert "no.wav" in result.output
    song = audio.write(tmp_path / "song.wav", torch.zeros(2, 1000))
    result = run(song, "--model", tmp_path / "nowhere", "--out", tmp_path)
    assert result.exit_code == 1
    assert "separator.json" in result.output


def test_an_output_folder_that_is_a_file_is_refused_before_the_work(model, tmp_path):
    song = audio.write(tmp_path / "song.wav", torch.zeros(2, 1000))
    result = run(song, "--model", model, "--out", song)
    assert result.exit_code == 1
    assert "name a folder" in result.output


def test_nan_in_the_song_is_refused_before_any_stem_is_written(model, tmp_path):
    soundfile.write(tmp_path / "nan.wav", torch.full((99, 2), torch.nan).numpy(), 44_100, "FLOAT")
    result = run(tmp_path / "nan.wav", "--model", model, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_batches_and_shifts_change_little_and_float_keeps_all(model, tmp_path):
    song = audio.write(tmp_path / "song.wav", 0.1 * torch.randn(2, 33_000))
    stems = []
    for i, more in enumerate([(), FLOATS, (*FLOATS, "--batch-size", 2), ("--shifts", 2)]):
        out = tmp_path / str(i)
        result = run(song, "--model", model, "--out", out, "--segment-seconds", 0.5, *more)
        assert result.exit_code == 0, result.output
        stems.append(audio.read(out / "vocals.wav")[0])
    plain, floats, batched, shifted = stems
    assert torch.equal(plain, (floats * 32_768).round() / 32_768)
    torch.testing.assert_close(batched, floats, atol=1e-6, rtol=0)
    assert 0 < (shifted - plain).abs().max() < 0.1


def answer(monkeypatch, forward):
    """Every model that is loaded from now on answers so."""

    def load(folder):
        separator = load_separator(folder)
        separator.forward = forward
        return separator

    monkeypatch.setattr(storage, "load_separator", load)


def test_the_gain_against_clipping_is_told(model, tmp_path, monkeypatch):
    answer(monkeypatch, lambda mixture: torch.stack([4 * mixture, mixture], 1))
    song = audio.write(tmp_path / "song.wav", torch.full((2, 1000), 0.5))
    result = run(song, "--model", model, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "all stems are scaled by 0.500" in result.output
    other, _ = audio.read(tmp_path / "out" / "other.wav")
    assert torch.equal(other, torch.full((2, 1000), 0.25))
    result = run(song, "--model", model, "--out", tmp_path / "floats", *FLOATS)
    assert "scaled" not in result.output


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has …"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …"),
        MemoryError(),
    ],
)
def test_no_memory_for_a_single_segment_is_told_in_one_line(model, tmp_path, monkeypatch, error):
    def fail(mixture):
        raise error

    answer(monkeypatch, fail)
    song = audio.write(tmp_path / "song.wav", torch.zeros(2, 1000))
    result = run(song, "--model", model, "--out", tmp_path / "out", "--batch-size", 4)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if "Error" in line]
    assert line.startswith("Error: out of memory")
    assert ("(tried to allocate 9.00 GiB)" in line) == ("9.00 GiB" in str(error))
    assert "--segment-seconds" in line
    assert "Traceback" not in result.output
    assert list((tmp_path / "out").iterdir()) == []


class Copies(nn.Module):
    """A separator without a network: three quarters and a quarter of the mixture."""

    stems, audio_channels, sample_rate = ("vocals", "other"), 2, 44_100

    def forward(self, mixture):
        return torch.stack([0.75 * mixture, 0.25 * mixture], 1)


@pytest.fixture
def copies(monkeypatch):
    monkeypatch.setattr(storage, "load_separator", lambda model: Copies().eval())


def write_song(path, level=0.5, samples=9000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full((samples, 2), level), 44_100)
    return path


def written(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in files)


def level(path):
    return round(soundfile.read(path)[0][100, 0], 3)


def test_several_songs_have_a_folder_each_and_mixtures_their_folders_name(copies, tmp_path):
    songs = [
        write_song(tmp_path / name) for name in ("a/one.wav", "b/A - B/mixture.wav", "c.d.flac")
    ]
    result = run(*songs, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    stems = ("other.wav", "vocals.wav")
    assert written(tmp_path / "out") == [
        f"{track}/{stem}" for track in ("A - B", "c.d", "one") for stem in stems
    ]
    assert result.stdout.splitlines()[0] == str(tmp_path / "out" / "one" / "vocals.wav")


def test_a_folder_stands_for_its_mixtures_or_its_songs(copies, tmp_path):
    for name in ("mixture", "vocals"):
        write_song(tmp_path / "set" / "test" / "A - B" / f"{name}.wav")
    for name in ("x/1.flac", "x/2.ogg", "x/notes.txt", "x/.3.wav", "__MACOSX/1.wav"):
        (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
        write_song(tmp_path / "new.wav").rename(tmp_path / "album" / name)
    assert run(tmp_path / "set", "--out", tmp_path / "one").exit_code == 0
    assert written(tmp_path / "one") == ["A - B/other.wav", "A - B/vocals.wav"]
    assert run(tmp_path / "album", "--out", tmp_path / "two", "--stem", "vocals").exit_code == 0
    assert written(tmp_path / "two") == ["1/vocals.wav", "2/vocals.wav"]


def test_patterns_and_repeated_songs_are_what_a_shell_makes_of_them(copies, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a1.wav", "a2.wav", "b1.wav", "[x].wav"):
        write_song(Path(name))
    result = run("a*.wav", "a1.wav", "[x].wav", "--out", "out", "--stem", "other")
    assert result.exit_code == 0, result.output
    assert written(Path("out")) == ["[x]/other.wav", "a1/other.wav", "a2/other.wav"]
    assert "z*.wav: no file has such a name" in run("z*.wav", "--out", "out").stderr


def test_what_it_writes_evaluate_reads(copies, tmp_path):
    root = tmp_path / "set"
    for name in ("vocals", "drums", "bass", "other"):
        write_song(root / "test" / "A - B" / f"{name}.wav", 0.1, 100_000)
    write_song(root / "test" / "A - B" / "mixture.wav", 0.4, 100_000)
    assert run(root, "--out", tmp_path / "E").exit_code == 0
    options = ("--estimates", tmp_path / "E", "--data-root", root, "--stems", "vocals,other")
    more = ("--output-dir", tmp_path / "scores", "--no-bounds", "--jobs", 1)
    result = CliRunner().invoke(app, ["evaluate", *map(str, (*options, *more))])
    assert result.exit_code == 0, result.output


def test_two_songs_of_one_name_are_both_kept_or_refused(copies, tmp_path):
    songs = [write_song(tmp_path / cd / "01.wav", x) for cd, x in (("cd1", 0.25), ("cd2", -0.5))]
    result = run(*songs, "--out", tmp_path / "both")
    assert result.exit_code == 1
    assert all(str(song) in result.stderr for song in songs)
    assert "{parent}" in result.stderr
    assert not (tmp_path / "both").exists()
    result = run(*songs, "--out", tmp_path / "both" / "{parent}_{track}_{stem}.{ext}")
    assert result.exit_code == 0, result.output
    assert level(tmp_path / "both" / "cd1_01_vocals.wav") == 0.188  # 3/4 of a quarter
    assert level(tmp_path / "both" / "cd2_01_vocals.wav") == -0.375
    for song, status in zip(songs, (0, 1), strict=True):
        result = run(song, "--out", tmp_path / "out")
        assert result.exit_code == status
    assert "exists; use --overwrite" in result.stderr
    assert level(tmp_path / "out" / "vocals.wav") == 0.188
    assert run(songs[1], "--out", tmp_path / "out", "--overwrite").exit_code == 0
    assert level(tmp_path / "out" / "vocals.wav") == -0.375


def test_a_batch_goes_on_after_a_bad_song_and_after_a_stop(copies, tmp_path):
    good = write_song(tmp_path / "good.wav")
    (tmp_path / "bad.wav").write_text("no song")
    log, out = tmp_path / "log.jsonl", tmp_path / "out"
    result = run(tmp_path / "bad.wav", good, "--out", out, "--jsonl", log)
    assert result.exit_code == 1
    assert "1 of 2 songs failed" in result.stderr
    bad, done = map(json.loads, log.read_text().splitlines())
    assert "bad.wav is not readable" in bad["error"]
    assert done["song"] == str(good)
    assert done["files"]["vocals"] == str(out / "good" / "vocals.wav")
    assert done["seconds"] == round(9000 / 44_100, 3)
    assert done["gain"] == 1
    late = write_song(tmp_path / "late.wav")
    assert "exists" in run(good, late, "--out", out).stderr
    result = run(good, late, "--out", out, "--skip-existing", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert written(out)[2:] == ["late/other.wav", "late/vocals.wav"]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{track}/{stem}.{ext}", "s{0}/vocals.wav"),
        ("{stem} of {track}.flac", "vocals of s{0}.flac"),
        ("deep/er/{parent}-{stem}", "deep/er/songs-vocals.wav"),
    ],
)
def test_a_template_names_the_files(copies, tmp_path, template, name):
    song = write_song(tmp_path / "songs" / "s{0}.wav")
    result = run(song, "--out", tmp_path / "out" / template, "--stem", "vocals")
    assert result.exit_code == 0, result.output
    assert written(tmp_path / "out") == [name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{track}.wav"], "a template has {stem} and other fields"),
        (["--out", "{stem}{album}"], "a template has {stem} and other fields"),
        (["--jsonl", "/nowhere/x"], "/nowhere/x"),
        (["--out", "{stem"], "write a field as {stem}"),
        (["--out", "{stem}.mp3", "--format", "wav"], "ends in .mp3, but --format is wav"),
        (["--format", "wma"], "use wav, flac, mp3, ogg"),
        (["--stem", "voice"], "no stem 'voice'; it has vocals, other"),
        (["--two-stems", "vocals", "--stem", "other"], "give one of them"),
        (["--overwrite", "--skip-existing"], "contradict"),
        (["--start", "9"], "ends at 0.20 s"),
        (["--start", "-1"], "start=-1.0"),
        (["--overlap", "0.9"], "overlap=0.9"),
        (["--device", "tpu"], "device='tpu'"),
        (["--shifts", "x"], "--shifts"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_1(copies, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = run(write_song(tmp_path / "song.wav"), *options)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line
    assert written(tmp_path) == ["song.wav"]


@pytest.mark.parametrize("out", ["separated", "."])
def test_a_folder_with_its_own_stems_in_it_is_separated_once(copies, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    for name in ("1.wav", "2.wav"):
        write_song(Path(name))
    for more in ((), ("--skip-existing",), ("--overwrite",)):
        result = run(".", "--out", out, *more)
        assert result.exit_code == 0, result.output
    stems = [f"{track}/{stem}.wav" for track in "12" for stem in ("other", "vocals")]
    ours = [(Path(out) / stem).as_posix() for stem in stems]
    assert written(tmp_path) == sorted(["1.wav", "2.wav", *ours])


def test_a_song_is_never_replaced_by_its_stem(copies, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = write_song(Path("vocals.wav")).read_bytes()
    result = run("vocals.wav", "--out", ".", "--overwrite")
    assert result.exit_code == 1
    assert "vocals.wav is one of the songs" in result.stderr
    assert Path("vocals.wav").read_bytes() == before


def test_a_song_some_of_whose_stems_are_there_does_not_stop_the_others(copies, tmp_path):
    songs = [write_song(tmp_path / name) for name in ("1.wav", "2.wav")]
    assert run(songs[0], "--out", tmp_path / "out" / "1", "--stem", "vocals").exit_code == 0
    result = run(*songs, "--out", tmp_path / "out", "--skip-existing")
    assert result.exit_code == 1
    assert "1/vocals.wav exists" in result.stderr
    assert written(tmp_path / "out") == ["1/vocals.wav", "2/other.wav", "2/vocals.wav"]


@pytest.mark.parametrize("name", ["", "...wav", "..wav"])
def test_a_name_that_is_no_name_is_refused(copies, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name:
        write_song(Path("a.wav")).rename(name)
    result = run(name, write_song(Path("b.wav")), "--out", "out")
    assert result.exit_code == 1
    assert "empty" in result.stderr or "rename the song" in result.stderr
    assert not Path("out").exists()


def test_two_kinds_of_one_song_are_told_apart_by_the_advised_template(copies, tmp_path):
    songs = [write_song(tmp_path / name) for name in ("x.wav", "x.flac")]
    assert "{trackext}" in run(*songs, "--out", tmp_path / "out").stderr
    out = tmp_path / "out" / "{parent}" / "{track}.{trackext}" / "{stem}.{ext}"
    assert run(*songs, "--out", out).exit_code == 0
    assert len(written(tmp_path / "out")) == 4


def test_two_stems_are_the_stem_and_the_rest(copies, tmp_path):
    song = write_song(tmp_path / "song.wav", 0.5)
    assert run(song, "--out", tmp_path / "out", "--two-stems", "vocals").exit_code == 0
    assert level(tmp_path / "out" / "vocals.wav") == 0.375
    assert level(tmp_path / "out" / "no_vocals.wav") == 0.125


def test_models_and_version_are_shown(tmp_path):
    assert "band: vocals, drums, bass, other at 44100 Hz" in run("--list-models").stdout
    version = CliRunner().invoke(app, ["--version"]).stdout
    assert version.startswith("tfswa-lab ")


def test_a_run_is_a_model(model, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.move(model, tmp_path / "run" / "best")
    result = run(write_song(tmp_path / "song.wav"), "-m", tmp_path / "run", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_names_that_are_no_text_and_long_paths_are_separated(copies, tmp_path):
    deep = tmp_path.joinpath(*["d" * 100] * 12)
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    songs = [latin, tmp_path / f"{'n' * 251}.wav"]
    for song in songs:
        write_song(tmp_path / "a.wav").rename(song)
    deep.mkdir(parents=True)
    result = run(*songs, "--out", deep / "out")
    assert result.exit_code == 0, result.output
    stems = list((deep / "out").rglob("*.wav"))
    assert len(stems) == 4
    assert {path.parent.name for path in stems} == {song.stem for song in songs}


def test_kills_at_random_moments_leave_whole_stems_of_one_song_or_nothing(tmp_path):
    script = Path(__file__).with_name("killed_separate.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, "10"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout
