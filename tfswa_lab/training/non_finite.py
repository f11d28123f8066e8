"""What happens when a loss is not a number: the run stops, and the batch can be looked at.

Notebook: 07_training
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file


class NonFiniteError(FloatingPointError):
    """Loss or gradient became infinite or NaN: names the songs, and where their samples are.

    Args:
        what: e.g. "the loss is nan".
        step: updates done before.
        batches: those that may have caused it, as the network saw them.
        folder: where to write them, None for nowhere.
        rank: the process, for the names of the files.

    Notebook: 07_training
    """

    def __init__(self, what: str, step: int, batches: list[dict], folder: Path | None, rank: int):
        songs = "; ".join(describe_batch(batch) for batch in batches)
        message = f"{what} in step {step + 1}. The batch: {songs}."
        if folder is not None:
            name = f"non_finite_batch_step_{step + 1}_rank_{rank}"
            files = [
                write_batch(folder / f"{name}_part_{part}.safetensors", batch)
                for part, batch in enumerate(batches)
            ]
            message += f" Its samples are in {', '.join(map(str, files))}."
        super().__init__(f"{message} Lower the learning rate, or look for what is wrong with it.")


def describe_batch(batch: dict) -> str:
    """The songs of a batch and where its stretches start.

    >>> describe_batch({"track": ["A", "B"], "start_seconds": [1.5, 0]})
    'A at 1.50 s, B at 0.00 s'

    Notebook: 07_training
    """
    places = zip(batch["track"], batch["start_seconds"], strict=True)
    return ", ".join(f"{track} at {float(start):.2f} s" for track, start in places)


def write_batch(path: Path, batch: dict) -> Path:
    """Write the tensors of a batch as safetensors, its songs as `metadata["track"]` (JSON).

    Notebook: 07_training
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: batch[name].contiguous() for name in ("mixture", "stems", "start_seconds")}
    save_file(tensors, path, metadata={"track": json.dumps(batch["track"])})
    return path
