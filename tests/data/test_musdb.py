"""MUSDB18Dataset against soundfile, musdb, integer sums and whole-track resampling."""

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from tfswa_lab.audio import resample
from tfswa_lab.data.musdb import MUSDB18Dataset, stem_parts

STEMS = ("vocals", "drums", "bass", "other")
RATE = 8000


def integers(folder, source):
    """The samples as soundfile's own integers, `(2, s)`."""
    samples, _ = soundfile.read(folder / f"{source}.wav", dtype="int16")
    return torch.from_numpy(samples.T.astype(np.int32))


def as_integers(waveform):
    return (waveform * 32768).to(torch.int32)


# --- what is read ---------------------------------------------------------------------------


def test_a_random_segment_is_bit_identical_to_musdbs_own(tree, musdb):
    dataset = MUSDB18Dataset(tree, segment_seconds=0.3, valid_fraction=0, seed=3)
    tracks = {track.name: track for track in musdb.DB(root=str(tree), is_wav=True)}
    for item in (dataset[index] for index in range(3)):
        track = tracks[item["track"]]
        track.chunk_start, track.chunk_duration = item["start_seconds"], 0.3
        peer = torch.from_numpy(track.stems).float().transpose(1, 2)  # mixture first, then:
        order = ["mixture", "drums", "bass", "other", "vocals"]
        torch.testing.assert_close(item["mixture"], peer[0], rtol=0, atol=0)
        expected = peer[[order.index(stem) for stem in STEMS]]
        torch.testing.assert_close(item["stems"], expected, rtol=0, atol=0)


def test_whole_tracks_equal_soundfile_in_the_order_asked_for(tree):
    order = ["bass", "other", "vocals", "drums"]
    dataset = MUSDB18Dataset(tree, "test", order, segment_seconds=None)
    assert dataset.track_names == ["Hiss - 0", "Hiss - 1"]
    for item in dataset:
        folder = tree / "test" / item["track"]
        assert torch.equal(as_integers(item["mixture"]), integers(folder, "mixture"))
        for stem, waveform in zip(order, item["stems"], strict=True):
            assert torch.equal(as_integers(waveform), integers(folder, stem))


@pytest.mark.parametrize(
    ("target_stems", "other_is"),
    [
        (["vocals", "other"], ["drums", "bass", "other"]),
        (["other", "drums", "vocals"], ["bass", "other"]),
        (["other"], ["vocals", "drums", "bass", "other"]),
        (list(STEMS), ["other"]),
        (["vocals", "drums"], None),
        (["vocals"], None),
    ],
)
def test_other_is_the_integer_sum_of_what_was_not_asked_for(tree, target_stems, other_is):
    item = MUSDB18Dataset(tree, "test", target_stems, segment_seconds=None)[1]
    folder = tree / "test" / item["track"]
    for stem, waveform in zip(target_stems, item["stems"], strict=True):
        parts = other_is if stem == "other" else [stem]
        assert torch.equal(as_integers(waveform), sum(integers(folder, part) for part in parts))
    if "other" in target_stems:
        assert torch.equal(item["stems"].sum(0), item["mixture"])


def test_only_the_files_that_are_needed_must_exist(lone_tree):
    (lone_tree / "train" / "Noise - 0" / "bass.wav").unlink()
    dataset = MUSDB18Dataset(lone_tree, target_stems=["vocals", "drums"], segment_seconds=0.1)
    assert dataset[0]["stems"].shape == (2, 2, 800)
    with pytest.raises(FileNotFoundError, match=r"bass\.wav is missing"):
        MUSDB18Dataset(lone_tree, target_stems=["vocals", "other"])


@pytest.mark.audio
def test_real_stems_add_up_to_the_mixture(audio_root, tmp_path):
    for name in ("Music Delta - Reggae", "Music Delta - Rock"):
        (tmp_path / "train" / name).mkdir(parents=True)
        mixture = 0
        for stem in STEMS:
            source = audio_root / "music_delta" / "train" / name / f"{stem}.flac"
            samples, rate = soundfile.read(source, dtype="int16")
            soundfile.write(tmp_path / "train" / name / f"{stem}.wav", samples, rate)
            mixture = mixture + samples
        soundfile.write(tmp_path / "train" / name / "mixture.wav", mixture, rate)
    dataset = MUSDB18Dataset(tmp_path, target_stems=["vocals", "other"], valid_fraction=0)
    assert dataset.sample_rate == 44100
    for item in dataset:
        assert item["mixture"].shape == (2, 264600)
        assert item["mixture"].abs().max() > 0.05
        assert torch.equal(item["stems"].sum(0), item["mixture"])


# --- which segments -------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.7])
def test_sequential_segments_rebuild_every_track(tree, overlap):
    dataset = MUSDB18Dataset(
        tree, "train", segment_seconds=0.2, random_segments=False, overlap=overlap, valid_fraction=0
    )
    wholes = {
        item["track"]: item for item in MUSDB18Dataset(tree, valid_fraction=0, segment_seconds=None)
    }
    built = {name: torch.full_like(item["stems"], torch.nan) for name, item in wholes.items()}
    starts = {name: [] for name in wholes}
    for item in dataset:
        start = round(item["start_seconds"] * RATE)
        starts[item["track"]].append(start)
        whole = built[item["track"]]
        there = min(1600, whole.shape[-1] - start)
        whole[..., start : start + there] = item["stems"][..., :there]
        assert item["stems"].shape == (4, 2, 1600)
        assert not item["stems"][..., there:].any()  # padded with silence
    for name, whole in built.items():
        assert torch.equal(whole, wholes[name]["stems"])
        assert set(np.diff(starts[name])) == {round(1600 * (1 - overlap))}
        # One segment less would lose the end.
        assert starts[name][-2] + 1600 < whole.shape[-1]


def test_random_starts_are_uniform_over_all_valid_ones(lone_tree):
    # 3992 of 4000 samples: a segment can start at 0 to 8.
    dataset = MUSDB18Dataset(
        lone_tree, target_stems=["bass"], segment_seconds=0.499, samples_per_track=1800
    )
    counts = np.bincount([round(item["start_seconds"] * RATE) for item in dataset])
    assert len(counts) == 9
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 26.1  # 99.9 % quantile at 8 degrees of freedom


def test_a_track_shorter_than_the_segment_ends_in_silence(lone_tree):
    item = MUSDB18Dataset(lone_tree, segment_seconds=1.0)[0]
    folder = lone_tree / "train" / "Noise - 0"
    assert item["mixture"].shape == (2, 8000)
    assert torch.equal(as_integers(item["mixture"][:, :4000]), integers(folder, "mixture"))
    assert not item["stems"][..., 4000:].any()


def fingerprints(dataset, workers, epochs):
    loader = DataLoader(
        dataset,
        batch_size=2,
        num_workers=workers,
        collate_fn=dataset.collate_fn,
        persistent_workers=workers > 0,
    )
    seen = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        seen.append(torch.cat([batch["mixture"] for batch in loader]))
    return torch.stack(seen)


def test_draws_do_not_depend_on_workers_and_follow_the_epoch(tree):
    torch.set_num_threads(1)
    dataset = MUSDB18Dataset(tree, segment_seconds=0.1, samples_per_track=2, valid_fraction=0)
    alone = fingerprints(dataset, workers=0, epochs=3)
    assert torch.equal(alone, fingerprints(dataset, workers=2, epochs=3))
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[1], alone[2])
    other_seed = MUSDB18Dataset(
        tree, segment_seconds=0.1, samples_per_track=2, valid_fraction=0, seed=1
    )
    assert not torch.equal(alone[:1], fingerprints(other_seed, workers=0, epochs=1))


def test_batches_are_stacked_and_whole_tracks_are_refused(tree):
    dataset = MUSDB18Dataset(tree, "test", ["vocals", "other"], segment_seconds=0.2)
    batch = dataset.collate_fn([dataset[0], dataset[3]])
    assert batch["mixture"].shape == (2, 2, 1600)
    assert batch["stems"].shape == (2, 2, 2, 1600)
    assert batch["track"] == ["Hiss - 0", "Hiss - 1"]
    assert torch.equal(batch["stems"][1], dataset[3]["stems"])
    whole = MUSDB18Dataset(tree, "test", segment_seconds=None)
    assert whole.collate_fn([whole[1]])["mixture"].shape == (1, 2, 4001)
    with pytest.raises(ValueError, match=r"Hiss - 1.*4001.*batch_size=1"):
        whole.collate_fn([whole[0], whole[1]])


# --- resampling -----------------------------------------------------------------------------


@pytest.mark.parametrize(("rate_in", "rate_out"), [(8000, 5000), (8000, 11025), (8000, 2000)])
def test_a_resampled_segment_is_cut_from_the_resampled_track(
    tmp_path, make_track, rate_in, rate_out
):
    samples = make_track(tmp_path / "test" / "Noise", 6 * rate_in // 2 + 17, rate_in)
    whole = torch.from_numpy(samples["drums"].T / np.float32(32768))
    whole = resample(whole, rate_in, rate_out)
    dataset = MUSDB18Dataset(
        tmp_path, "test", ["drums"], 0.3, overlap=0.37, sample_rate=rate_out, seed=5
    )
    assert len(dataset) > 10
    for item in dataset:
        start = round(item["start_seconds"] * rate_out)
        expected = whole[:, start : start + round(0.3 * rate_out)]
        assert item["stems"].shape == (1, 2, round(0.3 * rate_out))
        error = item["stems"][0, :, : expected.shape[1]] - expected
        assert error.abs().max() < 1e-6
        assert not item["stems"][..., expected.shape[1] :].any()


def test_mixed_rates_need_an_explicit_rate(tmp_path, make_track):
    for number in range(3):
        make_track(tmp_path / "test" / f"Noise - {number}", 8000, 16000 if number == 1 else 8000)
    with pytest.raises(ValueError, match=r"Noise - 1 has 16000 Hz .* sample_rate=8000"):
        MUSDB18Dataset(tmp_path, "test")
    dataset = MUSDB18Dataset(tmp_path, "test", segment_seconds=None, sample_rate=8000)
    assert [item["mixture"].shape[-1] for item in dataset] == [8000, 4000, 8000]


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_stems": ["vocal"]}, "did you mean 'vocals'"),
        ({"target_stems": "vocals"}, r"write \['vocals'\]"),
        ({"target_stems": []}, "one or more"),
        ({"target_stems": ["bass", "bass"]}, "each once"),
        ({"split": "validation"}, "did you mean 'valid'"),
        ({"split": "dev"}, "choose among train, valid, test"),
        ({"segment_seconds": 0}, "segment_seconds=0"),
        ({"segment_seconds": -1.0}, "segment_seconds=-1"),
        ({"segment_seconds": float("nan")}, "segment_seconds=nan"),
        ({"segment_seconds": float("inf")}, "segment_seconds=inf"),
        ({"overlap": 1.0, "random_segments": False}, "overlap=1"),
        ({"overlap": -0.1, "random_segments": False}, "overlap=-0.1"),
        ({"overlap": 0.5}, "random_segments=False"),
        ({"segment_seconds": None, "random_segments": True}, "whole songs"),
        ({"samples_per_track": 0}, "samples_per_track=0"),
        ({"samples_per_track": 2, "random_segments": False}, "random_segments=True"),
        ({"sample_rate": 44.1}, "sample_rate=44.1"),
        ({"valid_fraction": 1.0}, "valid_fraction=1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_an_argument_that_makes_no_sense_is_named(tree, arguments, message):
    with pytest.raises(ValueError, match=message):
        MUSDB18Dataset(tree, **arguments)


def test_an_index_or_epoch_out_of_range_is_named(tree):
    dataset = MUSDB18Dataset(tree)
    with pytest.raises(IndexError, match="item 4 of a data set of 4"):
        dataset[4]
    with pytest.raises(ValueError, match="epoch=-1"):
        dataset.set_epoch(-1)


def test_stem_parts_keep_every_file_exactly_once_where_other_is_present():
    for stems in (["other"], ["vocals", "other"], ["bass", "other", "drums"], list(STEMS)):
        files = [file for parts in stem_parts(stems).values() for file in parts]
        assert sorted(files) == sorted(STEMS)
