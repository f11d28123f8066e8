"""Execute lessons strictly: whatever a reader would call broken fails here.

papermill alone exits 0 when a parameter is misspelt (it runs with the defaults), when a widget
callback raises (the traceback lands in the widget's own output), and when a figure, a player or a
widget never appears. Here all of these are errors.

    python -m tfswa_lab.teaching.runner --full --device cuda 03_tfswa_unet

Notebook: 00_start_here
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from typing import Annotated

import papermill
import psutil
import typer
from ipykernel.kernelspec import get_kernel_dict
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from rich.console import Console
from rich.table import Table
from rich.text import Text
from traitlets import Type

from tfswa_lab.memory.gauges import process_peak
from tfswa_lab.memory.sizes import MIB, format_bytes

UNLIMITED = 10**6  # seconds
# The kernel draws into the notebook, whatever the user's environment or matplotlibrc says.
INLINE = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
PICTURE, WIDGET, PLAYER = "image/png", "application/vnd.jupyter.widget-view+json", "text/html"
OUTPUT_OF = {r"show|plot_\w+": PICTURE, "explore|interact": WIDGET, "play": PLAYER}
MAYBE = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.If, ast.IfExp, ast.Try, ast.For, ast.While)


@dataclass(frozen=True)
class NotebookRun:
    """What one execution cost: host memory of the kernel, `error` empty if all went well."""

    name: str
    seconds: float
    peak_bytes: int | None
    error: str = ""


class WidgetError(RuntimeError):
    """A widget callback raised while the notebook itself ran to the end."""


class MissingOutputError(RuntimeError):
    """A cell draws, or makes a player or a widget, and nothing of that kind appeared."""


def run_notebook(
    path: str | Path,
    output: str | Path,
    parameters: Mapping[str, object],
    timeout_seconds: float,
) -> NotebookRun:
    """Execute one notebook in its own folder, in a fresh kernel of this interpreter.

    Its drawings are copied beside the executed copy, whose text shows them.

    Args:
        path: the notebook; it is read, never written.
        output: where the executed copy goes, also when execution fails.
        parameters: values for its cell tagged `parameters`.
        timeout_seconds: limit for the whole notebook.

    Raises:
        ValueError: the notebook has no such parameter.
        papermill.PapermillExecutionError: a cell raised.
        WidgetError: a widget callback raised.
        MissingOutputError: a figure, a player or a widget did not appear.
        TimeoutError: the notebook took longer than `timeout_seconds`.
        DeadKernelError: the kernel ended, for instance because memory ran out.
    """
    path, output = Path(path), Path(output)
    refuse_unknown_parameters(path, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    _copy_drawings(path.parent / "figures", output.parent / "figures")
    watch = _KernelWatch(timeout_seconds)
    start = time.perf_counter()
    try:
        notebook = papermill.execute_notebook(
            str(path),
            str(output),
            parameters=dict(parameters),
            cwd=path.parent,
            kernel_name="python3",
            kernel_manager_class=_kernel_manager(watch),
            progress_bar=False,
            start_timeout=UNLIMITED,  # the only limit is `timeout_seconds`
            iopub_timeout=UNLIMITED,
        )
    except RuntimeError as error:  # nbclient's own, or a plain one while the kernel starts
        if watch.expired or "died" in str(error):
            raise watch.ending(path.name, error) from error
        raise
    finally:
        watch.stop()
    seconds = time.perf_counter() - start
    if errors := widget_errors(notebook):
        raise WidgetError(f"{path.name}: a widget callback raised {'; '.join(errors)}")
    if missing := missing_outputs(notebook):
        raise MissingOutputError(f"{path.name}: {'; '.join(missing)}")
    return NotebookRun(path.stem, seconds, watch.peak_bytes)


def _copy_drawings(source: Path, target: Path) -> None:
    if source.is_dir() and source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True)


def refuse_unknown_parameters(path: Path, parameters: Mapping[str, object]) -> None:
    """Stop at a misspelt parameter, which would otherwise leave the default in force."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such notebook")
    known = set(papermill.inspect_notebook(str(path)))
    if unknown := set(parameters) - known:
        raise ValueError(
            f"{path.name} has no parameter {sorted(unknown)}; its parameters are {sorted(known)}"
        )


def widget_errors(notebook: NotebookNode) -> list[str]:
    """The exceptions that widget callbacks raised, one line each: `ZeroDivisionError: …`."""
    saved = notebook.metadata.get("widgets", {}).values()
    states = [model["state"] for widgets in saved for model in widgets["state"].values()]
    outputs = [output for state in states for output in state.get("outputs", [])]
    return [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]


def missing_outputs(notebook: NotebookNode) -> list[str]:
    """Outputs that cells should have shown and did not: `cell fit-code shows no image/png`.

    A semicolon behind a widget hides it, as does a line after it, and a matplotlib that draws
    elsewhere shows no figure.
    """
    missing = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = {kind for output in cell.outputs for kind in output.get("data", ())}
            wanted = expected_outputs(cell.source) - shown
            missing += [f"cell {cell.get('id', '?')} shows no {kind}" for kind in sorted(wanted)]
    return missing


def expected_outputs(source: str) -> set[str]:
    """Kinds of output that a cell's calls must show, those in functions and branches left out.

    >>> expected_outputs("%load_ext x\\nfig, ax = plots.plot_mask(mask)")
    {'image/png'}
    """
    called, ahead = set(), [ast.parse(TransformerManager().transform_cell(source))]
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.Call):
            called.add(getattr(node.func, "attr", getattr(node.func, "id", "")))
        ahead += [child for child in ast.iter_child_nodes(node) if not isinstance(child, MAYBE)]
    return {
        kind for name, kind in OUTPUT_OF.items() if any(re.fullmatch(name, call) for call in called)
    }


class _AttentiveChannel(AsyncZMQSocketChannel):
    """A channel that looks again every half second.

    While a cell with a widget runs, jupyter_client writes to the same socket past its asyncio
    wrapper, which may then miss that the cell's reply has come, and wait for ever.
    """

    async def get_msg(self, timeout: float | None = None) -> dict:
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while not await self.socket.poll(500):
            if time.monotonic() > deadline:
                raise Empty
        return await self._recv()


class _AttentiveClient(AsyncKernelClient):
    """The usual client, with that channel for the replies."""

    shell_channel_class = Type(_AttentiveChannel)


def _kernel_manager(watch: _KernelWatch) -> type[AsyncKernelManager]:
    """A manager that starts this interpreter, whatever the user has registered as python3."""

    class Kernel(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict())
        client_factory = Type(_AttentiveClient)

        async def start_kernel(self, **options) -> None:
            await super().start_kernel(env=os.environ | INLINE, **options)
            watch.follow(self.provisioner.pid)

        async def shutdown_kernel(self, *arguments, **options) -> None:
            watch.look()  # the last cell's peak may be newer than the last look
            await super().shutdown_kernel(*arguments, **options)

    return Kernel


class _KernelWatch(threading.Thread):
    """Beside a running kernel: note its memory, end it at the deadline.

    papermill's own limit counts per cell; a lesson's limit is for the whole lesson.
    """

    def __init__(self, timeout_seconds: float) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.expired = False
        self._timeout_seconds = timeout_seconds
        self._ended = threading.Event()

    def follow(self, pid: int) -> None:
        self._kernel = psutil.Process(pid)
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        try:
            while not self._ended.wait(0.02):  # the peak of a dead kernel cannot be read
                self.look()
                if time.monotonic() > deadline:
                    self.expired = True
                    self._kernel.kill()
        except psutil.NoSuchProcess:
            return

    def look(self) -> None:
        """Note the kernel's memory; once it has gone, there is nothing to note."""
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            self.peak_bytes = max(self.peak_bytes, process_peak(self._kernel))

    def ending(self, name: str, error: Exception) -> Exception:
        """The error for a kernel that ended too early, with its peak memory."""
        had = f"its kernel had taken at least {format_bytes(self.peak_bytes)}"
        if self.expired:
            return TimeoutError(f"{name}: not finished after {self._timeout_seconds} s; {had}")
        return DeadKernelError(f"{name}: {error}; {had}")

    def stop(self) -> None:
        self._ended.set()


def try_notebook(
    path: Path, output: Path, parameters: Mapping[str, object], timeout_seconds: float
) -> NotebookRun:
    """Like `run_notebook`, but a failure becomes a line in the table, so that the rest can run."""
    start = time.perf_counter()
    try:
        return run_notebook(path, output, parameters, timeout_seconds)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [""]
        text = f"{type(error).__name__}: {reason[0]}"
        return NotebookRun(path.stem, time.perf_counter() - start, None, text)


def runs_table(runs: list[NotebookRun]) -> Table:
    """Run time and peak memory per notebook, for the terminal."""
    table = Table("notebook", "seconds", "peak MiB", "result")
    for run in runs:
        peak = "" if run.peak_bytes is None else f"{run.peak_bytes / MIB:.0f}"
        result = Text(run.error or "ok", style="red" if run.error else "green")
        table.add_row(run.name, f"{run.seconds:.1f}", peak, result)
    return table


def main(
    names: Annotated[list[str] | None, typer.Argument(help="03_tfswa_unet …; all if none")] = None,
    quick: Annotated[bool, typer.Option("--quick/--full", help="seconds on a CPU, or all")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    data_root: Annotated[str, typer.Option(help="MUSDB18-shaped folder; the band if none")] = "",
    notebooks: Annotated[Path, typer.Option(help="folder of the lessons")] = Path("notebooks"),
    output: Annotated[Path, typer.Option(help="for executed copies")] = Path("build/notebooks"),
    timeout: Annotated[float, typer.Option(help="limit per lesson in seconds")] = 600.0,
) -> None:
    """Execute lessons, print time and peak memory of each, and write times.json."""
    paths = [notebooks / f"{name}.ipynb" for name in names or ()]
    paths = paths or sorted(notebooks.glob("*.ipynb"))
    data = str(Path(data_root).resolve()) if data_root else ""
    parameters = {"quick": quick, "device": device, "data_root": data}
    runs = [try_notebook(path, output / path.name, parameters, timeout) for path in paths]
    Console().print(runs_table(runs))
    output.mkdir(parents=True, exist_ok=True)
    (output / "times.json").write_text(json.dumps([asdict(run) for run in runs], indent=2) + "\n")
    sys.exit(any(run.error for run in runs))


if __name__ == "__main__":
    typer.run(main)
