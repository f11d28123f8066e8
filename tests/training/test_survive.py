"""A run that runs out of memory again and again ends as one that never did."""

import gc
import json
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.utils.data import default_collate
from toy_run import ToyLoss, ToySongs, toy_separator, toy_trainer, weights

from tfswa_lab.data.augment import Chain, Gain, Remix, SpectrogramMasking
from tfswa_lab.performance.oom import part_size, train_step
from tfswa_lab.training.config import TrainingConfig
from tfswa_lab.training.learner import Learner, NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")


@pytest.fixture(scope="module")
def frozen():
    """Old objects are frozen: each failure collects garbage, which need not search them."""
    trainer(max_epochs=1).fit()  # imports a lot
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Failing(ToyLoss):
    """Runs out of memory once in most steps, in the forward or in the backward pass of any part."""

    def __init__(self):
        super().__init__()
        self.chance, self.learner, self.failed_in = random.Random(0), None, []

    def forward(self, estimates, targets):
        step, backward = self.learner.steps, self.chance.random() < 0.5
        fails = (
            torch.is_grad_enabled() and step not in self.failed_in and self.chance.random() < 0.5
        )
        if fails:
            self.failed_in.append(step)
            if not backward:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            estimates.register_hook(self.fail)
        return super().forward(estimates, targets)

    def fail(self, _gradient):
        raise RuntimeError("CUDA error: out of memory")


def trainer(loss=None, survives=True, **changes):
    usual = {
        "augment": Chain([Remix(), Gain((0.5, 2))]),
        "masking": SpectrogramMasking(max_bins=8, max_frames=20),
        "max_epochs": 4,
    }
    made = toy_trainer(loss=loss, **{**usual, **changes})
    made.learner.train_step = train_step if survives else None
    return made


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (5, 2), (3, 3)])
def test_a_run_of_failures_ends_like_one_without(batch_size, accumulate):
    """Where a batch has 5 or 3 items, parts of 2 hold items of two batches."""
    sizes = {"batch_size": batch_size, "accumulate": accumulate, "gradient_clip_val": 0.1}
    smooth, rough = trainer(survives=False, **sizes), trainer(Failing(), **sizes)
    rough.learner.loss.learner = rough.learner
    before = weights(smooth)
    for run in (smooth, rough):
        run.fit()
    assert len(rough.learner.loss.failed_in) >= smooth.step / 2
    assert part_size(rough.learner.optimizer) == 1
    assert rough.step == smooth.step
    after = weights(smooth)
    assert max((after[name] - before[name]).abs().max() for name in before) > 0.01
    for name, tensor in weights(rough).items():
        torch.testing.assert_close(tensor, after[name], atol=1e-6, rtol=0)
    for curve, (steps, values) in smooth.history.items():
        if curve.startswith("train/"):
            assert rough.history[curve][0] == steps
            assert rough.history[curve][1] == pytest.approx(values, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_without_failures_it_is_the_same_run_to_the_bit(precision):
    settings = {"accumulate": 2, "dropout": 0.3, "norm": "batch", "precision": precision}
    plain, other = (trainer(survives=survives, **settings) for survives in (False, True))
    torch.manual_seed(1)
    plain.fit()
    torch.manual_seed(1)
    other.fit()
    for name, tensor in weights(other).items():
        assert torch.equal(tensor, weights(plain)[name]), name
    assert part_size(other.learner.optimizer) is None


def test_a_run_may_be_resumed_with_it_or_without(tmp_path):
    ends = []
    for survives in (False, True):
        folder = tmp_path / str(survives)
        trainer(survives=not survives, output_dir=folder, max_epochs=1).fit()
        resumed = trainer(survives=survives, output_dir=folder, max_epochs=2)
        resumed.fit(folder)
        ends.append(weights(resumed))
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


class Poison(ToyLoss):
    """NaN where song 3 is."""

    def forward(self, estimates, targets):
        total, terms = super().forward(estimates, targets)
        return total * (torch.nan if targets.abs().max() > 50 else 1), terms


def test_a_loss_that_is_not_finite_names_the_batch_of_the_item(tmp_path):
    run = trainer(Poison(), output_dir=tmp_path, augment=None, masking=None, accumulate=2)
    songs = ToySongs()
    good, bad = (default_collate([songs[k] for k in range(first, first + 4)]) for first in (4, 0))
    bad["stems"][3] *= 1000
    with pytest.raises(NonFiniteError, match=r"loss is nan in step 1.*song 3 at 0\.30 s") as error:
        run.learner.step([good, bad])
    assert "song 4" not in str(error.value)
    (file,) = tmp_path.glob("non_finite_batch*")
    with safe_open(file, "pt") as saved:
        assert json.loads(saved.metadata()["track"]) == bad["track"]


def test_where_one_item_is_too_much_the_error_comes_out_and_nothing_has_moved(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    run = trainer()
    before = weights(run)
    monkeypatch.setattr(run.learner.loss, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        run.fit()
    assert "[4, 2, 1]" in raised.value.__notes__[0]
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, before[name])


def test_several_processes_are_refused_before_they_begin(monkeypatch):
    group = SimpleNamespace(world_size=2)
    monkeypatch.setattr("tfswa_lab.training.learner.launch", lambda *_: group)
    with pytest.raises(ValueError, match="is for one process, here are 2"):
        Learner(toy_separator(), ToyLoss(), TrainingConfig(), 10, train_step=train_step)
