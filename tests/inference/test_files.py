"""From a file to its stems: as long, as fast, and all of them or none."""

from functools import partial

import pytest
import soundfile
import torch
from torch import nn

from tfswa_lab import audio
from tfswa_lab.inference import blocks as stream
from tfswa_lab.inference import files as module
from tfswa_lab.inference.files import Reading, Writing, separate_file
from tfswa_lab.inference.separate import Segmentation, separate_track
from tfswa_lab.models.separator import build_separator

QUARTER = Segmentation(segment_seconds=0.25)
FLOATS = Writing(bits="32f")
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


def separate_to(out, song, separator=None, segmentation=None, **more):
    """Files and what else is said."""
    done = separate_file(separator or Copies(), song, out, segmentation or QUARTER, **more)
    return [*done.files.values()], *done[1:]


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("samples", [1200, 22_050, 30_001])
def test_an_identity_returns_the_song(tmp_path, ending, samples):
    song = write_song(tmp_path / f"my.song.{ending}", 2, samples)
    mixture, _ = audio.read(song)
    for as_float in (True, False):
        writing = Writing(bits="32f" if as_float else "16", overwrite=True)
        files, gain, *_ = separate_to(tmp_path / "out", song, Copies(), writing=writing)
        assert [file.name for file in files] == ["times0.wav", "times1.wav"]
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
    files, *_ = separate_to(tmp_path / "out", song, separator, segmentation, writing=FLOATS)
    for file, stem in zip(files, expected, strict=True):
        written, written_rate = audio.read(file)
        assert written_rate == rate
        torch.testing.assert_close(written, stem, atol=2e-6, rtol=0)


def test_stems_that_would_clip_get_one_gain(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 30_000)
    mixture, _ = audio.read(song)
    files, gain, *_ = separate_to(tmp_path / "out", song, Copies((20.0, -0.5)))
    assert gain == pytest.approx(1 / (20 * mixture.abs().max().item()), rel=1e-6)
    loud, soft = (audio.read(file)[0] for file in files)
    assert loud.abs().max() > 0.9999
    torch.testing.assert_close(loud, gain * 20 * mixture, atol=1.01 / 32_768, rtol=0)
    torch.testing.assert_close(soft, gain * -0.5 * mixture, atol=0.51 / 32_768, rtol=0)


def test_floats_are_never_scaled(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 30_000)
    (file,), gain, *_ = separate_to(tmp_path / "out", song, Copies((20.0,)), writing=FLOATS)
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
    files, *_ = separate_to(out, song)
    before = [file.read_bytes() for file in files]
    with pytest.raises(type(error)):
        separate_file(Failing(error), song, out, QUARTER, writing=Writing(overwrite=True))
    assert files_in(out) == ["times0.wav", "times1.wav"]
    assert [file.read_bytes() for file in files] == before


def test_ctrl_c_while_floats_become_integers_leaves_nothing(tmp_path, monkeypatch):
    song, out = write_song(tmp_path / "song.wav", 2, 30_000), tmp_path / "out"
    write, seen = stream.write_blocks, []

    def interrupted(paths, blocks, rate, shape, subtype, *form):
        seen.extend([subtype, len(files_in(out))])
        peak = write(paths, blocks, rate, shape, subtype, *form)
        if seen.count("PCM_16") == 2:
            raise KeyboardInterrupt
        return peak

    monkeypatch.setattr(module, "write_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        separate_file(Copies(), song, out, QUARTER)
    assert seen == ["FLOAT", 0, "PCM_16", 2, "PCM_16", 2]  # the first float is gone again
    assert files_in(out) == []


def test_an_estimate_that_is_no_number_is_an_error(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 30_000)
    with pytest.raises(ValueError, match="NaN or infinite"):
        separate_file(Copies((1.0, float("nan"))), song, tmp_path / "out", QUARTER)
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("damage", ["half", "nan", "text", "empty"])
def test_a_bad_song_is_refused_before_the_work(tmp_path, damage):
    song = write_song(tmp_path / "song.flac", 2, 100_000)
    if damage == "half":
        song.write_bytes(song.read_bytes()[: song.stat().st_size // 2])
    elif damage == "nan":
        samples = torch.zeros(100_000, 2)
        samples[90_000] = torch.nan
        soundfile.write(song, samples.numpy(), 44_100, "FLOAT", format="WAV")
    else:
        song.write_text("not a song" if damage == "text" else "")
    separator = Failing(AssertionError("the work has begun"))
    separator.calls = 2
    with pytest.raises(ValueError, match=r"song\.flac"):
        separate_file(separator, song, tmp_path / "out", QUARTER)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", ["wav", "mp3", "aiff", "flac", "ogg", "w64", "au"])
def test_a_song_that_is_cut_off_is_separated_only_if_that_is_allowed(tmp_path, ending):
    song = write_song(tmp_path / f"song.{ending}", 2, 200_000)
    song.write_bytes(song.read_bytes()[: song.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"song\..* (truncated|damaged).*--allow-truncated"):
        separate_file(Copies(), song, tmp_path / "out", QUARTER)
    assert not (tmp_path / "out").exists()
    allowed = Reading(allow_truncated=True)
    done = separate_file(Copies(), song, tmp_path / "out", QUARTER, allowed, FLOATS)
    assert "it holds" in done.notes[0]
    samples = round(done.seconds * 44_100)
    assert 60_000 < samples < 120_000
    assert f"it holds {samples} samples" in done.notes[0]
    whole, _ = audio.read(write_song(tmp_path / f"again.{ending}", 2, 200_000))
    heard = audio.read(done.files["times0"])[0]
    torch.testing.assert_close(heard[:, :50_000], whole[:, :50_000], atol=1e-6, rtol=0)


def test_more_than_two_channels_are_mixed_down_by_what_knows_their_places(tmp_path):
    samples = torch.zeros(30_000, 6)
    samples[:, 2] = 0.5  # the centre, where films have the voice
    soundfile.write(tmp_path / "film.wav", samples.numpy(), 44_100)
    done = separate_file(Copies((1.0,)), tmp_path / "film.wav", tmp_path / "out", QUARTER)
    stem, _ = audio.read(done.files["times0"])
    assert stem.shape == (2, 30_000)
    left, right = stem[:, 15_000].tolist()
    assert left == right > 0.1
    assert "6 channels (5.1) were mixed down to 2" in done.notes[0]


def test_a_part_of_a_song_is_that_part_of_its_stems(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 100_000)
    part = separate_file(Copies(), song, tmp_path / "part", QUARTER, Reading(0.5, 1.0), FLOATS)
    heard, _ = audio.read(part.files["times0"])
    torch.testing.assert_close(heard, audio.read(song, 22_050, 44_100)[0], atol=1e-6, rtol=0)
    rest = separate_file(Copies(), song, tmp_path / "rest", QUARTER, Reading(2.0, 99), FLOATS)
    assert round(rest.seconds * 44_100) == 100_000 - 88_200
    with pytest.raises(ValueError, match=r"ends at 2\.27 s, before start=3\.0"):
        separate_file(Copies(), song, tmp_path / "none", QUARTER, Reading(3.0))


@pytest.mark.parametrize("rate", [44_100, 96_000])
def test_stem_and_residual_sum_to_the_song(tmp_path, rate):
    song = write_song(tmp_path / "song.wav", 2, 50_000, rate)
    writing = Writing(bits="32f", stems=["times1"], residual=True)
    done = separate_file(Copies(), song, tmp_path / "out", QUARTER, writing=writing)
    assert files_in(tmp_path / "out") == ["no_times1.wav", "times1.wav"]
    stem, rest = (audio.read(path)[0] for path in done.files.values())
    torch.testing.assert_close(stem + rest, audio.read(song)[0], atol=1e-6, rtol=0)


FORMATS = [("wav", "16"), ("wav", "24"), ("wav", "32f"), ("flac", "16"), ("flac", "24")]


@pytest.mark.parametrize(("form", "bits"), [*FORMATS, ("mp3", None), ("ogg", None)])
def test_every_format_holds_the_stems_to_its_precision(tmp_path, form, bits):
    tone = 0.2 * torch.sin(torch.arange(50_000) / 9).expand(2, -1)
    song = audio.write(tmp_path / "song.wav", tone)
    files, *_ = separate_to(tmp_path / "out", song, writing=Writing(form, bits))
    stem, rate = audio.read(files[1])
    assert (rate, stem.shape) == (44_100, (2, 50_000))
    step = {"16": 2**-15, "24": 2**-23, "32f": 2**-24, None: 0.03}[bits]
    assert (stem - 0.5 * audio.read(song)[0]).abs().max() <= 0.51 * step


def test_peaks_are_clamped_or_refused_as_wanted(tmp_path):
    song, loud = write_song(tmp_path / "song.wav", 2, 30_000), Copies((20.0,))
    files, gain, *_ = separate_to(tmp_path / "out", song, loud, writing=Writing(clip="clamp"))
    expected = (20 * audio.read(song)[0]).clamp(-1, 32_767 / 32_768)
    assert gain == 1
    torch.testing.assert_close(audio.read(files[0])[0], expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"reaches .* 16 bits end at 1: use clip rescale"):
        separate_to(tmp_path / "none", song, loud, writing=Writing(clip="none"))
    assert files_in(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "wma"}, "use wav, flac, mp3, ogg"),
        ({"format": "flac", "bits": "32f"}, "flac files take 16, 24"),
        ({"format": "mp3", "bits": "16"}, "mp3 files take no number of bits"),
        ({"clip": "soft"}, "use rescale, clamp, none"),
        ({"stems": "vocals"}, r"write \['vocals'\]"),
    ],
)
def test_a_choice_that_does_not_exist_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Writing(**options)


def test_a_rate_that_a_format_lacks_is_refused_before_the_work(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 9000, rate=96_000)
    with pytest.raises(ValueError, match="mp3 files cannot hold 96000 Hz"):
        separate_to(tmp_path / "out", song, Failing(AssertionError()), writing=Writing("mp3"))


def test_a_rate_that_ends_libsndfile_is_refused_before_it_is_asked(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 9000, rate=384_000)
    with pytest.raises(ValueError, match="ogg files cannot hold 384000 Hz"):
        separate_to(tmp_path / "out", song, writing=Writing("ogg"))


def test_channels_without_known_places_are_refused_by_name(tmp_path):
    for channels in (3, 9, 12):
        song = write_song(tmp_path / "song.wav", channels, 9000)
        with pytest.raises(ValueError, match=rf"song\.wav has {channels} channels"):
            separate_to(tmp_path / "out", song)


def test_stems_that_are_there_are_replaced_only_if_wanted(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 9000)
    files, *_ = separate_to(tmp_path / "out", song)
    before = files[1].read_bytes()
    with pytest.raises(FileExistsError, match=r"times0\.wav exists; use --overwrite"):
        separate_to(tmp_path / "out", song, Copies((0.1, 0.2)))
    assert files[1].read_bytes() == before
    separate_to(tmp_path / "out", song, Copies((0.1, 0.2)), writing=Writing(overwrite=True))
    assert files[1].read_bytes() != before
    assert files_in(tmp_path / "out") == ["times0.wav", "times1.wav"]


def test_a_song_that_appears_meanwhile_is_not_replaced(tmp_path):
    """Two processes separate two songs into one folder: the second finds the stems at the end."""
    song, out = write_song(tmp_path / "song.wav", 2, 9000), tmp_path / "out"
    with pytest.raises(FileExistsError, match="exists; use --overwrite"):
        separate_to(out, song, progress=lambda starts: [separate_to(out, song), *starts][1:])
    assert files_in(out) == ["times0.wav", "times1.wav"]


@pytest.mark.parametrize("there", [True, False])
def test_where_the_last_rename_fails_all_is_as_before(tmp_path, there):
    song, out = write_song(tmp_path / "song.wav", 2, 9000), tmp_path / "out"
    if there:
        separate_to(out, song)
    else:
        out.mkdir()
    (out / "times1.wav").unlink(missing_ok=True)
    (out / "times1.wav").mkdir()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match=r"times1\.wav"):
        separate_to(out, song, Copies((0.1, 0.2)), writing=Writing(overwrite=True))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_shifts_that_make_no_sense_are_refused_before_the_work(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 1000)
    with pytest.raises(ValueError, match="must be"):
        separate_file(Copies(), song, tmp_path / "out", Segmentation(0.001, shifts=100))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    song = write_song(tmp_path / "song.wav", 2, 1000)
    with pytest.raises(FileExistsError, match="name a folder"):
        separate_file(Copies(), song, song)
