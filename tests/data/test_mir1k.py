"""MIR1K on a synthetic original layout, and real labels against measurements on the voice."""

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from tfswa_lab.data.mir1k import HOP, MIR1K, RATE

NAMES = ("abjones_1_01", "amy_2_03", "Ani_1_02", "Kenshin_3_11")


@pytest.fixture(params=["vocal-nonvocalLabel", "vocal-nonvocal label"])
def original(tmp_path, request):
    """The layout of the authors' archive: 4 clips of 10 000 to 10 300 samples."""
    vocal_folder = tmp_path / request.param
    for folder in (tmp_path / "Wavfile", tmp_path / "PitchLabel", vocal_folder):
        folder.mkdir()
    generator = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        samples = generator.integers(-9000, 9000, (10_000 + 100 * number, 2)).astype(np.int16)
        soundfile.write(tmp_path / "Wavfile" / f"{name}.wav", samples, RATE)
        frames = len(samples) // HOP - 1
        pitch = "".join(f"{40 + frame / 4 if frame % 5 else 0:g} \n" for frame in range(frames))
        vocal = "".join(f"{int(frame % 5 > 0)} \n" for frame in range(frames))
        (tmp_path / "PitchLabel" / f"{name}.pv").write_text(pitch)
        (vocal_folder / f"{name}.vocal").write_text(vocal)
    return tmp_path


def test_whole_clips_of_the_original_layout(original):
    dataset = MIR1K(original)
    assert [item["clip"] for item in dataset] == sorted(NAMES)
    for item in dataset:
        samples, _ = soundfile.read(original / "Wavfile" / f"{item['clip']}.wav", dtype="int16")
        left, right = torch.from_numpy(samples.T.astype(np.float32) / 32768)
        assert torch.equal(item["accompaniment"], left[None])
        assert torch.equal(item["voice"], right[None])
        assert torch.equal(item["mixture"], (left + right)[None])
        frame = torch.arange(len(samples) // HOP - 1)
        assert torch.equal(item["f0_midi"], torch.where(frame % 5 > 0, 40 + frame / 4, 0.0))
        assert torch.equal(item["vocal"], frame % 5 > 0)


def test_the_singer_decides_about_the_split(original):
    assert [clip.name for clip in MIR1K(original, "train").clips] == ["abjones_1_01", "amy_2_03"]
    assert [clip.name for clip in MIR1K(original, "test").clips] == ["Ani_1_02", "Kenshin_3_11"]


@pytest.mark.parametrize("seconds", [0.1, 0.11])
def test_segments_cover_the_clip_and_keep_its_labels_in_place(original, seconds):
    wholes = {item["clip"]: item for item in MIR1K(original)}
    last_seen = {}
    for item in MIR1K(original, segment_seconds=seconds):
        whole = wholes[item["clip"]]
        start = round(item["start_seconds"] * RATE)
        assert start % HOP == 0
        assert start <= last_seen.get(item["clip"], 0)  # no gap
        last_seen[item["clip"]] = start + round(seconds * RATE)
        for key, first, length in (
            ("mixture", start, round(seconds * RATE)),
            ("voice", start, round(seconds * RATE)),
            ("f0_midi", start // HOP, 4),  # 40 ms windows in 100 or 110 ms
            ("vocal", start // HOP, 4),
        ):
            expected = whole[key][..., first : first + length]
            there = expected.shape[-1]
            assert item[key].shape[-1] == length
            assert torch.equal(item[key][..., :there], expected)
            assert not item[key][..., there:].any()
    assert all(last_seen[name] >= wholes[name]["mixture"].shape[-1] for name in wholes)


def test_segments_stack_with_torchs_own_collate(original):
    batch = next(iter(DataLoader(MIR1K(original, segment_seconds=0.2), batch_size=5)))
    assert batch["mixture"].shape == (5, 1, 3200)
    assert batch["f0_midi"].shape == batch["vocal"].shape == (5, 9)


def test_bad_input_is_named(original, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        MIR1K(original, "valid")
    with pytest.raises(ValueError, match=r"segment_seconds=0\.01"):
        MIR1K(original, segment_seconds=0.01)
    with pytest.raises(IndexError, match="item 4 of a data set of 4"):
        MIR1K(original)[4]
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        MIR1K(original / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds neither Wavfile"):
        MIR1K(original / "PitchLabel")
    pitch = original / "PitchLabel" / "Ani_1_02.pv"
    content = pitch.read_text()
    pitch.write_text(content + "0 \n")
    with pytest.raises(ValueError, match=r"Ani_1_02\.pv holds 31 labels, .* needs 30"):
        MIR1K(original)[0]
    pitch.write_text(content.replace("40.5", "4O.5"))
    with pytest.raises(ValueError, match=r"Ani_1_02\.pv is no list of numbers .*4O\.5"):
        MIR1K(original)[0]
    pitch.unlink()
    with pytest.raises(FileNotFoundError, match=r"Ani_1_02\.pv is missing"):
        MIR1K(original)


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros(9999), RATE, r"1 channel\(s\) at 16000 Hz"),
        (np.zeros((9999, 2)), 44100, r"2 channel\(s\) at 44100 Hz"),
        (np.zeros((0, 2)), RATE, "holds no samples"),
    ],
)
def test_a_broken_clip_is_named(original, samples, rate, message):
    soundfile.write(original / "Wavfile" / "amy_2_03.wav", samples, rate)
    with pytest.raises(ValueError, match=rf"amy_2_03\.wav.*{message}"):
        MIR1K(original)


# --- real singing ---------------------------------------------------------------------------


@pytest.mark.audio
def test_the_real_clips_are_all_there(audio_root):
    train, test = MIR1K(audio_root / "mir1k", "train"), MIR1K(audio_root / "mir1k", "test")
    assert (len(train), len(test)) == (175, 201)
    assert {clip.path.parent.name for clip in train.clips} == {"train"}
    assert {clip.path.parent.name for clip in test.clips} == {"test"}


def windows(item):
    """The 40 ms of voice around each label, `(frames, 640)`."""
    return item["voice"][0].unfold(0, 2 * HOP, HOP)


@pytest.mark.audio
def test_the_voice_is_loud_where_the_labels_say_so(audio_root):
    dataset = MIR1K(audio_root / "mir1k")
    for index in range(0, len(dataset), 75):
        item = dataset[index]
        energy = windows(item).square().mean(-1)
        assert len(energy) == len(item["vocal"])
        ratio = energy[item["vocal"]].median() / energy[~item["vocal"]].median()
        assert ratio > 10, item["clip"]


def autocorrelation_pitch(frames):
    """MIDI pitch of each 40 ms frame: the strongest lag of 80 to 800 Hz."""
    spectrum = torch.fft.rfft(frames - frames.mean(-1, keepdim=True), 2 * frames.shape[-1])
    correlation = torch.fft.irfft(spectrum.abs() ** 2)[:, : frames.shape[-1]]
    correlation = correlation / torch.arange(frames.shape[-1], 0, -1)  # unbiased
    low, high = RATE // 800, RATE // 80
    best = correlation[:, low : high + 1].max(-1).values
    # Double periods score alike: take the shortest lag that is nearly as good and a local peak.
    middle = correlation[:, low : high + 1]
    peak = (middle >= correlation[:, low - 1 : high]) & (
        middle >= correlation[:, low + 1 : high + 2]
    )
    lag = low + (peak & (middle > 0.85 * best[:, None])).int().argmax(-1)
    return 69 + 12 * torch.log2(RATE / lag / 440)


@pytest.mark.audio
def test_the_pitch_labels_agree_with_autocorrelation(audio_root):
    dataset = MIR1K(audio_root / "mir1k")
    agreement = {-2: [], 0: [], 2: []}
    for index in range(0, len(dataset), 75):
        item = dataset[index]
        pitch = autocorrelation_pitch(windows(item))
        for shift, within in agreement.items():
            label = item["f0_midi"].roll(shift)
            within.append(((pitch - label).abs() < 0.5)[label > 0])
    share = {shift: torch.cat(within).float().mean() for shift, within in agreement.items()}
    assert share[0] > 0.95
    # Labels that are 40 ms early or late fit worse: the grid is right.
    assert share[0] > max(share[-2], share[2]) + 0.15
