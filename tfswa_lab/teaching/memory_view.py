"""An SVG of all blocks of memory; pointing at a block shows what it is and who allocated it.

It is plain SVG, so it needs no network and no script, and opens in any browser.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from tfswa_lab.memory.sizes import format_bytes, unit_of
from tfswa_lab.memory.trace.timeline import Block, Timeline, by_category, by_line, by_module
from tfswa_lab.teaching.memory_plots import (
    OTHERS,
    PASS_COLOURS,
    group_colours,
    groups_over_time,
    passes,
    peak_label,
    shortened,
    window,
)

if TYPE_CHECKING:
    from ipywidgets import VBox

LEFT, RIGHT, TOP, BOTTOM = 64, 250, 44, 46  # margins in pixels, for axes and legend
NICE = [1, 2, 5, 10]  # steps between ticks, times powers of ten
GROUPS = 7  # with a colour of their own
LINES = 5  # of a stack in a tooltip
LONGEST_LINE, LONGEST_GROUP = 120, 34  # characters
MOST_CORNERS = 30_000  # of all outlines; keeps a drawing below 1.5 MB
AROUND_WORDS = 'paint-order="stroke" stroke="#fff" stroke-width="4"'
BY = {
    "category": by_category,
    "module": by_module(2),
    "phase": lambda block: block.phase,
    "line": by_line,
}


class Canvas(NamedTuple):
    """Coordinates of events and bytes in a drawing; y counts from its upper edge."""

    start: int
    stop: int
    peak: int
    width: int
    height: int

    def x(self, event: float) -> str:
        """Pixels of an event, clipped to the axes."""
        share = (min(max(event, self.start), self.stop) - self.start) / (self.stop - self.start)
        return _pixels(LEFT + share * (self.right - LEFT))

    def y(self, size: float) -> str:
        """Pixels of a height in bytes."""
        return _pixels(self.floor - size / (1.04 * self.peak) * (self.floor - TOP))

    @property
    def right(self) -> int:
        """Pixels of the right edge."""
        return self.width - RIGHT

    @property
    def floor(self) -> int:
        """Pixels of the lower edge."""
        return self.height - BOTTOM


def timeline_svg(
    timeline: Timeline,
    count: int = 800,
    width: int = 1020,
    height: int = 440,
    key: Callable[[Block], str] = by_category,
    start: int = 0,
    stop: int | None = None,
) -> str:
    """A drawing of blocks; pointing at one shows what it is and which lines allocated it.

    A block is a band from its allocation to its release. Blocks are stacked in the order of their
    allocation and sink when a lower one is released, as in PyTorch's memory_viz. The blocks with
    the largest areas, bytes × events, are drawn; the grey area behind them is all allocated memory.
    Times are events, sizes are bytes as the allocator rounds them.

    Args:
        timeline: of a trace or a prediction.
        count: how many blocks to draw; fewer if their outlines have very many corners.
        width: of the drawing, in pixels.
        height: of the drawing, in pixels.
        key: which blocks share a colour, such as `by_category` or `by_module(2)`.
        start: the first event to show.
        stop: the event to stop before, None for all.

    Raises:
        ValueError: nothing is allocated between `start` and `stop`.
    """
    start, stop = window(timeline, start, stop)
    canvas = Canvas(start, stop, timeline.peak(start, stop).allocated, width, height)
    colours = group_colours([*groups_over_time(timeline, key, GROUPS, start, stop), OTHERS])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" class="tfswa-memory" font-family="sans-serif" font-size="12">',
        "<style>.tfswa-memory g path:hover{stroke:#000;stroke-width:1.5}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *_axes(canvas),
        *_blocks(timeline, canvas, count, key, colours),
        *_passes(timeline, canvas),
        *_peak(timeline, canvas),
        *_legend(canvas, colours),
        "</svg>",
    ]
    return "\n".join(parts)


def timeline_view(timeline: Timeline, count: int = 800) -> VBox:
    """The drawing of `timeline_svg` with controls for the colours and the range of events.

    A shorter range shows more small blocks, because it draws the largest blocks of the range.

    Raises:
        ValueError: nothing is allocated.
    """
    from ipywidgets import HTML, Dropdown, IntRangeSlider, Layout, VBox

    drawing = HTML(timeline_svg(timeline, count))
    colour = Dropdown(options=list(BY), description="colour by")
    whole = {"value": (0, timeline.events + 1), "min": 0, "max": timeline.events + 1}
    events = IntRangeSlider(**whole, description="events", layout=Layout(width="760px"))
    events.continuous_update = False  # redraw when the mouse is released

    def redraw(_change: object) -> None:
        start, stop = events.value
        try:
            drawing.value = timeline_svg(
                timeline, count, key=BY[colour.value], start=start, stop=stop
            )
        except ValueError as nothing:
            drawing.value = f"<p>{_text(str(nothing))}</p>"

    for control in (colour, events):
        control.observe(redraw, names="value")
    return VBox([colour, events, drawing])


def largest_areas(timeline: Timeline, count: int, start: int, stop: int) -> list[Block]:
    """Blocks with the most bytes × events between `start` and `stop`, oldest first."""

    def area(block: Block) -> int:
        ends = stop if block.died is None else min(block.died, stop)
        return block.rounded * max(0, ends - max(block.born, start))

    areas = sorted(timeline.blocks, key=area, reverse=True)[:count]
    drawn = {id(block) for block in areas if area(block)}
    return [block for block in timeline.blocks if id(block) in drawn]


def heights(blocks: Sequence[Block]) -> list[list[tuple[int, int]]]:
    """The height of each block above the older ones, and how it sinks: (event, bytes).

    Args:
        blocks: in the order of their births.

    >>> heights([Block(8, 8, 1, 3), Block(4, 4, 2)])
    [[(1, 0)], [(2, 8), (3, 0)]]
    """
    places, below = [], []
    for block in blocks:
        below = [each for each in below if each.alive_at(block.born)]
        height = sum(each.rounded for each in below)
        places.append([(block.born, height)])
        released = (each for each in below if each.died is not None and block.alive_at(each.died))
        for each in sorted(released, key=lambda each: each.died):
            height -= each.rounded
            places[-1].append((each.died, height))
        below.append(block)
    return places


def _blocks(
    timeline: Timeline, canvas: Canvas, count: int, key: Callable, colours: dict[str, str]
) -> Iterator[str]:
    """All allocated memory as one grey area, and the largest blocks in front of it."""
    in_sight = largest_areas(timeline, len(timeline.blocks), canvas.start, canvas.stop)
    drawn = largest_areas(timeline, count, canvas.start, canvas.stop)
    places = heights(drawn)
    while sum(map(len, places)) > MOST_CORNERS:
        drawn = largest_areas(timeline, len(drawn) // 2, canvas.start, canvas.stop)
        places = heights(drawn)
    grey, rest = colours[OTHERS], len(in_sight) - len(drawn)
    words = f"{rest} more blocks, too small or too short to be drawn one by one"
    yield f'<path d="{_outline(timeline, canvas)}" fill="{grey}"><title>{words}</title></path>'
    yield "<g>"
    for block, steps in zip(drawn, places, strict=True):
        colour = colours.get(key(block), grey)
        thin = block.rounded / canvas.peak * canvas.height < 3  # a white edge would hide it
        look = f'fill="{colour}" stroke="{colour if thin else "#fff"}" stroke-width=".3"'
        about = f"<title>{_text(_about(block))}</title>"
        yield f'<path d="{_band(block, steps, canvas)}" {look}>{about}</path>'
    yield "</g>"


def _band(block: Block, places: list[tuple[int, int]], canvas: Canvas) -> str:
    """The outline of a block: along its lower edge, and back along its upper edge."""
    end = canvas.x(canvas.stop if block.died is None else block.died)
    at = {canvas.x(event): height for event, height in places}  # the last height in each pixel
    steps = list(at.items())
    path = f"M{steps[0][0]} {canvas.y(steps[0][1])}"
    path += "".join(f"H{x}V{canvas.y(height)}" for x, height in steps[1:]) + f"H{end}"
    back = list(reversed(steps))
    path += f"V{canvas.y(back[0][1] + block.rounded)}"
    for (x, _), (_, height) in pairwise(back):
        path += f"H{x}V{canvas.y(height + block.rounded)}"
    return path + f"H{steps[0][0]}Z"


def _outline(timeline: Timeline, canvas: Canvas) -> str:
    """The outline of all allocated memory; of the events in half a pixel, the highest."""
    allocated = np.array(timeline.allocated()[canvas.start : canvas.stop])
    columns = min(len(allocated), 2 * (canvas.right - LEFT))
    starts = np.arange(columns) * len(allocated) // columns
    path = f"M{LEFT} {canvas.floor}"
    for start, most in zip(starts, np.maximum.reduceat(allocated, starts), strict=True):
        path += f"H{canvas.x(canvas.start + start)}V{canvas.y(most)}"
    return path + f"H{canvas.right}V{canvas.floor}Z"


def _about(block: Block) -> str:
    """A block in words."""
    shape = f"{block.dtype} {block.shape}" if block.dtype else ""
    asked = f" ({format_bytes(block.size)} asked for)" if block.size != block.rounded else ""
    end = "to the end" if block.died is None else f"to {block.died}"
    step = f" of step {block.step}" if block.step >= 0 else ""
    lines = [
        f"{format_bytes(block.rounded)}{asked}, {block.category}",
        " ".join(filter(None, (block.op, shape))),
        block.module and f"module {block.module}",
        f"{block.phase}{step}, events {block.born} {end}",
        *(str(frame) for frame in block.frames[:LINES]),
    ]
    return "\n".join(shortened(line, LONGEST_LINE) for line in lines if line)


def _axes(canvas: Canvas) -> Iterator[str]:
    unit, name = unit_of(canvas.peak)
    for tick in MaxNLocator(6, steps=NICE).tick_values(0, canvas.peak / unit):
        if tick * unit <= 1.04 * canvas.peak:
            y = canvas.y(tick * unit)
            yield f'<path d="M{LEFT} {y}H{canvas.right}" stroke="#ddd"/>'
            yield _label(LEFT - 6, y, f"{tick:g}", "end", 'dy=".35em"')
    for tick in MaxNLocator(8, steps=NICE, integer=True).tick_values(canvas.start, canvas.stop):
        if canvas.start <= tick <= canvas.stop:
            x = canvas.x(tick)
            yield f'<path d="M{x} {canvas.floor}v4" stroke="#000"/>'
            yield _label(x, canvas.floor + 17, f"{tick:.0f}", "middle")
    yield f'<path d="M{LEFT} {TOP}V{canvas.floor}H{canvas.right}" fill="none" stroke="#000"/>'
    middle = (LEFT + canvas.right) / 2
    yield _label(middle, canvas.height - 10, "event (an allocation or a release)", "middle")
    turned = f'transform="rotate(-90 16 {(TOP + canvas.floor) / 2})"'
    yield _label(16, (TOP + canvas.floor) / 2, f"allocated in {name}", "middle", turned)


def _passes(timeline: Timeline, canvas: Canvas) -> Iterator[str]:
    """Steps as lines, passes as a strip above, as far as there is room."""
    for name, start, stop in passes(timeline):
        left, right = float(canvas.x(start)), float(canvas.x(stop))
        if right - left >= 1:
            look = f'width="{right - left:.1f}" height="16" fill="{PASS_COLOURS[name]}"'
            yield f'<rect x="{left}" y="{TOP - 20}" {look}/>'
        if right - left > 7 * len(name):
            yield _label((left + right) / 2, TOP - 8, name, "middle")
    line_from = label_from = LEFT  # from here on, there is room for the next
    for number, step in enumerate(timeline.steps):
        x = float(canvas.x(step))
        if canvas.start <= step < canvas.stop and x >= line_from:
            line = 'stroke="#000" stroke-dasharray="4 3" pointer-events="none"'
            yield f'<path d="M{x} {TOP - 20}V{canvas.floor}" {line}/>'
            line_from = x + 5
            if x >= label_from:
                yield _label(x, TOP - 26, f"step {number}", "start")
                label_from = x + 55


def _peak(timeline: Timeline, canvas: Canvas) -> Iterator[str]:
    peak = timeline.peak(canvas.start, canvas.stop)
    x, y = canvas.x(peak.event + 0.5), canvas.y(peak.allocated)
    words = peak_label(peak)
    late = float(x) + 6.2 * len(words) > canvas.right
    side = f'dx="{-6 if late else 6}" dy="-2" {AROUND_WORDS}'
    yield _label(x, y, words, "end" if late else "start", side)
    yield f'<circle cx="{x}" cy="{y}" r="2.5"/>'


def _legend(canvas: Canvas, colours: dict[str, str]) -> Iterator[str]:
    """In the order of the areas, the last on top."""
    for row, (name, colour) in enumerate(reversed(colours.items())):
        y, x = TOP + 4 + 20 * row, canvas.right + 14
        look = f'width="14" height="12" fill="{colour}" stroke="#888" stroke-width=".5"'
        whole = _text(shortened(name, LONGEST_LINE))
        yield f'<g><title>{whole}</title><rect x="{x}" y="{y}" {look}/>'
        yield _label(x + 20, y + 10, shortened(name, LONGEST_GROUP), "start") + "</g>"


def _label(x: str | float, y: str | float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{_text(words)}</text>'


def _text(words: str) -> str:
    """Text without markup; characters that XML forbids are replaced."""
    return escape(
        "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in words)
    )


def _pixels(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
