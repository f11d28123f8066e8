"""What to do about a holder that is known: by its class, by classes on the way, or by its name.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tfswa_lab.memory.leaks.spelling import outputs_of

OUTPUTS = "IPython.outputs"
AUTOCAST = "torch.autocast"

FUTURE = "a future keeps its result: take the results, and drop the futures"
QUEUE = "the queue is filled faster than it is emptied: give it a maxsize, so that `put` waits"
FIGURE = "close each figure: `plt.close(figure)`; pyplot keeps all figures until then"
KV_CACHE = (
    "the key/value cache gets longer with each token: make a new one for each sequence, and crop "
    "it (`cache.crop(…)`)"
)
LOGGING = "a log record keeps its arguments: log `.item()`, and empty handlers that collect"
WRITER = "the writer keeps what it has not written: give it `.item()`, call `writer.flush()`"
TEE = "itertools.tee keeps all that one iterator is ahead of the other: advance both"
LOCAL = "what is stored for a thread lives as long as the thread: delete it when a task ends"
CONTEXT = "reset a context variable: `variable.reset(token)`, with the token that `set` returned"

# By the package and the name of a class.
BY_CLASS = {
    OUTPUTS: (
        "IPython keeps the value of each cell's last line: end the line with `;`, or use "
        "`%reset out`, or configure `c.InteractiveShell.cache_size = 0`"
    ),
    AUTOCAST: (
        "leave autocast in each step (`with torch.autocast(…):`), or use cache_enabled=False; "
        "`.item()` and `.detach()` do not help"
    ),
    "itertools.cycle": (
        "itertools.cycle keeps all that it gave: write a generator with "
        "`while True: yield from loader`"
    ),
    "itertools._tee": TEE,
    "itertools._tee_dataobject": TEE,
    "functools._lru_cache_wrapper": (
        "bound the cache, `lru_cache(maxsize=…)`, or empty it with `cache_clear()`"
    ),
    "torchmetrics.Metric": (
        "call `metric.reset()` after each epoch: until then, a metric keeps its states"
    ),
    "matplotlib.Figure": FIGURE,
    "matplotlib.Artist": FIGURE,
    "matplotlib.Gcf": FIGURE,
    "torch.RemovableHandle": "remove hooks that are no longer needed: `handle.remove()`",
    "transformers.Cache": KV_CACHE,
    "transformers.DynamicCache": KV_CACHE,
    **dict.fromkeys(("concurrent.Future", "asyncio.Future", "_asyncio.Future"), FUTURE),
    **dict.fromkeys(("asyncio.Task", "_asyncio.Task"), FUTURE),
    **dict.fromkeys(("queue.Queue", "_queue.SimpleQueue", "asyncio.Queue"), QUEUE),
    "_thread._local": LOCAL,
    "_threading_local.local": LOCAL,
    "threading.Thread": "a thread object keeps its attributes: `join()` it, and drop it",
    **dict.fromkeys(("_contextvars.Context", "_contextvars.ContextVar"), CONTEXT),
    **dict.fromkeys(("logging.LogRecord", "logging.Handler", "logging.Logger"), LOGGING),
    **dict.fromkeys(("torch.SummaryWriter", "tensorboard.EventFileWriter"), WRITER),
    "warnings.WarningMessage": "leave `warnings.catch_warnings(record=True)`, or empty its list",
}
# By the name of a holder, as code.
BY_NAME = {
    r"^last_(exc|value|traceback)\b": (
        "the interpreter keeps its last error: `sys.last_exc = sys.last_value = "
        "sys.last_traceback = None`"
    ),
    r"past_key_value|kv_?cache|key_value_cache": KV_CACHE,
    r"__warningregistry__": "clear the module's `__warningregistry__`, or warn with equal texts",
    r"_hooks\[": "remove the hook, `handle.remove()`, or empty what it keeps",
}


NEAR = 4  # objects above a holder that are a part of it, such as a queue's dictionary of attributes


def known_classes(chain: Sequence[Any], at: int) -> tuple[str, ...]:
    """The classes of `BY_CLASS` in a chain of holders, the nearest to its end first.

    Args:
        chain: objects, each of which holds the next one.
        at: the place of the holder that is named; what is far above says nothing about it.

    >>> from queue import Queue
    >>> known_classes([Queue(), [], "tensor"], 1)
    ('queue.Queue',)
    """
    near = chain[max(0, at - NEAR) :]
    kinds = [thing if isinstance(thing, type) else type(thing) for thing in reversed(near)]
    found = [name for kind in kinds for name in _names(kind) if name in BY_CLASS]
    if len(chain) > 1 and chain[1] is outputs_of(chain[0]):
        found.append(OUTPUTS)
    return tuple(dict.fromkeys(found))


def _names(kind: type) -> Iterable[str]:
    for each in kind.__mro__:
        yield f"{str(each.__module__).split('.')[0]}.{each.__name__}"


def cure(classes: Sequence[str], name: str) -> str:
    """What to do about a holder; empty if nothing special is known.

    Args:
        classes: from `known_classes`.
        name: of the holder, as code.
    """
    if classes:
        return BY_CLASS[classes[0]]
    found = (what for pattern, what in BY_NAME.items() if re.search(pattern, name, re.I))
    return next(found, "")
