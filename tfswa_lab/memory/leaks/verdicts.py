"""The rules by which findings become a verdict, in the order in which they are asked.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from tfswa_lab.memory.leaks.findings import Findings
from tfswa_lab.memory.leaks.suspects import Culprit
from tfswa_lab.memory.leaks.trend import fills_up, grows, slope
from tfswa_lab.memory.sizes import MIB, format_bytes
from tfswa_lab.memory.trace.stacks import in_short

LARGE_PEAK = 16 * MIB  # below this nobody runs out of memory
PEAK_RATIO = 4  # of what a step needs to what stays
LARGE_CACHE = 32 * MIB
OUTSIDE = 8 * MIB
PINNED = 2.0


@dataclass(frozen=True)
class Diagnosis:
    """What is the matter with the memory of a step.

    Args:
        verdict: `healthy`, `warm-up only`, `activation peak`, `leak of graph`, `leak of tensors`,
            `reference cycle`, `bounded cache`, `duplicated state`, `frame/exception retention`,
            `hook accumulation`, `fragmentation`, `reserved cache`, `outside the allocator` or
            `host memory`.
        cause: the line that allocates and the object that holds.
        evidence: what was measured, a sentence each.
        growth_per_step: bytes that are lost with each; of nodes of graphs, about.
        suggestion: what to do.
        failed: whether a step raised something else than the end of its data, or took more memory
            than there was, or than `limit`.
    """

    verdict: str
    cause: str
    evidence: tuple[str, ...] = ()
    growth_per_step: float = 0.0
    suggestion: str = ""
    failed: bool = False

    @property
    def leaks(self) -> bool:
        """Whether memory is lost with every step."""
        return self.verdict in LEAKS

    def __str__(self) -> str:
        grows = f": {format_bytes(round(self.growth_per_step))} per step" * self.leaks
        lines = [f"{self.verdict}{grows}", self.cause, *self.evidence, self.suggestion]
        return "\n  ".join(filter(None, lines))


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
    return replace(found, failed=findings.ended.failed or _over(findings))


def hook_accumulation(f: Findings) -> Diagnosis | None:
    """A list of hooks becomes longer, or tensors are lost to hooks that refer to them."""
    lost = [each for each in f.rising if "hook" in each.through and not each.rooted]
    if f.hooks:
        most = max(f.hooks, key=lambda hooks: hooks.per_step)
        plural = "" if most.per_step == 1 else "s"
        cause = (
            f"`{most.owner}.{most.name}` gets {most.per_step:.3g} hook{plural} per step and has "
            f"{most.count}" + (f", the last from {in_short(most.line)}" if most.line else "")
        )
        if f.rising:
            cause += f"; with them {_made(f.rising[0])} stays"
    elif lost:
        cause = f"a hook on a tensor refers to that tensor itself: {_made(lost[0])} is never freed"
    else:
        return None
    advice = "register hooks once, outside of the step, or keep the handle and call .remove()"
    growth = max(_growth(f.rising), slope(f.settled))
    return Diagnosis("hook accumulation", cause, _levels(f), growth, advice)


def leak(f: Findings) -> Diagnosis | None:
    """Blocks become ever more, and nothing bounds their number."""
    kinds: dict[str, list[Culprit]] = {}
    for culprit in f.rising:
        if not bounded(culprit, f.steps):
            kinds.setdefault(_kind(culprit), []).append(culprit)
    if not kinds:
        return None
    verdict, culprits = max(kinds.items(), key=lambda item: _growth(item[1]))
    main = max(culprits, key=lambda culprit: culprit.per_step)
    cause = f"{_made(main)}, {_held(main)}"
    if main.pinned >= PINNED and verdict == "leak of tensors":
        cause += f"; a view that is kept pins a storage {main.pinned:.0f} times its size"
    growth = _growth([each for group in kinds.values() for each in group])
    evidence = (*_only_if(main), *_levels(f))
    return Diagnosis(verdict, cause, evidence, growth, _advice(verdict, main))


def _only_if(culprit: Culprit) -> tuple[str, ...]:
    """A limit that a program names is no evidence: it may be printed, and kept to nowhere."""
    claim = culprit.container.claim
    said = f"it grows so far; bounded only if the program keeps to `{claim}`"
    return (f"{said}, which a larger `longest` would show",) if claim else ()


def bounded(culprit: Culprit, steps: int) -> bool:
    """Whether a container will stop growing: by its limit, or because its keys come again."""
    container = culprit.container
    again = container.by_content and fills_up(culprit.births, steps)
    return container.limit is not None or container.by_size or again


def _kind(culprit: Culprit) -> str:
    if culprit.through & {"frame", "exception"}:
        return "frame/exception retention"
    if _of_optimizer(culprit) or "parameter" in culprit.through:
        return "duplicated state"
    return "leak of graph" if culprit.through & {"graph", "node"} else "leak of tensors"


def reference_cycle(f: Findings) -> Diagnosis | None:
    """The collector of cycles frees tensors again and again."""
    freed = [each for each in f.freed[2:] if each]
    if len(freed) < 2:
        return None
    cause = "objects refer to each other in a circle and keep tensors until the collector comes"
    cause += f": `{f.circle}`" if f.circle else ""
    cause += f"; most of it made at {in_short(f.in_circle)}" if f.in_circle else ""
    evidence = f"gc.collect() freed {format_bytes(round(median(freed)))} after {len(freed)} steps"
    advice = (
        "break the circle (weakref, or `del` the attribute at the end); gc.collect() only hides it"
    )
    growth = sum(f.freed[2:]) / len(f.freed[2:])
    return Diagnosis("reference cycle", cause, (evidence, *_levels(f)), growth, advice)


def outside(f: Findings) -> Diagnosis | None:
    """The device is used more and more, beyond what the allocator has reserved."""
    levels = [each.used - each.reserved for each in f.device]
    if not levels or not grows(levels) or levels[-1] - levels[0] < OUTSIDE:
        return None
    cause = "memory of the device that PyTorch's allocator did not ask for grows"
    advice = "look at cuFFT's plan cache (torch.backends.cuda.cufft_plan_cache), NCCL, and others"
    evidence = f"outside: {format_bytes(levels[0])} at first, {format_bytes(levels[-1])} at the end"
    return Diagnosis("outside the allocator", cause, (evidence,), slope(levels), advice)


def fragmentation(f: Findings) -> Diagnosis | None:
    """More and more is reserved, though no step needs more than another before."""
    waste = _waste(f)
    highest = max((each.peak for each in f.device), default=0)
    retried = f.device and f.device[-1].retries > f.device[0].retries
    if not waste or not (grows(waste) or retried) or waste[-1] < 0.25 * highest:
        return None
    cause = "freed pieces of reserved memory do not fit what is asked for next"
    first, last = format_bytes(waste[0]), format_bytes(waste[-1])
    evidence = f"reserved beyond the highest peak: {first}, then {last}"
    advice = "PYTORCH_ALLOC_CONF=expandable_segments:True, or fewer different lengths"
    return Diagnosis("fragmentation", cause, (evidence, *_levels(f)), slope(waste), advice)


def host_memory(f: Findings) -> Diagnosis | None:
    """The host's memory grows, by nodes of graphs or otherwise, and tensors do not."""
    if f.host is None:
        return None
    grown, what, verdict = f.host, format_bytes(round(f.host.size)), "host memory"
    advice = "keep numbers or sums instead of lists, or empty them after each epoch"
    if grown.kind == "nodes":
        plural = "" if grown.per_step == 1 else "s"
        what, verdict = f"{grown.per_step:.3g} node{plural} of autograd's graph", "leak of graph"
        advice = "add `loss.item()` or `loss.detach()`: the sum remembers all that it was made of"
    if grown.kind == "process":
        what += " that neither Python nor PyTorch asked for"
        advice = "look at extensions and C libraries: what they allocate, they have to free"
    line = f", made at {in_short(grown.line)}" if grown.line else ""
    holder = f", held by `{grown.holder}` ({grown.where})" if grown.holder else ""
    tensors = "" if f.rising else "; tensors do not grow"
    cause = f"{what} per step stay on the host{line}{holder}{tensors}"
    return Diagnosis(verdict, cause, _levels(f), grown.size, advice)


def kept_frames(f: Findings) -> Diagnosis | None:
    """An exception that was kept holds all that its functions had, once."""
    held = [each for each in (*f.lasting, *f.newest) if "exception" in each.through]
    if not held:
        return None
    main = max(held, key=lambda culprit: culprit.held)
    cause = f"{_made(main)}, {_held(main)}"
    advice = _advice("frame/exception retention", main)
    return Diagnosis("frame/exception retention", cause, _levels(f), 0.0, advice)


def bounded_cache(f: Findings) -> Diagnosis | None:
    """What piles up has a bound."""
    caches = [*f.rising, *f.ending]
    if not caches:
        return None
    main = max(caches, key=lambda culprit: culprit.held)
    cause = f"{_made(main)}, {_held(main)}"
    limit = main.container.limit
    why = f"it holds {limit} elements at most" if limit else "its growth ends"
    if main in f.rising and not limit:
        why = "it ends when all keys have been seen"
    advice = "no leak; if it is too large, bound it (maxsize) or compute anew"
    evidence = (f"{why}; now {format_bytes(main.held)}", *_levels(f))
    return Diagnosis("bounded cache", cause, evidence, 0.0, advice)


def warm_up(f: Findings) -> Diagnosis | None:
    """Something was added once, and that was all."""
    added = [each for each in f.lasting if not _of_optimizer(each)]
    if not added:
        return None
    main = max(added, key=lambda culprit: culprit.held)
    cause = f"{_made(main)} in step {main.births[0]}, {_held(main)}; nothing was added since"
    return Diagnosis("warm-up only", cause, _levels(f), 0.0, "nothing; measure after these steps")


def activation_peak(f: Findings) -> Diagnosis | None:
    """A step needs much more than stays, and that may be too much."""
    stays, peak = f.settled[-1] if f.settled else 0, max(f.peaks, default=0)
    large = peak - stays >= max(LARGE_PEAK, PEAK_RATIO * stays)
    if not (f.ended.out_of_memory or _over(f) or (large and f.limit is None)):
        return None
    lines = "; ".join(f"{format_bytes(size)} made at {line}" for line, size in f.at_peak)
    cause = (
        f"within a step {format_bytes(peak)} are alive at once, between steps {format_bytes(stays)}"
    )
    advice = (
        "checkpoint, bf16, fused attention, a shorter crop or smaller batch; `del` frees little"
    )
    cause += f": {lines}" if lines else ""
    return Diagnosis("activation peak", cause, _levels(f), 0.0, advice)


def reserved_cache(f: Findings) -> Diagnosis | None:
    """Much is reserved that late steps do not need, and it does not grow."""
    late = f.device[len(f.device) // 2 :]
    if not late:
        return None
    reserved, peak = late[-1].reserved, max(each.peak for each in late)
    if reserved < 2 * peak or reserved - peak < LARGE_CACHE:
        return None
    held, needed = format_bytes(reserved), format_bytes(peak)
    cause = f"{held} are reserved, steps need {needed}: an earlier peak's cache"
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


def _growth(culprits: Iterable[Culprit]) -> float:
    return sum(max(0.0, each.per_step) for each in culprits)


def _of_optimizer(culprit: Culprit) -> bool:
    return culprit.phase == "optimizer" or "optimizer" in culprit.through


def _made(culprit: Culprit) -> str:
    unseen = "made out of sight: in another thread, from an array, or sparse"
    where = f"made at {in_short(culprit.line)}" if culprit.line else unseen
    op = culprit.op.removeprefix("aten.").split(".")[0]
    return f"{format_bytes(culprit.held)} {where}" + (f" by {op}" if op else "")


def _held(culprit: Culprit) -> str:
    container = culprit.container
    what = f"a {container.kind}" + (f" of {container.length}" if container.length else "")
    graph = ", through the graph that made it" if "graph" in culprit.through else ""
    path = f"; one of them is `{culprit.path}`" if culprit.path != culprit.holder else ""
    return f"held by `{culprit.holder}` ({what}, {culprit.where}){graph}{path}"


def _levels(f: Findings) -> tuple[str, ...]:
    first, last = (format_bytes(level) for level in (f.settled[0], f.settled[-1]))
    text = f"allocated after step 0: {first}, after step {f.steps - 1}: {last}"
    peak = f"highest peak within a step: {format_bytes(max(f.peaks))}"
    kept = format_bytes(round(f.kernels))
    kernels = f"oneDNN keeps {kept} of kernels per step, for 1024 sizes at most"
    plural = "s were" if f.untraced > 1 else " was"
    untraced = f"{f.untraced} more step{plural} run without the trace"
    said = (text if f.steps else "", peak, kernels if f.kernels else "")
    return tuple(filter(None, (*said, untraced if f.untraced else "", f.ended.words)))


def _advice(verdict: str, culprit: Culprit) -> str:
    if verdict == "leak of tensors" and culprit.pinned >= PINNED:
        return "keep `.clone()` of the view: the storage it looks into can go then"
    if verdict == "frame/exception retention" and "exception" not in culprit.through:
        return "run generators and coroutines to their end, or close() them, and let go of frames"
    return {
        "leak of tensors": "keep `.item()`, a sum or `.detach().cpu()`, or empty the holder",
        "leak of graph": "keep `.item()` or `.detach()`; evaluate under torch.no_grad()",
        "duplicated state": "make optimizers and parameters once, or let go of the old ones",
        "frame/exception retention": "keep str(error), or traceback.clear_frames(its traceback)",
    }[verdict]
