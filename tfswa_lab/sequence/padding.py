"""Sequences of unequal lengths as one tensor, for a model or a DataLoader.

Notebook: 11_hmm
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def pad_sequences(sequences: Sequence[Tensor], padding: float = 0) -> tuple[Tensor, Tensor]:
    """Stack sequences `(t_i, …)` into `(b, t, …)`, with their lengths `(b)`.

    Raises:
        ValueError: there are none, one is empty, or their frames differ in shape.

    >>> x, lengths = pad_sequences([torch.ones(3, 2), torch.ones(1, 2)])
    >>> tuple(x.shape), lengths.tolist()
    ((2, 3, 2), [3, 1])
    """
    tensors = [torch.as_tensor(sequence) for sequence in sequences]
    if not tensors:
        raise ValueError("there are no sequences")
    first = tensors[0]
    for place, tensor in enumerate(tensors):
        if tensor.ndim == 0 or len(tensor) == 0:
            raise ValueError(f"sequence {place} has no frames")
        if tensor.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"frames of sequence {place} have shape {tuple(tensor.shape[1:])}, those of "
                f"sequence 0 {tuple(first.shape[1:])}"
            )
    lengths = torch.tensor([len(tensor) for tensor in tensors])
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)
    return padded, lengths


def collate_padded(items: Sequence) -> tuple:
    """For `DataLoader(collate_fn=…)`: sequences become padded batches with their lengths.

    Args:
        items: sequences `(t_i, …)`, or tuples whose first entry is one. Further entries of the same
            length in frames, such as states, are padded with -1; all others are stacked.

    Returns:
        `(x, lengths)`, or `(x, lengths, …)`.
    """
    if not isinstance(items[0], (tuple, list)):
        return pad_sequences(items)
    columns = list(zip(*items, strict=True))
    x, lengths = pad_sequences(columns[0])
    return (x, lengths, *(_collated(column, lengths) for column in columns[1:]))


def _collated(column: Sequence, lengths: Tensor) -> Tensor:
    tensors = [torch.as_tensor(entry) for entry in column]
    by_frame = all(
        tensor.ndim > 0 and len(tensor) == length
        for tensor, length in zip(tensors, lengths.tolist(), strict=True)
    )
    return pad_sequences(tensors, padding=-1)[0] if by_frame else torch.stack(tensors)


class BucketSampler(torch.utils.data.Sampler):
    """Batches of sequences of similar length, for `DataLoader(batch_sampler=…)`.

    Args:
        lengths: of all sequences.
        batch_size: sequences in a batch; the last batch may be smaller.
        generator: shuffles the batches, anew in each epoch; without one they keep their order.

    >>> list(BucketSampler([9, 1, 8, 2], 2))
    [[1, 3], [2, 0]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        generator: torch.Generator | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
        order = torch.argsort(torch.as_tensor(lengths), stable=True).tolist()
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self.generator = generator

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        number = len(self.batches)
        order = range(number)
        if self.generator is not None:
            order = torch.randperm(number, generator=self.generator).tolist()
        return (self.batches[place] for place in order)
