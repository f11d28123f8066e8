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
        what: e.g. "the loss is nan in step 12".
        songs: descriptions of the batches that may have caused it, of all processes.
        files: where these batches are.
    """

    def __init__(self, what: str, songs: list[str], files: list[str]):
        message = f"{what}. The batch: {'; '.join(songs)}."
        if files:
            message += f" Its samples are in {', '.join(files)}."
        super().__init__(f"{message} Lower the learning rate, or look for what is wrong with it.")


def describe_batch(batch: dict) -> str:
    """The songs of a batch and where its stretches start.

    >>> describe_batch({"track": ["A", "B"], "start_seconds": [1.5, 0]})
    'A at 1.50 s, B at 0.00 s'
    """
    places = zip(batch["track"], batch["start_seconds"], strict=True)
    return ", ".join(f"{track} at {float(start):.2f} s" for track, start in places)


def write_batches(folder: Path | None, step: int, rank: int, batches: list[dict]) -> list[str]:
    """Write the tensors of batches as safetensors, their songs as `metadata["track"]` (JSON).

    Mixture and stems are those that the network and the loss got, augmented.

    Args:
        folder: of the run, None to write nothing.
        step: updates done before.
        rank: of the process.
        batches: one file each.

    Returns:
        What there is to be looked at; where a file could not be written, why.
    """
    written = []
    for part, batch in enumerate(batches if folder else []):
        path = folder / f"non_finite_batch_step_{step + 1}_rank_{rank}_part_{part}.safetensors"
        tensors = {name: batch[name].contiguous() for name in ("mixture", "stems", "start_seconds")}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, metadata={"track": json.dumps(batch["track"])})
        except OSError as error:  # must not hide why the run stops
            written.append(f"no file ({error})")
        else:
            written.append(str(path))
    return written
