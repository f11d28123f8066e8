"""Checks of lesson 03: count a block, apply the masks, take a view away.

Axis letters: `b` batch, `n` stems, `c` channels, `f` frequency bins, `t` frames, `s` samples.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from tfswa_lab.models.attention import (
    FrequencySequenceAttention,
    ShiftedWindowAttention,
    TemporalSequenceAttention,
)
from tfswa_lab.models.separator import Separator, build_separator
from tfswa_lab.models.tfswa_block import TFSWABlock
from tfswa_lab.stft import STFTProcessor
from tfswa_lab.teaching.checks import mismatch_or_mistake, verdict

VIEWS = {
    "tsa": TemporalSequenceAttention,
    "fsa": FrequencySequenceAttention,
    "swa": ShiftedWindowAttention,
}


def check_block_parameters(block_parameters: Callable[[int], object]) -> bool:
    """Exercise 1: `block_parameters(c)` is the number of parameters of a TFSWA block."""
    for c in (8, 32, 256):
        if hint := _count_hint(block_parameters(c), c):
            return verdict("block_parameters", f"{c} channels: {hint}")
    return verdict("block_parameters", None)


def _count_hint(got: object, c: int) -> str | None:
    block = TFSWABlock(c, num_heads=1)
    expected = sum(p.numel() for p in block.parameters())
    buffers = sum(b.numel() for b in block.buffers() if b.ndim)
    mistakes = {
        "the attentions are right; add the input projection and the fusion": 36 * c**2 + 30 * c,
        "both batch norms have a weight and a bias per channel": expected - 4 * c,
        "running mean and variance are buffers: no optimiser changes them": expected + buffers,
    }
    return mismatch_or_mistake(got, expected, mistakes)


def check_apply_masks(
    apply_masks: Callable[[Tensor, Tensor, STFTProcessor, int], object],
) -> bool:
    """Exercise 2: `apply_masks(output, spectrogram, stft, length)` gives stems `(b, n, c, s)`.

    `output` `(b, n·c, t, f)` is what the network returns, `spectrogram` `(b, c, f, t)` the
    mixture's.
    """
    stft, generator = STFTProcessor(64, 16), torch.Generator().manual_seed(0)
    for stems, length in [(1, 512), (2, 512), (4, 777)]:
        spectrogram = stft(torch.randn(2, 2, length, generator=generator))
        t, f = spectrogram.shape[3], spectrogram.shape[2]
        output = torch.rand(2, stems * 2, t, f, generator=generator)
        got = apply_masks(output.clone(), spectrogram.clone(), stft, length)
        if hint := _stems_hint(got, output, spectrogram, stft, length):
            return verdict("apply_masks", f"n = {stems}, {length} samples: {hint}")
    return verdict("apply_masks", None)


def _stems_hint(
    got: object, output: Tensor, spectrogram: Tensor, stft: STFTProcessor, length: int
) -> str | None:
    def stems(fold: str, values: Tensor) -> Tensor:
        masks = rearrange(values, f"b {fold} t f -> b n c f t", c=2)
        return stft.istft(masks * spectrogram[:, None], length)

    mistakes = {
        "the network has its own sigmoid; a second one never falls below 0.5": (
            stems("(n c)", output.sigmoid())
        ),
        "outputs 0 and 1 are left and right of the first stem, not two stems": (
            stems("(c n)", output)
        ),
    }
    return mismatch_or_mistake(got, stems("(n c)", output), mistakes)


def check_without(without: Callable[[Separator, str], object]) -> bool:
    """Exercise 3: `without(separator, view)` is a copy in which no block has that view."""
    sizes = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}
    for view in VIEWS:
        separator = build_separator(("vocals", "other"), n_fft=64, hop_length=16, **sizes)
        before = _parameters(separator)
        changed = without(separator, view)
        if _parameters(separator) != before:
            return verdict("without", f"{view}: the original has lost it too; work on a copy")
        if hint := _without_hint(changed, view, before):
            return verdict("without", f"{view}: {hint}")
    return verdict("without", None)


def _without_hint(changed: object, view: str, before: int) -> str | None:
    if not isinstance(changed, Separator):
        return f"expected a Separator, got {type(changed).__name__}"
    kept = {name: _count(changed, unit) for name, unit in VIEWS.items()}
    if kept.pop(view):
        return "some block still has it: encoder, bottleneck and decoder have seven in all"
    if set(kept.values()) != {7}:
        return f"the other two views should stay in all seven blocks, found {kept}"
    if _parameters(changed) != before - 7 * (12 * 8**2 + 10 * 8):
        return "seven units should be gone with their parameters, and nothing else"
    mixture = torch.randn(1, 2, 1600, generator=torch.Generator().manual_seed(0))
    if not _sees(changed.model.encoder[0][0], view):
        return None if changed(mixture).shape == (1, 2, 2, 1600) else "it no longer gives two stems"
    return "an output cell still depends on cells that only this view could see"


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _count(module: nn.Module, unit: type[nn.Module]) -> int:
    return sum(isinstance(m, unit) for m in module.modules())


def _sees(block: TFSWABlock, view: str) -> bool:
    """Whether cell (1, 1) of the block's output moves with a cell that only `view` reaches."""
    x = torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    training = block.training
    block.eval()(x)[0, :, 1, 1].square().sum().backward()  # in training, batch norm reaches all
    block.train(training)
    cell = {"tsa": (9, 1), "fsa": (1, 9), "swa": (2, 2)}[view]
    return bool(x.grad[0, :, *cell].any())
