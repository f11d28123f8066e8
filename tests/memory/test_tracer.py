"""Traces: equal to torch's MemTracker, and right about who made what."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode
from torch.utils.checkpoint import checkpoint

from tfswa_lab.memory.trace import trace
from tfswa_lab.models.tf_locoformer import SIZES, TFLocoformer
from tfswa_lab.models.tfswa_unet import TFSWAUNet


class Net(nn.Module):
    """Two layers, so that sizes are easily counted: 64 rows of 256 and 32 numbers."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 256), nn.Linear(256, 32)

    def forward(self, x):
        return self.narrow(self.wide(x).relu())


def training(model, shape, out_shape, **optimizer):
    """A step, and what there is before it."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False, **optimizer)
    x, target = torch.randn(shape), torch.randn(out_shape)

    def step():
        loss = (model(x) - target).abs().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step, optimizer, (x, target)


MODELS = {
    "locoformer": lambda: TFLocoformer(4, 16, **SIZES["tiny"]),
    "locoformer, checkpointed": lambda: TFLocoformer(
        4, 16, **SIZES["tiny"], activation_checkpointing=True
    ),
    "unet": lambda: TFSWAUNet(4, 16, (8, 8, 8, 8), (1, 1, 1, 1), 2, 1),
}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_peaks_are_those_of_memtracker_to_the_byte(name, fake):
    def make():
        model = MODELS[name]()
        return model, *training(model, (1, 4, 16, 33), (1, 16, 16, 33))

    model, step, optimizer, inputs = make()
    peer = MemTracker()
    peer.track_external(model, optimizer, *inputs)
    with peer:
        step()
    snapshot = peer.get_tracker_snapshot("peak")
    expected = snapshot[torch.device("cpu")]["Total"]
    if fake:
        as_drawn = patch.object(nn.init, "_no_grad_trunc_normal_", lambda x, *_, **__: x)
        with FakeTensorMode(), as_drawn:  # torch draws until all numbers are inside
            model, step, optimizer, inputs = make()
            with trace(model, optimizer, inputs) as seen:
                step()
    else:
        with trace(model, optimizer, inputs) as seen:
            step()
    assert seen.peak().allocated == expected


@pytest.fixture
def seen():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(64, 32)
    optimizer = torch.optim.AdamW(net.parameters(), foreach=False)
    with trace(net, inputs=[x]) as seen:
        for _ in range(2):
            seen.step()
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen


def held(timeline, event):
    return timeline.held_by(event, lambda block: block.category)


def test_categories_are_what_they_should_be(seen):
    timeline = seen.timeline()
    parameters = 4 * (32 * 256 + 256 + 256 * 32 + 32)
    first_backward = next(block.born for block in timeline.blocks if block.phase == "backward")
    at_start = held(timeline, first_backward - 1)
    assert at_start["parameter"] == parameters
    assert at_start["input"] == 4 * 64 * 32
    # relu's output, the net's output, its square's mean; relu's input is let go.
    assert at_start["activation"] == 4 * (64 * 256 + 64 * 32 + 1)
    in_optimizer = next(block.born for block in timeline.blocks if block.phase == "optimizer")
    assert held(timeline, in_optimizer)["gradient"] == parameters
    end = held(timeline, timeline.events)
    assert end["optimizer state"] == 2 * parameters + 4 * 4  # and a counter per parameter
    assert end["gradient"] == end["activation"] == 0


def test_blocks_know_their_module_their_line_and_their_step(seen):
    timeline = seen.timeline()
    hidden = [b for b in timeline.blocks if b.shape == (64, 256) and b.category == "activation"]
    assert {block.module for block in hidden} == {"Net"}
    assert {block.step for block in hidden} == {0, 1}
    assert "self.narrow(self.wide(x).relu())" in line_of(hidden[0].frames[0])
    products = [b for b in timeline.blocks if b.module == "wide" and b.phase == "forward"]
    assert products
    assert all(block.shape == (64, 256) for block in products)
    of_relu = [b for b in timeline.blocks if b.op.startswith("aten.threshold_backward")]
    assert {block.module for block in of_relu} == {"Net"}  # the module of the forward operation
    assert of_relu[0].frames == hidden[0].frames
    gradients = [b for b in timeline.blocks if b.category == "gradient"]
    assert {block.module for block in gradients} == {"wide", "narrow"}


def line_of(frame):
    return Path(frame.filename).read_text().splitlines()[frame.line - 1]


def test_allocated_is_the_sum_of_what_is_alive_at_every_event(seen):
    timeline = seen.timeline()
    allocated = timeline.allocated()
    for event in range(0, timeline.events + 1, 7):
        assert allocated[event] == sum(block.rounded for block in timeline.alive(event))
    peak = timeline.peak()
    assert (peak.allocated, peak.event) == (max(allocated), allocated.index(max(allocated)))


def test_recomputed_activations_belong_to_their_module_and_phase():
    net, x = Net(), torch.randn(64, 32)
    with trace(net, inputs=[x]) as seen:
        checkpoint(net, x, use_reentrant=False).square().mean().backward()
    hidden = [b for b in seen.timeline().blocks if b.shape == (64, 256) and b.op]
    first = [block for block in hidden if block.phase == "forward"]
    again = [block for block in hidden if block.phase == "recompute"]
    assert first
    assert {block.category for block in first} == {"temporary"}
    assert "activation" in {block.category for block in again}
    assert {block.module for block in again} <= {"wide", "Net"}


def in_the_engines_thread(backward, engine):
    """Runs a backward pass as a GPU's runs: in a thread of its own, under the same trace."""
    mode = _get_current_dispatch_mode()

    def run():
        _push_mode(mode)
        try:
            backward()
        finally:
            _pop_mode()

    engine.submit(run).result()


def table(timeline):
    """Blocks and bytes by step, phase, category, module and, inside of modules, line."""
    held = Counter()
    for block in timeline.blocks:
        line = block.frames[0].line if block.module and block.frames else None
        held[block.step, block.phase, block.category, block.module, line, block.size] += 1
    return held


def plain(net, x):
    return net(x)


def checkpointed(net, x):
    return checkpoint(net, x, use_reentrant=False)


def checkpointed_anew(net, x):
    return checkpoint(net, x.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize("forward", [plain, checkpointed, checkpointed_anew])
def test_a_backward_pass_in_another_thread_gives_the_same_table(forward):
    def run(backward):
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), foreach=False)
        with trace(net, optimizer) as seen:
            for _ in range(3):
                seen.step()
                x = torch.randn(64, 32)
                backward(forward(net, x).square().mean().backward)
                optimizer.step()
                optimizer.zero_grad()
        return table(seen.timeline())

    with ThreadPoolExecutor(1) as engine:
        engine.submit(lambda: torch.zeros(1, requires_grad=True) + 1).result()  # not at 0
        there = run(lambda backward: in_the_engines_thread(backward, engine))
    assert there == run(lambda backward: backward())


@pytest.mark.gpu
@pytest.mark.parametrize("forward", [plain, checkpointed, checkpointed_anew])
def test_a_gpu_gives_the_cpus_table(forward):
    def run(device):
        net = Net().to(device)
        optimizer = torch.optim.SGD(net.parameters(), foreach=False)
        with trace(net, optimizer) as seen:
            for _ in range(3):
                seen.step()
                x = torch.randn(64, 32, device=device)
                forward(net, x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return table(seen.timeline(device))

    assert run("cuda:0") == run("cpu")


def test_a_view_is_no_memory_and_a_resized_storage_is_other_memory():
    with trace() as seen:
        x = torch.zeros(1000)
        views = [x[10:], x.view(10, 100), x.detach()]
        x.resize_(2000)
    sizes = [block.size for block in seen.timeline().blocks]
    assert sizes == [4000, 8000]
    assert seen.peak().allocated == 8000
    assert len(views) == 3


def test_what_is_made_unseen_is_an_input_when_it_is_used():
    array = torch.arange(10.0).numpy()
    with trace() as seen:
        torch.from_numpy(array).add(1)
    categories = [block.category for block in seen.timeline().blocks]
    assert categories[0] == "input"


def test_modules_and_optimizers_are_as_before_after_an_error():
    call = nn.Module.__call__
    with pytest.raises(RuntimeError, match="shapes"), trace():
        Net()(torch.zeros(3, 5))
    assert nn.Module.__call__ is call


def test_what_dies_after_the_region_is_alive_at_its_end():
    with trace() as seen:
        x = torch.zeros(1000)
    del x
    assert [block.died for block in seen.timeline().blocks] == [None]


def test_a_device_without_tensors_is_named():
    with trace() as seen:
        torch.zeros(3)
    with pytest.raises(ValueError, match="nothing was allocated on cuda:0; seen: cpu"):
        seen.timeline("cuda:0")


def test_the_peak_of_the_cpu_allocator_is_near():
    """Torch's profiler sees allocations inside operators, too."""
    model = TFLocoformer(4, 16, **SIZES["tiny"])
    step, optimizer, inputs = training(model, (1, 4, 32, 65), (1, 16, 32, 65))
    with trace(model, optimizer, inputs) as seen:
        step()
    there_before = sum(block.size for block in seen.timeline().alive(0))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    total = most = 0
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    before = sum(b.size for b in seen.timeline().blocks if b.op == "")
    assert there_before <= before
    assert seen.peak().allocated == pytest.approx(before + most, rel=0.035)
