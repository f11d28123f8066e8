"""Masks on what the network sees: torchaudio's own, and only in training."""

import pytest
import torch
from torch import nn

from tfswa_lab.data.augment import SpectrogramMasking
from tfswa_lab.models.separator import build_separator


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_masks_are_those_of_torchaudio():
    from torchaudio.functional import mask_along_axis_iid

    features = torch.randn(8, 1, 200, 500, generator=seeded())
    for bins, frames, axis in ((80, 0, 3), (0, 40, 2)):
        masking = SpectrogramMasking(bins, frames, max_share=1.0)
        generator = seeded(5)
        if axis == 2:
            torch.rand(16, generator=generator)  # the numbers of the band come first
        with torch.random.fork_rng():
            torch.set_rng_state(generator.get_state())
            peer = mask_along_axis_iid(features, bins + frames, 0.0, axis)
        assert torch.equal(masking(features, seeded(5)), peer)


def test_masks_hide_whole_lines_within_their_limits():
    features = torch.ones(300, 2, 120, 400)
    new = SpectrogramMasking()(features, seeded())
    assert torch.equal(new[:, 0], new[:, 1])
    bins = (new[:, 0] == 0).all(1).sum(1)
    frames = (new[:, 0] == 0).all(2).sum(1)
    assert 70 < bins.max() <= 80
    assert 25 < frames.max() <= 30  # a quarter of 120
    outside = (400 - bins) * (120 - frames)
    assert torch.equal(new[:, 0].sum((1, 2)), outside.float())
    assert len(set(bins.tolist())) > 40


def test_no_small_map_is_hidden_whole():
    new = SpectrogramMasking()(torch.ones(500, 1, 8, 8), seeded())
    assert new.mean((1, 2, 3)).min() >= 0.75**2


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_that_share_a_batch_hide_what_one_would(processes):
    masking, features = SpectrogramMasking(apply_prob=0.7), torch.ones(6, 2, 300, 200)
    whole = masking(features, torch.Generator().manual_seed(0))
    for rank in range(processes):
        share = features[rank::processes]
        masked = masking(share, torch.Generator().manual_seed(0), rank, processes)
        assert torch.equal(masked, whole[rank::processes])


def test_masks_spare_the_items_they_are_not_applied_to():
    masking = SpectrogramMasking(apply_prob=0.3)
    new = masking(torch.ones(2000, 1, 100, 300), seeded())
    assert abs((new == 0).any(-1).any(-1).float().mean() - 0.3) < 0.04


class Seen(nn.Module):
    """A network that remembers what it saw and lets the whole mixture pass."""

    def __init__(self):
        super().__init__()
        self.sizes = {"in_channels": 2, "out_channels": 2}

    def forward(self, x):
        self.seen = x
        return torch.ones_like(x)


def masked_separator():
    separator = build_separator(("vocals",), dims=(8,) * 4, depths=(1,) * 4, num_heads=1)
    separator.model = Seen()
    return separator


def test_the_network_sees_less_and_the_estimate_still_has_all_of_the_mixture():
    separator, mixture = masked_separator(), torch.randn(2, 2, 60_000)
    separator(mixture)
    whole = separator.model.seen
    with SpectrogramMasking().applied(separator.model, seeded()):
        estimates = separator(mixture)
    hidden = separator.model.seen == 0
    assert hidden.any()
    assert torch.equal(separator.model.seen, SpectrogramMasking()(whole, seeded()))
    torch.testing.assert_close(estimates[:, 0], mixture, atol=1e-5, rtol=0)
    separator(mixture)
    assert torch.equal(separator.model.seen, whole)  # the masking ended with its block


def test_evaluation_and_averaged_copies_see_everything():
    separator, mixture = masked_separator(), torch.randn(1, 2, 60_000)
    average = torch.optim.swa_utils.AveragedModel(separator)
    separator(mixture)
    whole = separator.model.seen
    with SpectrogramMasking().applied(separator.model, seeded()):
        average(mixture)
        separator.eval()(mixture)
    assert torch.equal(separator.model.seen, whole)
    assert torch.equal(average.module.model.seen, whole)


def test_masking_reaches_a_wrapped_separator_and_ends_with_an_exception():
    separator = masked_separator()
    wrapped = nn.Sequential(separator)  # as DDP and Fabric: a module around the module
    with SpectrogramMasking().applied(separator.model, seeded()):
        wrapped(torch.randn(1, 2, 60_000))
    assert (separator.model.seen == 0).any()
    applied = SpectrogramMasking().applied(separator.model, seeded())
    with pytest.raises(ValueError, match="expected a mixture"), applied:
        wrapped(torch.randn(5))
    assert not separator.model._forward_pre_hooks
