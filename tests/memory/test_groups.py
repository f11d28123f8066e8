"""Groups of a snapshot's allocations, against counting by hand; ranks, differences, and texts."""

import copy
import json
import pickle
import re
from collections import Counter

import pytest

from tfswa_lab.memory.snapshot import difference, read
from tfswa_lab.memory.snapshot.emit import as_snapshot, write_snapshot
from tfswa_lab.memory.snapshot.groups import GROUPINGS, NOBODY, category_of, site_of
from tfswa_lab.memory.snapshot.ranks import compare
from tfswa_lab.memory.trace.stacks import Frame
from tfswa_lab.memory.trace.timeline import Block, Timeline

MIB = 2**20
VENV = "/home/she/.venv/lib/python3.12/site-packages"
LINEAR = Frame(f"{VENV}/torch/nn/functional.py", 9, "linear")
CALL = Frame(f"{VENV}/torch/nn/modules/module.py", 1751, "_call_impl")
ENGINE = Frame("??", 0, "torch::autograd::Engine::thread_main(...)")
MODEL, TRAIN = Frame("model.py", 12, "forward"), Frame("train.py", 3, "step")
EINOPS = Frame(f"{VENV}/einops/einops.py", 907, "einsum")
FSDP = Frame(f"{VENV}/torch/distributed/fsdp/fully_sharded_data_parallel.py", 1, "forward")
ADAM = Frame(f"{VENV}/torch/optim/adamw.py", 5, "_init_group")
STACKS = {  # innermost first, with its category
    (LINEAR, CALL, MODEL, FSDP, TRAIN): "activations",
    (LINEAR, CALL._replace(name="Module._call_impl"), TRAIN): "activations",
    (EINOPS, CALL, MODEL, TRAIN): "activations",
    (ADAM, TRAIN): "optimizer state and temporaries",
    (ENGINE, Frame("thread48.o", 0, "execute_native_thread_routine")): (
        "gradients and temporaries of the backward pass"
    ),
    (Frame(f"{VENV}/torch/nn/modules/linear.py", 99, "__init__"), MODEL): "parameters",
    (Frame(f"{VENV}/torch/utils/data/_utils/pin_memory.py", 9, "_pin"), TRAIN): "input",
    (Frame("/tmp/torchinductor_me/ab/cabc.py", 80, "call"), TRAIN): "compiled code",
    (Frame(f"{VENV}/torch/distributed/distributed_c10d.py", 5, "all_gather"),): "communication",
    (TRAIN,): "other",
}


@pytest.mark.parametrize(("stack", "category"), STACKS.items())
def test_categories_are_guessed_from_the_innermost_function_that_tells(stack, category):
    assert category_of(stack) == category


def test_no_object_file_is_a_users_line_and_libraries_are_named():
    """Two stacks of public snapshots: 12.72 GiB were booked on `thread48.o`, 6.59 on einops."""
    backward = [ENGINE, Frame("thread48.o", 0, "execute_native_thread_routine")]
    backward.append(Frame("??", 0, "clone"))
    assert site_of(backward) == NOBODY
    wrapped = [
        Frame(f"{VENV}/torch/functional.py", 402, "einsum"),
        Frame(f"{VENV}/einops/_backends.py", 291, "einsum"),
        EINOPS,
        Frame("/home/me/course/basics/model.py", 39, "forward"),
    ]
    assert site_of(wrapped) == "/home/me/course/basics/model.py:39 (forward) via einops"


def recorded():
    """A history as a GPU's: contexts, annotations and all stacks, one block each, kept."""
    blocks = [
        Block((1 + at) * MIB, (1 + at) * MIB, at + 1, frames=stack)
        for at, stack in enumerate(STACKS)
    ]
    raw = as_snapshot(Timeline(blocks, len(blocks)))
    for number, entry in enumerate(raw["device_traces"][0]):
        entry["time_us"] = number
        entry.pop("category", None)
        entry.pop("user_metadata", None)
        entry["compile_context"] = "0/0" if number % 2 else None
    return raw


def alive(raw):
    return [entry for entry in raw["device_traces"][0] if entry["action"] == "alloc"]


def test_groups_add_up_to_all_memory_however_they_are_made():
    snapshot = read(recorded())
    total = snapshot.fragmentation().allocated
    for by in GROUPINGS:
        assert sum(site.size for site in snapshot.held_by(by)) == total, by
    rules = {"network": "model", "rest": "."}
    assert sum(site.size for site in snapshot.held_by("rule", rules=rules)) == total


def test_rules_take_the_first_that_is_found_in_a_file_or_function():
    raw = recorded()
    expected = Counter()
    for entry in alive(raw):
        texts = [text for f in entry["frames"] for text in (f["filename"], f["name"])]
        network = any(re.search("model", text) for text in texts)
        optimizer = any(re.search("_init_group", text) for text in texts)
        name = "network" if network else "optimizer" if optimizer else "(no rule)"
        expected[name] += 1
    rules = {"network": "model", "optimizer": "_init_group"}
    found = read(raw).held_by("rule", rules=rules)
    assert {site.line: site.blocks for site in found} == expected


def test_contexts_of_the_compiler_are_those_of_the_entries():
    raw = recorded()
    expected = Counter(entry["compile_context"] or "(not compiled)" for entry in alive(raw))
    found = read(raw).held_by("compile_context")
    assert {site.line: site.blocks for site in found} == expected


def test_annotations_count_while_they_are_open():
    raw = recorded()
    marks = [("step", "START", 2), ("loss", "START", 6), ("loss", "END", 9), ("step", "END", 13)]
    raw["external_annotations"] = [
        {"name": name, "stage": stage, "device": 0, "time_us": time} for name, stage, time in marks
    ]
    expected = Counter()
    for entry in alive(raw):
        time = entry["time_us"]
        inner = "loss" if 6 <= time < 9 else "step" if 2 <= time < 13 else "(no annotation)"
        expected[inner] += 1
    snapshot = read(raw)
    assert {site.line: site.blocks for site in snapshot.held_by("annotation")} == expected
    levels = snapshot.over_time().allocated
    times = snapshot.history().time_us
    at = [(f"{name} {stage}", int(levels[(times <= time).sum()])) for name, stage, time in marks]
    assert snapshot.summary().annotations == at


def test_moments_are_named_or_counted():
    raw = recorded()
    snapshot = read(raw)
    entries = raw["device_traces"][0]
    assert snapshot.event("end") == len(entries)
    assert snapshot.event("peak") == snapshot.over_time().allocated.argmax()
    assert snapshot.event("5") == snapshot.event(5) == 5
    last = max(at for at, entry in enumerate(entries) if entry["action"] == "alloc")
    assert snapshot.event(hex(entries[last]["addr"])) == last + 1
    for wrong in ("oom", "0xzz", "99999", "soon", "0"):
        with pytest.raises(ValueError, match=f"at='{wrong}'"):
            snapshot.event(wrong)


@pytest.mark.parametrize(
    ("by", "rules", "message"),
    [
        ("lines", {}, "by='lines'; choose one of line, category"),
        ("rule", {}, "by='rule' needs rules"),
        ("rule", {"a": "("}, "rule a='\\(' is no regular expression"),
    ],
)
def test_unknown_groupings_are_refused(by, rules, message):
    with pytest.raises(ValueError, match=message):
        read(recorded()).held_by(by, rules=rules)


def test_a_difference_has_both_directions():
    first = recorded()
    second = copy.deepcopy(first)
    grown = alive(second)[4]
    gone = alive(second)[-1]
    second["device_traces"][0].remove(gone)
    extra = grown | {"addr": 2**50, "time_us": 10**6}
    second["device_traces"][0].append(extra)
    for raw in (first, second):
        del raw["segments"]
    found = difference(read(first), read(second))
    growth = {change.line: change.growth for change in found.changes}
    assert growth == {NOBODY: grown["size"], str(TRAIN): -gone["size"]}
    assert found.after - found.before == grown["size"] - gone["size"]
    assert "more in the second: 1" in str(found)
    assert "less in the second: 1" in str(found)


def test_a_rank_out_of_balance_is_named_with_what_it_holds_more(tmp_path):
    for rank in range(12):
        blocks = [Block(8 * MIB, 8 * MIB, 1, frames=(TRAIN,))]
        if rank == 10:
            blocks.append(Block(4 * MIB, 4 * MIB, 2, frames=(MODEL,)))
        write_snapshot(tmp_path / f"rank{rank}.pickle", Timeline(blocks, 2))
    found = compare(tmp_path)
    assert [rank.name for rank in found.ranks] == [f"rank{n}.pickle" for n in range(12)]
    assert found.highest.name == "rank10.pickle"
    assert found.imbalance == 1.5
    assert [(change.line, change.growth) for change in found.changes] == [(str(MODEL), 4 * MIB)]
    assert "out of balance" in str(found)
    (tmp_path / "rank10.pickle").write_bytes(b"")
    found = compare(tmp_path)
    assert "balanced" in str(found)
    assert "rank10.pickle: it is empty" in str(found)


def test_a_folder_without_snapshots_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no snapshot with memory"):
        compare(tmp_path)
    with pytest.raises(NotADirectoryError, match="no such folder"):
        compare(tmp_path / "nothing")


def test_what_is_shown_is_short_and_complete():
    raw = recorded()
    raw["device_traces"][0].append({"action": "oom", "size": MIB, "device_free": 0, "frames": []})
    snapshot = read(raw)
    assert len(str(snapshot).splitlines()) <= 25
    assert "\n" not in repr(snapshot)
    assert len(repr(snapshot)) < 120
    page = snapshot._repr_html_()
    peak = f"peak {snapshot.over_time().allocated.max() // MIB}.00 MiB allocated"
    for text in (str(snapshot), page):
        assert peak in text
        assert "would have fitted" in text
        assert "guessed" in text
    json.dumps(snapshot.summary().as_dict())
    for part in (snapshot.contents, snapshot.history(), snapshot.allocations()):
        assert len(repr(part)) < 120


def test_hostile_names_are_only_text_in_html(tmp_path):
    frame = Frame("<img src=x onerror=alert(1)>.py", 1, "f")
    snapshot = read(as_snapshot(Timeline([Block(512, 512, 1, frames=(frame,))], 1)))
    assert "<img" not in snapshot._repr_html_()


def test_names_of_strangers_command_no_terminal():
    frame = Frame("train\x1b[31m.py", 1, "f\n\x07g")
    snapshot = read(as_snapshot(Timeline([Block(512, 512, 1, frames=(frame,))], 1)))
    (site,) = snapshot.allocation_sites()
    assert site.line == "train�[31m.py:1 (f��g)"


def test_several_devices_have_a_line_each(tmp_path):
    first, second = recorded(), recorded()
    for segment in second["segments"]:
        segment["device"] = 1
    both = {
        "segments": first["segments"] + second["segments"],
        "device_traces": [*first["device_traces"], *second["device_traces"]],
    }
    path = tmp_path / "two.pickle"
    path.write_bytes(pickle.dumps(both))
    assert [line.split(":")[1] for line in str(read(path)).splitlines()] == ["0", "1"]
