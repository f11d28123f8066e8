"""Every kind of file is read to the sample, and none is shorter than it says without a word."""

import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tfswa_lab import decode, headers
from tfswa_lab.decode import ensure_ffmpeg, open_sound, read_header

RATE, SAMPLES = 44_100, 60_000
SNDFILE = {
    "wav": ("WAV", "PCM_16"),
    "24.wav": ("WAV", "PCM_24"),
    "x.wav": ("WAVEX", "FLOAT"),
    "rf64.wav": ("RF64", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
LOSSY = {"ogg", "mp3"}
FFMPEG = {
    "alac.m4a": ["-c:a", "alac"],
    "aac.m4a": ["-c:a", "aac", "-movflags", "+faststart"],
    "mka": ["-c:a", "flac"],
    "webm": ["-c:a", "libopus"],
    "opus.ogg": ["-c:a", "libopus"],
    "adpcm.wav": ["-c:a", "adpcm_ms"],
    "wma": ["-c:a", "wmav2"],
    "aac": ["-c:a", "aac"],
    "nothing-stated.mp3": ["-c:a", "libmp3lame", "-q:a", "4", "-write_xing", "0"],
}

VARIABLE = {"variable.mp3": ["-c:a", "libmp3lame", "-q:a", "2"]}


@pytest.fixture(scope="module")
def song():
    s = np.arange(SAMPLES)
    sound = 0.3 * np.sin(s * (0.02 + s / 3e6)) * (1 + np.sin(s / 4000)) / 2
    return np.round(np.stack([sound, -0.5 * sound], 1) * 32_768) / 32_768


@pytest.fixture(scope="module")
def files(song, tmp_path_factory):
    """The song in every kind of file, by ending."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    for ending, (form, subtype) in SNDFILE.items():
        found[ending] = folder / f"song.{ending}"
        soundfile.write(found[ending], song, RATE, subtype, format=form)
    ensure_ffmpeg()
    for ending, codec in (FFMPEG | VARIABLE).items():
        found[ending] = folder / f"song.{ending}"
        command = ["ffmpeg", "-v", "error", "-i", found["wav"], *codec, found[ending]]
        subprocess.run(command, check=True)
    return found


@pytest.mark.parametrize("ending", SNDFILE)
def test_what_libsndfile_reads_has_the_length_of_the_song(files, song, ending):
    samples, rate = decode.decode(files[ending])
    assert (rate, samples.shape, samples.dtype) == (RATE, (2, SAMPLES), np.float32)
    assert read_header(files[ending]) == (RATE, 2, SAMPLES)
    worst = 0.05 if ending in LOSSY else 1e-6
    assert np.abs(samples.T - song).max() < worst
    part, _ = decode.decode(files[ending], 40_000, 3000)
    np.testing.assert_allclose(part, samples[:, 40_000:43_000], atol=worst)


@pytest.mark.parametrize("ending", [*SNDFILE, *FFMPEG, "variable.mp3"])
def test_blocks_are_the_whole_in_pieces(files, ending):
    """soundfile seeks after each block; where libsndfile seeks amiss, most of a song is lost."""
    with open_sound(files[ending]) as sound:
        whole = sound.read()
        pieces = [block.copy() for block in sound.blocks(5000)]
        late = [block.copy() for block in sound.blocks(5000, start=33_333)]
    assert np.array_equal(np.concatenate(pieces, 1), whole)
    assert np.array_equal(np.concatenate(late, 1), whole[:, 33_333:])


@pytest.mark.parametrize("ending", FFMPEG)
def test_what_ffmpeg_reads_is_the_song(files, song, ending):
    samples, rate = decode.decode(files[ending])
    assert rate == (48_000 if ending in ("webm", "opus.ogg") else RATE)
    expected = SAMPLES * rate / RATE
    if ending in ("alac.m4a", "mka"):
        assert np.array_equal(samples.T, song.astype(np.float32))
    elif ending == "aac.m4a":  # its header knows where the padding begins
        assert 0 <= SAMPLES - samples.shape[1] < RATE / 1000  # it counts milliseconds
    else:
        assert abs(samples.shape[1] - expected) < 0.1 * rate
    assert read_header(files[ending]).samples == samples.shape[1]
    part, _ = decode.decode(files[ending], 30_000, 500)
    assert np.array_equal(part, samples[:, 30_000:30_500])


def cut(path, share, tmp_path):
    """A copy of the first share of a file."""
    short = tmp_path / path.name
    content = path.read_bytes()
    short.write_bytes(content[: int(share * len(content))])
    return short


@pytest.mark.parametrize("share", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("ending", [*SNDFILE, "aac.m4a", "mka", "webm"])
def test_a_file_that_is_cut_off_is_never_read_as_a_shorter_one(files, tmp_path, ending, share):
    short = cut(files[ending], share, tmp_path)
    with pytest.raises(
        ValueError, match=r"song\.\S+ (is|holds) (truncated|damaged|not readable|no samples)"
    ):
        decode.decode(short)


@pytest.mark.parametrize("ending", ["wav", "24.wav", "x.wav", "rf64.wav", "w64", "aiff", "au"])
def test_both_lengths_are_named(files, tmp_path, ending):
    short = cut(files[ending], 0.5, tmp_path)
    with open_sound(short) as sound:
        there = sound.samples
        assert abs(sound.promised - SAMPLES) <= 4
        with pytest.raises(ValueError, match=f"{there} samples .* of the {sound.promised} "):
            sound.check()
    for call in (decode.decode, read_header):
        with pytest.raises(ValueError, match="truncated"):
            call(short)


def test_samples_before_the_damage_can_be_had(files, tmp_path):
    heard, short = [], cut(files["flac"], 0.5, tmp_path)
    with open_sound(short) as sound, pytest.raises(ValueError, match="damaged"):
        heard.extend(sound.blocks())
    assert sum(block.shape[1] for block in heard) > 0.4 * SAMPLES


@pytest.mark.parametrize("stated", [0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("riff", [0, None])
def test_a_recording_that_was_never_finished_is_read_to_its_end(files, tmp_path, stated, riff):
    content = bytearray(files["wav"].read_bytes())
    if riff is not None:
        content[4:8] = struct.pack("<I", riff)
    place = content.index(b"data") + 4
    content[place : place + 4] = struct.pack("<I", stated)
    (tmp_path / "recorded.wav").write_bytes(content)
    with open_sound(tmp_path / "recorded.wav") as sound:
        assert sound.samples == SAMPLES
        assert ("states no length" in sound.note) == (stated != 0xFFFFFFFF)  # as pipes write
        samples = sound.read()
    assert np.array_equal(samples, decode.decode(files["wav"])[0])
    if stated != 0xFFFFFFFF:
        with pytest.warns(UserWarning, match=r"recorded\.wav states no length"):
            decode.decode(tmp_path / "recorded.wav")


@pytest.mark.parametrize("ending", ["mp3", "ogg", "opus.ogg"])
def test_joined_files_are_read_to_the_last(files, tmp_path, ending):
    joined = tmp_path / f"joined.{ending}"
    joined.write_bytes(2 * files[ending].read_bytes())
    one, rate = decode.decode(files[ending])
    both, _ = decode.decode(joined)
    assert both.shape[1] == pytest.approx(2 * one.shape[1], abs=0.2 * rate)
    assert read_header(joined).samples == both.shape[1]


@pytest.mark.parametrize("ending", ["ogg", "opus.ogg", "mp3"])
def test_segments_near_the_end_are_where_they_should_be(files, ending):
    """libsndfile seeks amiss in the last pages of Ogg Vorbis."""
    whole, _ = decode.decode(files[ending])
    samples = whole.shape[1]
    for start in (samples - 20_000, samples - 3000, samples - 50):
        part, _ = decode.decode(files[ending], start, 300)
        assert np.array_equal(part, whole[:, start : start + 300])


def test_a_hole_in_an_ogg_file_is_noticed(files, tmp_path):
    content = files["ogg"].read_bytes()
    middle = len(content) // 2
    (tmp_path / "hole.ogg").write_bytes(content[:middle] + content[middle + 900 :])
    with pytest.raises(ValueError, match=r"hole\.ogg is damaged"):
        decode.decode(tmp_path / "hole.ogg")


def test_the_checksum_of_a_page_is_a_division_of_polynomials():
    page, rest = b"OggS" + bytes(range(40)), 0
    for byte in page[:22] + bytes(4) + page[26:]:
        rest ^= byte << 24
        for _ in range(8):
            rest = rest << 1 ^ (0x1_04C1_1DB7 if rest >> 31 else 0)
    assert headers.ogg_checksum(page) == rest


def test_a_flac_stream_without_a_length_is_read_to_its_end(files, song, tmp_path):
    content = bytearray(files["flac"].read_bytes())
    content[21] &= 0xF0  # the 36 bits of the count in the first block
    content[22:26] = bytes(4)
    (tmp_path / "stream.flac").write_bytes(content)
    with pytest.warns(UserWarning, match=r"stream\.flac states no length"):
        samples, _ = decode.decode(tmp_path / "stream.flac")
    assert np.array_equal(samples.T, song.astype(np.float32))


def test_a_tag_before_a_wav_file_costs_no_samples(files, song, tmp_path):
    tag = b"ID3\x03\x00\x00\x00\x00\x00\x14" + bytes(20)
    (tmp_path / "tagged.wav").write_bytes(tag + files["wav"].read_bytes())
    samples, _ = decode.decode(tmp_path / "tagged.wav")
    assert np.array_equal(samples.T, song.astype(np.float32))


def test_a_size_that_32_bits_cannot_hold_is_refused(tmp_path):
    path, samples = tmp_path / "long.wav", 2**30 + 441_000
    soundfile.write(path, np.zeros((9, 2)), RATE)
    with path.open("r+b") as file:  # sparse: it takes no disk
        file.truncate(44 + 4 * samples)
        file.seek(40)
        file.write(struct.pack("<I", 4 * samples % 2**32))
    with pytest.raises(ValueError, match=r"long\.wav is longer than a WAV header can say"):
        read_header(path)


def test_a_picture_may_last_longer_than_the_sound(files, tmp_path):
    source = ["-f", "lavfi", "-i", "color=size=16x16:rate=5:duration=4", "-i", files["wav"]]
    for ending, codecs in (("mkv", ["-c:a", "flac"]), ("mp4", ["-c:a", "alac"])):
        film = tmp_path / f"film.{ending}"
        command = ["ffmpeg", "-v", "error", *source, "-c:v", "mpeg4", *codecs, film]
        subprocess.run(command, check=True)
        assert np.array_equal(decode.decode(film)[0], decode.decode(files["wav"])[0])


def test_names_of_other_bytes_and_long_paths_are_read(files, tmp_path):
    deep = tmp_path.joinpath(*["d" * 100] * 12)
    deep.mkdir(parents=True)
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    for name in ("wav", "alac.m4a"):
        for path in (latin.with_name(f"{latin.name}.{name}"), deep / f"song.{name}"):
            path.write_bytes(files[name].read_bytes())
            assert read_header(path) == (RATE, 2, SAMPLES)


def test_without_ffmpeg_the_error_says_what_to_install(files, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(ValueError, match=r"alac\.m4a is not readable .*tfswa-lab\[ffmpeg\]"):
        decode.decode(files["alac.m4a"])


def test_what_is_no_sound_is_named(tmp_path):
    (tmp_path / "b.flac").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"a\.wav: no such audio file; .*b\.flac"):
        decode.decode(tmp_path / "a.wav")
    with pytest.raises(IsADirectoryError, match="is a folder; name a sound file"):
        decode.decode(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(ValueError, match=r"picture\.png is not readable as audio"):
        decode.decode(tmp_path / "picture.png")
