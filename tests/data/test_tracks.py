"""Which tracks of a tree make up a split, what a broken one is told, and .stem.mp4 files."""

import shutil
import struct

import numpy as np
import pytest
import soundfile
import torch

from tfswa_lab.data.musdb import MUSDB18Dataset

RATE = 8000


# --- which tracks ---------------------------------------------------------------------------


def test_validation_is_a_seeded_disjoint_share_of_the_train_folder(tree):
    def names(split, **options):
        return set(MUSDB18Dataset(tree, split, **options).track_names)

    everything = {f"Noise - {number}" for number in range(5)}
    for seed in range(4):
        assert len(names("valid", seed=seed)) == 1
        assert names("valid", seed=seed) | names("train", seed=seed) == everything
        assert not names("valid", seed=seed) & names("train", seed=seed)
    assert len({frozenset(names("valid", seed=seed)) for seed in range(8)}) > 1
    assert len(names("valid", valid_fraction=0.01)) == 1
    assert len(names("valid", valid_fraction=0.99)) == 4
    assert names("train", valid_fraction=0) == everything


def test_musdbs_validation_tracks_are_valid_and_never_train(tmp_path, make_track, musdb):
    official = musdb.DB(root=str(tmp_path)).setup["validation_tracks"]
    assert len(official) == 14
    for name in [*official, "A Classic Education - NightOwl", "Music Delta - Reggae"]:
        make_track(tmp_path / "train" / name, samples=40)
    valid = MUSDB18Dataset(tmp_path, "valid", segment_seconds=0.004).track_names
    train = MUSDB18Dataset(tmp_path, "train", segment_seconds=0.004).track_names
    assert sorted(valid) == sorted(official)
    assert sorted(train) == ["A Classic Education - NightOwl", "Music Delta - Reggae"]
    for name in official[1:]:
        shutil.rmtree(tmp_path / "train" / name)
    assert MUSDB18Dataset(tmp_path, "valid", segment_seconds=0.004).track_names == official[:1]


def test_folders_inside_tracks_and_hidden_ones_are_no_tracks(lone_tree):
    (lone_tree / "train" / "Noise - 0" / "takes").mkdir()
    (lone_tree / "train" / ".cache").mkdir()
    assert MUSDB18Dataset(lone_tree).track_names == ["Noise - 0"]


# --- kinds of files ------------------------------------------------------------------------------


def as_kind(folder, suffix, **options):
    """Write the WAV files of a tree again, as another kind of file."""
    for path in sorted(folder.rglob("*.wav")):
        samples, rate = soundfile.read(path, dtype="int16")
        soundfile.write(path.with_suffix(suffix), samples, rate, **options)
        path.unlink()


@pytest.mark.parametrize("suffix", [".flac", ".FLAC", ".aiff"])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_tree_of_other_lossless_files_reads_like_wav(tree, tmp_path, suffix, split):
    shutil.copytree(tree, tmp_path, dirs_exist_ok=True)
    as_kind(tmp_path, suffix)
    options = {"target_stems": ["vocals", "other"], "segment_seconds": 0.3, "seed": 3}
    wav, other = (MUSDB18Dataset(root, split, **options) for root in (tree, tmp_path))
    assert wav.track_names == other.track_names
    assert len(wav) == len(other)
    for one, two in zip(wav, other, strict=True):
        assert torch.equal(one["mixture"], two["mixture"])
        assert torch.equal(one["stems"], two["stems"])


def test_kinds_can_be_mixed_but_two_files_of_a_stem_are_refused(lone_tree):
    folder = lone_tree / "train" / "Noise - 0"
    before = MUSDB18Dataset(lone_tree, segment_seconds=None)[0]
    samples, rate = soundfile.read(folder / "bass.wav", dtype="int16")
    soundfile.write(folder / "bass.flac", samples, rate)
    with pytest.raises(ValueError, match=r"Noise - 0 holds bass\.flac and bass\.wav; keep one"):
        MUSDB18Dataset(lone_tree)
    (folder / "bass.wav").unlink()
    for name in ("vocals.txt", "vocals.wav.asd", "._vocals.wav", "no_vocals.wav"):
        (folder / name).write_bytes(b"of another program")
    after = MUSDB18Dataset(lone_tree, segment_seconds=None)[0]
    assert torch.equal(before["stems"], after["stems"])


def test_the_official_validation_holds_for_flac(tmp_path, make_track):
    for name in ("Leaf - Summerghost", "Somebody - Else"):
        make_track(tmp_path / "train" / name, samples=40)
    as_kind(tmp_path, ".flac")
    assert MUSDB18Dataset(tmp_path, "valid", segment_seconds=0.004).track_names == [
        "Leaf - Summerghost"
    ]


def test_a_folder_of_flac_is_never_said_to_be_empty(lone_tree):
    folder = lone_tree / "train" / "Noise - 0"
    as_kind(lone_tree, ".flac")
    with pytest.raises(ValueError, match="is a single track"):
        MUSDB18Dataset(folder)
    with pytest.raises(FileNotFoundError, match=f"pass its parent {lone_tree}"):
        MUSDB18Dataset(lone_tree / "train")
    (folder / "drums.flac").rename(folder / "accompaniment.flac")
    (folder / "bass.flac").unlink()
    with pytest.raises(FileNotFoundError) as error:
        MUSDB18Dataset(lone_tree, target_stems=["vocals", "other"])
    assert f"{folder / 'drums.flac'} is missing" in str(error.value)
    assert "['accompaniment.flac', 'mixture.flac', 'other.flac', 'vocals.flac']" in str(error.value)


def test_a_truncated_flac_is_named(lone_tree):
    as_kind(lone_tree, ".flac")
    path = lone_tree / "train" / "Noise - 0" / "bass.flac"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"bass\.flac .* of the 4000 that its header promises"):
        MUSDB18Dataset(lone_tree, segment_seconds=None)[0]


# --- broken trees and files ------------------------------------------------------------------


def test_a_folder_that_is_no_data_set_is_explained(lone_tree):
    train = lone_tree / "train"
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        MUSDB18Dataset(lone_tree / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no test/ folder"):
        MUSDB18Dataset(lone_tree, "test")
    with pytest.raises(ValueError, match="is a single track"):
        MUSDB18Dataset(train / "Noise - 0")
    with pytest.raises(FileNotFoundError, match=f"pass its parent {lone_tree}"):
        MUSDB18Dataset(train)
    with pytest.raises(ValueError, match=r"no track of .* is left for split='valid'"):
        MUSDB18Dataset(lone_tree, "valid")
    (lone_tree / "test").mkdir()
    with pytest.raises(FileNotFoundError, match="test is empty"):
        MUSDB18Dataset(lone_tree, "test")
    (lone_tree / "test" / "Notes").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Notes/mixture\.wav is missing.*no sound file"):
        MUSDB18Dataset(lone_tree, "test")


def rewrite(path, samples, rate=RATE, subtype="PCM_16"):
    soundfile.write(path, samples, rate, subtype=subtype)


def truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("source", ["mixture", "drums"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.unlink(),
            r"is missing \(the folder holds \['bass.wav', .* add the file",
        ),
        (lambda path: path.rename(path.with_stem("x")), r"is missing .*'x.wav'.* correct its name"),
        (lambda path: rewrite(path, np.zeros(4000)), r"has 1 channel\(s\), expected 2"),
        (lambda path: rewrite(path, np.zeros((4000, 6))), r"has 6 channel\(s\), expected 2"),
        (lambda path: rewrite(path, np.zeros((4000, 2)), 9000), "9000 Hz.*resample one"),
        (lambda path: rewrite(path, np.zeros((3999, 2))), "3999.*cut or pad"),
        (lambda path: rewrite(path, np.zeros((0, 2))), "holds no samples"),
        (lambda path: path.write_bytes(b""), "not readable as audio"),
        (lambda path: path.write_bytes(b"RIFF of a lost file"), "not readable as audio"),
        (truncate, "holds 1239 samples .* of the 4000 that its header promises"),
    ],
)
def test_a_broken_file_is_named_when_the_data_set_is_made(lone_tree, source, damage, message):
    path = lone_tree / "train" / "Noise - 0" / f"{source}.wav"
    damage(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        MUSDB18Dataset(lone_tree)
    assert path.name in str(error.value)


def test_a_truncated_float_wav_with_chunks_before_the_data_is_found(lone_tree):
    path = lone_tree / "train" / "Noise - 0" / "bass.wav"
    rewrite(path, np.zeros((4000, 2)), subtype="FLOAT")  # has a fact and a PEAK chunk
    assert MUSDB18Dataset(lone_tree, segment_seconds=0.1)[0]["stems"].shape == (4, 2, 800)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"bass\.wav .* 3999 samples .* of the 4000"):
        MUSDB18Dataset(lone_tree)


def test_a_wav_written_into_a_pipe_is_not_called_truncated(lone_tree):
    path = lone_tree / "train" / "Noise - 0" / "bass.wav"
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", 0xFFFFFFFF)  # the size that ffmpeg leaves in a pipe
    path.write_bytes(content)
    assert MUSDB18Dataset(lone_tree, segment_seconds=0.1)[0]["stems"].shape == (4, 2, 800)


def test_nan_samples_and_a_file_cut_later_are_named_when_read(lone_tree):
    dataset = MUSDB18Dataset(lone_tree, segment_seconds=None)
    path = lone_tree / "train" / "Noise - 0" / "vocals.wav"
    samples = np.zeros((4000, 2), np.float32)
    samples[1234, 1] = np.nan
    rewrite(path, samples, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"vocals\.wav contains NaN"):
        dataset[0]
    rewrite(path, np.zeros((3000, 2)))
    with pytest.raises(ValueError, match=r"vocals\.wav ends at sample 3000, 4000 were expected"):
        dataset[0]


# --- .stem.mp4 ------------------------------------------------------------------------------


def write_stems(path, sources, codec="alac"):
    import stempeg

    order = ["mixture", "drums", "bass", "other", "vocals"]
    audio = np.stack([sources[source] / 32768 for source in order])
    writer = stempeg.StreamsWriter(codec=codec, stem_names=order)
    path.parent.mkdir(parents=True, exist_ok=True)
    stempeg.write_stems(str(path), audio, sample_rate=44100, writer=writer)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stem_mp4_files_read_like_the_wav_folders_they_came_from(tmp_path, make_track):
    sources = make_track(tmp_path / "wav" / "test" / "Noise", samples=88200, rate=44100)
    write_stems(tmp_path / "mp4" / "test" / "Noise.stem.mp4", sources)
    arguments = {
        "split": "test",
        "target_stems": ["vocals", "other"],
        "segment_seconds": 0.7,
        "overlap": 0.123,
    }
    from_wav = MUSDB18Dataset(tmp_path / "wav", **arguments)
    from_mp4 = MUSDB18Dataset(tmp_path / "mp4", **arguments)
    assert from_mp4.track_names == ["Noise"]
    assert len(from_wav) == len(from_mp4) == 4
    for wav, mp4 in zip(from_wav, from_mp4, strict=True):
        assert torch.equal(wav["mixture"], mp4["mixture"])
        assert torch.equal(wav["stems"], mp4["stems"])


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_broken_stem_mp4_files_are_named(tmp_path, make_track):
    sources = make_track(tmp_path / "test" / "Noise", samples=4410, rate=44100)
    path = tmp_path / "test" / "Hiss.stem.mp4"
    write_stems(path, sources, codec="aac")
    with pytest.raises(ValueError, match=r"\.stem\.mp4 files and folders of stems"):
        MUSDB18Dataset(tmp_path, "test")
    shutil.rmtree(tmp_path / "test" / "Noise")
    assert MUSDB18Dataset(tmp_path, "test", segment_seconds=None)[0]["mixture"].shape[0] == 2
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"Hiss\.stem\.mp4 is not readable by ffmpeg"):
        MUSDB18Dataset(tmp_path, "test")
    rewrite(tmp_path / "one.wav", sources["mixture"], 44100)
    shutil.copy(tmp_path / "one.wav", path)
    with pytest.raises(ValueError, match=r"Hiss\.stem\.mp4 holds 1 audio streams instead of 5"):
        MUSDB18Dataset(tmp_path, "test")
