"""Checks of lesson 07: the learning rate of a step, remixed songs, an order that can be resumed.

Axis letters: `b` batch, `n` stems, `c` channels, `s` samples.

Notebook: 07_training
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from tfswa_lab.teaching.checks import mismatch, verdict
from tfswa_lab.training.learner import warmup_cosine


def check_factor(factor: Callable[[int, int, int], object]) -> bool:
    """Exercise 1: `factor(step, warmup_steps, total_steps)` of the learning rate, steps from 0."""
    for warmup, total in [(4, 20), (1, 5), (10, 1000)]:
        for step in (0, warmup - 1, warmup, (warmup + total) // 2, total - 1):
            if hint := _factor_hint(factor(step, warmup, total), step, warmup, total):
                name = f"factor({step}, {warmup}, {total})"
                return verdict("factor", f"{name}: {hint}")
    return verdict("factor", None)


def _factor_hint(got: object, step: int, warmup: int, total: int) -> str | None:
    hint = mismatch(got, warmup_cosine(step, warmup, total))
    if hint is None:
        return None
    if step < warmup and mismatch(got, step / warmup) is None:
        return "the first step would not move at all; count steps from 1 in the warm-up"
    if step >= warmup and mismatch(got, warmup_cosine(step, 0, total)) is None:
        return "the cosine starts where the warm-up ends, not at step 0"
    return hint


def check_remix(remix: Callable[[Tensor, Generator], object]) -> bool:
    """Exercise 2: `remix(stems, generator)` gives a new mixture `(b, c, s)` and its stems."""
    # The value of every sample tells item and stem: 10 b + n + 1.
    names = 10.0 * torch.arange(6)[:, None] + torch.arange(3) + 1
    stems = names[..., None, None].expand(6, 3, 2, 4).clone()
    answers = [remix(stems, Generator().manual_seed(seed)) for seed in (0, 1, 0)]
    if not torch.equal(stems[:, :, 0, 0], names):
        return verdict("remix", "the stems you were given have changed; make new ones")
    for answer in answers:
        if hint := _remix_hint(answer, stems):
            return verdict("remix", hint)
    first, other, again = (answer[1] for answer in answers)
    if not torch.equal(first, again):
        return verdict("remix", "the same seed gave another order; draw from the generator only")
    if torch.equal(first, other):
        return verdict("remix", "two seeds gave the same order; draw it from the generator")
    return verdict("remix", None)


def _remix_hint(answer: object, stems: Tensor) -> str | None:
    if not (isinstance(answer, tuple) and len(answer) == 2):
        return "return two tensors: mixture, stems"
    mixture, new = answer
    if not isinstance(new, Tensor) or new.shape != stems.shape:
        return mismatch(new, stems)
    if torch.equal(new, stems):
        return "all stems are still with their own song"
    names, old = new[:, :, 0, 0], stems[:, :, 0, 0]  # (b, n)
    for stem in range(stems.shape[1]):
        if set(names[:, stem].tolist()) - set(old[:, stem].tolist()):
            return f"stem {stem} holds something else than stem {stem} of the songs"
        if len(set(names[:, stem].tolist())) < len(names):
            return "some stem comes twice and another is lost; shuffle, do not draw at random"
    songs = names // 10
    if bool((songs == songs[:, :1]).all()):
        return "the songs changed places as wholes; every stem needs an order of its own"
    if (hint := mismatch(mixture, new.sum(1))) is None:
        return None
    is_old = mismatch(mixture, stems.sum(1)) is None
    return "the mixture is still the old one" if is_old else f"the mixture: {hint}"


def check_batch_indices(batch_indices: Callable[[int, int, int, int], object]) -> bool:
    """Exercise 3: `batch_indices(step, length, batch_size, seed)`, which batch a step sees."""
    before = torch.get_rng_state()
    hint = _epochs_hint(batch_indices) or _chance_hint(batch_indices)
    if hint is None and not torch.equal(before, torch.get_rng_state()):
        hint = "torch's global generator has moved; use one of your own"
    return verdict("batch_indices", hint)


def _epochs_hint(batch_indices: Callable) -> str | None:
    """What is wrong with the first two epochs of a small data set."""
    length, size = 14, 4  # three batches an epoch, two indices left over
    epochs = []
    for first in (0, 3):
        batches = [batch_indices(step, length, size, 0) for step in range(first, first + 3)]
        for batch in batches:
            if not isinstance(batch, list) or len(batch) != size:
                return f"expected a list of {size} indices, got {batch!r}"
            if not all(isinstance(i, int) and 0 <= i < length for i in batch):
                return f"expected whole numbers from 0 to {length - 1}, got {batch}"
        epochs.append([index for batch in batches for index in batch])
        if len(set(epochs[-1])) < 3 * size:
            return f"within an epoch no index may come twice, got {batches}"
    return "every epoch has the same order" if epochs[0] == epochs[1] else None


def _chance_hint(batch_indices: Callable) -> str | None:
    """Whether a batch depends on step and seed, all of these, and nothing else."""
    length, size = 40, 8  # five batches an epoch
    later = batch_indices(12, length, size, 3)
    for step in range(12):
        batch_indices(step, length, size, 3)
    if batch_indices(12, length, size, 3) != later:
        return "step 12 sees another batch when it is asked for alone, as after a resume"
    if batch_indices(0, length, size, 0) == batch_indices(0, length, size, 1):
        return "two seeds give the same order"
    if batch_indices(5, length, size, 0) == batch_indices(0, length, size, 1):
        return (
            "epoch 1 of seed 0 is epoch 0 of seed 1: seed + epoch mixes them up; "
            "np.random.default_rng((seed, epoch)) does not"
        )
    return None
