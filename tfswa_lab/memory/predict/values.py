"""The numbers inside tensors, as far as a prediction knows them.

Fake tensors have no values. Yet programs ask for some: the length of a batch, whether a loss is
finite. What follows from numbers in the program is calculated here.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
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
MOST_NUMBERS, MOST_FLOATS = 2**16, 2**6  # values of larger tensors are not calculated

FAILED = object()


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
        self._known: dict[int, Tensor] = {}  # a real tensor for each storage
        self._changed: set[int] = set()  # older storages that unknown numbers were written to
        self._beliefs: dict[int, bool] = {}  # storages of truth values that are all alike
        self._draws: set[int] = set()  # storages of one random number between 0 and 1
        self._likely: dict[int, bool] = {}  # of comparisons with such a number
        self._infinite: set[int] = set()  # storages into which the program wrote infinities
        self.handed_out = False  # whether the program has got an unknown number
        self.notes: dict[str, None] = {}  # sentences for the error budget, in order
        self.refusal: ValueNeeded | None = None  # the last one, which a library may have hidden
        self.tried: ValueNeeded | None = None  # a refusal that may have been no more than a try

    def of(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor as a real one; None if they are unknown.

        Those of a tensor that is older than the prediction are copied, so that it stays as it is.
        """
        if not has_storage(tensor) or tensor.is_complex() or tensor._is_zerotensor():
            return None
        key = tensor.untyped_storage()._cdata
        known = self._known.get(key)
        if known is None:
            known = self._copied(tensor, key)
        if known is None or (known.dtype == tensor.dtype and known.dim() == tensor.dim() == 0):
            return known
        with real_tensors():
            place = tensor.storage_offset(), tuple(tensor.size()), tensor.stride()
            return torch.empty(0, dtype=tensor.dtype).set_(known.untyped_storage(), *place)

    def _copied(self, tensor: Tensor, key: int) -> Tensor | None:
        storage = tensor.untyped_storage()
        is_older = not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu"
        if not is_older or key in self._changed or storage.nbytes() > 8 * MOST_NUMBERS:
            return None
        with real_tensors():
            copy = torch.empty(0, dtype=torch.uint8).set_(storage.clone())
        self._known[key] = copy
        return copy

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
        if random or not (free or all(map(self.knows, inputs))):
            return self._follow_unknown(func, args, kwargs, inputs, result, writes)
        keys = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [t for t in tensors_in(result) if t.untyped_storage()._cdata not in keys]
        if not new and not writes:
            return
        if any(map(_is_large, (*new, *inputs))):
            self._follow_infinities(func, args, inputs, result)
            return self._forget_written(args, kwargs, writes)
        found = self._calculated(func, args, kwargs, inputs, filled=free)
        if found is FAILED:
            return self._forget_written(args, kwargs, writes)
        for fake, real in zip(tensors_in(result), tensors_in(found), strict=False):
            if fake.untyped_storage()._cdata not in keys or (free and writes):
                self._record(fake, real)

    def _follow_unknown(
        self,
        func: Any,
        args: tuple,
        kwargs: dict,
        inputs: list[Tensor],
        result: Any,
        writes: tuple,
    ) -> None:
        """Nobody knows the result; sometimes something is known of it."""
        if func in INTERESTING:
            if func in DRAWS and result.numel() == 1:
                self._draws.add(result.untyped_storage()._cdata)
            elif func in COMPARISONS and inputs[0].untyped_storage()._cdata in self._draws:
                more_likely = COMPARISONS[func](0.5, args[1])
                self._likely[result.untyped_storage()._cdata] = more_likely
            elif func in BELIEFS:
                self._believe(func, args, result)
            self._follow_infinities(func, args, inputs, result)
        if writes and func not in CHECKS_ONLY:
            self._forget_written(args, kwargs, writes)

    def forget(self, storage: int) -> None:
        """A storage is gone, or its values are."""
        for kept in (self._known, self._beliefs, self._likely):
            kept.pop(storage, None)
        for kept in (self._draws, self._changed, self._infinite):
            kept.discard(storage)

    def made_with_unknown(self, result: Any) -> Any:
        """Forget the values of tensors that were made with an unknown number."""
        for tensor in tensors_in(result):
            self.forget(tensor.untyped_storage()._cdata)
        return result

    def sized(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The result of an operator whose size depends on values.

        Raises:
            ValueNeeded: they are unknown, and `given` does not have the size.
        """
        inputs = list(tensors_in((args, kwargs)))
        is_known = bool(inputs) and all(map(self.knows, inputs))
        real = self._calculated(func, args, kwargs, inputs, filled=False) if is_known else FAILED
        if real is not FAILED:
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

    def knows(self, tensor: Tensor) -> bool:
        """Whether it knows the values of a tensor."""
        if tensor.untyped_storage()._cdata in self._known:
            return True
        return not isinstance(tensor, FakeTensor) and self.of(tensor) is not None

    def _calculated(
        self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], filled: bool
    ) -> Any:
        """The result of the operator on real tensors; `FAILED` if the CPU has no kernel for it."""
        if "device" in kwargs:
            kwargs = kwargs | {"device": CPU}
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        try:
            with real_tensors():
                if filled or inputs:
                    real = _like if filled else self.of
                    args, kwargs = tree_map_only(Tensor, real, (args, kwargs))
                return func(*args, **kwargs)
        except (RuntimeError, TypeError):
            return FAILED

    def _record(self, fake: Tensor, real: Tensor) -> None:
        with real_tensors():
            if real.shape != fake.shape or real.dtype != fake.dtype:
                return
            if real.is_complex() or real._is_zerotensor() or fake._is_zerotensor():
                return
            size = fake.untyped_storage().nbytes()
            if size > 8 * MOST_NUMBERS:
                return
            if real.untyped_storage().nbytes() != size or real.stride() != fake.stride():
                storage = torch.UntypedStorage(size)
                place = fake.storage_offset(), tuple(fake.size()), fake.stride()
                real = torch.empty(0, dtype=fake.dtype).set_(storage, *place).copy_(real)
        self._known[fake.untyped_storage()._cdata] = real

    def _forget_written(self, args: tuple, kwargs: dict, writes: tuple) -> None:
        for place in writes:
            written = kwargs.get(place) if isinstance(place, str) else args[place : place + 1]
            for tensor in tensors_in(written):
                self.forget(tensor.untyped_storage()._cdata)
                if not isinstance(tensor, FakeTensor):
                    self._changed.add(tensor.untyped_storage()._cdata)

    def _follow_infinities(self, func: Any, args: tuple, inputs: list[Tensor], result: Any) -> None:
        """Tensors that may have infinities because the program wrote some, as masks do."""
        found = INFINITIES.intersection(x for x in args if type(x) is float)
        if self._infinite and not found and func in CARRY:
            found = self._infinite.intersection(t.untyped_storage()._cdata for t in inputs)
        if found and func not in BELIEFS:
            for tensor in tensors_in(result):
                self._infinite.add(tensor.untyped_storage()._cdata)

    def _may_be_infinite(self, tensor: Any) -> bool:
        if not isinstance(tensor, Tensor) or tensor.untyped_storage()._cdata in self._infinite:
            return isinstance(tensor, Tensor)
        known = self.of(tensor)
        if known is None:
            return False
        with real_tensors():
            return bool(known.isinf().any())

    def _believe(self, func: Any, args: tuple, result: Tensor) -> None:
        """In a program that works, no number is infinite or NaN, unless it wrote so itself."""
        if func in OF_INFINITIES and self._may_be_infinite(args[0]):
            return
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
        if likely is not None and (likely := self.likelier(likely)) is not None:
            return likely
        return self._unknown(tensor, line)

    def _unknown(self, tensor: Tensor, line: str) -> Unknown | Truth:
        if tensor.dtype is torch.bool:
            return Truth(self, line)
        whole = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
        drawn = tensor.untyped_storage()._cdata in self._draws
        return Unknown(self, line, whole, drawn)

    def likelier(self, outcome: bool) -> bool | None:
        """The likelier outcome of a random choice in a library; None elsewhere."""
        frame = asking_frame()
        if not is_library(frame.f_code.co_filename):
            return None
        self.note(f"a random choice at {line_of(frame)}: {outcome} is the likelier outcome")
        return outcome

    def numbers(self, tensor: Tensor) -> Any:
        """The same for a tensor of any shape, in nested lists."""
        line, found = self.given_here()
        if found is not None:
            return found
        found = self._unknown(tensor, line)
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

    def need(self, what: str, read_at: str = "") -> Any:
        """A number that nobody knows would become a size, an index or a branch.

        Args:
            what: what it would become.
            read_at: the line that got the number from a tensor, if it is another one.

        Returns:
            The one that `values` gives for either line.

        Raises:
            ValueNeeded: it gives none.
        """
        line, found = self.given_here()
        if found is None:
            found = self._given_for(read_at)
        if found is None:
            raise self.refuse(what, line, read_at)
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
        answer = answer_that_passes(asking_frame())
        return bool(self.need("a branch", asked_at)) if answer is None else answer

    def _given_for(self, line: str) -> Any:
        if line in self._given:
            self._asked.add(line)
        return self._given.get(line)

    def given_here(self) -> tuple[str, Any]:
        """The line that asks, and the number that is given for it."""
        line = line_of(asking_frame())
        return line, self._given_for(line)

    def unused(self) -> list[str]:
        """Lines in `given` that never asked for a number."""
        return sorted(set(self._given) - self._asked)


CPU = torch.device("cpu")


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)


def _is_large(tensor: Tensor) -> bool:
    return tensor.numel() > (MOST_FLOATS if tensor.dtype.is_floating_point else MOST_NUMBERS)


class real_tensors:
    """A context in which tensors are real, whatever modes are on."""

    def __enter__(self) -> None:
        self._guards = torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction()
        for guard in self._guards:
            guard.__enter__()
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *_: Any) -> None:
        torch._C._set_grad_enabled(self._grad)
        for guard in reversed(self._guards):
            guard.__exit__(None, None, None)


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
    resizes = schema.name.startswith("aten::resize")
    return writes, resizes or torch.Tag.nondeterministic_seeded in func.tags


# The values of the results do not depend on those of the tensors given. (Memory that was not
# filled is read by no program that works, so what it has does not matter.)
VALUE_FREE = {
    *(aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default),
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


# The results have infinities where the inputs have.
CARRY = {
    getattr(getattr(aten, name), overload)
    for name, overloads in {
        **dict.fromkeys(("add", "sub", "add_", "sub_"), ("Tensor",)),
        **dict.fromkeys(("masked_fill", "masked_fill_"), ("Scalar", "Tensor")),
        **dict.fromkeys(
            ("clone", "_to_copy", "copy_", "cat", "stack", "repeat", "neg"), ("default",)
        ),
        **dict.fromkeys(("triu", "tril", "expand", "view", "transpose", "slice"), ("default",)),
        "where": ("self", "ScalarSelf", "ScalarOther"),
    }.items()
    for overload in overloads
    if hasattr(getattr(aten, name), overload)
}

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

INTERESTING = DRAWS | COMPARISONS.keys() | BELIEFS.keys() | CARRY | {aten.full.default}
INFINITIES = {math.inf, -math.inf}
OF_INFINITIES = {
    *(aten.isinf.default, aten.isposinf.default, aten.isneginf.default),
    *(aten.eq.Scalar, aten.ne.Scalar),
}


def _rows(values: Values, mask: Tensor) -> tuple[Tensor, ...]:
    """Places of the elements that are not zero, one tensor for each axis of the mask."""
    known = values.of(mask)
    if known is not None:
        with real_tensors():
            count = int(known.count_nonzero())
    else:
        count = int(values.need("how many elements of a mask are set"))
        if not 0 <= count <= mask.numel():
            raise ValueError(
                f"values: {count} elements of a mask that has {mask.numel()} cannot be set"
            )
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
