"""Floor and ceilings: what physics says of masks and of the multichannel Wiener filter."""

import pytest
import torch

from tfswa_lab.evaluation.oracles import (
    BOUNDS,
    ideal_ratio_mask,
    multichannel_wiener,
    wiener_filter,
)
from tfswa_lab.evaluation.ratios import usdr
from tfswa_lab.evaluation.scoring import bound

ORACLES = [ideal_ratio_mask, multichannel_wiener]


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def panned(*gains, samples=40_000):
    """Mono noises at different places between left and right."""
    return torch.stack([torch.tensor(g)[:, None] * noise(1, samples, seed=i)
                        for i, g in enumerate(gains)])  # fmt: skip


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("samples", [100, 20_001])
def test_estimates_sum_to_the_mixture_and_one_stem_alone_comes_back(oracle, samples):
    stems = torch.stack([noise(2, samples), noise(1, samples, seed=1).expand(2, -1)])
    estimates = oracle(stems.sum(0), stems)
    assert estimates.shape == stems.shape
    torch.testing.assert_close(estimates.sum(0), stems.sum(0), atol=1e-6, rtol=0)
    alone = torch.stack([torch.zeros_like(stems[0]), stems[1]])
    torch.testing.assert_close(oracle(stems[1], alone), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("oracle", ORACLES)
def test_silence_stays_silent(oracle):
    silence = torch.zeros(2, 2, 5000)
    assert not oracle(silence[0], silence).any()


def test_two_noises_at_two_places_are_separated_by_their_places_alone():
    stems = panned([1.0, 0.2], [0.3, 1.0])
    ratio = usdr(stems, ideal_ratio_mask(stems.sum(0), stems))
    wiener = usdr(stems, multichannel_wiener(stems.sum(0), stems))
    assert ratio.max() < 15  # both are everywhere, so a mask cannot do much
    assert wiener.min() > 60  # two channels, two unknowns


def test_three_noises_in_two_channels_are_not_but_better_than_by_a_mask():
    stems = panned([1.0, 0.0], [0.0, 1.0], [0.7, 0.7])
    ratio = usdr(stems, ideal_ratio_mask(stems.sum(0), stems))
    wiener = usdr(stems, multichannel_wiener(stems.sum(0), stems))
    assert (wiener > ratio + 2).all()
    assert wiener.max() < 30


def test_noises_at_one_place_get_the_mask_of_their_powers():
    """Where places say nothing, the filter is the one-channel Wiener gain |S|² / Σ|S|²."""
    voices = torch.randn(3, 1, 20, 50, dtype=torch.complex64).expand(-1, 2, -1, -1)
    mixture = voices.sum(0)
    power = voices.abs().square()
    expected = power / power.sum(0) * mixture
    torch.testing.assert_close(wiener_filter(mixture, voices), expected, atol=1e-5, rtol=0)
    mono = wiener_filter(mixture[:1], voices[:, :1])
    torch.testing.assert_close(mono, expected[:, :1], atol=1e-5, rtol=0)


def test_the_filter_equals_the_formula_written_out():
    torch.manual_seed(0)
    sources = torch.randn(3, 2, 2, 7, dtype=torch.complex128)
    mixture = sources.sum(0)
    found = wiener_filter(mixture, sources)
    for f in range(2):
        v = sources[:, :, f].abs().square().mean(1)  # (n, t)
        R = [x @ x.mH / v[n].sum() for n, x in enumerate(sources[:, :, f])]
        for t in range(7):
            total = sum(v[n, t] * R[n] for n in range(3))
            for n in range(3):
                expected = v[n, t] * R[n] @ torch.linalg.solve(total, mixture[:, f, t])
                torch.testing.assert_close(found[n, :, f, t], expected, atol=1e-6, rtol=1e-6)


def test_the_rest_of_the_mixture_is_a_source_where_the_stems_are_not_all():
    stems = panned([1.0, 0.2], [0.3, 1.0], [0.8, 0.8])
    mixture = stems.sum(0)
    for name in BOUNDS:
        of_all = bound(name, mixture, stems, complete=True)
        of_some = bound(name, mixture, stems[:2], complete=False)
        torch.testing.assert_close(of_some, of_all[:2], atol=1e-5, rtol=0)


def test_channels_may_be_swapped_and_gains_changed():
    stems = panned([1.0, 0.0], [0.0, 1.0], [0.7, 0.7], samples=9000)
    mixture = stems.sum(0)
    for oracle in ORACLES:
        plain = oracle(mixture, stems)
        swapped = oracle(mixture.flip(0), stems.flip(1))
        torch.testing.assert_close(swapped.flip(1), plain, atol=1e-6, rtol=0)
        quiet = oracle(1e-3 * mixture, 1e-3 * stems)
        torch.testing.assert_close(1e3 * quiet, plain, atol=1e-6, rtol=0)
