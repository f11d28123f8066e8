"""Pictures of memory: they add up to what is allocated, and read in grey."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from torch import nn

from tfswa_lab.memory.trace.stacks import Frame
from tfswa_lab.memory.trace.timeline import CATEGORIES, Block, Timeline, by_category, by_line
from tfswa_lab.memory.trace.tracer import Tracer
from tfswa_lab.teaching import memory_plots as plots

MIB = 2**20
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: what most programs make grey with


pytestmark = pytest.mark.usefixtures("headless")


def by_module(block: Block) -> str:
    return block.module


def timeline(seed=0, count=300, modules=12):
    """Blocks that come and go by chance; two are there from the beginning to the end."""
    chance, live, event = random.Random(seed), [], 0
    blocks = [Block(n, n, 0, category="parameter", module="m0") for n in (3 * MIB, MIB)]
    for event in range(1, count + 1):
        if live and chance.random() < 0.5:
            live.pop(chance.randrange(len(live))).died = event
        else:
            size, module = chance.randrange(1, MIB), f"m{chance.randrange(modules)}"
            blocks.append(
                Block(size, size, event, category=chance.choice(CATEGORIES), module=module)
            )
            live.append(blocks[-1])
    return Timeline(blocks, event, steps=[1, count // 2])


@pytest.mark.parametrize("part", [(0, 301), (0, 1), (40, 210), (300, 301)])
@pytest.mark.parametrize("key", [by_category, by_module])
def test_groups_are_what_is_held_after_each_event(part, key):
    trace = timeline()
    groups = plots.groups_over_time(trace, key, 5, *part)
    for event in range(*part):
        held = trace.held_by(event, key)
        for name in groups:
            if name != plots.OTHERS:
                assert groups[name][event - part[0]] == held[name]
    total = sum(groups.values())
    np.testing.assert_array_equal(total, trace.allocated()[slice(*part)])


def test_the_largest_groups_have_names_and_one_other_is_not_hidden():
    blocks = [Block(1, size, 0, module=f"m{size}") for size in (5, 1, 4, 2, 3)]
    trace = Timeline(blocks, 0)
    assert list(plots.groups_over_time(trace, by_module, 3, 0, 1)) == ["m5", "m4", "m3", "others"]
    assert list(plots.groups_over_time(trace, by_module, 4, 0, 1)) == ["m5", "m1", "m4", "m2", "m3"]


def test_categories_are_stacked_in_their_order():
    groups = plots.groups_over_time(timeline(), by_category, 6, 0, 301)
    assert list(groups) == list(CATEGORIES)


def test_the_picture_is_as_high_as_what_is_allocated_and_marks_the_peak():
    trace = timeline()
    fig, ax = plots.plot_timeline(trace, key=by_module, count=4)
    top = ax.collections[4].get_paths()[0].vertices  # of the area on top
    allocated = np.array(trace.allocated()) / MIB
    for event in (0, 100, 299, 300):
        at = top[np.isclose(top[:, 0], event), 1]
        assert np.isclose(at, allocated[event]).any()
    peak = trace.peak()
    (dot,) = [line for line in ax.lines if line.get_marker() == "o"]
    assert dot.get_xydata().tolist() == [[peak.event + 0.5, pytest.approx(peak.allocated / MIB)]]
    words = [text.get_text() for text in ax.texts]
    assert f"peak {peak.allocated / MIB:.2f} MiB at event {peak.event}" in words
    assert {"step 0", "step 1"} <= set(words)
    assert ax.get_ylabel() == "allocated in MiB"
    assert ax.get_xlim() == (0, 301)
    fig.canvas.draw()


def test_a_part_has_its_own_peak_and_steps():
    trace = timeline()
    _, ax = plots.plot_timeline(trace, start=120, stop=140)
    words = [text.get_text() for text in ax.texts]
    assert any(word.endswith(f"at event {trace.peak(120, 140).event}") for word in words)
    assert not any("step" in word for word in words)
    assert ax.get_xlim() == (120, 140)


def test_names_appear_letter_by_letter():
    frames = [Frame(name, 3, "f") for name in ("_a.py", "$x$.py", "/home/" + "long/" * 20 + "z.py")]
    trace = Timeline([Block(1, 5, 0, frames=(frame,)) for frame in frames], 0)
    fig, ax = plots.plot_timeline(trace, key=by_line)
    texts = ax.get_legend().get_texts()
    longest, *short = [text.get_text() for text in texts]
    assert short == ["$x$.py:3 (f)", "_a.py:3 (f)"]
    assert longest.startswith("…/")
    assert longest.endswith("/z.py:3 (f)")
    assert not any(text.get_parse_math() for text in texts)
    fig.canvas.draw()


def test_passes_of_a_real_step_are_in_order():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.ones(4, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    with Tracer() as tracer:
        for _ in range(2):
            tracer.step()
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    trace = tracer.timeline("cpu")
    spans = plots.passes(trace)
    assert [span.name for span in spans] == ["forward", "backward", "optimizer"] * 2
    assert all(before.stop <= after.start for before, after in pairwise(spans))
    assert spans[2].stop <= trace.steps[1] <= spans[3].start


def test_recomputation_is_part_of_the_backward_pass():
    phases = ["outside", "forward", "backward", "recompute", "outside", "backward", "optimizer"]
    blocks = [Block(1, 1, event, phase=phase) for event, phase in enumerate(phases)]
    assert plots.passes(Timeline(blocks, 6)) == [
        ("forward", 1, 2),
        ("backward", 2, 6),
        ("optimizer", 6, 7),
    ]


def test_many_steps_do_not_hide_the_picture():
    trace = timeline(count=5000)
    trace.steps = list(range(0, 5000, 5))
    _, ax = plots.plot_timeline(trace)
    assert len(ax.lines) < 200
    assert len(ax.texts) < 20


def test_bars_are_as_long_as_they_say():
    held = {"activation": 3 * MIB, "_x.$y$": MIB - 1024, "input": 1024}
    fig, ax = plots.plot_peak(held)
    assert [bar.get_width() for bar in ax.patches] == [size / MIB for size in held.values()]
    words = ["3.00 MiB · 75 %", "1023.00 KiB · 25 %", "1.00 KiB · < 1 %"]
    assert [text.get_text() for text in ax.texts] == words
    assert [label.get_text() for label in ax.get_yticklabels()] == list(held)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first is on top
    assert ax.get_title(loc="left") == "4.00 MiB in all"
    fig.canvas.draw()


def test_what_is_beyond_the_budget_is_told_apart():
    peaks = {"batch 1": 2 * 2**30, "batch 2": 4 * 2**30, "batch 3": 6 * 2**30}
    _, ax = plots.plot_peaks(peaks, budget=4 * 2**30)
    words = ["2.00 GiB", "4.00 GiB", "6.00 GiB, over by 2.00 GiB"]
    assert [text.get_text() for text in ax.texts] == words
    colours = [bar.get_facecolor() for bar in ax.patches]
    assert colours[0] == colours[1] != colours[2]
    assert ax.lines[0].get_xdata()[0] == 4
    assert not plots.plot_peaks(peaks)[1].lines
    _, ax = plots.plot_peaks({"small": 1024}, budget=2**30)
    assert ax.get_xlim()[1] > 1  # the budget is in the picture


def test_everything_draws_into_given_axes_and_opens_no_other_figure():
    fig, axes = plt.subplots(3)
    calls = [
        lambda ax: plots.plot_timeline(timeline(), ax),
        lambda ax: plots.plot_peak({"input": 5}, ax),
        lambda ax: plots.plot_peaks({"batch 1": 5}, 4, ax),
    ]
    for ax, call in zip(axes, calls, strict=True):
        assert call(ax) == (fig, ax)
        assert ax.get_xlabel()
    assert plt.get_fignums() == [fig.number]
    fig.canvas.draw()


def test_colours_of_categories_grow_lighter_upwards():
    assert [*plots.CATEGORY_COLOURS] == [*CATEGORIES, plots.OTHERS]
    colours = [to_rgb(colour) for colour in plots.CATEGORY_COLOURS.values()]
    assert np.diff([lightness(colour) for colour in colours]).min() > 9
    assert np.diff([255 * np.dot(colour, LUMA) for colour in colours]).min() > 18
    scale = plots.group_colours([*"abcdefg", plots.OTHERS])
    assert np.diff([lightness(to_rgb(colour)) for colour in scale.values()]).min() > 5


def lightness(rgb: tuple[float, ...]) -> float:
    """CIE L* of an sRGB colour (IEC 61966-2-1), 0 to 100."""
    rgb = np.asarray(rgb)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return 116 * np.cbrt(luminance) - 16 if luminance > 0.008856 else 903.3 * luminance


@pytest.mark.parametrize(
    ("trace", "part", "words"),
    [
        (Timeline([], 0), (0, None), "nothing is allocated on cpu"),
        (Timeline([Block(4, 4, 3, 5)], 9), (6, None), "nothing is allocated on cpu in events 6"),
        (timeline(), (20, 20), "start=20, stop=20: choose events of 0 … 300"),
        (timeline(), (-1, 20), "start=-1"),
    ],
)
def test_nothing_to_draw_is_said(trace, part, words):
    with pytest.raises(ValueError, match=words):
        plots.plot_timeline(trace, start=part[0], stop=part[1])


def test_empty_mappings_are_named():
    with pytest.raises(ValueError, match="nothing is held"):
        plots.plot_peak({})
    with pytest.raises(ValueError, match="no peaks"):
        plots.plot_peaks({})
