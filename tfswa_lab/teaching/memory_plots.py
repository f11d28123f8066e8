"""Figures of memory: over time, at the peak, and against a budget.

Every plot takes `ax=None` and returns `fig, ax`; it changes no other state of matplotlib.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tfswa_lab.memory.sizes import format_bytes, unit_of
from tfswa_lab.memory.trace.timeline import CATEGORIES, Block, Peak, Timeline, by_category

OTHERS = "others"
# Dark to light from the lowest area to the top, at least 9 steps of CIE L* apart, so that they
# differ in grey and for colour-blind readers; a test measures it.
CATEGORY_COLOURS = {
    "parameter": "#001f51",
    "buffer": "#6d1a55",
    "gradient": "#1a6a50",
    "optimizer state": "#98712f",
    "input": "#5797c6",
    "activation": "#f7996e",
    "temporary": "#edcf80",
    OTHERS: "#ededed",
}
BAR_COLOUR = "#5b8db8"
OVER_COLOUR = "#8c1c13"  # beyond the budget; darker in grey as well
PASS_COLOURS = {"forward": "#e6e6e6", "backward": "#d2d2d2", "optimizer": "#bebebe"}
PASS_OF = {"recompute": "backward"} | {name: name for name in PASS_COLOURS}  # by phase of a block
DASHES = (0, (4, 3))
PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind text that crosses lines
LONGEST = 46  # characters of a name in a figure; a path loses its beginning


class Span(NamedTuple):
    """The events of one pass of a step, from `start` to before `stop`."""

    name: str  # forward, backward or optimizer
    start: int
    stop: int


def plot_timeline(
    timeline: Timeline,
    ax: Axes | None = None,
    key: Callable[[Block], str] = by_category,
    count: int = 6,
    start: int = 0,
    stop: int | None = None,
) -> tuple[Figure, Axes]:
    """Allocated memory after each event, as stacked areas.

    A strip above shows the passes of each step; a dot marks the peak of the figure.

    Args:
        timeline: of a trace or a prediction.
        ax: where to draw.
        key: how to group blocks, such as `by_category` or `by_module(2)`.
        count: how many groups to show, those with the highest peaks; the rest is `others`.
        start: the first event to show.
        stop: the event to stop before, None for all.

    Raises:
        ValueError: nothing is allocated between `start` and `stop`.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(9, 3.8), layout="constrained", dpi=100)
    start, stop = window(timeline, start, stop)
    groups = groups_over_time(timeline, key, count, start, stop)
    peak = timeline.peak(start, stop)
    unit, unit_name = unit_of(peak.allocated)
    colours, events = group_colours(groups), np.arange(start, stop + 1)
    floor, areas = np.zeros(stop - start + 1), []
    for name, held in groups.items():
        top = floor + np.append(held, held[-1]) / unit  # the last event is as wide as the others
        look = {"color": colours[name], "linewidth": 0, "step": "post"}
        areas.append(ax.fill_between(events, floor, top, **look))
        floor = top
    ax.set(
        xlim=(start, stop),
        ylim=(0, 1.12 * peak.allocated / unit),
        ylabel=f"allocated in {unit_name}",
    )
    ax.set_xlabel("event (an allocation or a release)")
    _mark_peak(ax, peak, unit)
    _mark_passes(ax, timeline, start, stop)
    _legend(ax, areas[::-1], list(groups)[::-1])
    return ax.figure, ax


def window(timeline: Timeline, start: int = 0, stop: int | None = None) -> tuple[int, int]:
    """The events from `start` to before `stop` that exist.

    Raises:
        ValueError: there are none, or nothing is allocated then.
    """
    stop = min(timeline.events + 1, timeline.events + 1 if stop is None else stop)
    if not 0 <= start < stop:
        raise ValueError(f"start={start}, stop={stop}: choose events of 0 … {timeline.events}")
    if not timeline.blocks or not timeline.peak(start, stop).allocated:
        raise ValueError(
            f"nothing is allocated on {timeline.device} in events {start} … {stop - 1}: there is "
            "nothing to draw; trace a region that makes tensors"
        )
    return start, stop


def groups_over_time(
    timeline: Timeline, key: Callable[[Block], str], count: int, start: int, stop: int
) -> dict[str, np.ndarray]:
    """Bytes of the largest groups after each event from `start` to before `stop`.

    Categories are in the order of `CATEGORIES`, other groups in that of their first blocks;
    `others`, the sum of all that are not among the largest, is last.

    >>> blocks = [Block(4, 4, 0, category="input"), Block(2, 2, 1, 2)]
    >>> groups_over_time(Timeline(blocks, 2), by_category, 6, 0, 3)
    {'input': array([4., 4., 4.]), 'temporary': array([0., 2., 0.])}
    """
    changes = defaultdict(list)
    for block in timeline.blocks:
        if block.born < stop and (block.died is None or block.died > start):
            changes[key(block)].append((max(block.born, start), block.rounded))
            if block.died is not None and block.died < stop:
                changes[key(block)].append((block.died, -block.rounded))

    def over_time(of_group: list[tuple[int, int]]) -> np.ndarray:
        events, sizes = np.array(of_group).T
        return np.bincount(events - start, sizes, stop - start).cumsum()

    most = {name: over_time(changes[name]).max() for name in changes}
    largest = sorted(filter(most.get, most), key=most.get, reverse=True)
    if len(largest) > count + 1:  # a single group needs no `others`
        largest = largest[:count]
    place = {name: number for number, name in enumerate(CATEGORIES)}
    stacked = sorted((name for name in changes if name in largest), key=lambda n: place.get(n, 0))
    groups = {name: over_time(changes[name]) for name in stacked}
    rest = [change for name in changes if name not in largest for change in changes[name]]
    if rest and over_time(rest).any():
        groups[OTHERS] = over_time(rest)
    return groups


def group_colours(names: Iterable[str]) -> dict[str, str]:
    """Constant colours for categories, an even scale for other groups.

    >>> group_colours(["input", "others"])
    {'input': '#5797c6', 'others': '#ededed'}
    """
    names = list(names)
    if set(names) <= set(CATEGORY_COLOURS):
        return {name: CATEGORY_COLOURS[name] for name in names}
    named = [name for name in names if name != OTHERS]
    scale = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.92, len(named)))
    colours = dict(zip(named, map(to_hex, scale), strict=True))
    return {name: colours.get(name, CATEGORY_COLOURS[OTHERS]) for name in names}


def passes(timeline: Timeline) -> list[Span]:
    """When the forward passes, the backward passes and the optimizer ran.

    A pass lasts from its first allocation to its last; recomputation is part of the backward pass.
    """
    at_work = (block for block in timeline.blocks if block.phase in PASS_OF)
    runs = groupby(at_work, key=lambda block: (PASS_OF[block.phase], block.step))
    spans = []
    for (name, _), run in runs:
        births = [block.born for block in run]
        spans.append(Span(name, births[0], births[-1] + 1))
    return spans


def shortened(name: str, longest: int = LONGEST) -> str:
    """The end of a long name, from a `/` on if there is one.

    >>> shortened("/home/me/model.py:3 (forward)", 24)
    '…/model.py:3 (forward)'
    """
    if len(name) <= longest:
        return name
    end = name[1 - longest :]
    return "…" + end[max(end.find("/"), 0) :]


def peak_label(peak: Peak) -> str:
    """A peak in words.

    >>> peak_label(Timeline([Block(8, 512, 0)], 0).peak())
    'peak 512 B at event 0'
    """
    return f"peak {format_bytes(peak.allocated)} at event {peak.event}"


def _mark_peak(ax: Axes, peak: Peak, unit: int) -> None:
    """A dot with its label, on the side where there is room."""
    left, right = ax.get_xlim()
    late = peak.event > left + 0.62 * (right - left)
    where = peak.event + 0.5, peak.allocated / unit
    ax.plot(*where, "o", color="black", markersize=4, zorder=5)
    look = {"textcoords": "offset points", "fontsize": "small", "bbox": PLATE}
    side = {"xytext": (-7 if late else 7, 4), "ha": "right" if late else "left"}
    ax.annotate(peak_label(peak), where, **look, **side)


def _mark_passes(ax: Axes, timeline: Timeline, start: int, stop: int) -> None:
    """Steps as lines, passes as a strip above, as far as there is room."""
    above = {"transform": ax.get_xaxis_transform()}  # x in events, y in heights of the axes
    pixels = ax.get_position().width * ax.figure.bbox.width / (stop - start)  # per event
    line_from = label_from = start  # where there is room for the next
    for number, step in enumerate(timeline.steps):
        if line_from <= step < stop:
            ax.axvline(step, color="black", linewidth=0.8, linestyle=DASHES)
            line_from = step + 5 / pixels
        if label_from <= step < stop:
            ax.text(step, 1.09, f"step {number}", fontsize="small", **above)
            label_from = step + 60 / pixels
    for name, *ends in passes(timeline):
        first, last = np.clip(ends, start, stop)
        if (last - first) * pixels >= 1:
            strip = {"color": PASS_COLOURS[name], "clip_on": False, "linewidth": 0}
            ax.fill_between([first, last], 1.015, 1.075, **strip, **above)
        if (last - first) * pixels > 7 * len(name):
            centred = {"ha": "center", "va": "center", "fontsize": "small"}
            ax.text((first + last) / 2, 1.043, name, **centred, **above)


def _legend(ax: Axes, areas: list, names: list[str]) -> None:
    """Beside the axes, in the order of the areas; names are shown letter by letter."""
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False, "fontsize": "small"}
    legend = ax.legend(areas, [str(number) for number in range(len(names))], **place)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=shortened(name, 42), parse_math=False)  # matplotlib hides _a and reads $a$
    for patch in legend.get_patches():
        patch.set(edgecolor="#888888", linewidth=0.5)


def plot_peak(held: Mapping[str, int], ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Who holds the memory at one moment, in the order given.

    Args:
        held: name to bytes, such as `Prediction.by_category()`.
        ax: where to draw.

    Raises:
        ValueError: no memory is held.
    """
    total = sum(held.values())
    if not total:
        raise ValueError("nothing is held: there is nothing to draw")
    words = {}
    for name, size in held.items():
        share = f"{100 * size / total:.0f}" if size >= total / 100 else "< 1"
        words[name] = f"{format_bytes(size)} · {share} %"
    colours = [CATEGORY_COLOURS.get(name, BAR_COLOUR) for name in held]
    fig, ax = _bars(held, words, colours, ax)
    ax.set_title(f"{format_bytes(total)} in all", loc="left", fontsize="medium")
    return fig, ax


def plot_peaks(
    peaks: Mapping[str, int], budget: int | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Peaks of several configurations; those above the budget are dark and labelled.

    Args:
        peaks: name of the configuration to bytes.
        budget: bytes that are available; None to draw no line.
        ax: where to draw.

    Raises:
        ValueError: there are no peaks.
    """
    if not peaks:
        raise ValueError("there are no peaks to draw")
    over = {name: size - budget if budget else 0 for name, size in peaks.items()}
    words = {
        name: format_bytes(size)
        + (f", over by {format_bytes(over[name])}" if over[name] > 0 else "")
        for name, size in peaks.items()
    }
    colours = [OVER_COLOUR if over[name] > 0 else BAR_COLOUR for name in peaks]
    fig, ax = _bars(peaks, words, colours, ax, at_least=budget or 0)
    if budget:
        unit, _ = unit_of(max(*peaks.values(), budget))
        ax.axvline(budget / unit, color="black", gapcolor="white", linewidth=1, linestyle=DASHES)
        ax.set_title(f"dashed: the budget, {format_bytes(budget)}", loc="left", fontsize="medium")
    return fig, ax


def _bars(
    sizes: Mapping[str, int],
    words: Mapping[str, str],
    colours: list[str],
    ax: Axes | None,
    at_least: int = 0,
) -> tuple[Figure, Axes]:
    """One bar for each name with its text behind it, the first on top."""
    if ax is None:
        size = (8, 0.9 + 0.32 * len(sizes))
        _, ax = plt.subplots(figsize=size, layout="constrained", dpi=100)
    most = max(*sizes.values(), at_least)
    unit, unit_name = unit_of(most)
    rows = range(len(sizes))
    look = {"color": colours, "height": 0.72, "edgecolor": "#888888", "linewidth": 0.5}
    ax.barh(rows, [size / unit for size in sizes.values()], **look)
    for row, (name, size) in zip(rows, sizes.items(), strict=True):
        beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "bbox": PLATE}
        ax.annotate(words[name], (size / unit, row), fontsize="small", **beside)
    room = 1 + 0.015 * max(map(len, words.values()))
    ax.set_yticks(rows, [shortened(name) for name in sizes], parse_math=False)
    ax.set(xlabel=f"allocated in {unit_name}", xlim=(0, room * most / unit or 1))
    ax.set_ylim(len(sizes) - 0.5, -0.5)
    ax.spines[["top", "right"]].set_visible(False)
    return ax.figure, ax
