"""The drawing of blocks: each is where it belongs, says what it is, and injects nothing."""

import random
import re
import time
from xml.etree import ElementTree

import pytest

from tfswa_lab.memory.trace.stacks import Frame
from tfswa_lab.memory.trace.timeline import Block, Timeline
from tfswa_lab.teaching import memory_view as view

MIB = 2**20
SVG = "{http://www.w3.org/2000/svg}"
LINES = tuple(Frame(f"/home/me/model/blocks_{n}.py", n, "Attention.forward") for n in range(8))


def timeline(seed=0, count=300, keep=0.5):
    """Blocks that come and go by chance; two are there from the beginning to the end."""
    chance, live, event = random.Random(seed), [], 0
    blocks = [Block(n, n, 0, category="parameter", module="m0") for n in (3 * MIB, MIB)]
    for event in range(1, count + 1):
        if live and chance.random() > keep:
            live.pop(chance.randrange(len(live))).died = event
        else:
            size = chance.randrange(1, MIB)
            about = {"op": "aten.mm.default", "phase": "forward", "step": 0, "frames": LINES}
            blocks.append(Block(size, size, event, module=f"m{event % 12}", **about))
            live.append(blocks[-1])
    return Timeline(blocks, event, steps=[1, count // 2])


def bands(svg: str) -> list[ElementTree.Element]:
    """The blocks of a drawing, without the grey area and the axes."""
    return ElementTree.fromstring(svg).find(f"{SVG}g").findall(f"{SVG}path")


def titles(svg: str) -> list[str]:
    return [band.find(f"{SVG}title").text for band in bands(svg)]


def edges(path: str, x: float) -> tuple[float, float]:
    """Lower and upper edge of a band at a place, in pixels: by walking along its path."""
    here, there, crossed = [*map(float, re.match(r"M(\S+) ([\d.]+)", path).groups())], None, []
    for letter, number in re.findall(r"([HV])([\d.]+)", path):
        if letter == "V":
            here[1] = float(number)
            continue
        there = float(number)
        if min(here[0], there) < x < max(here[0], there):
            crossed.append(here[1])
        here[0] = there
    lower, upper = crossed
    return lower, upper


def test_bands_lie_on_those_allocated_before_them():
    trace = timeline()
    blocks = trace.blocks
    for block, places in zip(blocks, view.heights(blocks), strict=True):
        at = dict(places)
        height = None
        for event in range(block.born, trace.events + 1 if block.died is None else block.died):
            height = at.get(event, height)
            before = blocks[: blocks.index(block)]
            assert height == sum(each.rounded for each in before if each.alive_at(event))


@pytest.mark.parametrize("part", [(0, None), (100, 160)])
def test_bands_fill_what_is_allocated(part):
    trace = timeline()
    drawn = bands(view.timeline_svg(trace, start=part[0], stop=part[1]))
    stop = part[1] or trace.events + 1
    canvas = view.Canvas(part[0], stop, trace.peak(*part).allocated, 1020, 440)
    ends = [[*map(float, re.findall(r"[MH]([\d.]+)", band.get("d")))] for band in drawn]
    for event in range(part[0], stop, 7):
        x = (float(canvas.x(event)) + float(canvas.x(event + 1))) / 2
        here = [
            edges(band.get("d"), x)
            for band, xs in zip(drawn, ends, strict=True)
            if min(xs) < x < max(xs)
        ]
        assert len(here) == sum(1 for _ in trace.alive(event))
        floor = canvas.floor
        for lower, upper in here:  # no gap, no overlap
            assert lower == pytest.approx(floor, abs=0.11)
            assert upper <= lower
            floor = upper
        assert floor == pytest.approx(float(canvas.y(trace.allocated()[event])), abs=0.11)


def test_the_largest_areas_are_drawn_and_the_rest_is_counted():
    blocks = [Block(1, 1, 0), Block(900, 900, 1, 2), Block(90, 90, 3, 50), Block(5, 5, 60, 62)]
    svg = view.timeline_svg(Timeline(blocks, 62), count=2)
    assert [title.split(",")[0] for title in titles(svg)] == ["900 B", "90 B"]
    assert "2 more blocks" in svg
    svg = view.timeline_svg(Timeline(blocks, 62), count=2, start=55)
    assert [title.split(",")[0] for title in titles(svg)] == ["1 B", "5 B"]
    assert "0 more blocks" in svg


def test_a_tooltip_says_what_a_block_is():
    block = Block(
        *(3 * MIB - 100, 3 * MIB, 4, 9, "activation", "blocks.0.time", "aten.mm.default"),
        **{"phase": "recompute", "step": 2, "shape": (2, 96), "dtype": "float32"},
        frames=LINES,
    )
    (title,) = titles(view.timeline_svg(Timeline([block], 9)))
    assert title.splitlines() == [
        "3.00 MiB (3.00 MiB asked for), activation",
        "aten.mm.default float32 (2, 96)",
        "module blocks.0.time",
        "recompute of step 2, events 4 to 9",
        *(f"/home/me/model/blocks_{n}.py:{n} (Attention.forward)" for n in range(5)),
    ]
    (title,) = titles(view.timeline_svg(Timeline([Block(7, 7, 0, category="input")], 3)))
    assert title.splitlines() == ["7 B, input", "outside, events 0 to the end"]


HOSTILE = [
    "</title></path><script>alert(1)</script>",
    '"/><image href="x" onerror="alert(1)"/>',
    "]]><!--<style>&amp;&#60;b",
    "\x00\x1b[2J\ud800\u202e",
    "x" * 100_000,
]


@pytest.mark.parametrize("evil", HOSTILE)
@pytest.mark.parametrize("key", view.BY.values())
def test_hostile_names_are_only_words(evil, key):
    texts = {"category": evil, "module": evil, "op": evil, "phase": evil, "dtype": evil}
    block = Block(8, 8, 1, frames=(Frame(evil, 1, evil),), **texts)
    svg = view.timeline_svg(Timeline([block], 2, device=evil), key=key)
    tags = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(svg).iter()}
    assert tags <= {"svg", "style", "rect", "path", "title", "text", "circle", "g"}
    assert not re.search(r"<(?!/?(svg|style|rect|path|title|text|circle|g)[ />])", svg)
    assert len(svg) < 50_000
    svg.encode()


def test_axes_have_units_and_steps_have_marks():
    trace = timeline()
    peak = trace.peak()
    words = {
        text.text for text in ElementTree.fromstring(view.timeline_svg(trace)).iter(f"{SVG}text")
    }
    assert {"allocated in MiB", "event (an allocation or a release)", "step 0", "step 1"} <= words
    label = f"peak {peak.allocated / MIB:.2f} MiB at event {peak.event}"
    assert {label, "forward", "parameter"} <= words
    assert {"0", "100", "200", "300"} <= words
    part = view.timeline_svg(trace, start=10, stop=20)
    assert ">step 0<" not in part


def queue(count: int, frames=LINES) -> Timeline:
    """Blocks that are released in the order of their allocation: each sinks very often."""
    blocks = [Block(MIB, MIB, born, born + count, frames=frames) for born in range(count)]
    return Timeline(blocks, 2 * count)


def stack(count: int, frames=LINES) -> Timeline:
    """Blocks that are released in the reverse order, as activations are."""
    blocks = [Block(MIB, MIB, n, 2 * count - n, frames=frames) for n in range(count)]
    return Timeline(blocks, 2 * count)


@pytest.mark.parametrize("trace", [timeline(count=40_000, keep=0.52), queue(20_000), stack(20_000)])
def test_twenty_thousand_blocks_are_drawn_soon_and_in_little_space(trace):
    began = time.perf_counter()
    svg = view.timeline_svg(trace)
    print(f"{time.perf_counter() - began:.2f} s, {len(svg) / 1e6:.2f} MB")
    assert len(svg.encode()) < 1.5e6
    assert len(bands(svg)) >= 200


@pytest.mark.parametrize("trace", [queue(240, 5 * (Frame("&" * 200, 1, "f"),)), stack(800)])
def test_drawings_stay_small_where_every_block_is_drawn(trace):
    svg = view.timeline_svg(trace)
    assert len(bands(svg)) == len(trace.blocks)
    assert len(svg.encode()) < 1.5e6


@pytest.mark.parametrize("trace", [Timeline([], 0), Timeline([Block(0, 0, 1)], 1)])
def test_an_empty_timeline_is_named(trace):
    with pytest.raises(ValueError, match="nothing is allocated on cpu"):
        view.timeline_svg(trace)
    with pytest.raises(ValueError, match="nothing is allocated on cpu"):
        view.timeline_view(trace)


def test_the_view_redraws():
    trace = timeline()
    colour, events, drawing = view.timeline_view(trace).children
    assert drawing.value == view.timeline_svg(trace)
    colour.value = "module"
    assert drawing.value == view.timeline_svg(trace, key=view.BY["module"])
    events.value = (100, 200)
    assert drawing.value == view.timeline_svg(trace, key=view.BY["module"], start=100, stop=200)
    assert titles(drawing.value)
    events.value = (100, 100)
    assert drawing.value == "<p>start=100, stop=100: choose events of 0 … 300</p>"
    assert list(colour.options) == ["category", "module", "phase", "line"]
