"""A stranger's file: read if it is plain data; if not, refused at once and nothing executed."""

import contextlib
import copyreg
import gzip
import io
import itertools
import json
import os
import pickle
import random
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from tfswa_lab.memory.snapshot import read, schema, shapes
from tfswa_lab.memory.snapshot.emit import as_snapshot
from tfswa_lab.memory.snapshot.files import opened
from tfswa_lab.memory.snapshot.pickles import Reader, SnapshotError
from tfswa_lab.memory.snapshot.schema import ACTIONS, FORWARD
from tfswa_lab.memory.trace.stacks import Frame
from tfswa_lab.memory.trace.timeline import Block, Timeline

PROTO = b"\x80\x04"


class Shell:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def written(folder: Path, program: bytes) -> Path:
    path = folder / "hostile.pickle"
    path.write_bytes(program)
    return path


def read_plain(path):
    """All that a pickle contains, opcode by opcode."""
    with opened(path) as program:
        return Reader(program).load()


def small_snapshot():
    chance, blocks, live, event = random.Random(5), [], [], 0
    stacks = [(Frame("train.py", line, "step"), Frame("run.py", 1, "main")) for line in range(9)]
    for event in range(1, 150):
        if live and chance.random() < 0.5:
            live.pop(chance.randrange(len(live))).died = event
        else:
            size = int(2 ** chance.uniform(2, 25))
            blocks.append(Block(size, size, event, module="m", frames=chance.choice(stacks)))
            live.append(blocks[-1])
    return as_snapshot(Timeline(blocks, event, [1]))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_are_read_as_pickle_reads_them(tmp_path, protocol):
    chance = random.Random(protocol)
    numbers = [0, 255, 256, 65535, 65536, -1, 2**31, -(2**40), 2**62, 2**63 - 1]
    strings = ["", "é", "x" * 63, "x" * 64, "y" * 255, "z" * 256, "…" * 70_000, "a\nb"]
    pairs = [(chance.choice(numbers), chance.choice(numbers)) for _ in range(30_000)]
    data = {
        "numbers": numbers,
        "strings": strings,
        "others": [None, True, False, 0.5, -1e300, [], {}],
        "pairs": pairs,  # long enough for frames to end between the two
        "shared": [strings] * 3,
        "many": [{"a": i, "b": str(i), "c": [i] * (i % 3)} for i in range(3_000)],
    }
    path = written(tmp_path, pickle.dumps(data, protocol=protocol))
    there = read_plain(path)
    assert there == data
    assert there["shared"][0] is there["shared"][2]


def test_the_snapshot_that_mutations_start_from_is_read(tmp_path):
    snapshot = small_snapshot()
    assert read_plain(written(tmp_path, pickle.dumps(snapshot))) == snapshot


def doubled_tuples(count):
    """A tuple of two of a tuple of two of …, as a key: hashing it takes 2 ** count steps."""
    return PROTO + b"})" + b"2\x86" * count + b"K\x00s."


def nested_pairs(count):
    """Not doubled, but so deep that hashing it overflows the stack of C."""
    return PROTO + b"}K\x00" + b"K\x00\x86" * count + b"K\x00s."


HOSTILE = {
    "global": b"cos\nsystem\n(S'true'\ntR.",
    "stack global": PROTO + b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "instance": b"(S'true'\nios\nsystem\n.",
    "object": PROTO + b"(cos\nsystem\n\x8c\x04trueo.",
    "new object": PROTO + b"cos\nsystem\n)\x81.",
    "build": PROTO + b"}}b.",
    "reduce of a string": PROTO + b"\x8c\x06system)R.",
    "persistent": b"Pcalc\n.",
    "binary persistent": PROTO + b"K\x01Q.",
    "buffer": b"\x80\x05\x97.",
    "protocol 0": pickle.dumps({"segments": []}, protocol=0),
    "a later protocol": b"\x80\x7f}.",
    "key of doubled tuples": doubled_tuples(60),
    "key of nested tuples": nested_pairs(200_000),
    "set": PROTO + b"\x8f(K\x01\x90.",
    "index of 2 GiB": PROTO + b"]r\xff\xff\xff\x7f.",
    "index of 1 GiB, in text": b"]p1073741824\n.",
    "string of 2^62 bytes": PROTO + b"\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "string of 4 GiB": PROTO + b"X\xff\xff\xff\xffabc.",
    "bytes of 2^62": PROTO + b"\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "byte array of 2^62": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"abc.",
    "frame of 2^62": PROTO + b"\x95" + struct.pack("<Q", 2**62) + b"}.",
    "integer of 2 GiB": PROTO + b"\x8b\xff\xff\xff\x7f1.",
    "integer of many digits": b"L" + b"9" * 500_000 + b"L\n.",
    "unknown memory": PROTO + b"h\x07.",
    "empty stack": PROTO + b"u.",
    "marks": PROTO + b"(" * 1_000_000 + b".",
    "deep lists": PROTO + b"]" * 500_000 + b"a" * 499_999 + b".",
    "a list in itself": PROTO + b"]\x94h\x00a.",
    "trailing nothing": PROTO + b"}",
    "text": b"not a pickle at all",
    "zeros": bytes(1000),
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "broken utf-8": PROTO + b"\x8c\x02\xff\xff.",
    "segments are a number": pickle.dumps({"segments": 5}),
    "a number": pickle.dumps(5),
    "other data": pickle.dumps({"weights": [1, 2]}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(tmp_path, name):
    path = written(tmp_path, HOSTILE[name])
    began = time.perf_counter()
    with pytest.raises(SnapshotError, match=r"hostile\.pickle"):
        read(path)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("name", [name for name in HOSTILE if "GiB" in name or "2^62" in name])
def test_announced_bytes_are_not_made_room_for(tmp_path, name):
    path = written(tmp_path, HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotError):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_no_code_is_executed(tmp_path):
    witness = tmp_path / "witness"
    for protocol in range(6):
        program = pickle.dumps({"segments": [Shell(witness)]}, protocol=protocol)
        with pytest.raises(SnapshotError):
            read(written(tmp_path, program))
        assert not witness.exists()
    pickle.loads(program)
    assert witness.exists()  # so it would have


def test_registered_extensions_stay_closed(tmp_path):
    """Python's reader hands these out without `find_class` once they have been used."""
    copyreg.add_extension("posix", "system", 77)
    try:
        witness = tmp_path / "witness"
        program = pickle.dumps(Shell(witness), protocol=2)
        assert b"\x82\x4d" in program
        pickle.loads(pickle.dumps(os.system, protocol=2))  # fills the cache
        with pytest.raises(SnapshotError, match="EXT1"):
            read(written(tmp_path, program))
        assert not witness.exists()
    finally:
        copyreg.remove_extension("posix", "system", 77)


def test_a_small_file_that_repeats_itself_a_million_times_is_refused(tmp_path):
    part = {"size": 512, "state": "inactive"}
    segment = {"address": 0, "total_size": 1, "blocks": [part] * 2_000}
    program = pickle.dumps({"segments": [segment] * 2_000})
    assert len(program) < 10_000
    with pytest.raises(SnapshotError, match="blocks and entries in so small a file"):
        read(written(tmp_path, program))


def test_a_small_file_that_joins_all_stacks_with_all_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "MOST_JOINED", 100_000)
    line = {"filename": "a.py", "line": 1, "name": "f"}
    stacks = [[line] * (500 + n) for n in range(15)]
    pairs = itertools.product(stacks, stacks)
    entries = [{"action": "alloc", "frames": a, "forward_frames": b} for a, b in pairs]
    with pytest.raises(SnapshotError, match="more than 100,000 lines"):
        read(written(tmp_path, pickle.dumps({"device_traces": [entries]})))


def test_files_that_are_absent_empty_or_too_large_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pickle"):
        read(tmp_path / "none.pickle")
    with pytest.raises(SnapshotError, match="it is empty"):
        read(written(tmp_path, b""))
    with pytest.raises(SnapshotError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(SnapshotError, match="raise `largest`"):
        read(written(tmp_path, pickle.dumps(small_snapshot())), largest=1_000)


MADE_OF = [bytes([op]) for op in range(256)]
BOMBS = [program[2:] if program[:2] == PROTO else program for program in HOSTILE.values()]


def mutated(chance, program, witness):
    """One seeded wound: flips, cuts, other opcodes, lengths, repeats, or a weapon put in."""
    at = chance.randrange(len(program))
    shell = pickle.dumps(Shell(witness), protocol=2)[2:-1]
    kind = chance.randrange(9)
    if kind == 0:
        wounded = bytearray(program)
        for _ in range(chance.randrange(1, 20)):
            wounded[chance.randrange(len(wounded))] ^= 1 << chance.randrange(8)
        return bytes(wounded)
    if kind == 1:
        return program[:at]
    if kind == 2:
        return program[:at] + chance.choice(MADE_OF) + program[at + 1 :]
    if kind == 3:
        return program[:at] + shell + program[at:]
    if kind == 4:
        giant = chance.choice([b"\x8d", b"\x8e", b"\x95", b"\x96"]) + struct.pack("<Q", 2**60)
        return program[:at] + giant + program[at:]
    if kind == 5:
        return program[:at] + chance.choice(BOMBS)[:2_000] + program[at:]
    if kind == 6:
        return program[:at] + b"r" + chance.randbytes(4) + program[at:]
    if kind == 7:
        return program[:at] + program[chance.randrange(at + 1) :]
    return program[:at] + chance.randbytes(chance.randrange(1, 200)) + program[at:]


def use(snapshot):
    """All that can be asked of what was read."""
    for device in snapshot.devices:
        snapshot.over_time(device)
        snapshot.fragmentation(device)
        snapshot.allocation_sites(device=device)
        snapshot.timeline(device)
        str(snapshot.oom_report(device))


@pytest.mark.parametrize("start", range(0, 240, 40))
def test_mutated_snapshots_execute_nothing_and_hang_nowhere(tmp_path, monkeypatch, start):
    snapshot, witness = small_snapshot(), tmp_path / "witness"
    for seed in range(start, start + 40):
        monkeypatch.setattr(shapes, "OFTEN", 2 if seed % 2 else 10_000)
        chance = random.Random(seed)
        program = pickle.dumps(snapshot, protocol=chance.choice([2, 3, 4, 5]))
        began = time.perf_counter()
        with contextlib.suppress(ValueError):
            use(read(written(tmp_path, mutated(chance, program, witness))))
        assert time.perf_counter() - began < 2, f"seed {seed}"
        assert not witness.exists(), f"seed {seed}"


def one_bit_flipped(chance, program):
    """A wound that most often leaves a pickle, with other values."""
    wounded = bytearray(program)
    wounded[chance.randrange(len(wounded))] ^= 1 << chance.randrange(8)
    return bytes(wounded)


def test_a_damaged_file_says_the_same_in_one_match_and_opcode_by_opcode(tmp_path, monkeypatch):
    chance, raw = random.Random(3), random_snapshot(random.Random(4), count=40)
    program, understood = pickle.dumps(raw, protocol=4), 0
    monkeypatch.setattr(shapes, "OFTEN", 1)
    for _ in range(60):
        path = written(tmp_path, one_bit_flipped(chance, program))
        try:
            expected = read(read_plain(path)).contents
        except SnapshotError:
            with pytest.raises(SnapshotError):
                read(path)
            continue
        assert list(told_by_read(read(path).contents)) == list(told_by_read(expected))
        understood += 1
    assert understood > 10


LINES = [{"name": f"f{n}", "filename": f"x{n % 7}.py", "line": n} for n in range(300)]
TEXTS = ["", "N/A", "a", "step 17", "é" * 20, "long " * 40]


def random_entry(chance, lists):
    """As several versions of torch wrote it, in the order of keys that each has."""
    action = chance.choice(["alloc", "free_requested", "free_completed", "segment_map", "oom", "?"])
    address = "device_free" if action == "oom" else "addr"
    entry = {"action": action, address: chance.choice([0, 77, 2**47 - 512, 2**40, 300])}
    entry |= {"size": chance.choice([0, 255, 256, 65_536, 2**31, 2**40]), "stream": 0}
    if chance.random() < 0.9:
        entry["time_us"] = chance.choice([1_700_000_000_000_000, -5, 2**62]) + chance.randrange(9)
    if chance.random() < 0.7:
        entry["compile_context"] = "".join(chance.choice(TEXTS))
        entry["pool_id"] = (0, chance.randrange(300))
    if chance.random() < 0.6:
        text = str(chance.randrange(50))
        entry |= {"user_metadata": text, "category": chance.choice([text, "activation"])}
    elif chance.random() < 0.3:
        entry |= {"category": "gradient", "user_metadata": None}
    if chance.random() < 0.7:
        lists.append(chance.choices(LINES, k=chance.choice([0, 1, 2, 30])))
    entry["frames"] = chance.choice(lists[-3:])
    if chance.random() < 0.05:
        entry["forward_frames"] = chance.choice(lists)
    if chance.random() < 0.1:
        entry = dict(chance.sample(sorted(entry.items()), len(entry)))
    return entry


def random_snapshot(chance, count=400):
    lists = [[]]
    entries = [random_entry(chance, lists) for _ in range(count)]
    entries += chance.choices(entries, k=3)  # one entry in several places
    states = ["active_allocated", "inactive"]
    blocks = [
        {"address": 512 * n, "size": 512, "state": chance.choice(states), "frames": lists[n]}
        for n in range(len(lists) // 2)
    ]
    return {
        "segments": [{"device": 1, "address": 0, "total_size": 2**20, "blocks": blocks}],
        "device_traces": [entries, [], [random_entry(chance, lists) for _ in range(90)]],
        "external_annotations": [{"name": "step", "stage": "START", "device": 1, "time_us": 5}],
    }


def pickled(chance, data, monkeypatch):
    """By Python's own writer, with frames that begin after some hundred bytes."""
    size = int(2 ** chance.uniform(7, 14))
    monkeypatch.setattr(pickle._Framer, "_FRAME_SIZE_TARGET", size)
    file = io.BytesIO()
    pickle._Pickler(file, chance.choice([2, 3, 4, 5])).dump(data)
    return file.getvalue()


def as_frames(lines):
    return tuple(Frame(line["filename"], line["line"], line["name"]) for line in lines)


def told_by(raw):
    """Each entry's meaning, straight from its dictionary."""
    for device, entries in enumerate(raw["device_traces"]):
        for e in entries:
            action = e["action"] if e["action"] in ACTIONS else "other"
            free = e.get("device_free", 0) if action == "oom" else 0
            stack, forward = (as_frames(e.get(key, [])) for key in ("frames", "forward_frames"))
            stack += (FORWARD, *forward) if forward else ()
            text = e.get("user_metadata") or e.get("category") or ""
            numbers = (e.get("addr", 0), e["size"], free, e.get("time_us", 0))
            yield device, action, *numbers, stack, text, e.get("compile_context") or ""


def told_by_read(contents):
    stacks, texts = contents.stacks, contents.texts
    for device, history in contents.histories.items():
        columns = (column.tolist() for column in vars(history).values())
        for code, *numbers, stack, text, context in zip(*columns, strict=True):
            yield device, ACTIONS[code], *numbers, stacks[stack], texts[text], texts[context]


@pytest.mark.parametrize("seed", range(24))
def test_entries_in_one_match_are_those_opcode_by_opcode(tmp_path, monkeypatch, seed):
    chance = random.Random(seed)
    monkeypatch.setattr(shapes, "OFTEN", chance.choice([1, 2, 10]))
    raw = random_snapshot(chance)
    program = pickled(chance, raw, monkeypatch)
    assert read_plain(written(tmp_path, program)) == raw
    expected, found = read(raw).contents, read(written(tmp_path, program)).contents
    assert list(told_by_read(found)) == list(told_by(raw)) == list(told_by_read(expected))
    for name in ("segments", "stacks", "texts", "notes", "annotations", "settings"):
        assert getattr(found, name) == getattr(expected, name)


def entries_with_own_lists(count):
    """As torch makes them: a list and a text for each entry, lines that are shared."""
    chance = random.Random(1)
    stacks = [chance.choices(LINES, k=30) for _ in range(100)]
    return [
        {
            "action": "alloc",
            "addr": 512 * chance.randrange(1_000),
            "size": 512,
            "time_us": 2**50 + event,
            "user_metadata": "".join(["N/", "A"]),
            "frames": list(chance.choice(stacks)),
        }
        for event in range(count)
    ]


def most_memory(path):
    tracemalloc.start()
    try:
        snapshot = read(path)
        return tracemalloc.get_traced_memory()[1], snapshot
    finally:
        tracemalloc.stop()


def test_memory_is_a_few_times_that_of_the_columns(tmp_path):
    """Dictionaries and lists would take 25 times as much as the columns."""
    counts, peaks = (2_000, 22_000), []
    for count in counts:
        program = pickle.dumps({"device_traces": [entries_with_own_lists(count)]})
        peak, snapshot = most_memory(written(tmp_path, program))
        assert len(snapshot.history()) == count
        peaks.append(peak)
    columns = len(vars(snapshot.history())) * 8
    assert peaks[1] - peaks[0] < 6 * columns * (counts[1] - counts[0])


def test_a_list_that_several_entries_share_cannot_be_changed_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "OFTEN", 1)
    keys = b"\x8c\x06action\x94\x8c\x06frames\x94\x8c\x05alloc\x94]\x94"
    one = b"}\x94(h\x00h\x02h\x01]\x94h\x03au"
    changed = PROTO + b"(" + keys + one * 3 + b"h\x07h\x03a."
    with pytest.raises(SnapshotError, match="a list is expected"):
        read(written(tmp_path, changed))


def snapshot_program():
    return pickle.dumps(small_snapshot())


def zipped(folder, files):
    path = folder / "snapshot.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, program in files.items():
            archive.writestr(name, program)
    return path


def test_compressed_files_are_read(tmp_path):
    program = snapshot_program()
    expected = list(told_by_read(read(written(tmp_path, program)).contents))
    packed = written(tmp_path, gzip.compress(program))
    assert list(told_by_read(read(packed).contents)) == expected
    packed = zipped(tmp_path, {"run/snapshot.pickle": program})
    assert list(told_by_read(read(packed).contents)) == expected


def test_a_bomb_is_not_unpacked(tmp_path):
    bomb = bytes(50 * 2**20)
    for path in (zipped(tmp_path, {"a": bomb}), written(tmp_path, gzip.compress(bomb))):
        with pytest.raises(SnapshotError, match=r"more than 3,000,000; .*raise `largest`"):
            read(path, largest=3_000_000)


def test_compressed_files_that_are_damaged_are_refused(tmp_path):
    program = gzip.compress(snapshot_program())
    for damaged in (program[:-20], program[:100] + bytes(30) + program[130:], program[:3]):
        with pytest.raises(SnapshotError, match="cannot be unpacked"):
            read(written(tmp_path, damaged))
    path = zipped(tmp_path, {"a": snapshot_program()})
    with pytest.raises(SnapshotError, match="cannot be unpacked"):
        read(written(tmp_path, path.read_bytes()[:-40]))


def checkpoint(zipped=True):
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


STRANGE = {
    "torch.save": (checkpoint(), "a checkpoint that torch.save wrote"),
    "an old torch.save": (checkpoint(zipped=False), "a checkpoint that torch.save wrote"),
    "profiler": (json.dumps({"schemaVersion": 1, "traceEvents": []}).encode(), "torch.profiler"),
    "packed profiler": (gzip.compress(b'{"traceEvents": []}'), "torch.profiler"),
    "list": (b"[1, 2]", "seems to be JSON"),
    "page": (b"<!DOCTYPE html><html></html>", "for a browser"),
    "nothing": (b"", "it is empty"),
    "packed nothing": (gzip.compress(b""), "it is empty"),
    "text": (b"hello", "no pickle of protocol 2 to 5"),
    "old": (pickle.dumps({"segments": []}, protocol=0), "no pickle of protocol 2 to 5"),
    "packed twice": (gzip.compress(gzip.compress(b"x")), "compressed"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_other_files_are_recognised(tmp_path, name):
    program, message = STRANGE[name]
    with pytest.raises(SnapshotError, match=message):
        read(written(tmp_path, program))


def test_a_zip_of_several_files_is_refused(tmp_path):
    with pytest.raises(SnapshotError, match="a zip of 2 files"):
        read(zipped(tmp_path, {"a": snapshot_program(), "b": b""}))
