"""Which special rules of the diagnosis does a planted script need?

    python benchmarks/leak_rules.py

Each rule is switched off in turn, from outside of the package, and the scripts of `leaks.py` are
diagnosed again. Counted are those whose verdict, holder or line changes, or that end in an error,
twice. A first run of each script notes which rules make a difference to any intermediate result;
only these are switched off for it. Rules of GPU memory cannot be tried here (`ON_GPU_ONLY`), and
one rule only in a process that has not run the script before (`FIRST_RUN_ONLY`).

A rule without which nothing changes should be deleted, unless it saves time or memory.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context
from functools import cached_property
from inspect import Parameter, isgenerator, signature
from multiprocessing import get_context
from pathlib import Path
from types import CellType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from leaks import SETS, scripts
from record import record, table
from torch import Tensor, UntypedStorage

from tfswa_lab.memory.leaks import (
    census,
    containers,
    holders,
    hooks,
    host_steps,
    referrers,
    spelling,
    suspects,
    verdicts,
)
from tfswa_lab.memory.leaks.autograd_graph import SavedTensors
from tfswa_lab.memory.leaks.census import Census, Site
from tfswa_lab.memory.leaks.holders import Holders
from tfswa_lab.memory.leaks.host_steps import HostSteps
from tfswa_lab.memory.leaks.referrers import HeapPaths
from tfswa_lab.memory.leaks.traced_steps import TracedSteps

diagnosis = importlib.import_module("tfswa_lab.memory.leaks.diagnose")
PROCESSES = 2
TIMEOUT = 1200  # seconds for a script without all of its rules in turn
EVERY: list = []  # planted scripts, which forked processes share
FIRST_RUN_ONLY = "kernels that oneDNN keeps"  # for as long as the process runs
ON_GPU_ONLY = ("outside", "fragmentation", "reserved_cache")  # tried in tests/memory/test_verdicts
NEVER = type("Never", (), {})  # a class without instances
DIFFERENT = object()  # returned in place of a call that was left out


class Rule(NamedTuple):
    """A special case of the diagnosis.

    Args:
        name: what it does.
        owner: module or class that has it.
        attribute: its function there.
        off: what replaces the function; gets the function first, and then its arguments.
    """

    name: str
    owner: Any
    attribute: str
    off: Callable


@contextmanager
def changed(owner: Any, **values: Any) -> Iterator[None]:
    """Other values of some attributes, for a while."""
    before = {name: vars(owner)[name] for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def during(owner: Any, **values: Any) -> Callable:
    """Call the real function while an attribute has another value."""

    def off(real: Callable, *arguments: Any) -> Any:
        with changed(owner, **values):
            return real(*arguments)

    return off


def always(value: Any) -> Callable:
    """Return the same, whatever is asked."""
    return lambda real, *arguments: value


def container_without(**values: Any) -> Callable:
    """What is known of a container but for some fields."""
    return lambda real, chain, at: real(chain, at)._replace(**values)


def not_through(kind: str) -> Callable:
    """What leads from a holder to a block, but for one kind."""
    return lambda real, holding, at, path: real(holding, at, path) - {kind}


def not_of(*kinds: type) -> Callable:
    """No tensor is known to lead to objects of some classes."""
    return lambda real, reach, thing: None if isinstance(thing, kinds) else real(reach, thing)


def not_spelled(*kinds: type) -> Callable:
    """What objects of some classes hold is written like any attribute."""

    def off(real: Callable, chain: Any, at: int) -> str:
        holder = chain[at - 1]
        return (
            spelling._attribute(holder, chain[at]) if isinstance(holder, kinds) else real(chain, at)
        )

    return off


def not_replaced(beginning: str) -> Callable:
    """An expression is made readable but for one replacement."""

    def sub(pattern: str, by: str, text: str) -> str:
        return text if pattern.startswith(beginning) else re.sub(pattern, by, text)

    return during(spelling, re=SimpleNamespace(sub=sub))


def half_grown(real: Callable, levels: Any) -> bool:
    """Growth that halves has ended, if steady or not."""
    late = levels[len(levels) // 2 :]
    return levels[-1] - late[0] < 0.5 * (late[0] - levels[0]) or real(levels)


def without_rest(real: Callable, levels: Any) -> bool:
    """Growth that rests for long goes on."""
    late = levels[len(levels) // 2 :]
    return levels[-1] - late[0] < 0.5 * (late[0] - levels[0]) and real(levels)


def only_numbers(real: Callable, key: Any) -> Any:
    """A key that is a number, and no name with a number in it."""
    return real(key) if isinstance(key, int | float) else None


def stays_high(real: Callable, site: Site) -> bool:
    """Something is held in the last third that was not held after the first step."""
    return min(site.totals[2 * len(site.totals) // 3 :]) > site.totals[0]


def growing_without(kind: str) -> Callable:
    """The kind of host memory that grows, of all but one."""

    def off(real: Callable, host: HostSteps) -> str:
        with changed(host, kinds=[each for each in host.kinds if each != kind]):
            return real(host)

    return off


def growing_of_all(real: Callable, host: HostSteps) -> str:
    """The kind of host memory that grows, of all kinds."""
    with changed(host, kinds=tuple(host_steps.LEAST)):
        return real(host)


def dense_only(real: Callable, holders: Holders, storage: Any) -> Any:
    """The tensors that lie in a storage, without sparse ones."""
    with changed(holders, _sparse=[]):
        return real(holders, storage)


def without_gradients(real: Callable, holders: Holders, thing: Any) -> Iterator:
    """What holds an object, without parameters whose gradient it is."""
    return (p for p in real(holders, thing) if not _has_gradient(p[0], thing))


def _has_gradient(owner: Any, thing: Any) -> bool:
    return isinstance(owner, Tensor) and owner.is_leaf and owner.grad is thing


def beginning_without(*kinds: type) -> Callable:
    """A chain that begins at an object of some classes is said to be held by C++."""
    return lambda real, top, roots: (
        real(top, roots) if not isinstance(top, kinds) else (type(top).__name__, "held by C++")
    )


RULES = [
    *(
        Rule(f"verdict: {rule.__name__.replace('_', ' ')}", verdicts, rule.__name__, always(None))
        for rule in verdicts.RULES[:-1]
        if rule.__name__ not in ON_GPU_ONLY
    ),
    *(
        Rule(f"seen on the way: {kind}", suspects, "_through", not_through(kind))
        for kind in (*suspects.KINDS, "graph", "hook")
    ),
    Rule(
        "the optimizer's phase",
        suspects.Suspect,
        "of_optimizer",
        lambda real, suspect: "optimizer" in suspect.through,
    ),
    Rule("a view that pins a large storage", suspects, "_pinned", always(1.0)),
    Rule(
        "limit of a deque or lru_cache", containers, "container_of", container_without(limit=None)
    ),
    Rule("lru_cache by its own name", containers, "container_of", during(containers, LRU_CACHE=())),
    Rule("the dictionary of an lru_cache", containers, "_owning_cache", always(None)),
    Rule("keys by content", containers, "container_of", container_without(by_content=False)),
    Rule("keys that count up", containers, "_has_running_number", always(False)),
    Rule("numbers in the names of keys", containers, "_number", only_numbers),
    Rule("fills up: new keys become rare", census, "fills_up", always(True)),
    Rule("closed-over variables", suspects, "_joint", during(suspects, CellType=NEVER)),
    Rule(
        "the holder of two blocks",
        suspects,
        "_suspect",
        lambda real, site, holdings, holders: real(site, holdings[:1], holders),
    ),
    Rule("joined into longer tensors", Site, "joins", always(False)),
    Rule("growth ends", Site, "ends", always(False)),
    Rule("growth ends: half, if not steady", census, "slows", half_grown),
    Rule("growth ends: a long rest", census, "slows", without_rest),
    Rule("blocks that replace another line's", census, "replaces", always(False)),
    Rule("more steps, if something grows", census, "is_open", always(False)),
    Rule(
        "more steps, if something is new",
        census,
        "is_open",
        lambda real, stock: any(s.rises or s.collects for s in census.sites(stock)),
    ),
    Rule("lasting: not from the first step", Site, "lasts", stays_high),
    Rule(
        "collected: not of the last steps",
        Site,
        "collects",
        lambda real, site: len(site.births) > 1,
    ),
    Rule(
        "fewer steps, if much is lost", diagnosis, "_enough", lambda real, stock, longest: longest
    ),
    Rule("lines of the last step", TracedSteps, "has_tracebacks", always(False)),
    Rule("only while a traceback is kept", TracedSteps, "has_tracebacks", always(True)),
    Rule("tensors made out of sight", TracedSteps, "_register", always(DIFFERENT)),
    Rule("parts of sparse tensors", Holders, "_on", dense_only),
    Rule("arrays that view tensors", Holders, "_arrays_of", always([])),
    Rule("untracked containers of arrays", Holders, "_untracked", always({})),
    Rule("gradients of parameters", Holders, "_beyond", without_gradients),
    Rule("saved by a graph", SavedTensors, "holder_of", not_of(Tensor, UntypedStorage)),
    Rule(
        "packed by hooks of a graph",
        SavedTensors,
        "holder_of",
        lambda real, reach, thing: (
            real(reach, thing) if isinstance(thing, Tensor | UntypedStorage) else None
        ),
    ),
    Rule("variables of running functions", referrers, "running_locals", lambda real: iter(())),
    Rule(
        "several ends of a search",
        HeapPaths,
        "to",
        lambda real, paths, thing: real(paths, thing)[:1],
    ),
    Rule("frames of the diagnosis itself", referrers, "_is_ours", during(referrers, OF_CODE={})),
    Rule(
        "classes are names",
        HeapPaths,
        "is_root",
        lambda real, paths, thing: not isinstance(thing, type) and real(paths, thing),
    ),
    Rule("globals of code that was executed", referrers, "is_globals", always(False)),
    Rule("spelling: closures", spelling, "_access", not_spelled(CellType)),
    Rule("spelling: suspended functions", spelling, "_access", not_spelled(*spelling.SUSPENDED)),
    Rule("spelling: lru_cache", spelling, "_access", not_spelled(spelling.LRU_CACHE)),
    Rule("spelling: context variables", spelling, "_access", not_spelled(Context)),
    Rule("spelling: gradients", spelling, "_access", not_spelled(Tensor)),
    Rule("spelling: slots", spelling, "_slots", always(())),
    Rule("spelling: built-in attributes", spelling, "_attribute", during(spelling, BUILT_IN=())),
    Rule("spelling: wrapped functions", spelling, "_readable", not_replaced("^")),
    Rule("spelling: threads", spelling, "_readable", not_replaced(r"\.<dict>")),
    Rule("spelling: parts of modules", spelling, "_readable", not_replaced(r"\._(?")),
    Rule("spelling: repetitions", spelling, "_readable", not_replaced("((")),
    Rule(
        "spelling: the step's own closure", spelling, "_beginning", beginning_without(FunctionType)
    ),
    Rule("nodes of graphs", HostSteps, "growing", growing_without("nodes")),
    Rule("memory of Python", HostSteps, "growing", growing_without("python")),
    Rule("memory of the process", HostSteps, "growing", growing_without("process")),
    Rule("not the process, if tensors grow", HostSteps, "growing", growing_of_all),
    Rule("growth too small to tell", HostSteps, "growing", during(host_steps, LEAST=Counter())),
    Rule("new objects in place of old ones", HostSteps, "_python_holds_more", always(True)),
    Rule("kernels that oneDNN keeps", HostSteps, "_run_without_onednn", always(DIFFERENT)),
    Rule(
        "untracked containers of numbers",
        HostSteps,
        "grown_container",
        lambda real, host: host._grown(lambda: referrers.of_types(host_steps.CONTAINERS)),
    ),
    Rule("line of host memory", host_steps, "_line_that_grew", always(None)),
    Rule("cycle in words", holders, "cycle_of_step", always("")),
    Rule(
        "cycle: begins at a class of the user",
        holders,
        "_shortest_cycle",
        during(holders, PLAIN=()),
    ),
    Rule(
        "cycle: closure of a function",
        holders,
        "_shortest_cycle",
        during(holders, FunctionType=NEVER),
    ),
    Rule("cycle: the line", Census, "line_of_garbage", always(None)),
    Rule("hooks of torch itself", hooks, "hook_counts", during(hooks, GLOBAL=())),
    Rule("hooks of tensors", hooks, "hook_counts", during(hooks, OF_TENSORS=())),
    Rule("hooks: the line", hooks, "line_of_last", always(None)),
    Rule("hooks that are partial", hooks, "line_of_last", during(hooks, partial=NEVER)),
]


@contextmanager
def installed(rules: list[Rule], felt: set[str] | None = None) -> Iterator[None]:
    """One rule that is off; with `felt`, rules that are on and noted if they make a difference."""
    groups = defaultdict(list)
    for rule in rules:
        groups[rule.owner, rule.attribute].append(rule)
    undo = []
    try:
        for (owner, attribute), group in groups.items():
            undo += list(_install(owner, attribute, group, felt))
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def _install(owner: Any, name: str, rules: list[Rule], felt: set[str] | None) -> Iterator[tuple]:
    """Puts a replacement wherever a function is; yields what was there."""
    real = vars(owner)[name]
    kind = type(real) if isinstance(real, property | cached_property) else None
    function = {property: "fget", cached_property: "func"}.get(kind)
    new = _replaced(getattr(real, function) if function else real, rules, felt)
    if kind is not None:
        new = kind(new)
        if kind is cached_property:
            new.__set_name__(owner, name)
    places = [owner]
    if isinstance(owner, ModuleType):
        of_memory = [m for key, m in sys.modules.items() if key.startswith("tfswa_lab.memory")]
        places = [each for each in of_memory if vars(each).get(name) is real]
    for place in places:
        yield place, name, real
        setattr(place, name, new)
    if real in verdicts.RULES:
        yield verdicts, "RULES", verdicts.RULES
        verdicts.RULES = tuple(new if each is real else each for each in verdicts.RULES)


def _replaced(real: Callable, rules: list[Rule], felt: set[str] | None) -> Callable:
    """A function with as many arguments: one with any number would hold them in a tuple."""
    every = signature(real).parameters.values()
    count = sum(each.default is Parameter.empty for each in every)

    def ask(value: Any, others: Iterable) -> Any:
        wanted = _collected(value)
        felt.update(name for name, other in others if not _same(wanted, _collected(other)))

    if felt is None:
        off = rules[0].off
        made = (
            lambda: off(real),
            lambda a: off(real, a),
            lambda a, b: off(real, a, b),
            lambda a, b, c: off(real, a, b, c),
        )
    else:
        made = (
            lambda: ask(real(), ((r.name, r.off(real)) for r in rules)) or real(),
            lambda a: ask(real(a), ((r.name, r.off(real, a)) for r in rules)) or real(a),
            lambda a, b: (
                ask(real(a, b), ((r.name, r.off(real, a, b)) for r in rules)) or real(a, b)
            ),
            lambda a, b, c: (
                ask(real(a, b, c), ((r.name, r.off(real, a, b, c)) for r in rules)) or real(a, b, c)
            ),
        )
    for each in (made[count], ask, *(rule.off for rule in rules)):
        each.__code__ = _as_ours(each.__code__)
    return made[count]


def _as_ours(code: CodeType) -> CodeType:
    """Code of the diagnosis, so that no variable of it is named as a holder."""
    inner = tuple(_as_ours(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_filename=referrers.__file__, co_consts=inner)


def _collected(result: Any) -> Any:
    """A result to compare. Generators inside of it are a script's, and may never end."""
    return list(result) if isgenerator(result) else result


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    plain = str | int | float | frozenset | suspects.Suspect | verdicts.Diagnosis | dict
    return a is b or (isinstance(a, plain) and type(a) is type(b) and a == b)


def told(script: Any) -> str:
    """Verdict, holders, lines and pinned storages that are told, or the error at the end."""
    step, arguments = script.prepare()
    try:
        found = diagnosis.diagnose(step, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    named = re.findall(r"`[^`]+`|\S+\.py:\d+ ?\S*|\([^)]*\)|pins a storage", found.cause)
    return re.sub(
        r"\[\d+\]| of \d+", "", " ".join([found.verdict, *named])
    )  # more steps, more items


def examine(at: int) -> tuple[str, dict[str, str]]:
    """What is told of a script; and what without each rule that makes a difference to it."""
    script = EVERY[at]
    usual, felt = {told(script), told(script)}, set()
    with installed(RULES, felt):
        told(script)
    without = {}
    for rule in RULES:
        if rule.name in felt:
            with installed([rule]):
                now = told(script)
                again = now if now in usual else told(script)
            without[rule.name] = "" if {now, again} & usual else now
    return sorted(usual)[0], without


def examine_first_run(at: int) -> str:
    """What is told of a script without one rule, in a process that has not run it before."""
    with installed([rule for rule in RULES if rule.name == FIRST_RUN_ONLY]):
        return told(EVERY[at])


def main() -> None:
    """Examine all, record after each, print."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "memory"))
    torch.set_num_threads(1)
    EVERY.extend(script for source in SETS.values() for script in scripts(*source))
    rows = {rule.name: {"reached": 0, "changed": []} for rule in RULES}
    with get_context("fork").Pool(PROCESSES, maxtasksperchild=1) as pool:
        jobs = [
            (script.name, *(pool.apply_async(each, (at,)) for each in (examine, examine_first_run)))
            for at, script in enumerate(EVERY)
        ]
        for done, (name, job, first) in enumerate(jobs, 1):
            before, without = job.get(timeout=TIMEOUT)
            if (now := first.get(timeout=TIMEOUT)) != before:
                without[FIRST_RUN_ONLY] = now
            print(name, "|", before, flush=True)
            for rule, now in without.items():
                rows[rule]["reached"] += 1
                if now:
                    rows[rule]["changed"].append({"script": name, "before": before, "without": now})
                    print("   ", rule, "|", now[:150], flush=True)
            record("leak_rules", "cpu", {"scripts": done, "rules": rows})
    lines = [(name, row["reached"], len(row["changed"])) for name, row in rows.items()]
    print(table(("rule that is off", "scripts that reach it", "scripts that change"), lines))


if __name__ == "__main__":
    main()
