"""The folder of a run: that it can be written to, holds no other run, and has one writer.

Notebook: 07_training
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lightning_fabric import Fabric

from tfswa_lab.durable import held
from tfswa_lab.training.checkpoint import list_checkpoints
from tfswa_lab.training.launch import gathered

BEST = "best"  # the best average so far, for `load_separator`


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
        checkpoint: what it goes on from, None for a run from the start.

    Raises:
        FileExistsError: the folder holds checkpoints, and this is none of them, or the weights of
            a run whose checkpoints are gone.
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
def only_writer(folder: Path | None, fabric: Fabric) -> Iterator[None]:
    """Hold the folder of a run; the system lets go of it however the process ends.

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
                stack.enter_context(held(folder, "training"))
            except FileExistsError as error:
                refusal = str(error)
        refusal = gathered(fabric, refusal)[0]
        if refusal:
            raise FileExistsError(refusal)
        yield
