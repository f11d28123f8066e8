"""How a run of steps ends early, and whether that is a failure.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from typing import NamedTuple

import torch

END_OF_DATA = (StopIteration, StopAsyncIteration, IndexError, EOFError)


class Ending(NamedTuple):
    """Why a run ended; of one that did not end early, all is empty.

    Args:
        words: which step, and the error.
        failed: whether the error is another one than those that tell the end of data.
        out_of_memory: whether there was no memory left.

    Notebook: 06_leak_diagnosis
    """

    words: str = ""
    failed: bool = False
    out_of_memory: bool = False


NOTHING = Ending()  # ended early


def ending_of(error: Exception, step: int) -> Ending:
    """The ending that an error makes of a run.

    Notebook: 06_leak_diagnosis

    >>> ending_of(StopIteration(), 12)
    Ending(words='step 12 ended with StopIteration', failed=False, out_of_memory=False)
    """
    said = ": ".join(filter(None, (type(error).__name__, str(error))))
    failed = not isinstance(error, END_OF_DATA)
    return Ending(f"step {step} ended with {said}", failed, is_out_of_memory(error))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory left, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
