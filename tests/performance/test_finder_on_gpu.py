"""The finder on a real GPU, against every size tried by hand."""

import gc

import pytest
import torch
from torch import nn

from tfswa_lab.memory import gauges
from tfswa_lab.memory.out_of_memory import attempt
from tfswa_lab.performance import find_batch_size

pytestmark = pytest.mark.gpu
LIMIT = 2**30


@pytest.fixture
def small_gpu():
    """A GPU of 1 GiB."""
    gc.collect()
    torch.cuda.empty_cache()
    share = (LIMIT + gauges.reserved()) / gauges.device_memory().total
    torch.cuda.set_per_process_memory_fraction(share)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_largest_batch_is_that_of_brute_force_and_holds(small_gpu):
    network = nn.Sequential(nn.Linear(4096, 1024), nn.GELU(), nn.Linear(1024, 4096)).cuda()
    optimizer = torch.optim.AdamW(network.parameters())

    def step(size):
        optimizer.zero_grad()
        network(torch.ones(size, 1024, 4096, device="cuda")).square().mean().backward()
        optimizer.step()

    def fits(size):
        return attempt(lambda: [step(size) for _ in range(3)])[1] is None

    found = find_batch_size(step, state=(network, optimizer))
    assert found.stopped_by == "memory"
    assert found.largest == next(size for size in range(1, 1000) if not fits(size)) - 1
    for _ in range(200):
        step(found.value)
