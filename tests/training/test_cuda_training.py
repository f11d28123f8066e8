"""The same loop on a GPU: precisions, its memory by name, a run that goes on, a step undone."""

import pytest
import torch
from test_learner import learner, same, steps
from toy_run import ToySongs, toy_trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_it_learns_and_resumes_on_a_gpu(tmp_path, precision):
    settings = {"valid_set": ToySongs(5), "device": "cuda", "precision": precision}
    first = toy_trainer(tmp_path, max_epochs=10, log_every_n_steps=5, **settings)
    history = first.fit()
    assert history["valid/sdr"][1][-1] > history["valid/floor"][1][-1] + 1
    assert history["memory_mib/reserved"][1][-1] >= history["memory_mib/allocated"][1][-1] > 0
    longer = toy_trainer(tmp_path, max_epochs=11, **settings)
    longer.fit(tmp_path)
    assert longer.step == 55
    assert longer.history["train/loss"][0][:10] == history["train/loss"][0]


def test_the_gpu_and_the_cpu_take_the_same_step():
    songs = ToySongs()
    batch = torch.utils.data.default_collate([songs[index] for index in range(4)])
    scalars = [toy_trainer(device=device).learner.step([batch]) for device in ("cpu", "cuda")]
    for name, value in scalars[0].items():
        assert scalars[1][name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_learner_on_a_gpu_returns_to_an_earlier_step_from_the_middle_of_another(precision):
    it = learner(device="cuda", precision=precision)
    batches = steps(4, 1)
    for step in batches[:2]:
        it.step(step)
    saved = it.state_dict()
    assert not any(tensor.is_cuda for tensor in saved["separator"].values())
    first = [it.step(step)["loss"] for step in batches[2:]]
    it.loss.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        it.step(batches[0])
    it.loss.fails = False
    it.load_state_dict(saved)
    assert same(it.state_dict(), saved)
    # Dropout repeats; convolutions on a GPU add their gradients in no fixed order.
    assert [it.step(step)["loss"] for step in batches[2:]] == pytest.approx(first, rel=1e-3)
