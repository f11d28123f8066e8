"""The same loop on a card: precisions, its memory by name, and a run that goes on."""

import pytest
import torch
from toy_run import ToySongs, toy_trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_it_learns_and_resumes_on_a_card(tmp_path, precision):
    settings = {"valid_set": ToySongs(5), "device": "cuda", "precision": precision}
    first = toy_trainer(tmp_path, max_epochs=10, log_every_n_steps=5, **settings)
    history = first.fit()
    assert history["valid/sdr"][1][-1] > history["valid/floor"][1][-1] + 1
    assert history["memory_mib/reserved"][1][-1] >= history["memory_mib/allocated"][1][-1] > 0
    longer = toy_trainer(tmp_path, max_epochs=11, **settings)
    longer.fit(tmp_path)
    assert longer.step == 55
    assert longer.history["train/loss"][0][:10] == history["train/loss"][0]


def test_the_card_and_the_cpu_take_the_same_step():
    songs = ToySongs()
    batch = torch.utils.data.default_collate([songs[index] for index in range(4)])
    scalars = [toy_trainer(device=device).learner.step([batch]) for device in ("cpu", "cuda")]
    for name, value in scalars[0].items():
        assert scalars[1][name] == pytest.approx(value, rel=1e-3), name
