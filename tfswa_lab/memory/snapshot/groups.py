"""Allocations of a snapshot in groups: by line, file, stack, category, annotation, or your rules.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tfswa_lab.memory.snapshot.emit import SEPARATOR
from tfswa_lab.memory.snapshot.schema import Annotation
from tfswa_lab.memory.trace.stacks import Frame, user_frame, via

if TYPE_CHECKING:
    from tfswa_lab.memory.snapshot.snapshot import Snapshot

NOWHERE = "(no stack was recorded)"
NOBODY = "(no line outside of torch: its own threads, such as the backward pass)"
OLDER = "(older than the history)"
Stack = Sequence[Frame]


class Groups(NamedTuple):
    """Which group each allocation belongs to.

    Args:
        names: of the groups.
        of: the number of each allocation's group.
    """

    names: list[str]
    of: np.ndarray


def groups(snapshot: Snapshot, by: str, device: int | None, rules: Mapping[str, str]) -> Groups:
    """Group the allocations of a device.

    Args:
        snapshot: that they are in.
        by: a key of `GROUPINGS`, or `rule`.
        device: its number.
        rules: regular expressions by the name of their group. A stack belongs to the first one that
            is found in a file or function of it.

    Raises:
        ValueError: the grouping is unknown, there are no rules, or one is no regular expression.
    """
    if by == "rule":
        return _by_stack(snapshot, device, _matcher(rules))
    if by not in GROUPINGS:
        raise ValueError(f"by={by!r}; choose one of {', '.join([*GROUPINGS, 'rule'])}")
    return GROUPINGS[by](snapshot, device)


# By stack ----------------------------------------------------------------------------------------


def _by_stack(snapshot: Snapshot, device: int | None, name: Callable[[Stack], str]) -> Groups:
    names, number = numbered(map(name, snapshot.contents.stacks))
    return Groups(names, number[snapshot.allocations(device).stack])


def numbered(texts: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """The distinct texts, and the number of each."""
    numbers: dict[str, int] = {}
    of = np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
    return list(numbers), of


def site_of(stack: Stack) -> str:
    """The user's line of a stack and the libraries inside of it, or why there is none."""
    if frame := user_frame(stack):
        return f"{frame} {via(stack)}".rstrip()
    return NOBODY if stack else NOWHERE


def _file_of(stack: Stack) -> str:
    frame = user_frame(stack)
    return frame.filename if frame else site_of(stack)


def _text_of(stack: Stack) -> str:
    return "\n".join(map(str, stack)) or NOWHERE


def _matcher(rules: Mapping[str, str]) -> Callable[[Stack], str]:
    if not rules:
        raise ValueError("by='rule' needs rules, such as {'attention': 'attend|softmax'}")
    compiled = {}
    for name, rule in rules.items():
        try:
            compiled[name] = re.compile(rule)
        except re.error as error:
            raise ValueError(f"rule {name}={rule!r} is no regular expression: {error}") from None

    def first(stack: Stack) -> str:
        texts = [text for frame in stack for text in (frame.filename, frame.name)]
        found = (name for name, rule in compiled.items() if any(map(rule.search, texts)))
        return next(found, "(no rule)")

    return first


# By category -------------------------------------------------------------------------------------

# A snapshot has no categories; the functions in a stack tell, the innermost first. Patterns are
# searched in `file:function`.
CATEGORIES = {
    "optimizer state and temporaries": r"[/\\]torch[/\\]optim[/\\]",
    "gradients and temporaries of the backward pass": (
        r"torch::autograd::|[/\\]torch[/\\](autograd[/\\]|_tensor\.py).*[:.](backward|grad)$"
        r"|^<forward>"
    ),
    "activations": r"[/\\]nn[/\\]modules[/\\]module\.py:.*_call_impl$|[:.]forward$",
    "parameters": (
        r"[/\\]nn[/\\]modules[/\\].*[:.](__init__|_apply|to|cuda|load_state_dict)$"
        r"|[/\\](torch[/\\]serialization|safetensors)"
    ),
    "input": r"[/\\]torch[/\\]utils[/\\]data[/\\]|[:.]pin_memory$",
    "compiled code": r"torchinductor_|[/\\]torch[/\\]_(inductor|dynamo)[/\\]",
    "communication": r"[/\\]torch[/\\]distributed[/\\]|c10d::",
}
_CATEGORIES = {name: re.compile(pattern) for name, pattern in CATEGORIES.items()}


def category_of(stack: Stack) -> str:
    """What a stack allocates for, guessed from the functions in it.

    >>> layer = Frame("/venv/torch/nn/modules/module.py", 1751, "Module._call_impl")
    >>> category_of([Frame("/venv/torch/nn/functional.py", 9, "linear"), layer])
    'activations'
    """
    for frame in stack:
        text = f"{frame.filename}:{frame.name}"
        for name, pattern in _CATEGORIES.items():
            if pattern.search(text):
                return name
    return "other" if stack else NOWHERE


def _by_category(snapshot: Snapshot, device: int | None) -> Groups:
    """The categories of a trace, where the snapshot was made from one; else guessed."""
    texts = snapshot.contents.texts
    if not snapshot.has_categories:
        return _by_stack(snapshot, device, category_of)
    names, number = numbered(text.partition(SEPARATOR)[0] or NOWHERE for text in texts)
    return Groups(names, number[snapshot.allocations(device).text])


# By what the program said ------------------------------------------------------------------------


def _by_text(snapshot: Snapshot, device: int | None) -> Groups:
    texts = [text or "(no metadata)" for text in snapshot.contents.texts]
    return Groups(texts, snapshot.allocations(device).text)


def _by_context(snapshot: Snapshot, device: int | None) -> Groups:
    """By the `compile_context` in which torch.compile allocated."""
    texts = [text or "(not compiled)" for text in snapshot.contents.texts]
    context = np.concatenate([[0], snapshot.history(device).context])
    born = snapshot.allocations(device).born
    return Groups([*texts, OLDER], np.where(born > 0, context[born], len(texts)))


def _by_annotation(snapshot: Snapshot, device: int | None) -> Groups:
    """By the innermost annotation that was open, such as a `record_function` range."""
    history, number = snapshot.history(device), snapshot.one_device(device)
    here = [one for one in snapshot.contents.annotations if one.device == number]
    here.sort(key=lambda one: one.time_us)
    names, open_at = numbered(["(no annotation)", *open_after(here)])
    times = np.array([one.time_us for one in here], np.int64)
    entry = np.searchsorted(times, history.time_us, "right")
    born = snapshot.allocations(device).born
    of = open_at[np.concatenate([[0], entry])][born]
    return Groups([*names, OLDER], np.where(born > 0, of, len(names)))


def open_after(annotations: Sequence[Annotation]) -> list[str]:
    """The innermost open annotation after each start or end.

    >>> a, b = Annotation("step", "START", 0, 1), Annotation("loss", "START", 0, 2)
    >>> open_after([a, b, b._replace(stage="END"), a._replace(stage="END")])
    ['step', 'loss', 'step', '(no annotation)']
    """
    names, after = [], []
    for one in annotations:
        if one.stage == "START":
            names.append(one.name)
        elif one.name in names:
            del names[len(names) - 1 - names[::-1].index(one.name)]
        after.append(names[-1] if names else "(no annotation)")
    return after


GROUPINGS: dict[str, Callable[[Snapshot, int | None], Groups]] = {
    "line": lambda snapshot, device: _by_stack(snapshot, device, site_of),
    "category": _by_category,
    "file": lambda snapshot, device: _by_stack(snapshot, device, _file_of),
    "stack": lambda snapshot, device: _by_stack(snapshot, device, _text_of),
    "annotation": _by_annotation,
    "compile_context": _by_context,
    "metadata": _by_text,
}
