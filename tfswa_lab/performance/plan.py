"""What a pipeline of several models needs, by policy: arithmetic on bytes, nothing is loaded.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import NamedTuple

from tfswa_lab.memory.display import Shown, aligned, html_table, shown
from tfswa_lab.memory.sizes import format_bytes

# What happens to a stage's model: loaded before the first stage runs, and stays; loaded when first
# used, and stays; loaded for its run alone; kept on the host, and on the device for its run alone.
POLICIES = ("resident", "lazy", "sequential", "offload")
AUTO = ("resident", "offload", "sequential")  # that "auto" chooses among
Storages = Mapping[Hashable, int]  # bytes by storage: a storage that two hold is there once


@dataclass(frozen=True)
class StageSizes:
    """The bytes of one stage.

    Args:
        name: of the stage.
        weights: on the device while the stage runs; None where unknown.
        activations: the most that it holds beside the weights and what earlier stages have handed
            on. Its own output counts among them. None where unknown.
        hands_on: storages of its output; None where unknown.
        host: bytes of the weights on the host, where the device does not hold all of them.
        halved: finds the bytes of the weights on the device in half precision; None where they
            are in it. It is asked only if nothing fits.
        by_layer: whether the device holds one layer at a time.
    """

    name: str
    weights: Storages | None = None
    activations: int | None = None
    hands_on: Storages | None = None
    host: int | None = None
    by_layer: bool = False
    halved: Callable[[], int | None] = lambda: None

    @property
    def whole(self) -> int:
        """Bytes of all its weights, 0 where unknown."""
        return total(self.weights) if self.host is None else self.host

    @property
    def unknown(self) -> list[str]:
        """What is not known of it."""
        return [name for name in ("weights", "activations") if getattr(self, name) is None]


def total(*held: Storages | None) -> int:
    """Bytes of several holders together, each storage once.

    >>> total({"a": 3, "b": 4}, {"b": 4})
    7
    """
    return sum({key: size for each in held for key, size in (each or {}).items()}.values())


def without_details(sizes: Iterable[StageSizes]) -> tuple[StageSizes, ...]:
    """The same bytes, with storages that only one stage has taken together, for speed.

    >>> first = StageSizes("first", {"a": 1, "b": 2, "shared": 4})
    >>> without_details([first, StageSizes("second", {"shared": 4})])[0].weights
    {'shared': 4, ('first', 'weights'): 3}
    """
    sizes = tuple(sizes)
    held = [each or {} for stage in sizes for each in (stage.weights, stage.hands_on)]
    times = Counter(key for each in held for key in each)

    def short(name: str, what: str, storages: Storages | None) -> Storages | None:
        if storages is None:
            return None
        shared = {key: size for key, size in storages.items() if times[key] > 1}
        return shared | {(name, what): total(storages) - total(shared)}

    return tuple(
        replace(
            stage,
            weights=short(stage.name, "weights", stage.weights),
            hands_on=short(stage.name, "output", stage.hands_on),
        )
        for stage in sizes
    )


@dataclass(frozen=True)
class Room:
    """Where a pipeline runs.

    Args:
        budget: bytes that the device has for the process, with the CUDA context.
        context: bytes that are taken there before anything is loaded.
        host: bytes of the host's memory that are free; None where the device is the host.
    """

    budget: int
    context: int = 0
    host: int | None = None


class Moment(NamedTuple):
    """A point of a run, and the bytes on the device there."""

    stage: str
    doing: str
    size: int


class StageRow(NamedTuple):
    """One stage when no other model is on the device; bytes, None where unknown."""

    name: str
    weights: int | None
    activations: int | None
    carried_in: int
    peak: int


class PolicyRow(NamedTuple):
    """One policy; bytes."""

    name: str
    peak: int  # on the device, with the context
    worst: str  # the stage of the peak
    host: int | None  # of weights on the host; None where the device is the host
    moved: int  # to the device in each run after the first
    fits: bool | None  # None where a size is unknown
    fails_at: str  # what is done when the budget is first exceeded; empty where it is not


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What each policy needs, and what "auto" does.

    Args:
        sizes: of the stages.
        room: where they run.
        keep_all: whether outputs stay until the end of the run; else until the next stage has run.
        keep_on_host: whether outputs leave the device, but for the input of the stage that runs.
        input_bytes: of the first stage's input on the device.
        notes: sentences on what was found.
    """

    sizes: tuple[StageSizes, ...]
    room: Room
    keep_all: bool = True
    keep_on_host: bool = False
    input_bytes: int = 0
    notes: tuple[str, ...] = ()
    modes: dict[str, str] = field(init=False)  # of "auto", by stage

    def __post_init__(self):
        object.__setattr__(self, "sizes", without_details(self.sizes))
        object.__setattr__(self, "modes", self._auto())

    # Arithmetic ----------------------------------------------------------------------------------

    def carried(self) -> list[Storages]:
        """What lies on the device for each stage before it runs: its input, and kept outputs."""
        kept, before = {}, []
        for sizes in self.sizes:
            before.append({**kept, **self._input_of(sizes)})
            if self.keep_all and not self.keep_on_host:
                kept |= sizes.hands_on or {}
        return before

    def moments(self, modes: Mapping[str, str]) -> Iterator[Moment]:
        """All points of a run at which the device may hold most, in their order."""
        stays: dict[Hashable, int] = {}
        for sizes in self.sizes:
            if modes[sizes.name] == "resident" and not sizes.by_layer:
                stays |= sizes.weights or {}
                yield Moment(sizes.name, "loading", self.room.context + total(stays))
        staying = ("lazy",) if self.room.host is not None else ("lazy", "offload")
        for run in range(1 + any(mode in staying for mode in modes.values())):  # then all are there
            doing = "running" if run == 0 else "running, for the second time,"
            for sizes, carried in zip(self.sizes, self.carried(), strict=True):
                held = total(stays, sizes.weights, carried) + (sizes.activations or 0)
                if modes[sizes.name] in staying and not sizes.by_layer:
                    stays |= sizes.weights or {}
                yield Moment(sizes.name, doing, self.room.context + held)

    def running(self, modes: Mapping[str, str]) -> list[Moment]:
        """The points at which stages run, without those at which models are loaded."""
        return [moment for moment in self.moments(modes) if moment.doing != "loading"]

    def peak(self, modes: Mapping[str, str]) -> Moment:
        """When the device holds most."""
        return max(self.moments(modes), key=lambda moment: moment.size)

    def _host(self, modes: Mapping[str, str]) -> int | None:
        """Bytes of weights on the host: those that live there, and one that is being loaded."""
        if self.room.host is None:
            return None
        whole = {sizes.name: sizes.whole for sizes in self.sizes}
        first = [size for name, size in whole.items() if modes[name] == "resident"]
        later = [size for name, size in whole.items() if modes[name] in ("lazy", "sequential")]
        return max(*first, 0, self._offloaded(modes) + max(later, default=0))

    def _offloaded(self, modes: Mapping[str, str]) -> int:
        """Bytes of weights that live on the host."""
        lives = [sizes for sizes in self.sizes if modes[sizes.name] == "offload"]
        by_layer = sum(sizes.whole for sizes in lives if sizes.by_layer)
        return by_layer + total(*(sizes.weights for sizes in lives if not sizes.by_layer))

    def _moved(self, modes: Mapping[str, str]) -> int:
        """Bytes to the device in a run, when those models are there that stay."""
        staying = ("resident", "lazy") if self.room.host is not None else (*POLICIES[:2], "offload")
        return sum(s.whole for s in self.sizes if s.by_layer or modes[s.name] not in staying)

    def _auto(self) -> dict[str, str]:
        """Models that are used most often stay, then the largest, as long as the run fits."""
        modes = dict.fromkeys((sizes.name for sizes in self.sizes), "sequential")
        models: dict[Hashable, list[StageSizes]] = {}
        for sizes in self.sizes:
            shared = frozenset(key for key, size in (sizes.weights or {}).items() if size)
            models.setdefault(shared or frozenset([sizes.name]), []).append(sizes)
        for users in sorted(models.values(), key=lambda users: (-len(users), -users[0].whole)):
            stays = modes | {sizes.name: "resident" for sizes in users}
            if not users[0].by_layer and self._is_within(stays):
                modes = stays
        left = [name for name, mode in modes.items() if mode == "sequential"]
        offloaded = modes | dict.fromkeys(left, "offload")
        return offloaded if self.room.host is not None and self._is_within(offloaded) else modes

    def _is_within(self, modes: Mapping[str, str]) -> bool:
        host = self._host(modes)
        enough_host = host is None or host <= self.room.host or "offload" not in modes.values()
        return enough_host and self.peak(modes).size <= self.room.budget

    def modes_of(self, policy: str) -> dict[str, str]:
        """What a policy does with each stage's model."""
        return self.modes if policy == "auto" else dict.fromkeys(self.modes, policy)

    def has_room_for_next(self, modes: Mapping[str, str], index: int) -> bool:
        """Whether the next stage's model can be loaded on the host while stage `index` runs."""
        following = self.sizes[index + 1]
        if following.weights is None:
            return False
        if self.room.host is not None:
            return self._offloaded(modes) + following.whole <= self.room.host
        known = self.sizes[index].activations is not None
        return known and self.running(modes)[index].size + following.whole <= self.room.budget

    # Rows ----------------------------------------------------------------------------------------

    @property
    def unknown(self) -> list[str]:
        """Which sizes nobody has given or measured, in words."""
        return [f"{what} of {sizes.name}" for sizes in self.sizes for what in sizes.unknown]

    @property
    def stages(self) -> list[StageRow]:
        """Each stage alone on the device."""
        alone = dict.fromkeys(self.modes, "sequential")
        rows = zip(self.sizes, self.carried(), self.moments(alone), strict=True)
        return [
            StageRow(
                sizes.name,
                None if sizes.weights is None else total(sizes.weights),
                sizes.activations,
                total(carried),
                moment.size,
            )
            for sizes, carried, moment in rows
        ]

    @property
    def policies(self) -> list[PolicyRow]:
        """All policies, and "auto"."""
        return [self.policy(name) for name in (*POLICIES, "auto")]

    def policy(self, name: str) -> PolicyRow:
        """What one policy needs."""
        modes = self.modes_of(name)
        peak, host = self.peak(modes), self._host(modes)
        over = [moment for moment in self.moments(modes) if moment.size > self.room.budget]
        fails_at = f"{over[0].doing} {over[0].stage}" if over else ""
        fits = self._is_within(modes) and (None if self.unknown else True)
        if not fails_at and fits is False:
            fails_at = "loading on the host"
        return PolicyRow(name, peak.size, peak.stage, host, self._moved(modes), fits, fails_at)

    def check(self) -> None:
        """Refuse a pipeline that no policy can run.

        Raises:
            ValueError: names the stage that needs most, what there is, and what would help.
        """
        if all(row.fits is False for row in self.policies):
            raise ValueError(self._refusal())

    def _refusal(self) -> str:
        row = max(self.stages, key=lambda row: row.peak)
        sizes = next(sizes for sizes in self.sizes if sizes.name == row.name)
        parts = [f"{format_bytes(row.weights or 0)} of weights"]
        parts.append(f"{format_bytes(row.activations or 0)} of activations")
        if row.carried_in:
            parts.append(f"{format_bytes(row.carried_in)} handed on by earlier stages")
        if self.room.context:
            parts.append(f"{format_bytes(self.room.context)} of context")
        needs, budget = format_bytes(row.peak), format_bytes(self.room.budget)
        if needs == budget:
            needs, budget = f"{row.peak} B", f"{self.room.budget} B"
        return (
            f"stage {row.name!r} needs {needs} ({', '.join(parts)}), and the budget is {budget}: "
            f"no policy fits. What would help: {'; '.join(self._help(row, sizes))}"
        )

    def _help(self, row: StageRow, sizes: StageSizes) -> Iterator[str]:
        """What would help, and how much."""
        weights, activations = row.weights or 0, row.activations or 0
        if (halved := sizes.halved()) is not None:
            half = row.peak - weights - activations + halved + activations // 2
            yield f"dtype=torch.float16 would need about {format_bytes(half)}{self._verdict(half)}"
        left = self.room.budget - (row.peak - activations)  # for activations
        if left > 0 and activations:
            yield (
                f"a smaller input fits if it makes {format_bytes(left)} of activations, "
                f"{left / activations:.0%} of now"
            )
        elif weights + self.room.context > self.room.budget and not sizes.by_layer:
            yield "a smaller input cannot help, as the weights alone are too large"
            yield "layerwise=True holds one layer at a time"
        if kept := row.carried_in - total(self._input_of(sizes)):
            without = row.peak - kept
            yield (
                f"keep_on_host=True takes {format_bytes(kept)} of outputs off the device, "
                f"{format_bytes(without)} remain{self._verdict(without)}"
            )
        too_large = [each.name for each in self.stages if each.peak > self.room.budget]
        if len(too_large) > 1:
            yield f"{len(too_large)} stages are too large: {', '.join(too_large)}"

    def _verdict(self, size: int) -> str:
        return ", which fits" if size <= self.room.budget else ", still too much"

    def _input_of(self, sizes: StageSizes) -> Storages:
        """What the stage before hands on."""
        index = self.sizes.index(sizes)
        return self.sizes[index - 1].hands_on or {} if index else {"input": self.input_bytes}

    # Looks ---------------------------------------------------------------------------------------

    @property
    def brief(self) -> str:
        """The choice of "auto", and its peak."""
        row = self.policy("auto")
        resident = sum(mode == "resident" for mode in self.modes.values())
        return (
            f"{resident} of {len(self.sizes)} stages resident, peak {format_bytes(row.peak)} of "
            f"{format_bytes(self.room.budget)}"
        )

    def _sentences(self) -> list[str]:
        groups = {mode: [n for n, m in self.modes.items() if m == mode] for mode in AUTO}
        auto = "auto: " + "; ".join(
            f"{mode} {', '.join(names) if len(names) <= 8 else f'{len(names)} stages'}"
            for mode, names in groups.items()
            if names
        )
        unknown = [f"unknown, taken for 0: {', '.join(self.unknown)}; measure(value) finds them"]
        budget = f"budget {format_bytes(self.room.budget)}"
        if self.room.context:
            budget += f", {format_bytes(self.room.context)} of it context"
        return [budget, auto, *unknown * bool(self.unknown), *self.notes]

    def _tables(self) -> tuple[list[list[str]], list[list[str]]]:
        stages = [["stage", "weights", "activations", "carried in", "peak"]]
        stages += [[row.name, *map(shown, row[1:])] for row in self.stages]
        policies = [["policy", "peak", "at", "on the host", "moved per run", "fits"]]
        for row in self.policies:
            fits = {True: "yes", None: "perhaps", False: f"no: {row.fails_at}"}[row.fits]
            sizes = (shown(row.host), shown(row.moved), fits)
            policies.append([row.name, shown(row.peak), row.worst, *sizes])
        return stages, policies

    def __str__(self) -> str:
        stages, policies = self._tables()
        most = 12  # lines in all stay below 25
        if len(stages) > most + 1:
            more = len(stages) - most
            stages = [*stages[:most], [f"… {more} more", "", "", "", ""]]
        lines = [*aligned(stages), "", *aligned(policies), *self._sentences()]
        return "\n".join(lines[:25])

    def _repr_html_(self) -> str:
        parts = [html_table(rows) for rows in self._tables()]
        return "".join(parts) + "".join(f"<p>{escape(text)}</p>" for text in self._sentences())
