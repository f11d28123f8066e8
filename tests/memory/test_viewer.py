"""The page of a snapshot: its numbers against every block of the trace, and its safety."""

import base64
import hashlib
import json
import random
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from tfswa_lab.memory.sizes import rounded
from tfswa_lab.memory.snapshot import read, viewer
from tfswa_lab.memory.snapshot.emit import as_snapshot
from tfswa_lab.memory.snapshot.groups import site_of
from tfswa_lab.memory.snapshot.schema import Annotation
from tfswa_lab.memory.trace.stacks import Frame
from tfswa_lab.memory.trace.timeline import Block, Timeline

MIB = 2**20
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!--\ud800한"


def stack(site, caller):
    return (Frame("model.py", site, "forward"), Frame("train.py", caller, "step"))


def random_trace(seed=0, count=400, sites=30, largest=MIB):
    """Up to 1 MiB a block gets what it asks for, rounded up: sizes are known to the byte."""
    chance, blocks, live = random.Random(seed), [], []
    for event in range(1, count + 1):
        if live and chance.random() < 0.47:
            live.pop(chance.randrange(len(live))).died = event
        else:
            size = chance.randrange(1, largest)
            frames = stack(chance.randrange(sites), chance.randrange(9))
            blocks.append(Block(size, rounded(size), event, frames=frames))
            live.append(blocks[-1])
    return Timeline(blocks, count, steps=[0, count // 2])


def shown(snapshot):
    """The data of a snapshot with one device."""
    return viewer.views({"one": snapshot})[0][0]


def rows(view):
    """Bytes and blocks by line, at each sample."""
    sites = [*view["sites"], view["others"] | {"line": "others"}]
    return {
        site["line"]: (np.cumsum(site["bytes"]) * view["unit"], np.cumsum(site["blocks"]))
        for site in sites
    }


def expected(snapshot, event):
    """Bytes and blocks by line right after an event: every allocation is looked at."""
    found = snapshot.allocations()
    size, blocks = Counter(), Counter()
    columns = (found.born, found.died, found.size, found.stack)
    for born, died, held, number in zip(*(c.tolist() for c in columns), strict=True):
        if born <= event < died:
            line = site_of(snapshot.contents.stacks[number])
            size[line] += held
            blocks[line] += 1
    return size, blocks


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(viewer, "SAMPLES", 60)
    monkeypatch.setattr(viewer, "SITES", 7)
    monkeypatch.setattr(viewer, "STACKS", 3)


def test_every_row_is_exact_at_every_sample(small_limits):
    snapshot = read(as_snapshot(random_trace()))
    view = shown(snapshot)
    table = rows(view)
    assert len(view["sites"]) == 7
    assert view["others"]["sites"] == 30 - 7
    for k, event in enumerate(view["samples"]["event"]):
        size, blocks = expected(snapshot, event)
        for line, (held, count) in table.items():
            if line != "others":
                assert (held[k], count[k]) == (size.pop(line, 0), blocks.pop(line, 0))
        assert (table["others"][0][k], table["others"][1][k]) == (size.total(), blocks.total())


@pytest.mark.parametrize("seed", range(3))
def test_rows_add_up_to_what_is_allocated(small_limits, seed):
    view = shown(read(as_snapshot(random_trace(seed, largest=30 * MIB))))
    total = sum(held for held, _ in rows(view).values())
    assert total.tolist() == view["samples"]["allocated"]


def test_the_sites_shown_are_those_that_held_the_most(small_limits):
    snapshot = read(as_snapshot(random_trace(seed=2)))
    view = shown(snapshot)
    highest = Counter()
    for event in view["samples"]["event"]:
        highest |= expected(snapshot, event)[0]
    assert [site["line"] for site in view["sites"]] == [line for line, _ in highest.most_common(7)]
    for site in view["sites"]:
        held = np.cumsum(site["bytes"]) * view["unit"]
        assert held[site["peak"]] == held.max() == highest[site["line"]]


def test_stacks_are_those_that_hold_the_most_at_the_peak_of_their_site(small_limits):
    timeline = random_trace(seed=3, sites=3)
    snapshot = read(as_snapshot(timeline))
    view = shown(snapshot)
    times = snapshot.history().time_us
    for site in view["sites"]:
        event = times[view["samples"]["event"][site["peak"]] - 1]
        size, count = Counter(), Counter()
        for block in timeline.alive(event):
            if site_of(block.frames) == site["line"]:
                size[block.frames] += block.rounded
                count[block.frames] += 1
        found = [
            ([view["frames"][number] for number in one["frames"]], one["bytes"], one["blocks"])
            for one in site["stacks"]
        ]
        largest = size.most_common(3)
        assert found == [([str(f) for f in frames], n, count[frames]) for frames, n in largest]


def test_no_peak_is_lost_by_sampling(small_limits):
    snapshot = read(as_snapshot(random_trace(seed=4, count=2_000)))
    curves, samples = snapshot.over_time(), shown(snapshot)["samples"]
    events = np.array(samples["event"])
    assert len(events) <= 60
    assert (np.diff(events) > 0).all()
    assert {0, curves.allocated.argmax(), curves.reserved.argmax(), events[-1]} <= set(events)
    assert events[-1] == len(snapshot.history())
    for name in ("allocated", "active", "reserved"):
        assert samples[name] == getattr(curves, name)[events].tolist()
    # Between two neighbours, nothing is higher than the higher of the stretches around them.
    stretch = -(-len(curves.allocated) // (60 - 4))
    for middle in range(len(curves.allocated)):
        near = events[np.abs(events - middle) < stretch]
        assert curves.allocated[middle] <= curves.allocated[near].max()


def test_failures_are_samples_and_explained(small_limits):
    raw = as_snapshot(random_trace(seed=5, largest=30 * MIB), limit=100 * MIB)
    trace = raw["device_traces"][0]
    trace[:0] = [trace[-1]] * 100
    trace[500:500] = [trace[-1]] * 30
    snapshot = read(raw)
    view = shown(snapshot)
    failures = np.flatnonzero(snapshot.history().where("oom")) + 1
    assert [view["samples"]["event"][k] for k in view["ooms"]] == failures[-20:].tolist()
    assert view["oom"] == str(snapshot.oom_report())


def test_the_facts():
    snapshot = read(as_snapshot(random_trace()))
    view = shown(snapshot)
    curves = snapshot.over_time()
    peak, facts = curves.allocated.argmax(), view["facts"]
    assert view["samples"]["event"][view["peak"]] == peak
    assert facts["peak allocated"] == f"{curves.allocated[peak] / MIB:.2f} MiB (entry {peak})"
    assert facts["at the end"] == str(snapshot.fragmentation())
    assert facts["drawn"] == f"all {len(snapshot.history())} entries"
    assert (facts["notes"], view["oom"]) == ("", "")


def test_sampling_is_admitted(small_limits):
    snapshot = read(as_snapshot(random_trace()))
    view = shown(snapshot)
    count = len(view["samples"]["event"])
    assert f"{count} of {len(snapshot.history())} entries; peaks" in view["facts"]["drawn"]


def test_annotations_are_marks_on_the_axis(monkeypatch):
    monkeypatch.setattr(viewer, "MARKS", 4)
    snapshot = read(as_snapshot(random_trace()))
    times = snapshot.history().time_us
    start = int(times[0])
    moments = dict(zip("abcdef", range(start + 1, start + 60, 10), strict=True))
    moments |= {"before": start - 9, "last before": start - 5}
    snapshot.contents.annotations = [
        Annotation(name, "END" if name == "b" else "START", 0, time)
        for name, time in reversed(moments.items())
    ]
    snapshot.contents.annotations += [Annotation("elsewhere", "START", 1, start + 15)] * 9
    marks = shown(snapshot)["marks"]
    assert [mark["name"] for mark in marks] == ["last before", "b (end)", "d", "f"]
    assert [mark["time_us"] for mark in marks] == [0, 11, 31, 51]
    assert marks[0]["event"] == 0
    for mark in marks[1:]:
        assert mark["event"] == sum(times <= start + mark["time_us"])


def test_steps_of_a_trace_are_marks():
    timeline = random_trace()
    snapshot = read(as_snapshot(timeline))
    marks = shown(snapshot)["marks"]
    assert [mark["name"] for mark in marks] == ["step 0", "step 1"]
    times = snapshot.history().time_us
    born = [times[mark["event"]] for mark in marks]  # the first entry of each step
    assert born == [began + 1 for began in timeline.steps]


def test_a_comparison_shows_the_same_sites_on_both_sides(small_limits):
    first, second = (read(as_snapshot(random_trace(6, sites=n))) for n in (20, 4))
    (pair,) = viewer.views({"before": first, "after": second})
    assert [view["name"] for view in pair] == ["before", "after"]
    lines = [[site["line"] for site in view["sites"]] for view in pair]
    assert lines[0] == lines[1]
    highest = Counter()
    for snapshot, view in zip((first, second), pair, strict=True):
        for event in view["samples"]["event"]:
            highest |= expected(snapshot, event)[0]
    assert lines[0] == [line for line, _ in highest.most_common(7)]
    for snapshot, view in zip((first, second), pair, strict=True):
        size, _ = expected(snapshot, len(snapshot.history()))
        for line, (held, _) in rows(view).items():
            assert line == "others" or held[-1] == size[line]


def on_device(raw, device):
    for segment in raw["segments"]:
        segment["device"] = device
    return raw | {"device_traces": [[]] * device + raw["device_traces"]}


def test_devices_are_chosen_or_kept_apart():
    first, second = (as_snapshot(random_trace(seed)) for seed in (8, 9))
    both = read(
        {
            "segments": first["segments"] + on_device(second, 2)["segments"],
            "device_traces": [first["device_traces"][0], [], second["device_traces"][0]],
        }
    )
    one, other = read(first), read(second)
    groups = viewer.views({"both": both, "one": one})
    assert [[view["name"] for view in group] for group in groups] == [["both", "one"], ["both"]]
    assert groups[0][0]["samples"] == groups[0][1]["samples"] == shown(one)["samples"]
    assert groups[1][0]["facts"]["device"] == "2"
    assert viewer.views({"both": both}, device=2) == [groups[1]]
    with pytest.raises(ValueError, match=r"device=1; the snapshots have \[0, 2\]"):
        viewer.views({"both": both}, device=1)
    # Two processes, each with a GPU of its own.
    ranks = {"one": one, "other": read(on_device(second, 2))}
    (pair,) = viewer.views(ranks)
    assert [view["facts"]["device"] for view in pair] == ["0", "2"]
    assert pair[1]["samples"] == shown(other)["samples"]
    assert [[view["name"] for view in group] for group in viewer.views(ranks, device=2)] == [
        ["other"]
    ]
    with pytest.raises(ValueError, match="no snapshot to show"):
        viewer.views({})


def test_a_snapshot_without_history_has_one_moment():
    raw = as_snapshot(random_trace())
    snapshot = read(raw["segments"])
    view = shown(snapshot)
    assert view["samples"]["event"] == [0]
    assert view["samples"]["allocated"] == [snapshot.fragmentation().allocated]
    assert view["samples"]["reserved"] == [snapshot.fragmentation().reserved]
    assert "no history" in view["facts"]["drawn"]
    size, _ = expected(snapshot, 0)
    assert {line: held[0] for line, (held, _) in rows(view).items() if held[0]} == size


def test_nothing_is_nothing():
    view = shown(read({"segments": [], "device_traces": [[]]}))
    assert (view["sites"], view["frames"], view["samples"]["allocated"]) == ([], [], [0])
    assert view["facts"]["at the end"] == ""


def test_times_of_threads_that_are_out_of_order_do_not_go_back():
    raw = as_snapshot(random_trace())
    start = 1_700_000_000_000_000
    for k, entry in enumerate(raw["device_traces"][0]):
        entry["time_us"] = start + 10 * k - 15 * (k % 2)
    times = shown(read(raw))["samples"]["time_us"]
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    assert times[-1] >= 10 * len(raw["device_traces"][0]) - 25


def test_long_names_and_deep_stacks_are_cut():
    deep = tuple(Frame("x" * 10_000 + str(k), k, "f") for k in range(150))
    raw = as_snapshot(Timeline([Block(512, 512, 1, frames=deep)], 1))
    (site,) = (view := shown(read(raw)))["sites"]
    assert len(site["line"]) == 301
    assert len(site["stacks"][0]["frames"]) == 101
    assert view["frames"][-1] == "… 50 more lines"
    assert max(map(len, view["frames"])) == 301


class Page(HTMLParser):
    """The elements of a page, and the text in its scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.attributes = Counter(), {}, []
        self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs).get("type"))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        self.texts[self._inside] = self.texts.get(self._inside, "") + data


def hostile():
    frames = (Frame(HOSTILE, 1, HOSTILE), Frame(HOSTILE, 2, HOSTILE))
    raw = as_snapshot(Timeline([Block(512, 512, 1, frames=frames)], 1))
    snapshot = read(raw)
    snapshot.contents.annotations = [Annotation(HOSTILE, HOSTILE, 0, 1)]
    return snapshot


def test_nothing_of_a_snapshot_becomes_markup(tmp_path):
    harmless = read(as_snapshot(random_trace()))
    pages = []
    for name, snapshot in (("a", harmless), (HOSTILE, hostile())):
        path = viewer.write_html(tmp_path / "page.html", {name: snapshot})
        pages.append(path.read_text(encoding="utf-8"))
    harmless, page = map(Page, pages)
    assert page.tags == harmless.tags
    data = json.loads(page.texts["script", "application/json"])
    readable = HOSTILE.replace("\ud800", "?")
    assert data[0][0]["name"] == readable
    shown = "".join(each if each.isprintable() else "�" for each in HOSTILE)
    assert data[0][0]["frames"][0] == f"{shown}:1 ({shown})"
    assert not set("<>&\u2028") & set(page.texts["script", "application/json"])


def test_the_page_allows_its_own_script_and_style_only(tmp_path):
    text = viewer.write_html(tmp_path / "page.html", {"a": hostile()}).read_text(encoding="utf-8")
    page = Page(text)
    policy = next(a["content"] for _, a in page.attributes if "http-equiv" in a)
    for tag in ("script", "style"):
        digest = hashlib.sha256(page.texts[tag, None].encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    # Nothing is loaded, no attribute is code, and the script makes no markup from text.
    assert not {"src", "href", "style"} & {name for _, each in page.attributes for name in each}
    assert not any(name.startswith("on") for _, each in page.attributes for name in each)
    makers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|fetch\("
    assert not re.search(makers, page.texts["script", None])


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "page.html"
    snapshot = read(as_snapshot(random_trace()))
    assert viewer.write_html(path, {"a": snapshot}) == path
    before = path.read_bytes()
    monkeypatch.setattr(viewer, "page", lambda data: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        viewer.write_html(path, {"a": snapshot})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_page_stays_small_however_long_the_history(tmp_path):
    """Three million entries give 1.3 MiB; here are enough entries to fill every sample."""
    snapshot = read(as_snapshot(random_trace(count=12_000, sites=300)))
    path = viewer.write_html(tmp_path / "page.html", {"a": snapshot})
    view = json.loads(Page(path.read_text()).texts["script", "application/json"])[0][0]
    assert len(view["samples"]["event"]) <= viewer.SAMPLES
    assert len(view["sites"]) == viewer.SITES
    assert path.stat().st_size < 3 * MIB
