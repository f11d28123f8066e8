"""A stranger's file: read if it is plain data; if not, refused at once and nothing executed."""

import contextlib
import copyreg
import os
import pickle
import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from tfswa_lab.memory.snapshot import read
from tfswa_lab.memory.snapshot.emit import as_snapshot
from tfswa_lab.memory.snapshot.pickles import SnapshotError, read_plain
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


def test_files_that_are_absent_empty_or_too_large_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pickle"):
        read(tmp_path / "none.pickle")
    with pytest.raises(SnapshotError, match="0 bytes"):
        read(written(tmp_path, b""))
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
def test_mutated_snapshots_execute_nothing_and_hang_nowhere(tmp_path, start):
    snapshot, witness = small_snapshot(), tmp_path / "witness"
    for seed in range(start, start + 40):
        chance = random.Random(seed)
        program = pickle.dumps(snapshot, protocol=chance.choice([2, 3, 4, 5]))
        began = time.perf_counter()
        with contextlib.suppress(ValueError):
            use(read(written(tmp_path, mutated(chance, program, witness))))
        assert time.perf_counter() - began < 2, f"seed {seed}"
        assert not witness.exists(), f"seed {seed}"
