"""A run on disk, whole or not at all, and proof of it.

    RUN/checkpoints/step_00000120.ckpt      and the one before it

A file is a line `tfswa-lab checkpoint 1 <sha256> <bytes>` and as many bytes as it says, written by
`torch.save` and read with `weights_only=True`: tensors and plain containers, nothing that runs.

Notebook: 07_training
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from tfswa_lab.durable import write_whole

MAGIC = "tfswa-lab checkpoint 1"
FOLDER = "checkpoints"


def save_checkpoint(run: str | Path, step: int, state: Mapping, before: Path | None = None) -> Path:
    """Write the state of a run after `step` steps; keep it and the one before.

    A process or machine that dies at any moment leaves the checkpoints before.

    Args:
        run: the folder of the run.
        step: part of the file's name.
        state: tensors, numbers, strings, None, and tuples, lists and dicts of them.
        before: the checkpoint that this run wrote or read last; all others are removed.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    path = checkpoint_path(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    _write(path, buffer.getbuffer())
    kept = {kept.resolve() for kept in (path, before) if kept}
    for other in [*list_checkpoints(run), *path.parent.glob(".step_*.part")]:
        if other.resolve() not in kept:
            other.unlink()
    return path


def checkpoint_path(run: str | Path, step: int) -> Path:
    """Where the state after `step` steps lies."""
    return Path(run) / FOLDER / f"step_{step:08d}.ckpt"


def _write(path: Path, content: memoryview) -> None:
    """A line that says what follows, and the content."""
    header = f"{MAGIC} {hashlib.sha256(content).hexdigest()} {len(content)}\n".encode()
    try:
        write_whole({path: [header, content]})
    except OSError as error:
        raise OSError(
            f"{path} ({len(content)} bytes) could not be written ({error}); make room and resume "
            "from the checkpoint before it"
        ) from error


def list_checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first; what else lies there under other names is yours."""
    paths = (Path(run) / FOLDER).glob("step_*.ckpt")
    return sorted(path for path in paths if re.fullmatch(r"step_\d{8,}\.ckpt", path.name))


def find_checkpoint(place: str | Path) -> Path:
    """The newest checkpoint of a run, or the very file that is named.

    Raises:
        FileNotFoundError: there is none.
    """
    place = Path(place)
    if place.is_file():
        return place
    checkpoints = list_checkpoints(place)
    if not checkpoints:
        raise FileNotFoundError(
            f"nothing to resume: {place} is neither a checkpoint nor the folder of a run that has "
            "one; to start a run there, leave resume out"
        )
    return checkpoints[-1]


def load_checkpoint(path: str | Path) -> dict:
    """Read what `save_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: the file is foreign, cut off or altered, and then the error names one that is
            whole, if any; or it holds something that could run.
    """
    path = Path(path)
    try:
        content = _verified(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}; {_offer(path)}") from None
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain containers, and is not opened; "
            "where does it come from?"
        ) from error


def _verified(path: Path) -> bytes:
    """What follows the first line, if it is what that line says."""
    with path.open("rb") as file:
        first = re.fullmatch(rf"{MAGIC} ([0-9a-f]{{64}}) (\d+)\n".encode(), file.readline(128))
        content = file.read() if first else b""
    if not first:
        raise ValueError("is not a checkpoint of tfswa-lab")
    digest, size = first[1].decode(), int(first[2])
    if len(content) != size:
        state = "is cut off" if len(content) < size else "has more than its end"
        raise ValueError(f"{state}: it has {len(content)} of {size} bytes")
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError("is damaged: its content does not match its digest")
    return content


def _offer(path: Path) -> str:
    """What to do instead of resuming from a broken checkpoint."""
    for other in sorted(path.parent.glob("step_*.ckpt"), reverse=True):
        try:
            _verified(other)
        except ValueError:
            continue
        return f"{other} is whole, go on from there: --resume {other}"
    return f"no other checkpoint in {path.parent} is whole, start the run again"
