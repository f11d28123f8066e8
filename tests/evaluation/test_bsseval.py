"""museval and mir_eval as oracles; silence, order, rank; and what a ratio must be."""

import math
from itertools import permutations

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch

from tfswa_lab import audio
from tfswa_lab.device import compute_threads
from tfswa_lab.evaluation import energies
from tfswa_lab.evaluation.bsseval import (
    bss_eval,
    bss_eval_mono,
    gnsdr,
    gsar,
    gsir,
    score_clip,
)
from tfswa_lab.evaluation.frames import frames_in_seconds, frames_of
from tfswa_lab.evaluation.ratios import sdr

RATIOS = ("sdr", "isr", "sir", "sar")


@pytest.fixture(scope="module")
def museval():
    audio.ensure_ffmpeg()
    return pytest.importorskip("museval")


def noise(stems=3, channels=2, samples=9000, seed=0):
    """Sources that have something in common, and estimates with errors of every kind."""
    generator = torch.Generator().manual_seed(seed)
    shape = (stems, channels, samples)
    references = torch.randn(shape, generator=generator, dtype=torch.float64)
    references += 0.5 * references.roll(1, 0).roll(3, -1)
    artifacts = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return references, 0.8 * references + 0.2 * references.flip(0).roll(5, -1) + artifacts


def values(result):
    return torch.stack([getattr(result, name) for name in RATIOS]).cpu()


def expected(museval, references, estimates, window, hop, taps=512, v3=False):
    """museval's ratios; it wants channels last, and lengths in samples."""
    last = (x.double().numpy().swapaxes(1, 2) for x in (references, estimates))
    return torch.from_numpy(
        np.stack(
            museval.metrics.bss_eval(
                *last, window=window, hop=hop, filters_len=taps, framewise_filters=v3
            )[:4]
        )
    )


def differences(ours, theirs):
    """Largest difference in dB of each ratio; NaN must be where it is there."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    return (ours - theirs).nan_to_num().abs().amax((1, 2))


@pytest.mark.parametrize(
    ("stems", "channels", "window", "hop", "taps"),
    [
        (3, 2, 2000, 2000, 64),  # frames that tile the track
        (2, 1, 2000, 2000, 512),
        (2, 3, 2000, 1300, 64),  # overlapping
        (2, 2, 1000, 3000, 64),  # with gaps between them
        (3, 2, 300, 300, 512),  # shorter than the filters
        (2, 2, 2000.5, 1500.7, 33),  # not whole samples
        (1, 2, 2000, 2000, 64),  # one source: no interference
        (2, 2, 9000, 9000, 64),
        (2, 2, math.inf, math.inf, 64),
        (2, 2, 2000, 2000, 1),
    ],
)
def test_equal_to_museval(museval, stems, channels, window, hop, taps):
    references, estimates = noise(stems, channels)
    ours = values(bss_eval(references, estimates, window, hop, taps, rate=1))
    theirs = expected(museval, references, estimates, window, hop, taps)
    if stems == 1:  # no interference at all: an infinite ratio, but for rounding
        assert min(ours[2].min(), theirs[2].min()) > 200
        ours[2] = theirs[2] = 0
    assert differences(ours, theirs).max() <= 1e-9


@pytest.mark.parametrize(("window", "hop"), [(2000, 2000), (3000, 1700), (math.inf, math.inf)])
def test_equal_to_museval_with_filters_of_each_frame(museval, window, hop):
    references, estimates = noise(2, 2, 7000)
    ours = bss_eval(references, estimates, window, hop, 64, mode="v3", rate=1)
    theirs = expected(museval, references, estimates, window, hop, 64, v3=True)
    assert differences(values(ours), theirs).max() <= 1e-9


@pytest.mark.parametrize(("window", "hop"), [(math.inf, math.inf), (3000, 2500)])
@pytest.mark.parametrize("mode", ["v4", "v3"])
def test_the_pieces_of_a_long_frame_do_not_show(museval, monkeypatch, window, hop, mode):
    monkeypatch.setattr("tfswa_lab.evaluation.energies.TILE", 700)
    monkeypatch.setattr("tfswa_lab.evaluation.energies.LONGEST", 2000)
    monkeypatch.setattr("tfswa_lab.evaluation.energies.BLOCK", 701)
    references, estimates = noise(2, 2, 9000)
    ours = bss_eval(references, estimates, window, hop, 64, mode, rate=1)
    theirs = expected(museval, references, estimates, window, hop, 64, v3=mode == "v3")
    assert differences(values(ours), theirs).max() <= 1e-9


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_show_and_are_as_many_as_before(monkeypatch, threads):
    monkeypatch.setattr(energies, "CHUNK", 2)
    pair = noise()
    alone = values(bss_eval(*pair, 500, 500, 64, rate=1))
    with compute_threads(threads):
        assert torch.equal(values(bss_eval(*pair, 500, 500, 64, rate=1)), alone)
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("keep", [0, 10_000_000])
def test_spectra_that_are_made_twice_are_the_same(monkeypatch, keep):
    monkeypatch.setattr(energies, "SAMPLES_AT_ONCE", 1)  # frame by frame
    pair = noise()
    kept = values(bss_eval(*pair, 500, 500, 64, rate=1))
    monkeypatch.setattr(energies, "KEEP_BYTES", keep)
    assert torch.equal(values(bss_eval(*pair, 500, 500, 64, rate=1)), kept)


def real_song(audio_root, name, seconds):
    """Stems of a real song, 16 bit, and estimates cut out of the mixture by their magnitudes."""
    (folder,) = audio_root.glob(f"music_delta/*/Music Delta - {name}")
    frames = round(seconds * 44_100)
    stems = torch.stack([audio.read(folder / f"{s}.flac", 0, frames)[0] for s in audio.STEMS])
    stems = stems[stems.any(2).any(1)]
    stft = {"n_fft": 2048, "window": torch.hann_window(2048)}
    spectra = torch.stft(stems.flatten(0, 1), **stft, return_complex=True).unflatten(0, (-1, 2))
    masks = spectra.abs() / spectra.abs().sum(0).clamp(min=1e-9)
    estimates = torch.istft((masks * spectra.sum(0)).flatten(0, 1), **stft, length=frames)
    return stems, estimates.view_as(stems)


@pytest.mark.audio
@pytest.mark.parametrize(
    ("name", "tolerance", "loaded"),
    [("Reggae", 1e-6, False), ("Beatles", 1e-3, True), ("Punk", 1e-3, True)],
)
def test_equal_to_museval_on_real_songs(museval, audio_root, name, tolerance, loaded):
    stems, estimates = real_song(audio_root, name, 2.5)
    result = bss_eval(stems, estimates)
    theirs = expected(museval, stems, estimates, 44_100, 44_100)
    assert differences(values(result), theirs).max() <= tolerance
    assert any("repeat one another" in note for note in result.notes) == loaded


def test_the_order_of_the_sources_does_not_matter():
    references, estimates = noise()
    straight = values(bss_eval(references, estimates, 2000, 2000, 64, rate=1))
    for order in permutations(range(3)):
        turned = bss_eval(references[[*order]], estimates[[*order]], 2000, 2000, 64, rate=1)
        torch.testing.assert_close(values(turned), straight[:, [*order]], rtol=0, atol=1e-10)


def test_both_sides_of_a_stem_alike_need_a_loading_and_say_so(museval):
    references, estimates = noise(2, 2)
    references[0, 1] = 0.7 * references[0, 0]
    result = bss_eval(references, estimates, 2000, 2000, 64, rate=1)
    assert "repeat one another" in result.notes[0]
    theirs = expected(museval, references, estimates, 2000, 2000, 64)
    assert differences(values(result), theirs).max() <= 1e-6
    references[1] = references[0]  # two stems that are the same: nothing can tell them apart
    twins = bss_eval(references, estimates, 2000, 2000, 64, rate=1)
    assert values(twins).isfinite().all()


def test_a_channel_without_a_sound_changes_nothing_for_the_other(museval):
    references, estimates = noise(2, 2)
    references[:, 1] = estimates[:, 1] = 0
    stereo = values(bss_eval(references, estimates, 2000, 2000, 64, rate=1))
    mono = values(bss_eval(references[:, 0], estimates[:, 0], 2000, 2000, 64, rate=1))
    torch.testing.assert_close(stereo, mono, rtol=0, atol=1e-8)


# Silence


def test_a_frame_in_which_anything_is_silent_is_nan_for_all(museval):
    references, estimates = noise()
    references[1, :, 2100:4900] = 0  # the third frame alone is silent throughout
    estimates[0, 0, 6000:8000] = -estimates[0, 1, 6000:8000]  # cancels: silence for museval
    ours = values(bss_eval(references, estimates, 1000, 1000, 64, rate=1))
    theirs = expected(museval, references, estimates, 1000, 1000, 64)
    assert ours.isnan().all((0, 1)).tolist() == [
        *(False, False, False, True, False, False, True, True, False)
    ]
    assert differences(ours, theirs).max() <= 1e-9


def test_a_stem_silent_throughout_is_nan_and_the_others_are_as_without_it(museval):
    references, estimates = noise()
    references[1] = 0
    result = bss_eval(references, estimates, 2000, 2000, 64, rate=1)
    assert result.notes == ("stem 1 is silent throughout, so it has no ratios",)
    ours, rest = values(result), [0, 2]
    assert ours[:, 1].isnan().all()
    theirs = expected(museval, references[rest], estimates[rest], 2000, 2000, 64)
    assert differences(ours[:, rest], theirs).max() <= 1e-9


def test_an_estimate_silent_throughout_is_nan_and_its_stem_still_interferes():
    references, estimates = noise()
    full = values(bss_eval(references, estimates, 2000, 2000, 64, rate=1))
    estimates[1] = 0
    result = bss_eval(references, estimates, 2000, 2000, 64, rate=1)
    assert result.notes == ("the estimate of stem 1 is silent throughout: no ratios",)
    assert values(result)[:, 1].isnan().all()
    torch.testing.assert_close(values(result)[:, [0, 2]], full[:, [0, 2]], rtol=0, atol=1e-9)


def test_nothing_but_silence_has_no_ratio():
    references, estimates = torch.zeros(2, 2, 2, 500)
    result = bss_eval(references, estimates, 100, 100, 8, rate=1)
    assert values(result).shape == (4, 2, 5)
    assert values(result).isnan().all()


# What the ratios mean


def test_known_amounts_of_each_error_are_found():
    generator = torch.Generator().manual_seed(3)
    voice, band, hiss = torch.randn(3, 2, 40_000, generator=generator, dtype=torch.float64)
    voice[:, -9:] = band[:, -9:] = 0  # so that nothing comes round
    references = torch.stack([voice, band])
    echo, leak, crackle = 0.1 * voice.roll(7, -1), 0.03 * band.roll(2, -1), 0.01 * hiss
    estimates = torch.stack([voice + echo + leak + crackle, band])
    result = bss_eval(references, estimates, math.inf, math.inf, 32, rate=1)
    db = {name: getattr(result, name)[0, 0].item() for name in RATIOS}
    assert db["isr"] == pytest.approx(20, abs=0.1)
    assert db["sir"] == pytest.approx(-20 * math.log10(0.03) + 10 * math.log10(1.01), abs=0.1)
    assert db["sar"] == pytest.approx(40 + 10 * math.log10(1.0109), abs=0.1)
    assert db["sdr"] == pytest.approx(-10 * math.log10(0.01 + 0.0009 + 0.0001), abs=0.1)


def test_a_perfect_estimate_is_infinitely_good():
    references, _ = noise(2, 2)
    assert (values(bss_eval(references, references, 2000, 2000, 64, rate=1)) == math.inf).all()


def test_the_level_of_everything_does_not_matter():
    references, estimates = noise()
    loud = values(bss_eval(references, estimates, 2000, 2000, 64, rate=1))
    soft = values(bss_eval(1e-5 * references, 1e-5 * estimates, 2000, 2000, 64, rate=1))
    torch.testing.assert_close(soft, loud, rtol=0, atol=1e-9)


def test_medians_are_those_of_numpy():
    references, estimates = noise()
    references[0, :, 2000:4000] = 0
    result = bss_eval(references, estimates, 2000, 2000, 64, rate=1)
    medians = result.medians()
    assert list(medians) == ["SDR", "ISR", "SIR", "SAR"]
    for name, values_of in zip(medians, values(result), strict=True):
        np.testing.assert_allclose(medians[name], np.nanmedian(values_of, axis=1))


def test_the_median_of_perfection_is_perfect():
    references, _ = noise(2, 2)
    medians = bss_eval(references, references, 2000, 2000, 64, rate=1).medians()
    assert (torch.stack(list(medians.values())) == math.inf).all()


def test_estimates_fresh_from_a_network_are_taken():
    references, estimates = noise(2)
    fresh = bss_eval(references, estimates.clone().requires_grad_(), 2000, 2000, 64, rate=1)
    assert torch.equal(fresh.sdr, bss_eval(references, estimates, 2000, 2000, 64, rate=1).sdr)


def test_float32_arrays_and_mono_without_a_channel_axis_are_taken():
    references, estimates = (x[:, 0].float() for x in noise())
    from_arrays = bss_eval(references.numpy(), estimates.numpy(), 2000, 2000, 64, rate=1)
    stereo_form = references[:, None].double(), estimates[:, None]
    from_tensors = bss_eval(*stereo_form, 2000, 2000, 64, rate=1)
    torch.testing.assert_close(values(from_arrays), values(from_tensors), rtol=0, atol=1e-9)


# Clips of singing


def test_mono_clips_are_scored_as_by_mir_eval():
    mir_eval = pytest.importorskip("mir_eval")
    references, estimates = (x[:, 0] for x in noise(2, 1, 6000))
    ours = bss_eval_mono(references, estimates)
    with pytest.warns(FutureWarning):
        theirs = mir_eval.separation.bss_eval_sources(
            references.numpy(), estimates.numpy(), compute_permutation=False
        )
    for mine, their in zip((ours.sdr, ours.sir, ours.sar), theirs, strict=False):
        np.testing.assert_allclose(mine, their, rtol=0, atol=1e-6)


def test_v3_images_are_those_of_mir_eval_and_so_of_matlab():
    mir_eval = pytest.importorskip("mir_eval")
    references, estimates = noise(2, 2, 6000)
    ours = bss_eval(references, estimates, math.inf, math.inf, mode="v3")
    with pytest.warns(FutureWarning):
        theirs = mir_eval.separation.bss_eval_images(
            references.mT.numpy(), estimates.mT.numpy(), compute_permutation=False
        )
    for mine, their in zip(values(ours), theirs, strict=False):
        np.testing.assert_allclose(mine[:, 0], their, rtol=0, atol=1e-6)


def test_global_ratios_weigh_clips_by_their_length():
    clips = []
    for seed, samples in ((0, 4000), (1, 12_000)):
        references, estimates = (x[:, 0] for x in noise(2, 1, samples, seed))
        clips.append(score_clip(references, estimates, rate=1000))
    short, long = clips
    assert (short.seconds, long.seconds) == (4, 12)
    mixture = noise(2, 1, 4000, 0)[0][:, 0].sum(0)
    floor = bss_eval_mono(noise(2, 1, 4000, 0)[0][:, 0], mixture.expand(2, -1)).sdr
    torch.testing.assert_close(short.floor, floor)
    torch.testing.assert_close(gsir(clips), (short.sir + 3 * long.sir) / 4)
    torch.testing.assert_close(gsar(clips), (short.sar + 3 * long.sar) / 4)
    gain = (short.sdr - short.floor + 3 * (long.sdr - long.floor)) / 4
    torch.testing.assert_close(gnsdr(clips), gain)


# Mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": torch.zeros(2, 2, 999)}, r"\(2, 2, 999\) and estimates .* same shape"),
        ({"references": torch.zeros(9000), "estimates": torch.zeros(9000)}, "same shape"),
        ({"references": torch.zeros(0, 2, 9), "estimates": torch.zeros(0, 2, 9)}, "nothing"),
        ({"references": torch.zeros(2, 9, 2), "estimates": torch.zeros(2, 9, 2)}, "more channels"),
        ({"references": torch.full((2, 2, 9000), math.nan)}, r"references\[0\] contains NaN"),
        ({"estimates": torch.full((2, 2, 9000), math.inf)}, r"estimates\[0\] contains NaN"),
        ({"references": torch.zeros(2, 2, 9000, dtype=torch.complex64)}, "are complex"),
        ({"window": 0.0}, "window=0.0 s and hop=1.0 s must hold a sample"),
        ({"hop": -1.0}, "hop=-1.0 s must hold a sample"),
        ({"hop": math.inf}, "goes with window=inf"),
        ({"window": math.nan}, "window=nan"),
        ({"filter_length": 0}, "filter_length=0: a whole number"),
        ({"filter_length": 2.5}, "filter_length=2.5: a whole number"),
        ({"mode": "v5"}, "mode='v5': choose v4"),
        ({"rate": 0}, "rate=0 Hz"),
    ],
)
def test_mistakes_are_named(change, message):
    references, estimates = noise(2)
    with pytest.raises(ValueError, match=message):
        bss_eval(**{"references": references, "estimates": estimates, **change})


@pytest.mark.parametrize(
    ("references", "message"),
    [(torch.ones(2, 2, 99), "is not mono"), (torch.zeros(2, 99), "references is silent")],
)
def test_clips_must_be_mono_and_sound(references, message):
    with pytest.raises(ValueError, match=message):
        bss_eval_mono(references, torch.ones_like(references))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["v4", "v3"])
def test_a_gpu_gives_the_cpus_ratios(mode):
    references, estimates = noise(samples=30_000)
    on_cpu, on_gpu = (
        bss_eval(references.to(device), estimates.to(device), 9000, 9000, 64, mode, rate=1)
        for device in ("cpu", "cuda")
    )
    assert on_gpu.sdr.is_cuda
    torch.testing.assert_close(values(on_gpu), values(on_cpu), rtol=0, atol=1e-8)


def test_sdr_alone_is_bss_evals():
    references, estimates = noise()
    estimates[2, :, 2800:3700] = 0
    full = bss_eval(references, estimates, 900, 700, 64, rate=1)
    torch.testing.assert_close(
        sdr(references, estimates, 900, 700, rate=1), full.sdr, equal_nan=True, rtol=0, atol=1e-12
    )
    assert full.sdr.isnan().any()
    references[1] = 0  # throughout: NaN itself, and no frame is lost to it
    full = bss_eval(references, estimates, 900, 700, 64, rate=1)
    alone = sdr(references, estimates, 900, 700, rate=1)
    torch.testing.assert_close(alone, full.sdr, equal_nan=True, rtol=0, atol=1e-12)
    assert alone.isnan().sum() == 12 + 2
    with pytest.raises(ValueError, match=r"window=0 s"):
        sdr(references, estimates, window=0)


@pytest.mark.parametrize("hundredths", [35, 57, 70, 113, 140])
def test_frames_of_seconds_are_whole_samples_where_they_are_meant_to_be(hundredths):
    window = hundredths / 100
    (start, stop), *_ = frames_in_seconds(10 * 44_100, window, window, 44_100)
    assert (start, stop) == (0, 441 * hundredths)


def test_the_last_frame_is_whole():
    assert len(frames_of(44_100 * 3 + 44_099, 44_100, 44_100)) == 3
    assert frames_of(100, 200, 200) == [(0, 100)]


def test_taps_of_any_whole_type_and_notes_of_what_is_too_short():
    references, estimates = noise(2, 2, 300)
    result = bss_eval(references, estimates, math.inf, math.inf, np.int64(128), rate=1)
    assert any("too short to determine 4 filters of 128 taps" in note for note in result.notes)
    references[1] = references[1, :1]  # a mono stem
    result = bss_eval(references, estimates, math.inf, math.inf, np.int64(16), rate=1)
    assert any("repeat one another" in note for note in result.notes)


def delayed_copy(samples):
    """Low-passed stereo stems of floats, one of them another one a sample later; estimates."""
    generator = torch.Generator().manual_seed(0)
    filters = scipy.signal.butter(2, 3000, fs=44_100, output="sos")
    noise = torch.randn(2, 2, samples, generator=generator).numpy()
    voice, band = 0.1 * scipy.signal.sosfilt(filters, scipy.signal.sosfilt(filters, noise))
    stems = np.float32([voice, band, np.pad(voice, ((0, 0), (1, 0)))[:, :-1]])
    references = torch.from_numpy(stems).double()
    estimates = references + 0.1 * (references.sum(0) - references)
    return references, estimates + 0.003 * torch.randn(references.shape, generator=generator)


def explained(signals, wanted, taps):
    """The part of `wanted` that filters of the signals give, by QR with pivots; both `(…, s)`."""
    samples = signals.shape[-1]
    columns = [
        np.pad(row, (delay, taps - 1 - delay))
        for row in signals.reshape(-1, samples).numpy()
        for delay in range(taps)
    ]
    basis, sizes, _ = scipy.linalg.qr(np.stack(columns, 1), mode="economic", pivoting=True)
    basis = basis[:, np.abs(np.diag(sizes)) > 1e-13 * abs(sizes[0, 0])]
    padded = np.pad(wanted.numpy(), ((0, 0), (0, taps - 1))).T
    return padded, basis @ (basis.T @ padded)


def test_a_copy_that_is_a_sample_late_and_has_no_treble_is_solved_as_qr_solves_it():
    references, estimates = delayed_copy(9000)
    taps, seconds = 32, 9000 / 44_100
    result = bss_eval(references, estimates, seconds, seconds, filter_length=taps)
    assert "solved in part" in result.notes[0]
    for stem in range(3):
        truth, _ = explained(references[stem], references[stem], taps)
        estimate, own = explained(references[stem], estimates[stem], taps)
        _, of_all = explained(references, estimates[stem], taps)
        pairs = ((truth, own - truth), (own, of_all - own), (of_all, estimate - of_all))
        expected = [10 * np.log10(np.sum(a**2) / np.sum(b**2)) for a, b in pairs]
        found = [ratio[stem, 0].item() for ratio in (result.isr, result.sir, result.sar)]
        np.testing.assert_allclose(found, expected, atol=2e-3)
