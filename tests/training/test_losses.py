"""Peers, closed forms, finite differences, and silence."""

import math

import auraloss
import numpy as np
import pytest
import scipy.signal
import torch
from torchmetrics.functional.audio import (
    scale_invariant_signal_distortion_ratio,
    signal_noise_ratio,
)

from tfswa_lab.stft import STFTProcessor
from tfswa_lab.training.losses import (
    SILENT_POWER,
    L1SpectrogramLoss,
    L1WaveformLoss,
    MultiResolutionSTFTLoss,
    SDRLoss,
    SISDRLoss,
    SourceSeparationLoss,
)

STEMS = ("vocals", "drums")
WEIGHTS = {
    "l1_weight": 1.0,
    "mrstft_weight": 0.5,
    "waveform_weight": 20.0,
    "sdr_weight": 0.05,
    "si_sdr_weight": 0.02,
}
LOSSES = {
    "l1": L1SpectrogramLoss(256, 64),
    "mrstft": MultiResolutionSTFTLoss((256, 128)),
    "waveform": L1WaveformLoss(),
    "sdr": SDRLoss(),
    "si_sdr": SISDRLoss(),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def noise(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def pair(*shape, dtype=torch.float32):
    """Estimates about 10 dB above their error, and targets."""
    shape = shape or (3, 2, 2, 3000)
    targets = noise(*shape, dtype=dtype)
    return targets + 0.3 * noise(*shape, seed=1, dtype=dtype), targets


def gradient(loss, estimates, targets):
    estimates = estimates.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(estimates, targets).mean(), estimates)
    return slope


# Peers


def between_silent_margins(x):
    """So that mirroring at the ends, which the peer does, and zeros, which we do, are the same."""
    return torch.nn.functional.pad(x, (1100, 1100))


def test_l1_is_auraloss_for_each_stem():
    estimates, targets = map(between_silent_margins, pair())
    peer = auraloss.freq.STFTLoss(2048, 512, 2048, w_sc=0, w_log_mag=0, w_lin_mag=1, eps=1e-20)
    ours = L1SpectrogramLoss()(estimates, targets)
    for item, stem in np.ndindex(3, 2):
        theirs = peer(estimates[item, stem][None], targets[item, stem][None])
        torch.testing.assert_close(ours[item, stem], theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("level", [1.0, 1e-3])
@pytest.mark.parametrize("floor", [0.1, 1e-4])
def test_multi_resolution_is_the_sum_of_auraloss_parts(floor, level):
    estimates, targets = (level * between_silent_margins(x)[1:2, 1] for x in pair())
    windows = [2048, 1024, 512]
    sizes = windows, [n_fft // 4 for n_fft in windows], windows
    peer = auraloss.freq.MultiResolutionSTFTLoss
    linear = peer(*sizes, w_sc=0, w_log_mag=0, w_lin_mag=1, eps=1e-20)(estimates, targets)
    logarithmic = peer(*sizes, w_sc=0, w_log_mag=1, eps=floor**2)(estimates, targets)
    for weight in (0.0, 1.0, 0.3):
        ours = MultiResolutionSTFTLoss(floor=floor, log_weight=weight)
        expected = linear + weight * logarithmic
        actual = ours(estimates[:, None], targets[:, None])[0, 0]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_ratios_are_those_of_torchmetrics_with_the_channels_end_to_end():
    estimates, targets = pair()
    flat = estimates.flatten(2), targets.flatten(2)
    for kind, peer in (
        (SDRLoss, signal_noise_ratio),
        (SISDRLoss, scale_invariant_signal_distortion_ratio),
    ):
        ours = kind(math.inf)(estimates, targets)
        torch.testing.assert_close(ours, -peer(*flat), rtol=0, atol=1e-3)


def test_l1_is_a_loop_of_windowed_ffts():
    window = scipy.signal.get_window("hann", 256)

    def magnitudes(x):
        x = np.pad(x.numpy().ravel(), 128)
        return np.abs([np.fft.rfft(x[i : i + 256] * window) for i in range(0, 1001, 64)])

    estimates, targets = pair(1, 1, 1, 1000, dtype=torch.float64)
    expected = np.abs(magnitudes(estimates) - magnitudes(targets)).mean()
    assert LOSSES["l1"](estimates, targets).item() == pytest.approx(expected, rel=1e-12)


# Closed forms


def test_twice_the_target_is_wrong_by_what_arithmetic_says():
    _, targets = pair()
    double = 2 * targets
    l1, waveform = LOSSES["l1"], LOSSES["waveform"]
    torch.testing.assert_close(l1(double, targets), l1(0 * targets, targets))
    torch.testing.assert_close(waveform(double, targets), targets.abs().mean((2, 3)))
    torch.testing.assert_close(SDRLoss(math.inf)(double, targets), torch.zeros(3, 2))
    linear, both = (
        MultiResolutionSTFTLoss(floor=1e-9, log_weight=w)(double, targets) for w in (0, 1)
    )
    torch.testing.assert_close(both - linear, torch.full((3, 2), math.log(2)), rtol=1e-4, atol=0)


def test_only_the_waveform_and_the_sdr_hear_the_polarity():
    _, targets = pair()
    deaf = [
        k for k, loss in LOSSES.items() if loss(-targets, targets).equal(loss(targets, targets))
    ]
    assert deaf == ["l1", "mrstft", "si_sdr"]


@pytest.mark.parametrize("gain", [0.5, 3.0, 100.0, -1.0])
@pytest.mark.parametrize("error", [0.0, 0.3])
def test_si_sdr_does_not_hear_the_gain(error, gain):
    """At -20 dB, as music is, and also at the ceiling."""
    targets = 0.1 * noise(1, 2, 2, 3000)
    estimates = targets + 0.1 * error * noise(1, 2, 2, 3000, seed=1)
    expected, actual = (SISDRLoss()(g * estimates, targets) for g in (1, gain))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.02)


def test_si_sdr_hears_the_panning():
    """Gains 2 and 1/2 for equal channels: the best common gain is 5/4, it misses both by 3/4."""
    targets = noise(1, 1, 1, 1000).expand(1, 1, 2, 1000)
    estimates = targets * torch.tensor([[2.0], [0.5]])
    expected = -10 * math.log10((5 / 4) ** 2 / (3 / 4) ** 2)
    assert SISDRLoss(math.inf)(estimates, targets).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("ceiling", [10.0, 30.0])
@pytest.mark.parametrize("kind", [SDRLoss, SISDRLoss])
def test_near_the_ceiling_improvement_stops_paying(kind, ceiling):
    targets, error = noise(1, 1, 2, 3000), noise(1, 1, 2, 3000, seed=1)
    loss, bare = kind(ceiling), kind(math.inf)
    assert loss(targets, targets).item() == pytest.approx(-ceiling, abs=0.01)
    at_it = targets + 10 ** (-ceiling / 20) * error
    assert loss(at_it, targets).item() == pytest.approx(-ceiling + 10 * math.log10(2), abs=0.2)
    good, poor = targets + 0.001 * error, targets + error
    assert gradient(bare, good, targets).norm() > 100 * gradient(bare, poor, targets).norm()
    assert gradient(loss, good, targets).norm() < 2 * gradient(loss, poor, targets).norm()


# Derivatives


@pytest.mark.parametrize(
    ("estimate_level", "target_level"), [(1, 1), (1, 0), (1e-3, 1), (1e-3, 1e-3), (1e-4, 0)]
)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences(name, estimate_level, target_level):
    loss = {"l1": L1SpectrogramLoss(64, 16), "mrstft": MultiResolutionSTFTLoss((64, 32))}.get(
        name, LOSSES[name]
    )
    estimates = estimate_level * noise(1, 2, 1, 150, dtype=torch.float64)
    targets = target_level * noise(1, 2, 1, 150, seed=1, dtype=torch.float64)
    estimates.requires_grad_()
    step = 1e-6 * estimate_level  # small enough to cross none of the kinks of |x| and the floor
    assert torch.autograd.gradcheck(loss, (estimates, targets), eps=step, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("silent", [slice(None), slice(1500)], ids=["all", "half"])
@pytest.mark.parametrize("levels", [(1, 0), (0, 1), (0, 0), (1e-42, 1e-41)])  # the last: denormal
@each_loss
def test_silence_has_a_finite_loss_and_gradient(loss, levels, silent):
    estimates, targets = pair()
    estimates[..., silent] *= levels[0]
    targets[..., silent] *= levels[1]
    assert loss(estimates, targets).isfinite().all()
    assert gradient(loss, estimates, targets).isfinite().all()


@each_loss
def test_a_silent_target_asks_for_silence(loss):
    estimates, _ = pair()
    silence = torch.zeros_like(estimates)
    levels = [loss(level * estimates, silence).mean().item() for level in (0, 0.01, 0.1, 1)]
    assert levels[0] == 0
    assert levels == sorted(set(levels))
    assert not gradient(loss, silence, silence).any()
    slope = gradient(loss, estimates, silence)
    assert (slope * estimates).sum() > 0


def test_what_counts_as_silence_for_the_ratios():
    """An error at SILENT_POWER costs a silent target 3 dB."""
    error = torch.full((1, 1, 2, 100), math.sqrt(SILENT_POWER))
    for loss in (SDRLoss(), SISDRLoss()):
        assert loss(error, 0 * error).item() == pytest.approx(10 * math.log10(2), abs=1e-3)


def test_nothing_hides_a_nan():
    estimates, targets = pair()
    estimates[0, 0, 0, 100] = math.nan
    total, terms = SourceSeparationLoss(STEMS, **WEIGHTS)(estimates, targets)
    assert total.isnan()
    for name in LOSSES:
        assert terms[f"vocals/{name}"].isnan()
        assert terms[f"drums/{name}"].isfinite()


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [1.0, 1e-4])
@each_loss
def test_under_autocast_losses_are_those_of_float32(loss, level, dtype):
    """1e-4 has no square in float16."""
    estimates, targets = (level * x for x in pair())
    estimates = estimates.to(dtype)
    with torch.autocast("cpu", dtype):
        actual = loss(estimates, targets)
        slope = gradient(loss, estimates, targets)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, loss(estimates.float(), targets))
    assert torch.equal(slope, gradient(loss, estimates.float(), targets).to(dtype))


@each_loss
def test_float32_is_enough(loss):
    estimates, targets = pair()
    expected = loss(estimates.double(), targets.double())
    assert expected.dtype == torch.float64
    torch.testing.assert_close(loss(estimates, targets).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives():
    estimates, targets = pair()
    loss = SourceSeparationLoss(STEMS, **WEIGHTS)
    expected, _ = loss(estimates, targets)
    with torch.autocast("cuda", torch.float16):
        actual, _ = loss(estimates.cuda(), targets.cuda())
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=0)


# What they cannot mean


REFUSED = {
    "a complex spectrogram": (lambda x: STFTProcessor(256, 64)(x)[:, :, 0], "complex64"),
    "complex samples": (torch.Tensor.cfloat, r"complex64 .* pass the waveform"),
    "16-bit samples": (lambda x: (8000 * x).short(), r"int16 .* divide by full scale, 32768"),
    "64-bit integers": (lambda x: (8000 * x).long(), r"int64 .* divide by full scale"),
    "signs": (lambda x: x > 0, r"bool holds no samples"),
    "magnitudes with frames last": (
        lambda x: STFTProcessor(256, 64)(x)[:, :, 0].abs(),
        r"waveforms of 129 channels; if these are magnitudes, pass waveforms",
    ),
    "magnitudes with bins last": (
        lambda x: STFTProcessor(256, 32)(x)[:, :, 0].abs().mT,
        r"waveforms of 94 channels",
    ),
    "magnitudes of each channel": (lambda x: STFTProcessor(256, 64)(x).abs(), "same shape"),
}


@pytest.mark.parametrize(("of", "message"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize(
    "loss", [*LOSSES.values(), SourceSeparationLoss(STEMS)], ids=[*LOSSES, "sum"]
)
def test_what_is_not_a_waveform_is_refused(loss, of, message):
    estimates, targets = (of(x) for x in pair())
    with pytest.raises(ValueError, match=message):
        loss(estimates, targets)


@each_loss
def test_one_of_the_two_is_enough_to_be_refused(loss):
    estimates, targets = pair()
    with pytest.raises(ValueError, match=r"targets: torch\.int16"):
        loss(estimates, targets.short())
    with pytest.raises(ValueError, match=r"estimates: torch\.complex64"):
        loss(estimates.cfloat(), targets)


# The sum


def test_the_total_is_the_weighted_sum_of_the_terms():
    estimates, targets = pair()
    weights = {"vocals": 3.0}  # drums: 1
    total, terms = SourceSeparationLoss(STEMS, **WEIGHTS, stem_weights=weights)(estimates, targets)
    assert list(terms) == [
        f"{prefix}{name}" for name in LOSSES for prefix in ("vocals/", "drums/", "")
    ]
    for name in LOSSES:
        mean = 0.75 * terms[f"vocals/{name}"] + 0.25 * terms[f"drums/{name}"]
        torch.testing.assert_close(terms[name], mean)
    expected = sum(WEIGHTS[f"{name}_weight"] * terms[name] for name in LOSSES)
    torch.testing.assert_close(total, expected)


def test_terms_are_those_of_each_loss_alone():
    estimates, targets = pair()
    _, terms = SourceSeparationLoss(STEMS, **WEIGHTS, n_fft=256, hop_length=64)(estimates, targets)
    alone = LOSSES | {"mrstft": MultiResolutionSTFTLoss()}
    for name, loss in alone.items():
        vocals, drums = loss(estimates, targets).mean(0)
        torch.testing.assert_close(terms[f"vocals/{name}"], vocals)
        torch.testing.assert_close(terms[f"drums/{name}"], drums)


def test_terms_are_detached_and_only_of_what_is_weighted():
    estimates, targets = pair()
    total, terms = SourceSeparationLoss(STEMS)(estimates.requires_grad_(), targets)
    assert total.requires_grad
    assert {name.split("/")[-1] for name in terms} == {"l1", "mrstft"}
    assert not any(term.requires_grad for term in terms.values())


def test_the_gradient_of_a_batch_is_the_mean_of_those_of_its_halves():
    """Two processes that average their gradients take the step of one: also if a half is silent."""
    estimates, targets = pair(4, 2, 2, 3000)
    targets[2:] = 0
    loss = SourceSeparationLoss(STEMS, **WEIGHTS)

    def slope(items):
        return gradient(lambda e, t: loss(e, t)[0], estimates[items], targets[items])

    halves = torch.cat([slope(slice(0, 2)), slope(slice(2, 4))]) / 2
    torch.testing.assert_close(slope(slice(None)), halves, rtol=1e-5, atol=1e-8)


# Refusals


@pytest.mark.parametrize("samples", [1, 50, 511])
@each_loss
def test_signals_shorter_than_the_window_are_padded(loss, samples):
    _, targets = pair(1, 2, 1, samples)
    assert (loss(0 * targets, targets) >= 0).all()
    assert loss(2 * targets, targets).isfinite().all()


@each_loss
def test_shapes_that_would_broadcast_are_refused(loss):
    for one, other in (
        ((2, 2, 2, 100), (2, 1, 2, 100)),
        ((2, 2, 100), (2, 2, 100)),
        ((2, 2, 2, 0), (2, 2, 2, 0)),
    ):
        with pytest.raises(ValueError, match="must have the same shape") as error:
            loss(torch.zeros(one), torch.zeros(other))
        assert str(one) in str(error.value)
        assert str(other) in str(error.value)


def test_another_number_of_stems_is_refused():
    four = torch.zeros(1, 4, 2, 100)
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 100\) does not hold the stems"):
        SourceSeparationLoss(STEMS)(four, four)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l1_weight": -1}, "the loss weight of l1=-1 must be"),
        ({"sdr_weight": math.nan}, "the loss weight of sdr=nan must be"),
        ({"waveform_weight": math.inf}, "the loss weight of waveform=inf must be"),
        ({"l1_weight": 0, "mrstft_weight": 0}, "are all zero"),
        ({"stem_weights": {"vocal": 1}}, r"name \['vocal'\], the stems are"),
        ({"stem_weights": {"vocals": -1}}, "the stem weight of vocals=-1 must be"),
        ({"stem_weights": {"vocals": 0, "drums": 0}}, "are all zero"),
        ({"n_fft": 1023}, "must be even"),
    ],
)
def test_weights_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SourceSeparationLoss(STEMS, **arguments)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least one window"):
        MultiResolutionSTFTLoss(())
    for floor in (0, -1, math.nan):
        with pytest.raises(ValueError, match="must be a positive magnitude"):
            MultiResolutionSTFTLoss(floor=floor)
    with pytest.raises(ValueError, match="log_weight=-1 must be"):
        MultiResolutionSTFTLoss(log_weight=-1)
    with pytest.raises(ValueError, match="is no ceiling"):
        SDRLoss(math.nan)
