"""Findings about some steps, and the rules that turn them into a verdict, in their order.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from tfswa_lab.memory.display import Shown, page
from tfswa_lab.memory.gauges import DeviceSignals
from tfswa_lab.memory.leaks.advice import cure
from tfswa_lab.memory.leaks.census import grows, slope
from tfswa_lab.memory.leaks.hooks import Hooks
from tfswa_lab.memory.leaks.host_steps import HostGrowth
from tfswa_lab.memory.leaks.suspects import Suspect
from tfswa_lab.memory.leaks.traced_steps import COMPLETED, Outcome
from tfswa_lab.memory.sizes import MIB, format_bytes
from tfswa_lab.memory.trace.stacks import Frame, in_short

LARGE_PEAK = 16 * MIB  # below this nobody runs out of memory
PEAK_RATIO = 4  # of the peak of a step to the memory that stays
LARGE_CACHE = 32 * MIB
OUTSIDE = 8 * MIB
PINNED = 2.0


@dataclass(frozen=True)
class Findings:
    """All facts that the rules look at.

    Args:
        steps: the number of steps that ran under a trace.
        settled: bytes allocated after each step, once garbage was collected.
        peaks: most bytes allocated within each step.
        rising: lines with more and more blocks, fastest growth first.
        stopped: lines with more and more blocks until some step, and no more since.
        lasting: lines that added something once, after the first step, which stayed.
        newest: allocation sites of the last step that are still alive while an exception is stored.
        hooks: lists of hooks that grow.
        freed: bytes that only the garbage collector freed after each step.
        cycle: the objects of a reference cycle.
        in_cycle: the line that made most of the memory that the cycle keeps, if it is known.
        device: state of the CUDA device after each step; empty without CUDA.
        host: growth of host memory.
        kernels: bytes per step that oneDNN keeps on the host for sizes that are new to it.
        limit: bytes that a step may need, None without a limit.
        at_peak: the lines with most bytes at the highest peak, and these bytes.
        outcome: how the run ended.
        untraced: the number of further steps without a trace.
    """

    steps: int
    settled: Sequence[int]
    peaks: Sequence[int]
    rising: Sequence[Suspect] = ()
    stopped: Sequence[Suspect] = ()
    lasting: Sequence[Suspect] = ()
    newest: Sequence[Suspect] = ()
    hooks: Sequence[Hooks] = ()
    freed: Sequence[int] = ()
    cycle: str = ""
    in_cycle: Frame | None = None
    device: Sequence[DeviceSignals] = ()
    host: HostGrowth | None = None
    kernels: float = 0.0
    limit: int | None = None
    at_peak: Sequence[tuple[str, int]] = ()
    outcome: Outcome = COMPLETED
    untraced: int = 0


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """What happens to the memory of a step, and why.

    Args:
        verdict: `healthy`, `warm-up only`, `activation peak`, `leak of graph`, `leak of tensors`,
            `reference cycle`, `bounded cache`, `duplicated state`, `frame/exception retention`,
            `hook accumulation`, `fragmentation`, `reserved cache`, `outside the allocator` or
            `host memory`.
        cause: the line that allocates and the object that holds.
        evidence: measurements, a sentence each.
        growth_per_step: bytes that each step loses; for nodes of graphs, roughly.
        suggestion: what to do.
        failed: whether a step raised an error (but for the end of its data), ran out of memory, or
            needed more than `limit`.
    """

    verdict: str
    cause: str
    evidence: tuple[str, ...] = ()
    growth_per_step: float = 0.0
    suggestion: str = ""
    failed: bool = False

    @property
    def leaks(self) -> bool:
        """Whether each step loses memory."""
        return self.verdict in LEAKS

    @property
    def brief(self) -> str:
        """The verdict, and what each step loses."""
        lost = f": {format_bytes(round(self.growth_per_step))} per step" * self.leaks
        return f"{self.verdict}{lost}"

    def __str__(self) -> str:
        lines = [self.brief, self.cause, *self.evidence, self.suggestion]
        return "\n  ".join(filter(None, lines))

    def _repr_html_(self) -> str:
        advice = {"what to do": [self.suggestion]} if self.suggestion else {}
        return page(self.brief, {}, {self.cause: self.evidence} | advice, opened=True)


LEAKS = {
    *("leak of graph", "leak of tensors", "reference cycle", "duplicated state"),
    *("frame/exception retention", "hook accumulation", "outside the allocator", "host memory"),
}


def judge(findings: Findings) -> Diagnosis:
    """The verdict of the first rule that has one.

    >>> judge(Findings(steps=12, settled=[100] * 12, peaks=[300] * 12)).verdict
    'healthy'
    """
    found = next(verdict for rule in RULES if (verdict := rule(findings)) is not None)
    return replace(found, failed=findings.outcome.failed or _over(findings))


def hook_accumulation(f: Findings) -> Diagnosis | None:
    """A list of hooks becomes longer, or hooks keep the tensors alive that they belong to."""
    lost = [each for each in f.rising if "hook" in each.through and not each.rooted]
    if f.hooks:
        most = max(f.hooks, key=lambda hooks: hooks.per_step)
        plural = "" if most.per_step == 1 else "s"
        cause = (
            f"`{most.owner}.{most.name}` gets {most.per_step:.3g} hook{plural} per step and has "
            f"{most.count}" + (f", the last from {in_short(most.line)}" if most.line else "")
        )
        if f.rising:
            cause += f"; with them {f.rising[0]} stays"
    elif lost:
        cause = f"a hook on a tensor refers to that tensor itself: {lost[0]} is never freed"
    else:
        return None
    advice = "register hooks once, outside of the step, or keep the handle and call .remove()"
    growth = max(_growth(f.rising), slope(f.settled))
    return Diagnosis("hook accumulation", cause, _levels(f), growth, advice)


def leak(f: Findings) -> Diagnosis | None:
    """The number of blocks grows, and nothing bounds it."""
    kinds: dict[str, list[Suspect]] = {}
    for suspect in f.rising:
        if not suspect.is_bounded(f.steps):
            kinds.setdefault(_kind(suspect), []).append(suspect)
    if not kinds:
        return None
    verdict, suspects = max(kinds.items(), key=lambda item: _growth(item[1]))
    main = max(suspects, key=lambda suspect: suspect.per_step)
    cause = f"{main}, {main.held_by}"
    if main.pinned >= PINNED and verdict == "leak of tensors":
        cause += f"; a view that is kept pins a storage {main.pinned:.0f} times its size"
    growth = _growth([each for group in kinds.values() for each in group])
    return Diagnosis(verdict, cause, (*_limits(main), *_levels(f)), growth, _advice(verdict, main))


def _limits(suspect: Suspect) -> tuple[str, ...]:
    """Why a limit, or what may be one, does not count."""
    if suspect.limit:
        here = format_bytes(suspect.room)
        return (f"the limit of {suspect.limit} bounds nothing: this machine has {here}",)
    if suspect.condition:
        shown = "a larger `longest` would show it"
        return (f"grows so far; bounded only if {suspect.condition}: {shown}",)
    return ()


def _kind(suspect: Suspect) -> str:
    if suspect.through & {"frame", "exception"}:
        return "frame/exception retention"
    copied = suspect.of_optimizer or "parameter" in suspect.through
    if copied and not suspect.container.in_optimizer:
        return "duplicated state"
    return "leak of graph" if "graph" in suspect.through else "leak of tensors"


def reference_cycle(f: Findings) -> Diagnosis | None:
    """The garbage collector frees tensors again and again."""
    freed = [each for each in f.freed[2:] if each]
    if len(freed) < 2:
        return None
    cause = "a reference cycle keeps tensors until the garbage collector runs"
    cause += f": `{f.cycle}`" if f.cycle else ""
    cause += f"; most of it made at {in_short(f.in_cycle)}" if f.in_cycle else ""
    evidence = f"gc.collect() freed {format_bytes(round(median(freed)))} after {len(freed)} steps"
    advice = "break the cycle (weakref, or `del` an attribute); gc.collect() only hides it"
    growth = sum(f.freed[2:]) / len(f.freed[2:])
    return Diagnosis("reference cycle", cause, (evidence, *_levels(f)), growth, advice)


def outside(f: Findings) -> Diagnosis | None:
    """More and more memory of the device is used that the allocator has not reserved."""
    levels = [each.used - each.reserved for each in f.device]
    if not levels or not grows(levels) or levels[-1] - levels[0] < OUTSIDE:
        return None
    cause = "memory of the device grows that PyTorch's allocator did not reserve"
    advice = "look at cuFFT's plan cache (torch.backends.cuda.cufft_plan_cache), NCCL, and others"
    evidence = f"outside: {format_bytes(levels[0])} at first, {format_bytes(levels[-1])} at the end"
    return Diagnosis("outside the allocator", cause, (evidence,), slope(levels), advice)


def fragmentation(f: Findings) -> Diagnosis | None:
    """More and more is reserved, although no step needs more than an earlier one."""
    waste = _waste(f)
    highest = max((each.peak for each in f.device), default=0)
    retried = f.device and f.device[-1].retries > f.device[0].retries
    if not waste or not (grows(waste) or retried) or waste[-1] < 0.25 * highest:
        return None
    cause = "free blocks of reserved memory do not fit the next requests"
    first, last = format_bytes(waste[0]), format_bytes(waste[-1])
    evidence = f"reserved beyond the highest peak: {first}, then {last}"
    advice = "PYTORCH_ALLOC_CONF=expandable_segments:True, or fewer different lengths"
    return Diagnosis("fragmentation", cause, (evidence, *_levels(f)), slope(waste), advice)


def host_memory(f: Findings) -> Diagnosis | None:
    """Host memory grows, by nodes of graphs or otherwise, and tensors do not."""
    if f.host is None:
        return None
    grown, what, verdict = f.host, format_bytes(round(f.host.size)), "host memory"
    if grown.children:
        cause = f"{what} per step stay in child processes: {grown.children}"
        return Diagnosis(verdict, cause, _levels(f), grown.size, grown.children.advice)
    unknown, advice = "", "keep numbers or sums instead of lists, or empty them after each epoch"
    if grown.kind == "nodes":
        plural = "" if grown.per_step == 1 else "s"
        what, verdict = f"{grown.per_step:.3g} node{plural} of autograd's graph", "leak of graph"
        advice = "add `loss.item()` or `loss.detach()`: the sum keeps the graphs of all its terms"
    if grown.kind == "process":
        unknown = ", which neither Python nor PyTorch allocated"
        advice = "look at extensions and C libraries: they have to free what they allocate"
    line = f", made at {in_short(grown.line)}" if grown.line else ""
    holder = f", held by `{grown.holder}` ({grown.where})" if grown.holder else ""
    tensors = "" if f.rising else "; tensors do not grow"
    cause = f"{what} per step stay on the host{unknown}{line}{holder}{tensors}"
    if known := cure(grown.known, grown.holder):
        advice = known if verdict == "host memory" else f"{advice}; {known}"
    return Diagnosis(verdict, cause, _levels(f), grown.size, advice)


def kept_frames(f: Findings) -> Diagnosis | None:
    """A stored exception keeps its frames' local variables alive."""
    held = [each for each in (*f.lasting, *f.newest) if "exception" in each.through]
    if not held:
        return None
    main = max(held, key=lambda suspect: suspect.held)
    cause = f"{main}, {main.held_by}"
    advice = _advice("frame/exception retention", main)
    return Diagnosis("frame/exception retention", cause, _levels(f), 0.0, advice)


def bounded_cache(f: Findings) -> Diagnosis | None:
    """Blocks pile up, and their number has a bound."""
    caches = [*f.rising, *f.stopped]
    if not caches:
        return None
    main = max(caches, key=lambda suspect: suspect.held)
    cause = f"{main}, {main.held_by}"
    why = "it ends when all keys have been seen" if main in f.rising else "its growth ends"
    if main.limit:
        why = f"it holds at most {main.limit}"
    advice = "no leak; if it is too large, bound it (maxsize) or compute the values again"
    if main.container.limited_by == "history_size":
        advice = "no leak; if it is too large, give the optimizer a smaller history_size"
    evidence = (f"{why}; now {format_bytes(main.held)}", *_levels(f))
    return Diagnosis("bounded cache", cause, evidence, 0.0, advice)


def warm_up(f: Findings) -> Diagnosis | None:
    """Something was added once, and nothing since."""
    added = [each for each in f.lasting if not each.of_optimizer]
    if not added:
        return None
    main = max(added, key=lambda suspect: suspect.held)
    cause = f"{main} in step {main.births[0]}, {main.held_by}; nothing was added since"
    return Diagnosis("warm-up only", cause, _levels(f), 0.0, "nothing; measure after these steps")


def activation_peak(f: Findings) -> Diagnosis | None:
    """A step needs much more memory than stays, and that may be too much."""
    stays, peak = f.settled[-1] if f.settled else 0, max(f.peaks, default=0)
    large = peak - stays >= max(LARGE_PEAK, PEAK_RATIO * stays)
    if not (f.outcome.out_of_memory or _over(f) or (large and f.limit is None)):
        return None
    lines = "; ".join(f"{format_bytes(size)} made at {line}" for line, size in f.at_peak)
    cause = (
        f"within a step {format_bytes(peak)} are alive at once, between steps {format_bytes(stays)}"
    )
    cause += f": {lines}" if lines else ""
    advice = "checkpoint, bf16, fused attention, shorter crop, smaller batch; `del` frees little"
    return Diagnosis("activation peak", cause, _levels(f), 0.0, advice)


def reserved_cache(f: Findings) -> Diagnosis | None:
    """Much more is reserved than late steps need, and it does not grow."""
    late = f.device[len(f.device) // 2 :]
    if not late:
        return None
    reserved, peak = late[-1].reserved, max(each.peak for each in late)
    if reserved < 2 * peak or reserved - peak < LARGE_CACHE:
        return None
    held, needed = format_bytes(reserved), format_bytes(peak)
    cause = f"{held} are reserved, steps need {needed}: the cache of an earlier peak"
    advice = "nothing; torch.cuda.empty_cache() once, if another program needs it"
    return Diagnosis("reserved cache", cause, _levels(f), 0.0, advice)


def healthy(f: Findings) -> Diagnosis:
    """Nothing was found."""
    rises = [step for step in range(1, f.steps) if f.settled[step] > max(f.settled[:step])]
    settled = rises and rises[-1] < f.steps // 2
    since = f"after step {rises[-1]}" if settled else "from step to step"
    return Diagnosis("healthy", f"nothing grows {since}", _levels(f))


RULES: Sequence[Callable[[Findings], Diagnosis | None]] = (
    *(hook_accumulation, leak, reference_cycle, outside, fragmentation, host_memory),
    *(kept_frames, bounded_cache, warm_up, activation_peak, reserved_cache, healthy),
)


def _over(f: Findings) -> bool:
    return f.limit is not None and max(f.peaks, default=0) > f.limit


def _waste(f: Findings) -> list[int]:
    """Bytes reserved beyond the highest peak so far, after each step."""
    waste, highest = [], 0
    for each in f.device:
        highest = max(highest, each.peak)
        waste.append(each.reserved - highest)
    return waste


def _growth(suspects: Iterable[Suspect]) -> float:
    return sum(max(0.0, each.per_step) for each in suspects)


def _levels(f: Findings) -> tuple[str, ...]:
    first, last = (format_bytes(level) for level in (f.settled[0], f.settled[-1]))
    text = f"allocated after step 0: {first}, after step {f.steps - 1}: {last}"
    peak = f"highest peak within a step: {format_bytes(max(f.peaks))}"
    kept = format_bytes(round(f.kernels))
    kernels = f"oneDNN keeps {kept} of kernels per step, for 1024 sizes at most"
    plural = "s were" if f.untraced > 1 else " was"
    untraced = f"{f.untraced} more step{plural} run without the trace"
    said = (text if f.steps else "", peak, kernels if f.kernels else "")
    return tuple(filter(None, (*said, untraced if f.untraced else "", f.outcome.error)))


def _advice(verdict: str, suspect: Suspect) -> str:
    known = cure(suspect.known, suspect.path)
    if known and verdict == "leak of tensors":
        return known
    usual = _usual_advice(verdict, suspect)
    return f"{usual}; {known}" if known else usual


def _usual_advice(verdict: str, suspect: Suspect) -> str:
    if verdict == "leak of tensors" and suspect.pinned >= PINNED:
        return "keep `.clone()` of the view: the storage it looks into can go then"
    if verdict == "leak of tensors" and suspect.container.in_optimizer:
        return "shorten what the optimizer keeps of earlier steps, such as with `deque(maxlen=…)`"
    if verdict == "frame/exception retention" and "exception" not in suspect.through:
        return "run generators and coroutines to their end, or close() them, and do not keep frames"
    return {
        "leak of tensors": "keep `.item()`, a sum or `.detach().cpu()`, or empty the holder",
        "leak of graph": "keep `.item()` or `.detach()`; evaluate under torch.no_grad()",
        "duplicated state": "make optimizers and parameters once, or drop the old ones",
        "frame/exception retention": "keep str(error), or traceback.clear_frames(its traceback)",
    }[verdict]
