"""What we emit is what torch's own viewer reads, and it adds up to the trace."""

import pickle
import random
import re

import pytest
from torch.cuda import _memory_viz as viewer

from tfswa_lab.memory.predict.allocator import replay
from tfswa_lab.memory.sizes import rounded
from tfswa_lab.memory.snapshot.emit import as_snapshot, write_snapshot
from tfswa_lab.memory.trace.stacks import Frame
from tfswa_lab.memory.trace.timeline import Block, Timeline

MIB = 2**20
FORWARD = (Frame("model.py", 12, "forward"), Frame("train.py", 3, "step"))
BACKWARD = (Frame("train.py", 4, "step"),)


def timeline(seed=0, count=200):
    chance, blocks, live, event = random.Random(seed), [], [], 0
    for _ in range(3):
        n = chance.randrange(1, MIB)
        blocks.append(Block(n, rounded(n), 0, category="parameter", module="head"))
    for event in range(1, count + 1):
        if live and chance.random() < 0.5:
            live.pop(chance.randrange(len(live))).died = event
        else:
            n = int(2 ** chance.uniform(2, 24))
            module, frames = chance.choice([("blocks.0", FORWARD), ("", BACKWARD)])
            blocks.append(Block(n, rounded(n), event, None, "activation", module, frames=frames))
            live.append(blocks[-1])
    return Timeline(blocks, event, steps=[1, count // 2])


@pytest.fixture
def snapshot():
    return as_snapshot(timeline())


def lines_of(text):
    """Flame-graph lines: what is allocated, by stack."""
    sizes = {}
    for line in text.strip().splitlines():
        stack, size = line.rsplit(" ", 1)
        sizes[stack] = sizes.get(stack, 0) + int(size)
    return sizes


def test_torchs_summary_of_segments_adds_up(snapshot):
    story = replay(timeline())
    summary = viewer.segsum(snapshot)  # asserts that blocks tile segments
    total = story.allocator.reserved / MIB
    assert re.search(r"total_reserved: ([\d.]+)MiB", summary)[1] == f"{total:.1f}"
    assert sum(s["allocated_size"] for s in snapshot["segments"]) == story.allocator.allocated
    assert sum(s["requested_size"] for s in snapshot["segments"]) == story.allocator.requested


def test_torchs_trace_tells_every_event(snapshot):
    text = viewer.trace(snapshot)
    blocks = timeline().blocks
    assert len(re.findall("^# free completed", text, re.M)) == sum(bool(b.died) for b in blocks)
    assert len(re.findall(r"^\w+ = (?!cudaMalloc)", text, re.M)) == len(blocks)
    assert "MEM[" not in text  # every block lies in a segment that the trace has seen


def test_torchs_pairing_leaves_what_is_alive(snapshot):
    left = viewer.filter_alloc_free_pairs(snapshot)["device_traces"][0]
    alive = [block.size for block in timeline().blocks if block.died is None]
    assert [entry["size"] for entry in left if entry["action"] == "alloc"] == alive


def test_torchs_flame_graph_has_our_stacks(snapshot):
    sizes = lines_of(viewer.memory(snapshot, format_flamegraph=str))
    alive = [block for block in timeline().blocks if block.died is None]
    stack = "stream_0;active_allocated;train.py:3:step;model.py:12:forward"
    assert sizes[stack] == sum(b.size for b in alive if b.frames == FORWARD)


def test_torchs_comparison_finds_new_segments(snapshot, capsys):
    empty = as_snapshot(Timeline([], 0))
    text = viewer.compare(empty["segments"], snapshot["segments"], format_flamegraph=str)
    sizes = lines_of(text)
    assert all(stack.startswith("only_after") for stack in sizes)
    assert sum(sizes.values()) == sum(s["total_size"] for s in snapshot["segments"])
    assert "only_before = []" in capsys.readouterr().out


def test_torchs_plots_take_it(snapshot):
    for plot in (viewer.trace_plot, viewer.segment_plot):
        assert "snapshot.pickle" in plot(snapshot)


def test_entries_carry_category_module_and_steps(snapshot):
    allocations = [e for e in snapshot["device_traces"][0] if e["action"] == "alloc"]
    assert allocations[0]["user_metadata"] == "parameter | head"
    assert {e["category"] for e in allocations} == {"parameter", "activation"}
    starts = [(a["name"], a["time_us"]) for a in snapshot["external_annotations"]]
    assert starts == [("step 0", 1), ("step 1", 100)]
    assert len({id(e["frames"]) for e in allocations}) == 3  # each stack once


def test_a_trace_too_large_for_the_device_ends_with_its_oom():
    blocks = [Block(n * MIB, n * MIB, event, None) for event, n in ((1, 20), (2, 30), (3, 20))]
    snapshot = as_snapshot(Timeline(blocks, 3), limit=40 * MIB)
    last = snapshot["device_traces"][0][-1]
    assert (last["action"], last["device_free"], last["size"]) == ("oom", 20 * MIB, 30 * MIB)
    assert "addr" not in last
    assert sum(s["total_size"] for s in snapshot["segments"]) == 20 * MIB
    assert "raise OutOfMemoryError # 30.0MiB requested, 20.0MiB free" in viewer.trace(snapshot)


def test_the_file_is_the_snapshot(tmp_path, snapshot):
    path = write_snapshot(tmp_path / "new" / "cpu.pickle", timeline())
    assert pickle.loads(path.read_bytes()) == snapshot
    assert [file.name for file in path.parent.iterdir()] == ["cpu.pickle"]
