"""A user's mistakes and a lack of memory as one line on stderr and an exit status, no traceback.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line_errors(advice: Callable[[], str], bad_input: int = 1) -> Iterator[None]:
    """End the command with one line where its block raises an error that the user can act on.

    Args:
        advice: says how the command needs less memory, to follow "out of memory: …; ".
        bad_input: exit status for missing files and wrong values; out of memory is always 1.

    Raises:
        typer.Exit: after the line; other errors pass with their traceback.
    """
    try:
        yield
    except Exception as error:
        # Imported here: `tfswa-lab --help` should not wait for torch.
        from tfswa_lab.memory.out_of_memory import is_out_of_memory

        if is_out_of_memory(error):
            status, message = 1, f"out of memory{_in_short(error)}; {advice()}"
        elif isinstance(error, OSError | ValueError | FloatingPointError):
            status, message = bad_input, str(error)
        else:
            raise
        typer.echo(f"Error: {message}", err=True)  # unframed: commands in it can be copied
        raise typer.Exit(status) from error


def _in_short(error: Exception) -> str:
    """The size that was asked for, out of the many lines that torch writes; or nothing.

    >>> _in_short(RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has …"))
    ' (tried to allocate 9.00 GiB)'
    """
    texts = f"{error} {error.__cause__}"
    size = re.search(r"tried to allocate ([\d.]+ \w+)", texts, re.IGNORECASE)
    return f" (tried to allocate {size[1]})" if size else ""
