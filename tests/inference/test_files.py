"""From a file to its stems: as long, as fast, and all of them or none."""

from functools import partial

import pytest
import soundfile
import torch
from torch import nn

from tfswa_lab import audio
from tfswa_lab.inference import blocks as stream
from tfswa_lab.inference import files as module
from tfswa_lab.inference.files import separate_file
from tfswa_lab.inference.separate import Segmentation, separate_track
from tfswa_lab.models.separator import build_separator

QUARTER = Segmentation(segment_seconds=0.25)
MINI = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}


class Copies(nn.Module):
    """The mixture, once for each gain."""

    def __init__(self, gains=(1.0, 0.5), sample_rate=44_100, audio_channels=2):
        super().__init__()
        self.gains, self.sample_rate, self.audio_channels = gains, sample_rate, audio_channels
        self.stems = tuple(f"times{i}" for i in range(len(gains)))

    def forward(self, mixture):
        return torch.stack([gain * mixture for gain in self.gains], 1)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Songs of half a second have several blocks."""
    for name in ("read_blocks", "resample_blocks"):
        monkeypatch.setattr(module, name, partial(getattr(stream, name), size=5000))


def write_song(path, channels, samples, rate=44_100, level=0.1):
    torch.manual_seed(0)
    soundfile.write(path, (level * torch.randn(samples, channels)).numpy(), rate)
    return path


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("samples", [1200, 22_050, 30_001])
def test_an_identity_returns_the_song(tmp_path, ending, samples):
    song = write_song(tmp_path / f"my.song.{ending}", 2, samples)
    mixture, _ = audio.read(song)
    for as_float in (True, False):
        files, gain = separate_file(Copies(), song, tmp_path / "out", QUARTER, as_float=as_float)
        assert [file.name for file in files] == ["my.song_times0.wav", "my.song_times1.wav"]
        assert gain == 1
        stem, rate = audio.read(files[0])
        assert rate == 44_100
        subtype, step = ("FLOAT", 1e-6) if as_float else ("PCM_16", 0.51 / 32_768)
        assert soundfile.info(files[0]).subtype == subtype
        torch.testing.assert_close(stem, mixture, atol=step, rtol=0)
    if ending in ("wav", "flac"):  # 16 bits in, the same 16 bits out
        assert torch.equal(stem, mixture)
    assert files_in(tmp_path / "out") == [file.name for file in files]


@pytest.mark.parametrize(
    ("rate", "channels", "shifts"),
    [(16_000, 2, 1), (44_099, 1, 1), (44_100, 2, 3), (48_000, 1, 2), (48_000, 2, 1)],
)
def test_a_file_gives_what_the_whole_song_in_memory_gives(tmp_path, rate, channels, shifts):
    torch.manual_seed(0)
    separator = build_separator(
        ("vocals", "other"), n_fft=512, hop_length=128, audio_channels=channels, **MINI
    ).eval()
    samples = rate // 2 + 3
    song = write_song(tmp_path / "song.wav", 3 - channels, samples, rate)  # the other number
    mixture, _ = audio.read(song)
    heard = audio.resample(audio.to_channels(mixture, channels), rate, 44_100)
    segmentation = Segmentation(0.2, batch_size=2, shifts=shifts)
    estimates = separate_track(separator, heard, segmentation)
    expected = audio.resample(estimates, 44_100, rate)[..., :samples]
    files, _ = separate_file(separator, song, tmp_path / "out", segmentation, as_float=True)
    for file, stem in zip(files, expected, strict=True):
        written, written_rate = audio.read(file)
        assert written_rate == rate
        torch.testing.assert_close(written, stem, atol=2e-6, rtol=0)


def test_stems_that_would_clip_get_one_gain(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 30_000)
    mixture, _ = audio.read(song)
    files, gain = separate_file(Copies((20.0, -0.5)), song, tmp_path / "out", QUARTER)
    assert gain == pytest.approx(1 / (20 * mixture.abs().max().item()), rel=1e-6)
    loud, soft = (audio.read(file)[0] for file in files)
    assert loud.abs().max() > 0.9999
    torch.testing.assert_close(loud, gain * 20 * mixture, atol=1.01 / 32_768, rtol=0)
    torch.testing.assert_close(soft, gain * -0.5 * mixture, atol=0.51 / 32_768, rtol=0)


def test_floats_are_never_scaled(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 30_000)
    (file,), gain = separate_file(Copies((20.0,)), song, tmp_path / "out", QUARTER, as_float=True)
    assert gain == 1
    torch.testing.assert_close(audio.read(file)[0], 20 * audio.read(song)[0], atol=1e-6, rtol=1e-6)


class Failing(Copies):
    """Raises at the third segment."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, mixture):
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return super().forward(mixture)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a kernel failed")])
def test_a_run_that_fails_leaves_what_there_was(tmp_path, error):
    song, out = write_song(tmp_path / "song.wav", 2, 100_000), tmp_path / "out"
    with pytest.raises(type(error)):
        separate_file(Failing(error), song, out, QUARTER)
    assert files_in(out) == []
    files, _ = separate_file(Copies(), song, out, QUARTER)
    before = [file.read_bytes() for file in files]
    with pytest.raises(type(error)):
        separate_file(Failing(error), song, out, QUARTER)
    assert files_in(out) == ["song_times0.wav", "song_times1.wav"]
    assert [file.read_bytes() for file in files] == before


def test_ctrl_c_while_floats_become_integers_leaves_nothing(tmp_path, monkeypatch):
    song, out = write_song(tmp_path / "song.wav", 2, 30_000), tmp_path / "out"
    write, seen = stream.write_blocks, []

    def interrupted(paths, blocks, rate, shape, subtype):
        seen.extend([subtype, len(files_in(out))])
        peak = write(paths, blocks, rate, shape, subtype)
        if seen.count("PCM_16") == 2:
            raise KeyboardInterrupt
        return peak

    monkeypatch.setattr(module, "write_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        separate_file(Copies(), song, out, QUARTER)
    assert seen == ["FLOAT", 0, "PCM_16", 2, "PCM_16", 2]
    assert files_in(out) == []


def test_an_estimate_that_is_no_number_is_an_error(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 30_000)
    with pytest.raises(ValueError, match="NaN or infinite"):
        separate_file(Copies((1.0, float("nan"))), song, tmp_path / "out", QUARTER)
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("damage", ["half", "nan", "text", "empty", "three channels"])
def test_a_bad_song_is_refused_before_the_work(tmp_path, damage):
    song = tmp_path / "song.flac"
    write_song(song, 3 if damage == "three channels" else 2, 100_000)
    if damage == "half":
        song.write_bytes(song.read_bytes()[: song.stat().st_size // 2])
    elif damage == "nan":
        samples = torch.zeros(100_000, 2)
        samples[90_000] = torch.nan
        soundfile.write(song, samples.numpy(), 44_100, "FLOAT", format="WAV")
    elif damage in ("text", "empty"):
        song.write_text("not a song" if damage == "text" else "")
    separator = Failing(AssertionError("the work has begun"))
    separator.calls = 2
    with pytest.raises(ValueError, match="got 3" if "three" in damage else r"song\.flac"):
        separate_file(separator, song, tmp_path / "out", QUARTER)
    assert not (tmp_path / "out").exists()


def test_a_song_is_as_long_as_what_can_be_decoded_of_it(tmp_path):
    song = write_song(tmp_path / "song.mp3", 2, 200_000)
    song.write_bytes(song.read_bytes()[: song.stat().st_size // 2])
    heard, _ = audio.read(song)
    assert heard.shape[1] < soundfile.info(song).frames  # its header promises more
    files, _ = separate_file(Copies(), song, tmp_path / "out", QUARTER, as_float=True)
    torch.testing.assert_close(audio.read(files[0])[0], heard, atol=1e-6, rtol=0)


def test_shifts_that_make_no_sense_are_refused_before_the_work(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 1000)
    with pytest.raises(ValueError, match="must be"):
        separate_file(Copies(), song, tmp_path / "out", Segmentation(0.001, shifts=100))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 1000)
    with pytest.raises(FileExistsError, match="name a folder"):
        separate_file(Copies(), song, song)
