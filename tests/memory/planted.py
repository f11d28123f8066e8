"""How a planted script is written down, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tfswa_lab.memory.leaks.verdicts import Diagnosis

HEALTHY = "healthy"
WARM_UP = "warm-up only"
PEAK = "activation peak"
GRAPH = "leak of graph"
TENSORS = "leak of tensors"
CYCLE = "reference cycle"
CACHE = "bounded cache"
DUPLICATED = "duplicated state"
FRAMES = "frame/exception retention"
HOOKS = "hook accumulation"
HOST = "host memory"


class Planted(NamedTuple):
    """A script: `make()` gives a step, or a step and arguments of `diagnose`."""

    name: str
    make: Callable
    verdicts: tuple[str, ...]  # the right one, and others that are as right
    words: tuple[str, ...]  # that the cause has to say

    def prepare(self) -> tuple[Callable, dict]:
        """A fresh step and arguments of `diagnose`."""
        torch.manual_seed(0)
        made = self.make()
        return made if isinstance(made, tuple) else (made, {})

    def is_named_in(self, diagnosis: Diagnosis) -> bool:
        said = f"{diagnosis.verdict} {diagnosis.cause}".lower()
        return all(word.lower() in said for word in self.words)


def planter(corpus: list[Planted]) -> Callable:
    """A decorator that adds scripts to a corpus."""

    def planted(*verdicts: str, words: tuple[str, ...] = ()) -> Callable:
        def add(make: Callable) -> Callable:
            corpus.append(Planted(make.__name__, make, verdicts, words))
            return make

        return add

    return planted


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def batch(rows: int = 8) -> Tensor:
    return torch.randn(rows, 32)


class Training:
    """A sound training step around a model, to plant something into."""

    def __init__(self, model: nn.Module | None = None, optimizer: Callable = torch.optim.SGD):
        self.model = model or network()
        self.optimizer = optimizer(self.model.parameters(), lr=1e-3)

    def loss(self, rows: int = 8) -> Tensor:
        return self.model(batch(rows)).square().mean()

    def update(self, loss: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def __call__(self) -> None:
        self.update(self.loss())
