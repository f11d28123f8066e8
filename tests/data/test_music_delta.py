"""The Music Delta tree, made from a synthetic clone of MDB Drums."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "data_scripts" / "get_music_delta.py"
STEMS = ("vocals", "drums", "bass", "other")
BAND = ("drum set", "electric bass", "clean electric guitar", "male singer", "synthesizer")

spec = importlib.util.spec_from_file_location("get_music_delta", SCRIPT)
music_delta = importlib.util.module_from_spec(spec)
spec.loader.exec_module(music_delta)


def add_song(clone: Path, name: str, instruments=BAND, peak=3000, channels=2, frames=500) -> Path:
    """A song as the repository has it: metadata, stereo stems and mono raw tracks."""
    title = f"MusicDelta_{name}"
    song = clone / "MDB Drums" / "audio" / "multi-tracks" / title
    about = {"stem_dir": f"{title}_STEMS", "raw_dir": f"{title}_RAW", "stems": {}}
    for folder in (about["stem_dir"], about["raw_dir"]):
        (song / folder).mkdir(parents=True)
    rng = np.random.default_rng(len(name))
    for number, instrument in enumerate(instruments, 1):
        stem, raw = f"{title}_STEM_{number:02}.wav", f"{title}_RAW_{number:02}_01.wav"
        track = {"filename": raw, "instrument": instrument}
        about["stems"][f"S{number:02}"] = {
            "component": "",
            "filename": stem,
            "instrument": instrument,
            "raw": {"R01": track},
        }
        for path, width in ((f"{title}_STEMS/{stem}", channels), (f"{title}_RAW/{raw}", 1)):
            sound = rng.integers(-peak, peak, (frames, width), endpoint=True).astype(np.int16)
            soundfile.write(song / path, sound, 44_100, "PCM_16")
    (song / f"{title}_METADATA.yaml").write_text(yaml.safe_dump(about))
    return song


def make(clone: Path, dest: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, clone, dest]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def read(path: Path) -> np.ndarray:
    sound, rate = soundfile.read(path, dtype="int16", always_2d=True)
    assert (rate, soundfile.info(path).subtype, sound.shape[1]) == (44_100, "PCM_16", 2)
    return sound.astype(int)


def assert_mixture_is_sum(song: Path) -> None:
    assert {path.stem for path in song.iterdir()} == {"mixture", *STEMS}
    np.testing.assert_array_equal(
        sum(read(song / f"{stem}.wav") for stem in STEMS), read(song / "mixture.wav")
    )


@pytest.mark.parametrize(
    ("instrument", "stem"),
    [
        ("male singer", "vocals"),
        ("female rapper", "vocals"),
        ("vocalists", "vocals"),
        ("drum set", "drums"),
        ("bass drum", "drums"),
        ("tambourine", "drums"),
        ("electric bass", "bass"),
        ("double bass", "bass"),
        ("bass clarinet", "other"),
        ("distorted electric guitar", "other"),
        ("vibraphone", "other"),
        ("Unlabeled", "other"),
    ],
)
def test_grouping(instrument, stem):
    assert music_delta.stem_of(instrument) == stem


def test_command_makes_the_tree_and_lists_what_it_cannot_make(tmp_path):
    clone = tmp_path / "clone"
    rock = add_song(clone, "Rock")
    grunge = add_song(clone, "Grunge", BAND[:3])
    (grunge / "MusicDelta_Grunge_STEMS" / "MusicDelta_Grunge_STEM_02.wav").unlink()
    (clone / "MDB Drums" / "audio" / "multi-tracks" / "MusicDelta_Gospel").mkdir()
    run = make(clone, tmp_path / "out" / "delta")
    assert run.returncode == 0, run.stderr
    assert "CC BY-NC-SA 4.0" in run.stdout
    assert "Rock: train, from 5 files of STEMS\n" in run.stdout
    assert "Grunge: test, from 3 files of RAW\n" in run.stdout
    assert "2 of 3 songs" in run.stdout
    assert "MusicDelta_Gospel cannot be made: " in run.stderr
    assert "MusicDelta_Gospel_METADATA.yaml" in run.stderr

    made = tmp_path / "out" / "delta"
    assert sorted(path.name for path in made.parent.iterdir()) == ["delta"]
    stems = {
        number: read(rock / "MusicDelta_Rock_STEMS" / f"MusicDelta_Rock_STEM_{number:02}.wav")
        for number in range(1, 6)
    }
    song = made / "train" / "Music Delta - Rock"
    expected = {
        "drums": stems[1],
        "bass": stems[2],
        "other": stems[3] + stems[5],
        "vocals": stems[4],
    }
    for stem, sound in expected.items():
        np.testing.assert_array_equal(read(song / f"{stem}.wav"), sound)
    assert_mixture_is_sum(song)

    song = made / "test" / "Music Delta - Grunge"
    assert_mixture_is_sum(song)
    assert not read(song / "vocals.wav").any()  # an instrumental: silent, not absent
    raw, _ = soundfile.read(
        grunge / "MusicDelta_Grunge_RAW" / "MusicDelta_Grunge_RAW_02_01.wav", dtype="int16"
    )
    np.testing.assert_array_equal(read(song / "bass.wav"), np.stack([raw, raw], axis=1))


def test_loud_stems_get_one_common_gain(tmp_path):
    song = add_song(tmp_path, "Punk", peak=32_767)
    line = music_delta.write_song(song, folders(tmp_path / "out"))
    files = music_delta.sources(song)
    made = tmp_path / "out" / "train" / "Music Delta - Punk"
    assert_mixture_is_sum(made)
    assert 32_760 <= np.abs(read(made / "mixture.wav")).max() <= 32_767
    before = {stem: sum(read(file) for file in files if files[file] == stem) for stem in STEMS}
    gain = 32_765 / np.abs(sum(before.values())).max()
    assert f"would clip: all stems scaled by {20 * np.log10(gain):.1f} dB" in line
    for stem in STEMS:
        assert np.abs(read(made / f"{stem}.wav") - gain * before[stem]).max() <= 0.5 + 1e-9


def test_full_scale_without_clipping_is_left_alone(tmp_path):
    song = add_song(tmp_path, "Punk", ("electric bass",))
    path = next(song.glob("*_STEMS/*.wav"))
    sound = np.full((100, 2), -32_768, np.int16)
    sound[50:] = 32_767
    soundfile.write(path, sound, 44_100, "PCM_16")
    line = music_delta.write_song(song, folders(tmp_path / "out"))
    made = tmp_path / "out" / "train" / "Music Delta - Punk"
    np.testing.assert_array_equal(read(made / "mixture.wav"), sound)
    assert "scaled" not in line


def test_a_short_stem_is_filled_with_silence_and_reported(tmp_path):
    song = add_song(tmp_path, "Punk", channels=1)
    path = song / "MusicDelta_Punk_STEMS" / "MusicDelta_Punk_STEM_02.wav"
    short = read_mono(path)[:-30]
    soundfile.write(path, short, 44_100, "PCM_16")
    line = music_delta.write_song(song, folders(tmp_path / "out"))
    assert "MusicDelta_Punk_STEM_02.wav ends 30 samples early: silence added" in line
    bass = read(tmp_path / "out" / "train" / "Music Delta - Punk" / "bass.wav")
    np.testing.assert_array_equal(bass[:-30, 0], short)
    assert not bass[-30:].any()


def read_mono(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0]


def folders(root: Path) -> Path:
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("rate", "subtype", "channels", "frames"),
    [
        (48_000, "PCM_16", 2, 100),
        (44_100, "PCM_24", 2, 100),
        (44_100, "PCM_16", 3, 100),
        (44_100, "PCM_16", 1, 0),
    ],
)
def test_other_audio_is_refused(tmp_path, rate, subtype, channels, frames):
    path = tmp_path / "x.wav"
    soundfile.write(path, np.zeros((frames, channels)), rate, subtype)
    with pytest.raises(ValueError, match=f"{frames} samples in {channels} channels, {rate} Hz"):
        music_delta.read_stereo(path)


def test_nonsense_is_refused(tmp_path):
    path = tmp_path / "x.wav"
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"x\.wav is not readable as audio"):
        music_delta.read_stereo(path)
    song = add_song(tmp_path, "Punk")
    metadata = song / "MusicDelta_Punk_METADATA.yaml"
    text = metadata.read_text()
    for broken in ("", "a: [", text.replace("stem_dir", "stems_dir"), "stems: 3"):
        metadata.write_text(broken)
        with pytest.raises(ValueError, match="is not MedleyDB metadata"):
            music_delta.sources(song)
    metadata.write_text(text)
    for kind in ("STEM_02", "RAW_03_01"):
        next(song.rglob(f"*{kind}.wav")).unlink()
    with pytest.raises(FileNotFoundError, match=r"no MusicDelta_Punk_RAW_03.*_STEM_02\.wav"):
        music_delta.sources(song)


def test_command_fails_when_nothing_can_be_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a clone of"):
        music_delta.main(tmp_path, tmp_path / "out")
    (tmp_path / "MDB Drums" / "audio" / "multi-tracks" / "MusicDelta_Gospel").mkdir(parents=True)
    run = make(tmp_path, tmp_path / "out")
    assert run.returncode == 1
    assert "none of the 1 songs" in run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MDB Drums"]
