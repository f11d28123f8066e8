"""A limit is believed where Python enforces it or the growth is seen to end, and nowhere else."""

import functools
import random
from collections import deque

import pytest
import torch
import torch._dynamo  # before the heap is frozen

from tfswa_lab.memory.leaks import diagnose

pytestmark = pytest.mark.usefixtures("new_objects_only")

FAR, NEAR = 10_000, 20  # out of reach of the 40 steps that a diagnosis runs, and within it


class History:
    """Keeps all; what a subclass does with `capacity` is its affair."""

    def __init__(self, capacity: int):
        self.capacity, self.kept = capacity, []

    def __call__(self):
        self.kept.append(torch.zeros(64))


class Printed(History):
    def __repr__(self):
        return f"History of at most {self.capacity}"


class CutByNobody(History):
    def cut(self):
        del self.kept[: -self.capacity]


class Compared(History):
    full = False

    def __call__(self):
        super().__call__()
        self.full = len(self.kept) > self.capacity


class Cut(History):
    def __call__(self):
        super().__call__()
        del self.kept[: -self.capacity]


class Refilled(History):
    """Looks at the limit, and empties another list than the one that grows."""

    def __call__(self):
        super().__call__()
        recent = self.kept[-self.capacity :]
        recent.clear()


class CutAndCopied(Cut):
    """Keeps to its limit in one list and not in another."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self.copies = []

    def __call__(self):
        super().__call__()
        self.copies.append(self.kept[-1].clone())


class ListWithALimit(list):
    maxlen = FAR

    def __call__(self):
        self.append(torch.zeros(64))


class Slotted:
    __slots__ = ("capacity", "kept")

    def __init__(self, capacity: int):
        self.capacity, self.kept = capacity, []

    def __call__(self):
        self.kept.append(torch.zeros(64))


class OfProperty(History):
    """A property has the name, and no method does anything with it."""

    @property
    def max_items(self):
        return self.capacity


KEPT = []


def cut_at_a_global_limit():
    KEPT.append(torch.zeros(64))
    del KEPT[:-FAR]


def closing_over(limit):
    kept = []

    def step():
        kept.append(torch.zeros(64))
        del kept[:-limit]

    return step


def in_a_cached_list():
    @functools.lru_cache(maxsize=8)
    def history():
        return []

    return lambda: history().append(torch.zeros(64))


def in_a_cached_dictionary(maxsize):
    @functools.lru_cache(maxsize=maxsize)
    def history():
        return {}

    return lambda step: history().update({step: torch.zeros(64)})


def sizes_that_never_come_again():
    lengths, windows = random.Random(0).sample(range(64, 10_000), 500), {}

    def step(number):
        windows[lengths[number]] = torch.zeros(lengths[number])

    return step


LEAKS = {
    "printed only": Printed(FAR),
    "printed only, and small": Printed(NEAR),
    "in a method that nobody calls": CutByNobody(FAR),
    "in a method that nobody calls, and small": CutByNobody(NEAR),
    "compared": Compared(FAR),
    "compared and exceeded": Compared(NEAR),
    "kept to in a copy": Refilled(FAR),
    "kept to in one of two lists": CutAndCopied(NEAR),
    "kept to in one of two lists, far": CutAndCopied(FAR),
    "in a slot": Slotted(FAR),
    "of a class": ListWithALimit(),
    "behind a property": OfProperty(FAR),
    "of a cache around a list": in_a_cached_list(),
    "of a cache around a dictionary": in_a_cached_dictionary(8),
    "of an unlimited cache around a dictionary": in_a_cached_dictionary(None),
    "sizes as keys, new in each step": sizes_that_never_come_again(),
}
KEPT_TO = {  # but not reached by then, so that it cannot be told from the above
    "of an object": Cut(FAR),
    "just out of reach": Cut(39),
    "global": cut_at_a_global_limit,
    "closed over": closing_over(FAR),
}


@pytest.mark.parametrize("step", LEAKS.values(), ids=LEAKS)
def test_a_limit_that_nothing_keeps_to_is_no_bound(step, assert_no_leak):
    with pytest.raises(pytest.fail.Exception, match="leak of tensors"):
        assert_no_leak(step)


@pytest.mark.parametrize("step", KEPT_TO.values(), ids=KEPT_TO)
def test_a_limit_out_of_reach_is_not_taken_on_trust(step):
    found = diagnose(step)
    assert found.verdict == "leak of tensors"
    assert found.leaks


@pytest.mark.parametrize("kind", [Printed, CutByNobody, Compared, Cut])
def test_a_limit_that_is_only_named_is_told_as_a_condition(kind):
    found = diagnose(kind(FAR))
    assert "grows so far; bounded only if the program enforces `capacity = 10000`" in str(found)


@pytest.mark.parametrize("name", ["limit", "size", "window", "history_size", "max_length"])
def test_other_names_of_limits_are_told_as_conditions_too(name):
    history = History(FAR)
    setattr(history, name, FAR)
    del history.capacity
    found = diagnose(history)
    assert found.verdict == "leak of tensors"
    assert f"the program enforces `{name} = {FAR}`" in str(found)


@pytest.mark.parametrize("value", [True, 1e4, "10000"])
def test_what_is_no_count_is_no_limit(value):
    history = History(value)
    assert "bounded only if" not in str(diagnose(history))


def test_a_cache_by_size_is_bounded_once_sizes_come_again():
    found = diagnose(sizes_that_never_come_again())
    assert "grows so far; bounded only if its keys come again" in str(found)
    draw, windows = random.Random(0), {}

    def step():
        length = draw.randrange(64, 164)
        windows.setdefault(length, torch.zeros(length))

    assert diagnose(step).verdict == "bounded cache"


def test_nothing_is_said_of_a_limit_that_was_exceeded():
    assert "bounded only if" not in str(diagnose(Printed(NEAR)))


@pytest.mark.parametrize("step", [Cut(NEAR), closing_over(NEAR), Cut(33)])
def test_growth_that_is_seen_to_end_is_bounded(step, assert_no_leak):
    assert assert_no_leak(step).verdict == "bounded cache"


def test_more_steps_show_that_a_limit_is_kept_to(assert_no_leak):
    assert diagnose(Cut(60)).leaks
    assert assert_no_leak(Cut(60), longest=80).verdict == "bounded cache"


def test_limits_of_python_are_believed(assert_no_leak):
    recent = deque(maxlen=FAR)
    assert assert_no_leak(lambda: recent.append(torch.zeros(64))).verdict == "bounded cache"

    @functools.lru_cache(maxsize=FAR)
    def table(step):
        return torch.zeros(64)

    assert assert_no_leak(lambda step: table(step).sum()).verdict == "bounded cache"
