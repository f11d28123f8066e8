"""A run on disk: checkpoints that are complete or absent, its folder, and its settings.

    RUN/checkpoints/step_00000120.ckpt      and the one before it
    RUN/best/                               the best average so far, for `load_separator`

A checkpoint is a line `tfswa-lab checkpoint 1 <sha256> <bytes>` and as many bytes as it says,
written by `torch.save` and read with `weights_only=True`: tensors and plain containers, nothing
that runs.

Notebook: 07_training
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from lightning_fabric import Fabric

from tfswa_lab import __version__
from tfswa_lab.durable import locked, write_whole
from tfswa_lab.training.launch import gathered

MAGIC = "tfswa-lab checkpoint 1"
FOLDER = "checkpoints"
BEST = "best"


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
    """The file of the state after `step` steps."""
    return Path(run) / FOLDER / f"step_{step:08d}.ckpt"


def _write(path: Path, content: memoryview) -> None:
    """The line of digest and size, then the content."""
    header = f"{MAGIC} {hashlib.sha256(content).hexdigest()} {len(content)}\n".encode()
    try:
        write_whole({path: [header, content]})
    except OSError as error:
        raise OSError(
            f"{path} ({len(content)} bytes) could not be written ({error}); make room and resume "
            "from the checkpoint before it"
        ) from error


def list_checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first; files of other names are left alone."""
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
        ValueError: the file is foreign, cut off or altered, and then the error names an intact
            checkpoint beside it, if there is one; or it holds something that could run.
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
    """The content after the first line, if it has the size and digest that the line names."""
    with path.open("rb") as file:
        first = re.fullmatch(rf"{MAGIC} ([0-9a-f]{{64}}) (\d+)\n".encode(), file.readline(128))
        content = file.read() if first else b""
    if not first:
        raise ValueError("is not a checkpoint of tfswa-lab")
    digest, size = first[1].decode(), int(first[2])
    if len(content) != size:
        state = "is cut off" if len(content) < size else "has extra bytes at its end"
        raise ValueError(f"{state}: it has {len(content)} of {size} bytes")
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError("is damaged: its content does not match its digest")
    return content


def _offer(path: Path) -> str:
    """Advice for a broken checkpoint: the newest intact one beside it, if there is one."""
    for other in sorted(path.parent.glob("step_*.ckpt"), reverse=True):
        try:
            _verified(other)
        except ValueError:
            continue
        return f"{other} is whole, go on from there: --resume {other}"
    return f"no other checkpoint in {path.parent} is whole, start the run again"


# The folder of a run ------------------------------------------------------------------------


def make_run_folder(folder: Path) -> None:
    """Make the folder of a run, before hours are spent on what could not be written.

    Raises:
        OSError: it is a file, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink(missing_ok=True)  # several processes may try at once
    except OSError as error:
        raise OSError(
            f"{folder} cannot be the folder of a run ({error.strerror}); choose another output_dir"
        ) from error


def refuse_another_run(folder: Path, checkpoint: Path | None) -> None:
    """Make sure that a run does not write over another.

    Args:
        folder: where it will write.
        checkpoint: the one that it goes on from, None for a run from the start.

    Raises:
        FileExistsError: the folder holds checkpoints but not this one, or it holds the weights of a
            run whose checkpoints are gone.
    """
    existing = [path.resolve() for path in list_checkpoints(folder)]
    if existing and (checkpoint is None or checkpoint.resolve() not in existing):
        raise FileExistsError(
            f"{folder} holds a run already; go on with it (--resume {folder}) or choose another "
            "folder"
        )
    if not existing and (folder / BEST).exists():
        raise FileExistsError(
            f"{folder / BEST} holds the weights of a run without checkpoints; choose another "
            "folder or move them away"
        )


@contextmanager
def exclusive(folder: Path | None, fabric: Fabric) -> Iterator[None]:
    """Keep other runs out of the folder of a run; the lock ends however the process ends.

    Args:
        folder: of the run, None for nowhere.
        fabric: its first process holds the lock, all processes hear of the refusal.

    Raises:
        FileExistsError: another run is writing there now.
    """
    if folder is None:
        yield
        return
    with ExitStack() as stack:
        refusal = ""
        if fabric.is_global_zero:
            try:
                stack.enter_context(locked(folder, "training"))
            except FileExistsError as error:
                refusal = str(error)
        refusal = gathered(fabric, refusal)[0]
        if refusal:
            raise FileExistsError(refusal)
        yield


# The same run -------------------------------------------------------------------------------

PACKAGES = ("torch", "lightning-fabric", "numpy")

# Settings that a resumed run may change; any other would make it another run.
MAY_CHANGE = (
    {"max_epochs", "max_steps", "patience"}
    | {"log_every_n_steps", "val_every_n_steps"}
    | {"checkpoint_every_n_steps", "checkpoint_every_n_minutes"}
    | {"activation_checkpointing", "num_workers", "device", "devices", "data_root"}
)


# Settings as earlier versions wrote them.
RENAMED = {"stretches": "segments"}
ADDED = {
    "training.model": "tfswa_unet",
    "training.size": "default",
    "separator.normalizer_settings.eps": 1e-5,
}


def check_same_run(saved: dict, current: dict) -> None:
    """Refuse to resume a run with settings that would make it another run.

    A checkpoint of an earlier version, which does not describe the audio, only causes a warning.

    Args:
        saved: nested settings out of a checkpoint.
        current: those of the run that wants to resume.

    Raises:
        ValueError: names every setting that differs, with both values.
    """
    new = _flat(current)
    old = {name: value for name, value in ADDED.items() if name in new}
    old |= {RENAMED.get(name, name): value for name, value in _flat(saved).items()}
    if "audio" not in old and new.get("audio"):
        old["audio"] = new["audio"]
        warnings.warn(
            "the checkpoint is of an earlier version, which kept only the names of the songs: make "
            "sure that their files are the same as then",
            stacklevel=2,
        )
    differing = [
        f"{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name.split(".")[-1] not in MAY_CHANGE
    ]
    if differing:
        raise ValueError(
            f"the checkpoint is of another run: {'; '.join(differing)}; resume with the same "
            "settings, or start a new run"
        )


def _flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings as `{"separator.sizes.dims": [8, 16, 24, 32]}`, in JSON's types."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.loads(json.dumps(value))
    return flat


def spelled(part: object) -> str:
    """The `repr` of a part, or its class's name where the `repr` is an address in memory.

    >>> from tfswa_lab.data.augment import Chain, Gain, Remix
    >>> spelled(Chain([Remix(), Gain((0.5, 2))]))
    'Chain(augmentations=[Remix(), Gain(factor=(0.5, 2), prob=1.0)])'
    >>> spelled(object())
    'object'
    """
    text = " ".join(repr(part).split())
    return text if " at 0x" not in text else getattr(part, "__name__", type(part).__name__)


def versions() -> dict[str, str]:
    """The versions of the packages on which the last bit of a result depends."""
    ours = {"python": platform.python_version(), "tfswa-lab": __version__}
    return ours | {name: version(name) for name in PACKAGES}
