"""What a user can act on as one line on stderr and exit status 1, without a frame or a traceback.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from typer.core import TyperGroup


class PlainErrors(TyperGroup):
    """A command whose usage errors look like all others: a frame of 80 columns would cut paths."""

    def main(self, *arguments: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Run the command; a wrong option ends it as a wrong value does."""
        try:
            status = super().main(*arguments, standalone_mode=False, **more)
        except typer.Abort:
            status = 1
        except Exception as error:
            if not hasattr(error, "format_message"):  # typer has no public name for these errors
                raise
            status = 1
            context = getattr(error, "ctx", None)
            hint = f" ({context.command_path} --help)" if context else ""
            is_help = "NoArgs" in type(error).__name__
            say(error.format_message() if is_help else f"Error: {error.format_message()}{hint}")
        if standalone_mode:
            sys.exit(status)
        return status


@contextmanager
def one_line_errors(advice: Callable[[], str]) -> Iterator[None]:
    """End the command with one line where its block raises an error that the user can act on.

    Args:
        advice: says how the command needs less memory, to follow "out of memory: …; ".

    Raises:
        typer.Exit: after the line; other errors pass with their traceback.
    """
    try:
        yield
    except Exception as error:
        message = explain(error, advice)
        if message is None:
            raise
        say(f"Error: {message}")
        raise typer.Exit(1) from error


def explain(error: Exception, advice: Callable[[], str]) -> str | None:
    """An error in words, if a user can act on it; None for a fault of the program."""
    # Imported here: `tfswa-lab --help` should not wait for torch.
    from tfswa_lab.memory.out_of_memory import is_out_of_memory

    if is_out_of_memory(error):
        return f"out of memory{_in_short(error)}; {advice()}"
    if isinstance(error, OSError | ValueError | FloatingPointError):
        return str(error)
    return None


def _in_short(error: Exception) -> str:
    """The size that was asked for, out of the many lines that torch writes; or nothing.

    >>> _in_short(RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has …"))
    ' (tried to allocate 9.00 GiB)'
    """
    texts = f"{error} {error.__cause__}"
    size = re.search(r"tried to allocate ([\d.]+ \w+)", texts, re.IGNORECASE)
    return f" (tried to allocate {size[1]})" if size else ""


def say(text: object, err: bool = True) -> None:
    """Print a line on stderr, or on stdout; nobody may be listening, and the work goes on."""
    with suppress(OSError):
        typer.echo(printable(text), err=err)


def printable(text: object) -> str:
    """Text as it can be printed: names of files may hold bytes that are no characters.

    >>> printable("caf\\udce9.wav")
    'caf?.wav'
    """
    return str(text).encode("utf-8", "replace").decode()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and Ctrl-C end the block by an exception, so that it can clean up.

    Only the first counts: another one would interrupt the cleaning.
    """
    names = ("SIGTERM", "SIGHUP", "SIGINT")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]

    def end(number: int, _frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)  # the status of shells

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if is_main}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup asks
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
