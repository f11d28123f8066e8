"""Two processes that search together: gloo_batch_size.py OUTPUT RANK, twice."""

import json
import sys
from pathlib import Path

import torch
from pretend_gpu import PretendGpu
from torch import distributed, nn

from tfswa_lab.performance.batch_size import find_batch_size


def answers(rank):
    """What this process is told: refused, answered, and when only rank 1 fails."""
    gpu, net = PretendGpu(1000 * (1 + rank)), nn.Linear(1, 1)

    def step(n, each=10):
        with gpu.holding(n * each):
            return 1 / (each - 5)

    told = {}
    for name, search in {
        "alone": lambda: find_batch_size(step, state=net),
        "together": lambda: find_batch_size(step, state=net, all_ranks=True),
        "error": lambda: find_batch_size(
            lambda n: step(n, 5 if rank else 10), state=net, all_ranks=True
        ),
        "nothing": lambda: find_batch_size(
            lambda n: step(n, 9000 if rank else 10), state=net, all_ranks=True
        ),
        "number": lambda: find_batch_size(step, state=net, all_ranks=True, minimum=1 - rank),
    }.items():
        try:
            found = search()
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            told[name] = f"{type(error).__name__}: {error}"
        else:
            told[name] = [found.largest, found.value, found.stopped_by]
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    meeting = (folder / "meeting").as_uri()
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(answers(rank)))
    distributed.destroy_process_group()
