"""The embedded band against pitch trackers, onset detectors, integer sums and musdb."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from scipy.signal import butter, sosfilt

from tfswa_lab.data.band import band_root as default_root
from tfswa_lab.data.band import ensure_band, make_band, render_song, write
from tfswa_lab.data.band.instruments import draw_bass, draw_guitar, pluck
from tfswa_lab.data.band.score import Note
from tfswa_lab.data.band.song import song_name
from tfswa_lab.data.band.sound import frequency, shape

CHECKOUT = Path(__file__).resolve().parents[2]
RATE = 44_100
STEMS = ("vocals", "drums", "bass", "other")


@pytest.fixture(scope="module")
def songs(band_root):
    """Every song of the band: folder, annotations and int16 samples `(s, 2)` by name."""
    return [
        (
            folder,
            json.loads((folder / "annotations.json").read_text()),
            {
                name: soundfile.read(folder / f"{name}.wav", dtype="int16")[0]
                for name in (*STEMS, "mixture")
            },
        )
        for folder in sorted(band_root.glob("*/*/"))
    ]


def mono(samples):
    return samples.mean(axis=1) / 32768


def rms_db(samples):
    return 10 * np.log10(np.square(samples / 32768).mean())


def cents(hertz, reference):
    return 1200 * np.log2(hertz / reference)


def spectral_peak(sound, near_hertz):
    """The frequency of the highest peak within a semitone, by a zero-padded FFT."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 1 << 18))
    hertz = np.fft.rfftfreq(1 << 18, 1 / RATE)
    inside = np.flatnonzero(np.abs(cents(np.maximum(hertz, 1), near_hertz)) < 100)
    return hertz[inside[spectrum[inside].argmax()]]


# --- exact integers, whole files ------------------------------------------------------------


def test_the_mixture_is_the_exact_integer_sum_of_the_stems(songs):
    for folder, _, sounds in songs:
        total = sum(sounds[stem].astype(np.int64) for stem in STEMS)
        assert np.array_equal(total, sounds["mixture"]), folder.name
        assert sounds["mixture"].shape == (12 * RATE, 2)


def test_two_runs_are_byte_identical_however_many_processes_share_the_work(tmp_path):
    one = make_band(tmp_path / "one", 4.3, [2, 5], [101], workers=1)
    two = make_band(tmp_path / "two", 4.3, [2, 5], [101], workers=2)
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    assert len(files) == 3 * 6 + 1
    assert sorted(files) == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_files_equal_the_song_rendered_in_this_process(songs):
    folder, annotations, sounds = songs[0]
    seed = next(seed for seed in write.TEST_SEEDS if song_name(seed) == folder.name)
    song = render_song(seed)
    assert song.annotations == annotations
    for stem in STEMS:
        assert np.array_equal(song.stems[stem], sounds[stem])


def test_musdb_reads_twelve_and_six_tracks(band_root, musdb):
    for subset, count in (("train", 12), ("test", 6)):
        tracks = musdb.DB(root=str(band_root), is_wav=True, subsets=subset).tracks
        assert len(tracks) == len({track.artist for track in tracks}) == count
        assert tracks[0].rate == RATE
        stems = tracks[0].stems
        np.testing.assert_allclose(stems[0], stems[1:].sum(axis=0), atol=1e-9)


# --- it sounds like music -------------------------------------------------------------------


def test_the_annotated_f0_is_what_a_pitch_tracker_hears(songs):
    for folder, annotations, sounds in songs[::3]:
        f0 = np.array(annotations["f0"])
        hop = round(annotations["f0_hop_seconds"] * RATE)
        heard = librosa.yin(mono(sounds["vocals"]), fmin=60, fmax=900, sr=RATE, hop_length=hop)
        voiced = f0 > 0
        error = np.abs(cents(heard[: len(f0)][voiced], f0[voiced]))
        assert np.median(error) < 15, folder.name
        assert np.mean(error < 50) > 0.9, folder.name


def test_the_voice_has_vibrato_and_follows_its_notes(songs):
    for folder, annotations, _ in songs:
        f0, hop = np.array(annotations["f0"]), annotations["f0_hop_seconds"]
        rates = []
        for note in annotations["notes"]["vocals"]:
            frames = f0[round((note["start"] + 0.1) / hop) : round((note["end"] - 0.12) / hop)]
            assert len(frames) == 0 or frames.min() > 0
            off = cents(frames, frequency(note["pitch"]))
            assert np.abs(off).max(initial=0) < 130, folder.name
            if len(off) > 60:
                crossings = np.count_nonzero(np.diff(np.sign(off - off.mean())))
                rates.append(crossings / 2 / (len(off) * hop))
        assert not rates or 4 < np.median(rates) < 7, folder.name


def test_a_third_of_the_time_nobody_sings(songs):
    for folder, annotations, sounds in songs:
        assert np.mean(np.array(annotations["f0"]) == 0) > 1 / 3, folder.name
        frames = np.square(mono(sounds["vocals"])).reshape(-1, 882).mean(axis=1)
        quiet = frames < 1e-3 * frames.max()
        assert 0.15 < quiet.mean() < 0.6, folder.name


def test_vowels_differ_as_formants_say(songs):
    """`ee` has its second formant where `oo` has nothing."""
    bands = {"ee": [], "oo": []}
    for _, annotations, sounds in songs:
        voice = mono(sounds["vocals"])
        for s in annotations["syllables"]:
            if s["vowel"] in bands:
                sound = voice[int(s["vowel_start"] * RATE) : int(s["end"] * RATE)]
                power = np.abs(np.fft.rfft(sound)) ** 2
                hertz = np.fft.rfftfreq(len(sound), 1 / RATE)
                ratio = power[(hertz > 1900) & (hertz < 3500)].sum() / power.sum()
                bands[s["vowel"]].append(10 * np.log10(ratio))
    assert min(map(len, bands.values())) > 20
    assert np.median(bands["ee"]) > np.median(bands["oo"]) + 10


def test_voiceless_consonants_are_audible_and_have_no_pitch(songs):
    for folder, annotations, sounds in songs:
        voice, f0 = mono(sounds["vocals"]), np.array(annotations["f0"])
        for s in annotations["syllables"]:
            assert s["text"] == s["consonant"] + s["vowel"]
            assert s["start"] < s["vowel_start"] < s["end"]
            if s["consonant"] in "sfh":
                start, end = (int(s[key] * RATE) for key in ("start", "vowel_start"))
                assert rms_db(32768 * voice[start:end]) > -50, folder.name
                assert not f0[int(s["start"] * 100) + 1 : int(s["vowel_start"] * 100)].any()


@pytest.mark.parametrize("draw", [draw_bass, draw_guitar])
def test_strings_are_in_tune_within_five_cents(draw):
    rng = np.random.default_rng(0)
    for pitch in range(28, 80):
        sound = pluck(rng, Note(0.0, 1.0, pitch), draw(rng))
        assert abs(cents(spectral_peak(sound, frequency(pitch)), frequency(pitch))) < 5, pitch


def test_the_bass_plays_its_annotated_notes(songs):
    for folder, annotations, sounds in songs:
        bass, errors = mono(sounds["bass"]), []
        for note in annotations["notes"]["bass"]:
            sound = bass[int(note["start"] * RATE) + 500 : int(note["end"] * RATE) - 1500]
            if len(sound) > 6000:
                errors.append(
                    cents(spectral_peak(sound, frequency(note["pitch"])), frequency(note["pitch"]))
                )
        assert np.abs(errors).max(initial=0) < 15, folder.name


def test_the_accompaniment_plays_its_annotated_chords(songs):
    names = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
    for folder, annotations, sounds in songs[::3]:
        chroma = librosa.feature.chroma_cqt(y=mono(sounds["other"]), sr=RATE, norm=None, tuning=0)
        heard = []
        for chord in annotations["chords"]:
            root, quality = chord["label"].split(":")
            third = 4 if quality == "maj" else 3
            tones = [(names.index(root) + step) % 12 for step in (0, third, 7)]
            start, end = (round(chord[key] * RATE / 512) for key in ("start", "end"))
            profile = chroma[:, start + 10 : end].sum(axis=1)
            if end - start > 40:
                heard.append(profile[tones].sum() / profile.sum())
        assert np.min(heard) > 0.5, folder.name  # three of twelve classes: chance is 0.25


def test_drum_onsets_fall_on_annotated_hits_and_on_downbeats(songs):
    for folder, annotations, sounds in songs[::3]:
        onsets = librosa.onset.onset_detect(
            y=mono(sounds["drums"]), sr=RATE, hop_length=128, units="time", delta=0.1
        )
        hits = np.array([note["start"] for note in annotations["notes"]["drums"]])
        assert len(onsets) > 15, folder.name
        distance = np.abs(onsets[:, None] - hits).min(axis=1)
        assert np.mean(distance < 0.03) > 0.95, folder.name
        downbeats = [time for time in annotations["downbeats"] if time < 11.8]
        off_beat = np.abs(np.subtract.outer(downbeats, onsets)).min(axis=1)
        assert np.mean(off_beat < 0.03) > 0.75, folder.name  # the detector skips one after a fill
        assert downbeats == annotations["beats"][::4][: len(downbeats)]
        beat_seconds = np.diff(annotations["beats"])
        np.testing.assert_allclose(beat_seconds, 60 / annotations["tempo"], atol=2e-6)


# --- it is clean ----------------------------------------------------------------------------


def test_nothing_clips_and_nothing_has_dc(songs):
    for folder, _, sounds in songs:
        # Not even if every stem peaked with the same sign.
        worst = sum(np.abs(sounds[stem].astype(int)) for stem in STEMS).max()
        assert worst < 0.91 * 32767, folder.name
        for name, sound in sounds.items():
            assert np.abs(sound.mean(axis=0)).max() < 1, (folder.name, name)


def test_levels_are_balanced(songs):
    for folder, _, sounds in songs:
        levels = {stem: rms_db(sounds[stem]) for stem in STEMS}
        assert max(levels.values()) - min(levels.values()) < 10, folder.name
        assert levels["vocals"] > max(levels.values()) - 2, folder.name
        assert -22 < rms_db(sounds["mixture"]) < -12, folder.name


def highest_click_db(samples):
    """The peak above 15 kHz, where only a discontinuity can be, against the peak of the sound."""
    sound = mono(samples)
    above = sosfilt(butter(8, 15_000, "highpass", fs=RATE, output="sos"), sound)
    return 20 * np.log10(np.abs(above).max() / np.abs(sound).max())


def test_only_drums_and_consonants_jump(songs):
    for folder, annotations, sounds in songs:
        for stem in ("bass", "other"):
            jump = np.abs(np.diff(sounds[stem].astype(int), axis=0)).max()
            assert jump < 0.45 * np.abs(sounds[stem].astype(int)).max(), (folder.name, stem)
        assert highest_click_db(sounds["bass"]) < -70, folder.name
        assert highest_click_db(sounds["other"]) < -40, folder.name  # a bright pick
        for sound in sounds.values():
            assert np.abs(sound[[0, -1]].astype(int)).max() < 50, folder.name
        voice = mono(sounds["vocals"])
        for s in annotations["syllables"]:
            vowel = voice[int((s["vowel_start"] + 0.03) * RATE) : int(s["end"] * RATE)]
            assert np.abs(np.diff(vowel)).max() < 0.35 * np.abs(voice).max(), folder.name


def test_the_click_detector_detects_a_note_that_is_cut_off(songs):
    _, annotations, sounds = songs[0]
    cut = sounds["bass"].copy()
    start = int(annotations["notes"]["bass"][2]["start"] * RATE) + 2000
    loudest = start + np.abs(mono(cut)[start : start + 3000]).argmax()
    cut[loudest : loudest + 2000] = 0
    assert highest_click_db(cut) > -35


def test_shape_starts_and_ends_at_silence():
    shaped = shape(np.ones(1000), 0.005, 0.01)
    assert shaped[0] == 0
    assert shaped[-1] < 1e-6
    assert shaped[300:500].tolist() == [1.0] * 200
    assert np.abs(np.diff(shaped)).max() < 0.01


def test_it_is_real_stereo_with_the_bass_in_the_middle(songs):
    for folder, _, sounds in songs:
        likeness = {stem: np.corrcoef(sounds[stem].T.astype(float))[0, 1] for stem in STEMS}
        assert likeness["bass"] > 0.98, folder.name
        assert max(likeness[stem] for stem in ("vocals", "other")) < 0.97, folder.name
        assert likeness["drums"] < 0.999, folder.name


def test_songs_differ(songs):
    tempos = [annotations["tempo"] for _, annotations, _ in songs]
    assert min(tempos) >= 80
    assert max(tempos) <= 140
    assert len(set(tempos)) >= 10
    assert len({annotations["key"] for _, annotations, _ in songs}) >= 8
    for subset in ("train", "test"):
        medians = [
            np.median([note["pitch"] for note in annotations["notes"]["vocals"]])
            for folder, annotations, _ in songs
            if folder.parent.name == subset
        ]
        assert min(medians) < 54 < 62 < max(medians)


# --- whole, current, or not there -----------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """Make the full band tiny."""
    monkeypatch.setattr(write, "SECONDS", 4.0)
    monkeypatch.setattr(write, "TRAIN_SEEDS", (0,))
    monkeypatch.setattr(write, "TEST_SEEDS", (100,))


def test_a_current_band_is_left_alone_and_another_versions_is_remade(tmp_path, tiny):
    root = ensure_band(tmp_path / "band")
    inode = root.stat().st_ino
    assert ensure_band(root) == root
    assert root.stat().st_ino == inode
    recipe = json.loads((root / "band.json").read_text())
    (root / "band.json").write_text(json.dumps(recipe | {"generator": "older"}))
    (root / "train" / "left over").mkdir()
    ensure_band(root)
    assert json.loads((root / "band.json").read_text()) == recipe
    assert not (root / "train" / "left over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["band"]


def test_an_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch):
    root = tmp_path / "band"
    write_song = write._write_song

    def interrupted(subset, seed, seconds):
        if seed == 100:
            raise KeyboardInterrupt
        write_song(subset, seed, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_song", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_band(root, 4.0, [0], [100], workers=1)
    assert list(tmp_path.iterdir()) == []

    make_band(root, 4.0, [0], [101], workers=1)
    before = sorted(root.rglob("*"))
    monkeypatch.setattr(write, "_write_song", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_band(root, 4.0, [1], [100], workers=1)
    assert sorted(root.rglob("*")) == before
    assert list(tmp_path.iterdir()) == [root]


def test_two_processes_at_once_make_one_whole_band(tmp_path):
    script = (
        "from tfswa_lab.data.band import write; import sys;"
        "write.SECONDS, write.TRAIN_SEEDS, write.TEST_SEEDS = 4.0, (0,), (100,);"
        "write.ensure_band(sys.argv[1], workers=1)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "band")]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["band"]
    assert len(list((tmp_path / "band").glob("*/*/*.wav"))) == 10


def test_a_folder_with_something_else_in_it_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    for make in (ensure_band, make_band):
        with pytest.raises(FileExistsError, match=r"not a band .* name a new folder"):
            make(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


def test_a_song_too_short_for_a_phrase_is_refused():
    with pytest.raises(ValueError, match=r"seconds=1\.5: a song needs at least 4 s"):
        render_song(0, 1.5)


def test_the_default_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFSWA_LAB_DATA", str(tmp_path))
    assert default_root() == tmp_path / "band"
    monkeypatch.delenv("TFSWA_LAB_DATA")
    assert default_root() == CHECKOUT / "data" / "band"


def test_importing_the_band_imports_no_torch():
    code = "import sys, tfswa_lab.data.band; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_script_makes_a_band_where_it_is_told(tmp_path, capsys):
    script = runpy.run_path(str(CHECKOUT / "data_scripts" / "make_band.py"))
    script["main"](tmp_path / "band", train=1, test=1, seconds=4.0)
    assert "band: 1 + 1 songs of 4 s" in capsys.readouterr().out
    assert len(list((tmp_path / "band").glob("*/*/annotations.json"))) == 2
