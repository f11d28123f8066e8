"""The numbers inside tensors, as far as a prediction knows them.

Fake tensors have no values. Yet programs ask for some: the length of a batch, whether a loss is
finite. What follows from numbers in the program is calculated here.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from tfswa_lab.memory.predict.unknown import (
    Truth,
    Unknown,
    answer_that_passes,
    asking_frame,
    line_of,
    user_line,
)
from tfswa_lab.memory.trace.stacks import is_library
from tfswa_lab.memory.trace.tracer import has_storage, tensors_in

aten = torch.ops.aten
MOST_NUMBERS = 2**16  # values of larger tensors are not calculated


class ValueNeeded(NotImplementedError):
    """The program asks for a number that a prediction does not know."""


class Values:
    """The values of small tensors, followed through every operator.

    They are kept by storage, so views and in-place operators need no special care.

    Args:
        given: numbers for lines that ask for an unknown one, by `file.py:line`.
    """

    def __init__(self, given: Mapping[str, Any] | None = None):
        self._given = dict(given or {})
        self._asked: set[str] = set()
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._beliefs: dict[int, bool] = {}  # storages of truth values that are all alike
        self._draws: set[int] = set()  # storages of one random number between 0 and 1
        self._likely: dict[int, bool] = {}  # of comparisons with such a number
        self.notes: dict[str, None] = {}  # sentences for the error budget, in order
        self.refusal: ValueNeeded | None = None  # the last one, which a library may have hidden
        self.tried: ValueNeeded | None = None  # a refusal that may have been no more than a try

    def of(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor as a real one; None if they are unknown.

        Those of a tensor that is older than the prediction are copied, so that it stays as it is.
        """
        if not has_storage(tensor) or tensor.is_complex():
            return None
        key = tensor.untyped_storage()._cdata
        storage = self._storages.get(key)
        with real_tensors():
            if storage is None and not isinstance(tensor, FakeTensor):
                is_small = tensor.untyped_storage().nbytes() <= 8 * MOST_NUMBERS
                if tensor.device.type == "cpu" and is_small:
                    storage = self._storages[key] = tensor.untyped_storage().clone()
            if storage is None:
                return None
            place = tensor.storage_offset(), tuple(tensor.size()), tensor.stride()
            return torch.empty(0, dtype=tensor.dtype).set_(storage, *place)

    def belief(self, tensor: Tensor) -> bool | None:
        """The truth value that all of a tensor's elements have; None if they are unknown."""
        if tensor.dtype is not torch.bool or not has_storage(tensor):
            return None
        believed = self._beliefs.get(tensor.untyped_storage()._cdata)
        known = self.of(tensor) if believed is None else None
        if known is None or not known.numel():
            return believed
        with real_tensors():
            found = known.unique().tolist()
        return found[0] if len(found) == 1 else None

    def follow(
        self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], result: Any
    ) -> None:
        """Work out what an operator has made or changed.

        Args:
            func: the operator, already run on fake tensors.
            args: its arguments.
            kwargs: its named arguments.
            inputs: the tensors among them.
            result: what it returned.
        """
        writes, random = traits(func)
        free = func in VALUE_FREE
        if random or not (free or all(map(self._is_known, inputs))):
            if func in DRAWS and result.numel() == 1:
                self._draws.add(result.untyped_storage()._cdata)
            elif func in COMPARISONS and inputs[0].untyped_storage()._cdata in self._draws:
                more_likely = COMPARISONS[func](0.5, args[1])
                self._likely[result.untyped_storage()._cdata] = more_likely
            elif func in BELIEFS:
                self._believe(func, args, result)
            elif writes and func not in CHECKS_ONLY:
                self._forget_written(args, kwargs, writes)
            return
        keys = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [t for t in tensors_in(result) if t.untyped_storage()._cdata not in keys]
        if not new and not writes:
            return
        if max((t.numel() for t in (*new, *inputs)), default=0) > MOST_NUMBERS:
            return self._forget_written(args, kwargs, writes)
        found = self._calculated(func, args, kwargs, filled=free)
        if found is None:
            return self._forget_written(args, kwargs, writes)
        for fake, real in zip(tensors_in(result), tensors_in(found), strict=False):
            if fake.untyped_storage()._cdata not in keys or (free and writes):
                self._record(fake, real)

    def forget(self, storage: int) -> None:
        """A storage is gone, or its values are."""
        for kept in (self._storages, self._beliefs, self._likely):
            kept.pop(storage, None)
        self._draws.discard(storage)

    def sized(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The result of an operator whose size depends on values.

        Raises:
            ValueNeeded: they are unknown, and `given` does not have the size.
        """
        inputs = list(tensors_in((args, kwargs)))
        if inputs and all(map(self._is_known, inputs)):
            real = self._calculated(func, args, kwargs, filled=False)
            device = inputs[0].device
            fakes = tree_map_only(
                Tensor,
                lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device),
                real,
            )
            for fake, found in zip(tensors_in(fakes), tensors_in(real), strict=True):
                self._record(fake, found)
            return fakes
        if func not in SIZED:
            raise self.refuse(str(func), line_of(asking_frame()))
        return SIZED[func](self, func, *args, **kwargs)

    def _is_known(self, tensor: Tensor) -> bool:
        if tensor.untyped_storage()._cdata in self._storages:
            return True
        return not isinstance(tensor, FakeTensor) and self.of(tensor) is not None

    def _calculated(self, func: Any, args: tuple, kwargs: dict, filled: bool) -> Any:
        """The result of the operator on real tensors; None if the CPU has no kernel for them."""
        with real_tensors():

            def real(tensor: Tensor) -> Tensor:
                if filled:
                    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
                return self.of(tensor)

            args, kwargs = tree_map_only(Tensor, real, (args, kwargs))
            if "device" in kwargs:
                kwargs = kwargs | {"device": torch.device("cpu")}
            kwargs.pop("pin_memory", None)
            try:
                return func(*args, **kwargs)
            except (RuntimeError, TypeError):
                return None

    def _record(self, fake: Tensor, real: Tensor) -> None:
        with real_tensors():
            if real.shape != fake.shape or real.dtype != fake.dtype or real.is_complex():
                return
            if real.is_floating_point() and real.isnan().any():
                return
            size = fake.untyped_storage().nbytes()
            if size > 8 * MOST_NUMBERS:
                return
            storage = torch.UntypedStorage(size)
            place = fake.storage_offset(), tuple(fake.size()), fake.stride()
            torch.empty(0, dtype=fake.dtype).set_(storage, *place).copy_(real)
        self._storages[fake.untyped_storage()._cdata] = storage

    def _forget_written(self, args: tuple, kwargs: dict, writes: tuple) -> None:
        for place in writes:
            written = kwargs.get(place) if isinstance(place, str) else args[place : place + 1]
            for tensor in tensors_in(written):
                self.forget(tensor.untyped_storage()._cdata)

    def _believe(self, func: Any, args: tuple, result: Tensor) -> None:
        """In a program that works, no number is infinite or NaN."""
        answer = BELIEFS[func](self, *args)
        if answer is None or not isinstance(result, Tensor) or result.dtype is not torch.bool:
            return
        if result.numel() <= MOST_NUMBERS:
            with real_tensors():
                real = torch.full(tuple(result.shape), answer)
            self._record(result, real)
        else:
            self._beliefs[result.untyped_storage()._cdata] = answer

    def number(self, tensor: Tensor) -> Any:
        """The number in a tensor of one element.

        Returns:
            A Python number; an `Unknown` or a `Truth` if nobody knows it.
        """
        known = self.of(tensor)
        if known is not None:
            with real_tensors():
                return known.item()
        line, found = self.given_here()
        if found is not None:
            return found
        likely = self._likely.get(tensor.untyped_storage()._cdata)
        if likely is not None and is_library(asking_frame().f_code.co_filename):
            self.note(f"a random choice at {line}: {likely} is the likelier outcome")
            return likely
        kind = Truth if tensor.dtype is torch.bool else Unknown
        return kind(self, line)

    def numbers(self, tensor: Tensor) -> Any:
        """The same for a tensor of any shape, in nested lists."""
        line, found = self.given_here()
        if found is not None:
            return found
        found = (Truth if tensor.dtype is torch.bool else Unknown)(self, line)
        for length in reversed(tensor.shape):
            found = [found] * length
        return found

    def scalar(self, tensor: Tensor, running: Any) -> Any:
        """A number that torch's own code asks for.

        Args:
            tensor: of one element.
            running: the function of torch that the program has called.

        Raises:
            ValueNeeded: nobody knows it, and it is a whole number.
        """
        number = self.number(tensor)
        if isinstance(number, Truth):
            return False  # torch's own checks ask whether something is wrong
        if isinstance(number, Unknown) and not tensor.dtype.is_floating_point:
            name = getattr(running, "__name__", running)
            raise self.refuse(f"a whole number for {name}", number.line)
        return number

    def note(self, sentence: str) -> None:
        """Add a sentence to the error budget, once."""
        self.notes[sentence] = None

    def need(self, what: str) -> Any:
        """A number that nobody knows would become a size, an index or a branch.

        Returns:
            The one that `values` gives for this line.

        Raises:
            ValueNeeded: it gives none.
        """
        line, found = self.given_here()
        if found is None:
            raise self.refuse(what, line)
        return found

    def refuse(self, what: str, line: str, read_at: str = "") -> ValueNeeded:
        """The error that names the line and three ways out.

        Args:
            what: what the number would become.
            line: where.
            read_at: the line that got the number from a tensor, if it is another one.
        """
        key = read_at or line
        origin = f" (read at {read_at})" if read_at not in ("", line) else ""
        user = user_line()
        called = "" if user.startswith(f"{line} ") else f", called at {user},"
        self.refusal = ValueNeeded(
            f"{what} at {line}{called} depends on the values of a tensor{origin}, which a "
            "prediction does not know. Three ways out: write the number into the program; keep the "
            f"line out of the step; or give the number, predict(…, values={{'{key}': …}})"
        )
        return self.refusal

    def decide(self, asked_at: str = "") -> bool:
        """A truth value that nobody knows becomes a branch.

        A check that would raise an error is taken to pass, as it does in a program that works.

        Raises:
            ValueNeeded: the branch is no check, and `values` gives no answer.
        """
        frame = asking_frame()
        answer = answer_that_passes(frame)
        if answer is not None:
            return answer
        line, found = self.given_here()
        if found is None:
            found = self.given(asked_at)
        if found is None:
            raise self.refuse("a branch", line, asked_at)
        return bool(found)

    def given(self, line: str) -> Any:
        """The number that the caller of `predict` gives for a line; None without."""
        if line in self._given:
            self._asked.add(line)
        return self._given.get(line)

    def given_here(self) -> tuple[str, Any]:
        """The line that asks, and the number that is given for it."""
        line = line_of(asking_frame())
        return line, self.given(line)

    def unused(self) -> list[str]:
        """Lines in `given` that never asked for a number."""
        return sorted(set(self._given) - self._asked)


@contextmanager
def real_tensors() -> Iterator[None]:
    """Calculate with real tensors, whatever modes are on."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


@cache
def traits(func: Any) -> tuple[tuple, bool]:
    """Which arguments an operator writes to, and whether its values are random."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return (), True
    writes = tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    name = schema.name.removeprefix("aten::")
    unset = name.startswith(("empty", "new_empty", "_empty", "resize"))
    return writes, unset or torch.Tag.nondeterministic_seeded in func.tags


# The values of the results do not depend on those of the tensors given.
VALUE_FREE = {
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
}
# One number between 0 and 1, with which libraries decide whether to skip a layer.
DRAWS = {aten.rand.default, aten.uniform_.default}
COMPARISONS = {
    aten.lt.Scalar: operator.lt,
    aten.le.Scalar: operator.le,
    aten.gt.Scalar: operator.gt,
    aten.ge.Scalar: operator.ge,
}
# They write whether a number was infinite, and in a program that works none is.
CHECKS_ONLY = {aten._amp_foreach_non_finite_check_and_unscale_.default}


def _constant(answer: bool) -> Any:
    return lambda values, *_: answer


def _all_of(combine: Any) -> Any:
    def believed(values: Values, *args: Any) -> bool | None:
        found = [values.belief(tensor) for tensor in args if isinstance(tensor, Tensor)]
        return None if None in found or not found else combine(found)

    return believed


def _equal(values: Values, one: Tensor, other: Any) -> bool | None:
    if one is other:
        return True
    return False if isinstance(other, float) and math.isinf(other) else None


def _unequal(values: Values, one: Tensor, other: Any) -> bool | None:
    found = _equal(values, one, other)
    return None if found is None else not found


_not = _all_of(lambda found: not found[0])
_same = _all_of(lambda found: found[0])
BELIEFS = {
    aten.isnan.default: _constant(answer=False),
    aten.isinf.default: _constant(answer=False),
    aten.isposinf.default: _constant(answer=False),
    aten.isneginf.default: _constant(answer=False),
    aten.eq.Tensor: _equal,  # of `isfinite`, which torch writes with four others
    aten.eq.Scalar: _equal,
    aten.ne.Tensor: _unequal,
    aten.ne.Scalar: _unequal,
    aten.mul.Tensor: _all_of(all),
    aten.logical_and.default: _all_of(all),
    aten.bitwise_and.Tensor: _all_of(all),
    aten.logical_or.default: _all_of(any),
    aten.bitwise_or.Tensor: _all_of(any),
    aten.logical_not.default: _not,
    aten.bitwise_not.default: _not,
    **{
        overload: _same
        for packet in (aten.any, aten.all)
        for overload in (packet.default, packet.dim)
    },
}


def _rows(values: Values, mask: Tensor) -> tuple[Tensor, ...]:
    """Places of the elements that are not zero, one tensor for each axis of the mask."""
    known = values.of(mask)
    if known is not None:
        with real_tensors():
            count = int(known.count_nonzero())
    else:
        count = int(values.need("how many elements of a mask are set"))
    return tuple(mask.new_empty(count, dtype=torch.int64) for _ in range(mask.dim()))


def _nonzero(values: Values, func: Any, x: Tensor) -> Tensor:
    return x.new_empty((len(_rows(values, x)[0]), x.dim()), dtype=torch.int64)


def _masked_select(values: Values, func: Any, x: Tensor, mask: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    line = asking_frame()
    is_label = x.dtype is torch.int64 and x.numel() <= MOST_NUMBERS
    if is_label and values.of(mask) is None and is_library(line.f_code.co_filename):
        values.note(f"labels at {line_of(line)}: how many count is unknown, all are taken to")
        return x.new_empty(math.prod(shape))
    return x.new_empty(len(_rows(values, mask.expand(shape))[0]))


def _indexed(values: Values, func: Any, x: Tensor, indices: list, *rest: Any) -> Tensor:
    found = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        found += _rows(values, index) if is_mask else (index,)
    return func(x, found, *rest)


def _put(values: Values, func: Any, x: Tensor, indices: list, value: Tensor, *rest: Any) -> Any:
    """CUDA fills in one number without counting the elements of the mask."""
    (mask, *others) = indices
    if value.numel() == 1 and not others and mask.dtype is torch.bool and True not in rest:
        mask = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
        fill = x.masked_fill_ if func is aten.index_put_.default else x.masked_fill
        return fill(mask, value.reshape(()))
    return _indexed(values, func, x, indices, value, *rest)


def _unique(
    values: Values, func: Any, x: Tensor, *rest: Any, **named: Any
) -> tuple[Tensor, Tensor, Tensor]:
    count = int(values.need("how many different elements there are"))
    return x.new_empty(count), *(x.new_empty(n, dtype=torch.int64) for n in (x.numel(), count))


def _repeated(values: Values, func: Any, repeats: Tensor, **named: Any) -> Tensor:
    return repeats.new_empty(int(values.need("the sum of the repeats")), dtype=torch.int64)


# Operators whose results have a size that depends on values.
SIZED = {
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _masked_select,
    aten.index.Tensor: _indexed,
    aten.index_put.default: _put,
    aten.index_put_.default: _put,
    aten._unique2.default: _unique,
    aten.repeat_interleave.Tensor: _repeated,
}
