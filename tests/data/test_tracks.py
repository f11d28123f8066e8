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
    with pytest.raises(FileNotFoundError, match=r"Notes/mixture\.wav is missing.*no WAV file"):
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
        (truncate, "is truncated: 11044 bytes short"),
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
    with pytest.raises(ValueError, match=r"bass\.wav is truncated: 8 bytes"):
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
    with pytest.raises(ValueError, match=r"\.stem\.mp4 files and WAV folders"):
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
