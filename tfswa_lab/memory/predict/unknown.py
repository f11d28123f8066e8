"""Numbers that a prediction does not know, and the lines that ask for them.

An unknown number can be printed, logged and added up. Where it would become a size, an index or a
branch, an error names the line, except in checks: in a program that works, they pass.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import ast
import dis
import linecache
import math
import operator
import sys
from collections.abc import Callable
from functools import cache
from numbers import Number
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from tfswa_lab.memory.trace.stacks import CallSites, Frame, in_short, user_frame

NAN = float("nan")  # what `float()` of an unknown number gives; a program's own NaN is another


class Unknown(float):
    """A number that nobody knows: it can be printed, logged and added up.

    Its value is NaN, so that nothing can be taken for a number that was measured.
    """

    def __new__(cls, values: Any, line: str, whole: bool = False, drawn: bool = False):
        """Make one that was read at a line.

        Args:
            values: the `Values` of the prediction.
            line: where it was read.
            whole: whether it is a whole number.
            drawn: whether it was drawn at random between 0 and 1.
        """
        self = super().__new__(cls, math.nan)
        self.values, self.line, self.whole, self.drawn = values, line, whole, drawn
        values.handed_out = True
        return self

    def _again(self, *others: Any) -> Any:
        if not all(isinstance(other, Number | Truth) for other in others):
            return NotImplemented
        whole = self.whole and all(getattr(x, "whole", isinstance(x, int)) for x in others)
        return Unknown(self.values, self.line, whole)

    def _divided(self, other: Any) -> Any:
        known = isinstance(other, Number | Truth)
        return Unknown(self.values, self.line) if known else NotImplemented

    def _refused(self, *_: Any) -> Any:
        return int(self.values.need("a size, an index or a whole number", self.line))

    def __index__(self) -> int:
        """Torch tries this on any number, so it may ask for no reason."""
        before = self.values.refusal
        try:
            return self._refused()
        finally:
            self.values.tried, self.values.refusal = self.values.refusal, before

    def _comparison(compare: Callable) -> Callable:
        def compared(self: Unknown, other: Any) -> Any:
            if not isinstance(other, Number):
                return NotImplemented
            if self.drawn and not isinstance(other, Unknown):
                likely = self.values.likelier(compare(0.5, other))
                if likely is not None:
                    return likely
            return Truth(self.values, self.line)

        return compared

    def __bool__(self) -> bool:
        return self.values.decide(self.line)

    def __round__(self, digits: int | None = None) -> Any:
        return self._refused() if digits is None else self

    def __float__(self) -> float:
        return NAN

    def __format__(self, specification: str) -> str:
        try:
            return float.__format__(self, specification)
        except ValueError:  # of whole numbers
            return "nan"

    def __repr__(self) -> str:
        return "nan"

    __str__ = __repr__
    __hash__ = object.__hash__
    __int__ = __trunc__ = __ceil__ = __floor__ = _refused
    __lt__, __le__ = map(_comparison, (operator.lt, operator.le))
    __gt__, __ge__ = map(_comparison, (operator.gt, operator.ge))
    __eq__, __ne__ = map(_comparison, (operator.eq, operator.ne))
    __neg__ = __pos__ = __abs__ = __add__ = __radd__ = __sub__ = __rsub__ = _again
    __mul__ = __rmul__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _again
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _divided


class Truth:
    """A truth value that nobody knows."""

    def __init__(self, values: Any, line: str):
        self.values, self.line = values, line

    def __bool__(self) -> bool:
        return self.values.decide(self.line)

    def _again(self, *_: Any) -> Truth:
        return Truth(self.values, self.line)

    def _arithmetic(calculate: Callable) -> Callable:
        def counted(self: Truth, other: Any) -> Any:
            if isinstance(other, torch.Tensor):
                return self.values.made_with_unknown(calculate(other, True))
            if not isinstance(other, Number | Truth):
                return NotImplemented
            whole = getattr(other, "whole", isinstance(other, int | Truth))
            return Unknown(self.values, self.line, whole)

        return counted

    def __float__(self) -> float:
        return NAN

    def __repr__(self) -> str:
        return "unknown"

    __invert__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _again
    __add__ = __radd__ = _arithmetic(operator.add)
    __mul__ = __rmul__ = _arithmetic(operator.mul)
    __sub__ = __rsub__ = _arithmetic(operator.add)  # of the same shape and type


# --- lines --------------------------------------------------------------------------------------


def asking_frame() -> FrameType:
    """The innermost line that is neither ours nor part of torch's own machinery for calls."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _passes_on(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


@cache
def _passes_on(filename: str) -> bool:
    parts = Path(filename).parts
    return parts[-3:-1] in (("memory", "predict"), ("memory", "trace")) or (
        parts[-2:] in (("torch", "_tensor.py"), ("torch", "overrides.py"), ("torch", "_ops.py"))
        or parts[-2:-1] == ("_subclasses",)
        or parts[-1] in ("_contextlib.py", "contextlib.py", "mock.py")
    )


def user_line() -> str:
    """The user's line, file and function."""
    return in_short(user_frame(CallSites().here()))


def line_of(frame: FrameType) -> str:
    """File and line, as a key of `values`; notebook cells are called `cell`."""
    return in_short(Frame(frame.f_code.co_filename, frame.f_lineno, ""))


# --- checks -------------------------------------------------------------------------------------


def answer_that_passes(frame: FrameType) -> bool | None:
    """The truth value with which a check passes; None where the line is no check.

    A check is an `assert`, or an `if` whose block ends by raising an error.
    """
    steps = _instructions(frame.f_code)
    at = next(n for n, step in enumerate(steps) if step.offset == frame.f_lasti)
    while steps[at].opname in BEFORE_BRANCH:
        at += 1
    branch = steps[at]
    check = _check_at(frame.f_code.co_filename, branch.positions)
    if check is None or not branch.opname.startswith("POP_JUMP"):
        return None
    jumps_if_true = branch.opname.endswith("IF_TRUE")
    jumped = _danger(steps, _place(steps, branch.argval), check)
    stayed = _danger(steps, at + 1, check)
    return None if jumped == stayed else jumps_if_true == (jumped < stayed)


def is_compared(frame: FrameType) -> bool:
    """Whether the result of the running call is an operand of a comparison in the same line."""
    steps = _instructions(frame.f_code)
    at = next(n for n, step in enumerate(steps) if step.offset == frame.f_lasti)
    rest = (step.opname for step in steps[at:] if step.opname not in BEFORE_BRANCH)
    return next((name for name in rest if not name.startswith("LOAD_")), "") == "COMPARE_OP"


# What may come between a call to `bool` and the branch that it decides.
BEFORE_BRANCH = ("CALL", "CACHE", "TO_BOOL", "PRECALL")


@cache
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))


def _place(steps: list[dis.Instruction], offset: int) -> int:
    return next(n for n, step in enumerate(steps) if step.offset == offset)


def _danger(steps: list[dis.Instruction], at: int, check: ast.stmt) -> int:
    """From this instruction, does a check raise its error? 0 for no, 1 for perhaps, 2 for yes."""
    while at < len(steps) and _inside(steps[at].positions, check):
        step = steps[at]
        if step.opname == "RAISE_VARARGS":
            return 2
        if step.opname.startswith("POP_JUMP"):
            ways = {_danger(steps, at + 1, check)}
            if step.argval > step.offset:  # a jump back repeats a loop
                ways.add(_danger(steps, _place(steps, step.argval), check))
            return ways.pop() if len(ways) == 1 else 1
        at = _place(steps, step.argval) if step.opname == "JUMP_FORWARD" else at + 1
    return 0


def _check_at(filename: str, positions: dis.Positions) -> ast.stmt | None:
    """The innermost check at a place of a file."""
    found = [node for node in _checks(filename) if _inside(positions, node)]
    return max(found, key=lambda node: (node.lineno, node.col_offset), default=None)


def _inside(positions: dis.Positions, node: ast.stmt) -> bool:
    if positions.lineno is None:
        return True
    begins = (positions.lineno, positions.col_offset) >= (node.lineno, node.col_offset)
    return begins and positions.end_lineno <= node.end_lineno


@cache
def _checks(filename: str) -> list[ast.stmt]:
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:  # of cells with magics
        return []
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
        or (isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise))
    ]
