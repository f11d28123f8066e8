"""Snapshots against the trace and the allocator that made them, and against every old schema."""

import copy
import pickle
import random
from collections import Counter

import numpy as np
import pytest

from tfswa_lab.memory.predict.allocator import OutOfMemory, replay
from tfswa_lab.memory.sizes import rounded
from tfswa_lab.memory.snapshot import SnapshotError, diff, read
from tfswa_lab.memory.snapshot.emit import as_snapshot, write_snapshot
from tfswa_lab.memory.snapshot.groups import NOBODY, NOWHERE, site_of
from tfswa_lab.memory.trace.stacks import Frame
from tfswa_lab.memory.trace.timeline import Block, Timeline

MIB = 2**20
TORCH = Frame("/venv/lib/python3.12/site-packages/torch/nn/modules/linear.py", 134, "forward")
STACKS = [
    (TORCH, Frame("model.py", 12, "forward"), Frame("train.py", 3, "step")),
    (Frame("train.py", 4, "step"),),
    (Frame("??", 0, "at::detail::empty_cuda"), TORCH),
    (),
]
LINES = ["model.py:12 (forward)", "train.py:4 (step)", NOBODY, NOWHERE]


def small_blocks(seed=0, count=300, largest=MIB):
    """Up to 1 MiB a block gets what it asks for, rounded up: sizes are known to the byte."""
    chance, blocks, live, event = random.Random(seed), [], [], 0
    for event in range(1, count + 1):
        if live and chance.random() < 0.48:
            live.pop(chance.randrange(len(live))).died = event
        else:
            n = chance.randrange(1, largest)
            category, module = chance.choice([("activation", "blocks.0"), ("gradient", "")])
            frames = chance.choice(STACKS)
            blocks.append(Block(n, rounded(n), event, None, category, module, frames=frames))
            live.append(blocks[-1])
    return Timeline(blocks, event)


def forgotten(raw, count):
    """As if the ring had lost its oldest entries."""
    raw = copy.deepcopy(raw)
    del raw["device_traces"][0][:count]
    return raw


def at_events(snapshot, values):
    """What a curve says after the last entry of each event of the trace."""
    times = snapshot.history().time_us
    return [values[np.searchsorted(times, event, "right")] for event in range(times[-1] + 1)]


def test_curves_are_those_of_the_allocator():
    timeline = small_blocks()
    story, snapshot = replay(timeline), read(as_snapshot(timeline))
    curves = snapshot.over_time()
    assert at_events(snapshot, curves.allocated) == story.allocated.tolist()
    assert at_events(snapshot, curves.active) == story.allocated.tolist()
    assert at_events(snapshot, curves.reserved) == story.reserved.tolist()
    assert len(curves.time_us) == len(curves.allocated) == len(snapshot.history()) + 1


def test_large_blocks_are_known_at_the_end_and_to_a_mebibyte_before():
    timeline = small_blocks(seed=1, largest=40 * MIB)
    story, snapshot = replay(timeline), read(as_snapshot(timeline))
    allocated = np.array(at_events(snapshot, snapshot.over_time().allocated))
    assert allocated[-1] == story.allocated[-1]
    alive = np.array([sum(1 for _ in timeline.alive(e)) for e in range(timeline.events + 1)])
    assert (np.abs(allocated - story.allocated) <= alive * MIB).all()


@pytest.mark.parametrize("lost", [1, 100, 250, 400])
def test_a_ring_that_wrapped_tells_the_same_of_what_it_kept(lost):
    raw = as_snapshot(small_blocks())
    whole, rest = read(raw), read(forgotten(raw, lost))
    for name in ("allocated", "active", "reserved"):
        expected = getattr(whole.over_time(), name)[lost:]
        assert getattr(rest.over_time(), name).tolist() == expected.tolist()
    assert rest.allocations().alive(0).sum() == whole.allocations().alive(lost).sum()


def test_sampling_the_end_is_the_same_and_says_so(tmp_path):
    path = write_snapshot(tmp_path / "long.pickle", small_blocks())
    whole, rest = read(path), read(path, last=200)
    assert rest.over_time().allocated.tolist() == whole.over_time().allocated[-201:].tolist()
    assert rest.notes == [f"device 0: the last 200 of {len(whole.history())} entries"]
    assert whole.notes == []
    with pytest.raises(ValueError, match="last=0"):
        read(path, last=0)


def test_a_trace_comes_back_as_it_went():
    timeline = small_blocks()
    there = read(as_snapshot(timeline)).timeline()

    def told(blocks):
        return [(b.size, b.rounded, b.category, b.module, b.frames) for b in blocks]

    assert told(there.blocks) == told(timeline.blocks)
    assert [b.died is None for b in there.blocks] == [b.died is None for b in timeline.blocks]
    assert there.peak().allocated == timeline.peak().allocated


def expected_holders(timeline, event):
    held, count = Counter(), Counter()
    for block in timeline.alive(event):
        line = LINES[STACKS.index(block.frames)]
        held[line] += block.rounded
        count[line] += 1
    return [(line, size, count[line]) for line, size in held.most_common()]


def test_holders_are_named_by_their_own_line():
    timeline = small_blocks(seed=2)
    snapshot = read(as_snapshot(timeline))
    found = [(h.line, h.size, h.blocks) for h in snapshot.allocation_sites()]
    assert found == expected_holders(timeline, timeline.events)
    middle = 150
    entry = int(np.searchsorted(snapshot.history().time_us, middle, "right"))
    found = [(h.line, h.size, h.blocks) for h in snapshot.allocation_sites(entry)]
    assert found == expected_holders(timeline, middle)
    held = timeline.held_by(timeline.events, lambda b: f"{b.category} | {b.module}")
    assert {site.line: site.size for site in snapshot.held_by("metadata")} == held


def test_lines_of_torch_and_of_c_are_not_the_users():
    assert [site_of(stack) for stack in STACKS] == LINES
    mine = Frame("/home/me/torch/train.py", 1, "main")  # a folder of that name is no torch
    assert site_of([Frame("/opt/pytorch/torch/_ops.py", 5, "call"), mine]) == str(mine)
    assert site_of([Frame("C:\\v\\site-packages\\torch\\x.py", 5, "f"), mine]) == str(mine)


def test_fragmentation_adds_up():
    timeline = small_blocks(seed=3, largest=30 * MIB)
    allocator = replay(timeline).allocator
    found = read(as_snapshot(timeline)).fragmentation()
    assert (found.reserved, found.allocated) == (allocator.reserved, allocator.allocated)
    assert found.rounding == allocator.allocated - allocator.requested
    assert found.inactive_split == allocator.inactive_split
    assert found.releasable == allocator.empty_cache()
    assert found.reserved == found.allocated + found.releasable + found.inactive_split
    assert "rounding" in str(found)


def test_a_difference_is_by_line():
    timeline = small_blocks(seed=4, count=100)
    before = read(as_snapshot(timeline))
    leak = [Block(MIB, MIB, 100, frames=STACKS[0]) for _ in range(3)]
    freed = next(b for b in timeline.blocks if b.died is None and b.frames == STACKS[1])
    freed.died = 100
    after = read(as_snapshot(Timeline([*timeline.blocks, *leak], 100)))
    found = {c.line: (c.growth, c.blocks_after - c.blocks_before) for c in diff(before, after)}
    assert found == {LINES[0]: (3 * MIB, 3), LINES[1]: (-freed.rounded, -1)}
    assert diff(before, before) == []
    assert diff(before, after)[0].line == LINES[0]  # the largest change


def test_short_of_memory():
    sizes = [(1, 12), (2, 14), (3, 20)]
    blocks = [Block(n * MIB, n * MIB, event, frames=STACKS[0]) for event, n in sizes]
    timeline = Timeline(blocks, 3)
    with pytest.raises(OutOfMemory) as failed:
        replay(timeline, limit=40 * MIB)
    report = read(as_snapshot(timeline, limit=40 * MIB)).oom_report()
    assert (report.requested, report.device_free) == (20 * MIB, 14 * MIB)
    assert (report.allocated, report.reserved) == (26 * MIB, 26 * MIB)
    assert report.fits == failed.value.fits == 14 * MIB
    assert not report.is_fragmentation
    assert report.largest_batch == 40 / 46
    assert "lacked 6.00 MiB" in str(report)
    assert "at most 87%" in str(report)
    assert "model.py:12 (forward)" in str(report)


def test_fragmented():
    lives = [(2, 1, None), (18, 2, 5), (2, 3, None), (18, 4, 6), (24, 7, None)]
    blocks = [Block(n * MIB, n * MIB, born, died) for n, born, died in lives]  # 18 free, twice
    timeline = Timeline(blocks, 7)
    with pytest.raises(OutOfMemory) as failed:
        replay(timeline, limit=58 * MIB)
    report = read(as_snapshot(timeline, limit=58 * MIB)).oom_report()
    assert report.is_fragmentation
    assert report.fits == failed.value.fits
    assert report.free == 58 * MIB - failed.value.allocator.allocated
    assert "expandable_segments" in str(report)


@pytest.mark.parametrize("seed", range(4))
def test_what_fits_is_what_the_allocator_says(seed):
    """Random traces on a device that is too small for them."""
    timeline = small_blocks(seed=seed, largest=30 * MIB)
    with pytest.raises(OutOfMemory) as failed:
        replay(timeline, limit=100 * MIB)
    report = read(as_snapshot(timeline, limit=100 * MIB)).oom_report()
    allocator = failed.value.allocator
    assert report.requested == failed.value.requested
    assert report.reserved == allocator.reserved
    assert report.allocated == allocator.allocated
    assert report.fits == failed.value.fits


def test_an_oom_in_the_middle_is_seen_as_it_was_then():
    timeline = small_blocks(seed=1, largest=30 * MIB)
    raw = as_snapshot(timeline, limit=100 * MIB)
    then = read(raw).oom_report()
    entry = {"action": "free_requested", "stream": 0, "time_us": 999, "frames": []}
    for segment in raw["segments"]:  # everything is freed and given back afterwards
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                freed = entry | {"addr": block["address"], "size": block["requested_size"]}
                raw["device_traces"][0].append(freed)
        gone = {"addr": segment["address"], "size": segment["total_size"]}
        raw["device_traces"][0].append(entry | gone | {"action": "segment_free"})
    raw["segments"] = []
    later = read(raw).oom_report()
    assert (later.event, later.requested, later.reserved) == (
        then.event,
        then.requested,
        then.reserved,
    )
    blocks = sum(site.blocks for site in then.allocation_sites)
    assert abs(later.allocated - then.allocated) < MIB * blocks
    assert {h.line for h in later.allocation_sites} == {h.line for h in then.allocation_sites}


def test_no_oom_is_said_so():
    with pytest.raises(ValueError, match="no oom entry"):
        read(as_snapshot(small_blocks())).oom_report()


def older(raw, state="active_awaiting_free"):
    """As torch 1.x and 2.0 wrote it: histories for frames, no addresses, other names."""
    raw = copy.deepcopy(raw)
    for segment in raw["segments"]:
        for key in ("segment_pool_id", "is_expandable", "frames", "requested_size"):
            del segment[key]
        for block in segment["blocks"]:
            frames, requested = block.pop("frames"), block.pop("requested_size")
            if block["state"] == "active_allocated":
                block["history"] = [
                    {"addr": block["address"], "real_size": requested, "frames": frames}
                ]
            elif block["state"] == "active_pending_free":
                block["state"] = state
            del block["address"]
    for entry in raw["device_traces"][0]:
        for key in ("time_us", "pool_id", "user_metadata", "category"):
            entry.pop(key, None)
    del raw["allocator_settings"], raw["external_annotations"]
    return raw


def test_old_schemas_say_the_same():
    raw = as_snapshot(small_blocks())
    new, old = read(raw), read(older(raw))
    assert old.allocation_sites() == new.allocation_sites()
    assert old.fragmentation() == new.fragmentation()
    assert old.over_time().reserved.tolist() == new.over_time().reserved.tolist()
    segments_only = read(older(raw)["segments"])
    assert segments_only.allocation_sites() == new.allocation_sites()
    assert segments_only.over_time().allocated.tolist() == [new.fragmentation().allocated]


@pytest.mark.parametrize("state", ["active_pending_free", "active_awaiting_free"])
def test_memory_that_another_stream_still_uses_is_active(state):
    base = 0x7F00_0000_0000
    block = {"address": base, "size": 2 * MIB, "requested_size": 2 * MIB, "frames": []}
    entry = {"addr": base, "size": 2 * MIB, "stream": 0, "frames": []}
    segment = {"address": base, "total_size": 20 * MIB, "device": 0}
    rest = {"address": base + 2 * MIB, "size": 18 * MIB, "state": "inactive"}
    actions = ("alloc", "free_requested", "free_completed", "alloc", "free_requested")
    raw = {
        "segments": [segment | {"blocks": [block | {"state": state}, rest]}],
        "device_traces": [[entry | {"action": action} for action in actions]],
    }
    snapshot = read(raw)
    curves = snapshot.over_time()
    assert (curves.allocated // MIB).tolist() == [0, 2, 0, 0, 2, 0]
    assert (curves.active // MIB).tolist() == [0, 2, 2, 0, 2, 2]
    assert snapshot.fragmentation().pending == 2 * MIB
    assert snapshot.fragmentation().inactive_split == 18 * MIB
    assert snapshot.allocation_sites() == []


@pytest.mark.parametrize("kind", ["free_requested", "free_completed"])
def test_one_kind_of_release_is_enough(kind):
    raw = as_snapshot(small_blocks())
    expected = at_events(read(raw), read(raw).over_time().allocated)
    entries = raw["device_traces"][0]
    raw["device_traces"][0] = [entry for entry in entries if entry["action"] != kind]
    snapshot = read(raw)
    assert at_events(snapshot, snapshot.over_time().allocated) == expected
    assert snapshot.over_time().active.tolist() == snapshot.over_time().allocated.tolist()


def test_releases_that_were_not_recorded_are_counted():
    raw = as_snapshot(small_blocks())
    entries = raw["device_traces"][0]
    freed = sum(entry["action"] == "free_requested" for entry in entries)
    raw["device_traces"][0] = [entry for entry in entries if "free" not in entry["action"]]
    snapshot = read(raw)
    assert snapshot.over_time().allocated[-1] == snapshot.fragmentation().allocated
    assert snapshot.notes == [f"device 0: {freed} releases were not recorded"]


def test_expandable_segments_grow_and_shrink():
    base = 0x7F00_0000_0000

    def entry(action, offset, size):
        where = {"device_free": 0} if action == "oom" else {"addr": base + offset * MIB}
        return {"action": action, "size": size * MIB, "stream": 0, "frames": []} | where

    history = [
        entry("segment_map", 0, 20),
        entry("alloc", 0, 18),
        entry("segment_map", 20, 40),
        entry("alloc", 18, 30),
        entry("oom", 0, 30),
        entry("free_requested", 18, 30),
        entry("free_completed", 18, 30),
        entry("segment_unmap", 40, 20),
    ]
    blocks = [
        {"size": 18 * MIB, "requested_size": 18 * MIB, "state": "active_allocated", "frames": []},
        {"size": 22 * MIB, "requested_size": 0, "state": "inactive", "frames": []},
    ]
    segment = {"device": 0, "address": base, "total_size": 40 * MIB, "is_expandable": True}
    snapshot = read({"segments": [segment | {"blocks": blocks}], "device_traces": [history]})
    curves = snapshot.over_time()
    assert (curves.reserved // MIB).tolist() == [0, 20, 20, 60, 60, 60, 60, 60, 40]
    assert (curves.allocated // MIB).tolist() == [0, 0, 18, 18, 48, 48, 18, 18, 18]
    report = snapshot.oom_report()
    assert (report.reserved, report.largest_free) == (60 * MIB, 12 * MIB)


def matched_by_searching(entries, end):
    """Address, birth and death of each allocation, by looking at all other entries."""
    requested = any(action == "free_requested" for action, _ in entries)
    release = "free_requested" if requested else "free_completed"
    events = [(n, *e) for n, e in enumerate(entries, 1) if e[0] in ("alloc", release)]
    for n, action, address in events:
        if action == "alloc":
            later = [m for m, _, other in events if other == address and m > n]
            yield address, n, min(later, default=end + 1)
        elif [a for m, a, other in events if other == address and m < n][-1:] != ["alloc"]:
            yield address, 0, n


@pytest.mark.parametrize("seed", range(30))
def test_any_order_of_allocations_and_releases_is_matched(seed):
    """Rings lose entries, and versions of torch omit kinds of them."""
    chance = random.Random(seed)
    kinds = ["alloc", "free_requested", "free_completed", "snapshot"]
    kinds = chance.sample(kinds, chance.randrange(1, 5))
    entries = [(chance.choice(kinds), chance.randrange(1, 6)) for _ in range(chance.randrange(60))]
    trace = [{"action": action, "addr": address, "size": 1} for action, address in entries]
    found = read({"device_traces": [trace]}).allocations(0)
    columns = (found.address, found.born, found.died)
    told = list(zip(*(column.tolist() for column in columns), strict=True))
    assert sorted(told) == sorted(matched_by_searching(entries, len(entries)))
    assert found.born.tolist() == sorted(found.born)


def test_the_segments_are_right_about_the_end():
    trace = [{"action": "alloc", "addr": n, "size": 1, "frames": []} for n in (512, 1024)]
    state, frames = "active_allocated", [STACKS[1][0]._asdict()]
    blocks = [{"address": n, "size": 2_000, "state": state, "frames": frames} for n in (1024, 0)]
    segment = {"device": 0, "address": 0, "total_size": MIB, "blocks": blocks}
    snapshot = read({"segments": [segment], "device_traces": [trace]})
    found = snapshot.allocations()
    assert found.address.tolist() == [0, 512, 1024]
    assert found.born.tolist() == [0, 1, 2]
    assert found.died.tolist() == [3, 2, 3]
    assert found.size.tolist() == [2_000, 512, 2_000]
    assert snapshot.allocation_sites()[0].blocks == 2
    assert snapshot.notes == ["device 0: 1 releases were not recorded"]


def test_contexts_and_categories_are_texts():
    entry = {"action": "alloc", "addr": 1, "size": 1}
    about = [
        {"compile_context": "0/1", "user_metadata": "step", "category": "gradient"},
        {"compile_context": "step", "category": "gradient"},
        {"user_metadata": "", "compile_context": 5},
    ]
    contents = read({"device_traces": [[entry | one for one in about]]}).contents
    history, texts = contents.histories[0], contents.texts
    assert [texts[number] for number in history.text] == ["step", "gradient", ""]
    assert [texts[number] for number in history.context] == ["0/1", "step", ""]
    assert len(set(texts)) == len(texts)


def test_annotations_and_settings_are_kept():
    raw = as_snapshot(small_blocks())
    raw["external_annotations"] = [
        {"name": "step", "stage": "START", "device": 1, "time_us": 2**50},
        {"name": "step", "stage": "END"},
        "nonsense",
    ]
    contents = read(raw).contents
    assert contents.annotations == [("step", "START", 1, 2**50), ("step", "END", 0, 0)]
    assert contents.settings == raw["allocator_settings"]
    odd = raw | {"external_annotations": 7, "allocator_settings": [1]}
    assert (read(odd).contents.annotations, read(odd).contents.settings) == ([], {})


def test_several_devices_are_kept_apart():
    first, second = as_snapshot(small_blocks(seed=5)), as_snapshot(small_blocks(seed=6))
    for segment in second["segments"]:
        segment["device"] = 1
    second["device_traces"].insert(0, [])
    both = {
        "segments": first["segments"] + second["segments"],
        "device_traces": [first["device_traces"][0], second["device_traces"][1]],
    }
    snapshot = read(both)
    assert snapshot.devices == [0, 1]
    with pytest.raises(ValueError, match=r"devices \[0, 1\]"):
        snapshot.allocation_sites()
    assert snapshot.allocation_sites(device=0) == read(first).allocation_sites()
    assert snapshot.allocation_sites(device=1) == read(second).allocation_sites(device=1)
    assert snapshot.over_time(1).reserved.tolist() == read(second).over_time(1).reserved.tolist()


def test_lines_of_the_forward_pass_are_found_for_gradients():
    raw = as_snapshot(Timeline([Block(512, 512, 1, frames=STACKS[2])], 1))
    entry = raw["device_traces"][0][1]
    entry["forward_frames"] = [frame._asdict() for frame in STACKS[0]]
    assert [h.line for h in read(raw).allocation_sites()] == ["model.py:12 (forward)"]


def test_what_is_not_understood_is_noted():
    raw = as_snapshot(small_blocks())
    raw["device_traces"][0] += [{"action": "teleport"}, {"size": 1}]
    raw["segments"][0]["blocks"][0]["state"] = "asleep"
    assert sorted(read(raw).notes) == [
        "1 blocks in an unknown state, counted as inactive",
        "2 entries with an unknown action, ignored",
    ]
    notes = read({"device_traces": raw["device_traces"]}).notes
    assert "no segments: what was allocated before the trace is unknown" in notes


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "neither segments nor device_traces"),
        ({"segments": 3}, "segments is a int"),
        ({"segments": [3]}, "segments holds a int"),
        ({"segments": [{"blocks": {}, "address": 1}, {"blocks": {1: 2}}]}, "blocks is a dict"),
        ({"segments": [{"total_size": "many"}]}, "total_size is not a number"),
        ({"segments": [{"total_size": -1}]}, "total_size is not a number"),
        ({"segments": [{"address": 2**63}]}, "address is not a number"),
        ({"segments": [{"total_size": 2**50}]}, "total_size is not a number"),
        (
            {"segments": [{"total_size": 2**49} for _ in range(8_200)]},
            "more memory than any machine",
        ),
        ({"device_traces": [[7]]}, "trace holds a int"),
        ({"device_traces": [{"action": "alloc"}]}, "trace of device 0 is not a list"),
        ({"device_traces": [[{"action": "alloc", "size": 1.5}]]}, "size is not a number"),
    ],
)
def test_what_cannot_be_a_snapshot_is_named(tmp_path, raw, message):
    with pytest.raises(SnapshotError, match=message):
        read(raw)
    path = tmp_path / "odd.pickle"
    path.write_bytes(pickle.dumps(raw))
    with pytest.raises(SnapshotError, match=r"odd\.pickle.*" + message):
        read(path)


def test_odd_frames_do_no_harm():
    frames = [[1], {"name": 5}, {"filename": "a.py", "line": None, "name": "f"}, "x", None]
    raw = {"device_traces": [[{"action": "alloc", "addr": 1, "size": 1, "frames": frames}]]}
    assert [h.line for h in read(raw).allocation_sites()] == ["a.py:0 (f)"]


def test_nothing_is_nothing():
    snapshot = read({"segments": [], "device_traces": [[]]})
    assert snapshot.devices == []
    assert snapshot.allocation_sites() == []
    assert snapshot.over_time().allocated.tolist() == [0]
    assert snapshot.timeline().blocks == []
    assert snapshot.fragmentation().reserved == 0
