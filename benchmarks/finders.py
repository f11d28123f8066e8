"""Which batch size do finders find, how many tries does it take, and what do they leave changed?

    python benchmarks/finders.py [--peers FOLDER]

`pip install --no-deps --target FOLDER pytorch-lightning accelerate toma` makes the folder of the
peers; one that is missing is named, and has no rows.

Each finder searches for the same trainings, one after the other in one process. A pretend GPU
counts their bytes and raises torch's error beyond its size, so the true maximum is known: the
largest size of which ten steps and a validation run, found by trying all of them. The network has
batch norm and dropout, a frozen layer and a layer in evaluation mode.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from record import record, table
from torch import nn

from tfswa_lab.performance.batch_size import find_batch_size

BY_HAND = True  # without the peers' packages it would write a result without peers
START = 512  # where finders begin that only go down
STEPS = 3  # of a try, for finders that leave it to the user; ours and Lightning's take as many
LATER = 200  # steps at the answer


# The trainings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A training on a pretend GPU: bytes of the GPU, of what does not grow, and of each item."""

    name: str
    gpu: int
    fixed: int = 1000
    item: int = 64
    adam: int = 0  # its state, from the second step on
    longer: int = 0  # bytes that each item of every third batch takes more
    validation: int = 0  # bytes of each item
    before: int = 0  # steps before the search
    items: int = 10_000  # in the data


CASES = (
    Case("37 fit", 1000 + 37 * 64),
    Case("Adam's state", 1000 + 4000 + 50 * 100, item=100, adam=4000),
    Case("in mid-training", 1000 + 4000 + 105 * 90, item=90, adam=4000, before=5),
    Case("every third batch is longer", 1000 + 83 * 90, item=64, longer=26),
    Case("validation needs more", 1000 + 41 * 250, item=100, validation=250),
    Case("data of 24 items", 10**9, items=24),
    Case("not even one fits", 10),
)


class Training:
    """The training of a case."""

    def __init__(self, case: Case):
        self.case, self.used, self.batches, self.ooms = case, 0, 0, 0
        self.sizes = []  # of the steps
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)),
            *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)),
        )
        self.net[4].eval()
        self.net[3].requires_grad_(False)
        learnt = [weight for weight in self.net.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(learnt, 0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        for _ in range(case.before):
            self.step(1)

    @contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """Take so many bytes of the pretend GPU."""
        free = self.case.gpu - self.used
        if number > free:
            self.ooms += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {number} bytes. GPU 0 has a total capacity "
                f"of {self.case.gpu} bytes of which {free} bytes is free."
            )
        self.used += number
        try:
            yield
        finally:
            self.used -= number

    def loss(self, n: int) -> torch.Tensor:
        """The loss of a batch; draws from all generators."""
        self.batches += 1
        self.sizes.append(n)
        case = self.case
        item = case.item + case.longer * (self.batches % 3 == 0)
        with self.holding(case.fixed + n * item + case.adam * bool(self.optimizer.state)):
            noise = random.random() + np.random.rand()  # noqa: NPY002 (programs do)
            return self.net(torch.randn(2, 4) + noise).square().mean()

    def step(self, n: int) -> None:
        """A training step, as a user writes it."""
        for part in (self.net[0], self.net[1], self.net[2]):
            part.train()
        self.optimizer.zero_grad()
        self.loss(n).backward()
        self.optimizer.step()
        self.scheduler.step()

    def validate(self, n: int) -> None:
        """The validation of a batch; leaves the network in evaluation mode, as many do."""
        self.net.eval()
        with self.holding(self.case.fixed + n * self.case.validation):
            pass

    def state(self) -> dict[str, str]:
        """All that a finder should leave alone, by kind, as texts that differ where a bit does."""
        torch.set_printoptions(precision=20, threshold=10**6)
        weights = list(self.net.parameters())
        generators = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
        kinds = {
            "weights": weights,
            "batch norm": list(self.net.buffers()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "gradients": [weight.grad for weight in weights],
            "modes": [part.training for part in self.net.modules()],
            "requires_grad": [weight.requires_grad for weight in weights],
            "generators": [str(generators[0]), generators[1][1].tolist(), generators[2].tolist()],
        }
        return {kind: repr(value) for kind, value in kinds.items()}


def true_maximum(case: Case) -> int:
    """The largest size of which ten steps and a validation run, tried one by one."""
    for n in range(1, case.items + 1):
        if not runs(Training(case), n, 10):
            return n - 1
    return case.items


def runs(training: Training, n: int, steps: int) -> bool:
    """Whether so many steps of that size run, and a validation after them."""
    try:
        for _ in range(steps):
            training.step(n)
        training.validate(n)
    except torch.OutOfMemoryError:
        return False
    return True


# The finders -------------------------------------------------------------------------------------


def ours(training: Training) -> int:
    """`find_batch_size`."""
    state = (training.net, training.optimizer, training.scheduler)
    found = find_batch_size(
        training.step, state=state, validate=training.validate, maximum=training.case.items
    )
    return found.value


def trial(training: Training, n: int) -> int:
    """What those who leave the trial to the user are given."""
    for _ in range(STEPS):
        training.step(n)
    training.validate(n)
    return n


def accelerates(training: Training) -> int:
    """accelerate's decorator, from the smaller of 512 and the data."""
    from accelerate.utils import find_executable_batch_size

    start = min(START, training.case.items)
    return find_executable_batch_size(lambda batch_size: trial(training, batch_size), start)()


def tomas(training: Training) -> int:
    """toma's plain function, from the smaller of 512 and the data."""
    from toma import simple

    start = min(START, training.case.items)
    return simple.batch(lambda n: trial(training, n), start)


def powers_of_two(training: Training) -> int:
    """The loop of many guides: double, one step each, until the error; stop at the data's end."""
    best, n = 0, 1
    while n <= training.case.items:
        try:
            training.step(n)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            torch.cuda.empty_cache()
            break
        best, n = n, 2 * n
    return best


def lightnings(mode: str) -> Callable[[Training], int]:
    """Lightning's `BatchSizeFinder`, by its `Tuner`, in one of its modes."""
    return lambda training: _lightning(training, mode)


def _lightning(training: Training, mode: str) -> int:
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.tuner import Tuner

    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.batch_size = training.net, 2

        def training_step(self, batch, _index):
            return training.loss(len(batch))

        def validation_step(self, batch, _index):
            with training.holding(training.case.fixed + len(batch) * training.case.validation):
                pass

        def configure_optimizers(self):
            return [training.optimizer], [training.scheduler]

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.zeros(training.case.items), self.batch_size)

        val_dataloader = train_dataloader

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", default_root_dir=folder, max_steps=1000, **dict.fromkeys(off, False)
        )
        return Tuner(trainer).scale_batch_size(Module(), mode=mode)


FINDERS = {
    "ours": (ours, None),
    "Lightning, binsearch": (lightnings("binsearch"), "pytorch_lightning"),
    "Lightning, power": (lightnings("power"), "pytorch_lightning"),
    "accelerate": (accelerates, "accelerate"),
    "toma": (tomas, "toma"),
    "powers of two": (powers_of_two, None),
}


# The table ---------------------------------------------------------------------------------------


def measure(case: Case, name: str, maximum: int) -> dict:
    """One search: the answer, what it took, what it changed, and whether the answer holds."""
    training = Training(case)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = training.state()
    training.sizes.clear()
    began = time.perf_counter()
    try:
        answer, error = FINDERS[name][0](training), None
    except (RuntimeError, ValueError) as failure:
        answer, error = None, f"{type(failure).__name__}: {failure}"
    seconds = time.perf_counter() - began
    tried, steps, ooms = len(set(training.sizes)), len(training.sizes), training.ooms
    after = training.state()
    return {
        "case": case.name,
        "finder": name,
        "answer": answer,
        "true_maximum": maximum,
        "sizes": tried,
        "steps": steps,
        "ooms": ooms,
        "seconds": round(seconds, 3),
        "changed": [kind for kind in before if before[kind] != after[kind]],
        "holds": bool(answer) and runs(training, answer, LATER),
        "error": error,
    }


def shown(row: dict) -> list:
    """A row of the table."""
    answer = row["error"][:60] if row["answer"] is None else row["answer"]
    later = "" if not row["answer"] else "run" if row["holds"] else "run out of memory"
    changed = ", ".join(row["changed"]) or "nothing"
    tries = f"{row['sizes']} / {row['steps']}"
    name, maximum, seconds = row["finder"], row["true_maximum"], f"{row['seconds']:.2f}"
    return [row["case"], name, maximum, answer, tries, seconds, later, changed]


def main() -> None:
    """Run all finders on all cases, print the table and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", help="folder with the peers' packages")
    asked = parser.parse_args()
    if asked.peers:
        sys.path.append(str(Path(asked.peers).resolve()))
    warnings.filterwarnings("ignore")
    packages = {package for _, package in FINDERS.values() if package}
    missing = sorted(package for package in packages if not find_spec(package))
    rows = []
    for case in CASES:
        maximum = true_maximum(case)
        names = [name for name, (_, package) in FINDERS.items() if package not in missing]
        rows += [measure(case, name, maximum) for name in names]
    columns = ["case", "finder", "true maximum", "answer", "sizes / steps", "s", "200 more steps"]
    print(table([*columns, "changed afterwards"], map(shown, rows)))
    print("not installed:", ", ".join(missing) or "none")
    versions = {package: version(package.replace("_", "-")) for package in packages - {*missing}}
    record("finders", "cpu", {"rows": rows, "missing": missing, "versions": versions})


if __name__ == "__main__":
    main()
