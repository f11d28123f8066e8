"""Whole songs are scored without a copy of all of them in float64, or all their spectra at once."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tfswa_lab.evaluation.oracles import ideal_ratio_mask, multichannel_wiener
from tfswa_lab.evaluation.ratios import si_sdr, usdr


class Peak(TorchDispatchMode):
    """The most bytes alive at once, of those that operations made beside their arguments."""

    def __init__(self, *given):
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage):
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.bytes = max(self.bytes, sum(self.alive.values()))
            weakref.finalize(storage, self.alive.pop, storage._cdata)


def peak_bytes(call, *given):
    with Peak(*given) as peak:
        call(*given)
    return peak.bytes


def song(seconds):
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(4, 2, round(seconds * 44_100), generator=generator)


def test_the_count_is_right():
    x = torch.ones(1000)
    assert peak_bytes(lambda x: (x + 1).double() + 1, x) == 16_000
    assert peak_bytes(lambda x: x.view(10, 100)[3:].mT, x) == 0


@pytest.mark.parametrize("ratio", [usdr, si_sdr])
def test_ratios_take_no_more_for_a_longer_song(ratio):
    short, long = (peak_bytes(ratio, song(x), song(x)) for x in (4, 20))
    assert long <= 1.1 * short


# In the memory of the stems themselves; all of their spectra are four.
@pytest.mark.parametrize(("oracle", "most"), [(ideal_ratio_mask, 4.5), (multichannel_wiener, 7.5)])
def test_oracles_transform_one_waveform_at_a_time(oracle, most):
    stems = song(10)
    assert peak_bytes(oracle, stems.sum(0), stems) / stems.nbytes <= most
