"""Checks of lesson 00: decibels, karaoke, a balanced band.

Axis letters: `n` stems, `s` samples.

Notebook: 00_start_here
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tfswa_lab.audio import STEMS
from tfswa_lab.teaching.checks import mismatch, mismatch_or_mistake, verdict


def check_gain(gain: Callable[[float], object]) -> bool:
    """Exercise 1: `gain(db)` is the factor that changes a level by that many decibels."""
    for db, factor in [(20.0, 10.0), (0.0, 1.0), (-40.0, 0.01), (-6.0, 0.5012)]:
        mistakes = {"that is the factor for power; amplitudes take 20 in place of 10": factor**2}
        if hint := mismatch_or_mistake(gain(db), factor, mistakes, 1e-3):
            return verdict("gain", f"{db:g} dB: {hint}")
    return verdict("gain", None)


def check_karaoke(karaoke: Callable[[Tensor, Sequence[str], str], object]) -> bool:
    """Exercise 2: `karaoke(stems, names, mute)` is the sum of all stems but one."""
    stems = torch.randn(4, 2, 100, generator=torch.Generator().manual_seed(0))
    for names in (STEMS, STEMS[::-1]):
        for index, mute in enumerate(names):
            kept = [stem for position, stem in enumerate(stems) if position != index]
            if hint := mismatch(karaoke(stems.clone(), names, mute), torch.stack(kept).sum(0)):
                return verdict("karaoke", f"without {mute}, names {tuple(names)}: {hint}")
    return verdict("karaoke", None)


def check_balance(balance: Callable[[Tensor, float], object]) -> bool:
    """Exercise 3: `balance(stems, level_db)` brings every stem to that RMS level; silence stays."""
    noise = torch.randn(4, 2, 1000, generator=torch.Generator().manual_seed(1))
    for level_db, factors in [(-20.0, (1.0, 0.1, 3.0, 0.5)), (-35.0, (0.01, 0.0, 1.0, 2.0))]:
        stems = noise * torch.tensor(factors)[:, None, None]
        expected = torch.zeros_like(stems)
        for index, stem in enumerate(stems):
            if stem.any():
                expected[index] = stem * 10 ** (level_db / 20) / stem.square().mean().sqrt()
        if hint := mismatch(balance(stems.clone(), level_db), expected, 1e-3):
            silent = " (one of the stems is silent)" if 0.0 in factors else ""
            return verdict("balance", f"{level_db:g} dB{silent}: {hint}")
    return verdict("balance", None)
