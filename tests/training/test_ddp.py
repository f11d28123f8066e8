"""Two processes against one, and what batch norm makes of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_run import kinds, train
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from toy_run import toy_separator, weights

from tfswa_lab.training.checkpoint import find_checkpoint, load_checkpoint

SCRIPT = Path(__file__).with_name("ddp_run.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the weights of each rank, for each kind of training."""
    folder = tmp_path_factory.mktemp("two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def one():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {kind: train(kind) for kind in kinds()}
    torch.set_num_threads(before)


def distance(first, second):
    floating = [name for name in first if first[name].is_floating_point()]
    return max((first[name] - second[name]).abs().max().item() for name in floating)


def test_two_processes_make_the_weights_of_one(two, one):
    together = [load_file(two / "group" / f"rank_{rank}.safetensors") for rank in (0, 1)]
    alone = weights(one["group"])
    moved = distance(
        alone,
        {f"model.{k}": v for k, v in toy_separator().state_dict().items()}
        | {name: tensor for name, tensor in alone.items() if name.startswith("ema.")},
    )
    assert moved > 0.01, "nothing was learnt"
    assert distance(together[0], together[1]) == 0
    assert distance(together[0], alone) <= 1e-6


def test_remix_masks_and_running_statistics_are_of_the_whole_batch(two, one):
    together = [load_file(two / "whole batch" / f"rank_{rank}.safetensors") for rank in (0, 1)]
    alone = weights(one["whole batch"])
    assert distance(weights(one["group"]), alone) > 0.01, "they make a difference"
    assert distance(alone, together[0]) <= 1e-6
    learnt = {name: tensor for name, tensor in together[0].items() if name.startswith("model.")}
    assert distance(learnt, together[1]) == 0


def test_both_agree_on_the_validation(two, one):
    for rank in (0, 1):
        with safe_open(two / "group" / f"rank_{rank}.safetensors", "pt") as file:
            assert float(file.metadata()["sdr"]) == pytest.approx(one["group"].best_sdr, abs=1e-4)


def test_batch_norm_sees_half_a_batch_and_makes_other_weights(two, one):
    together = load_file(two / "batch" / "rank_0.safetensors")
    assert distance(together, weights(one["batch"])) > 1e-4


def test_its_fix_on_gpus_is_the_same_network():
    separator = toy_separator(norm="batch").eval()
    mixture = torch.randn(1, 1, 400)
    expected = separator(mixture)
    fixed = nn.SyncBatchNorm.convert_sync_batchnorm(separator)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in fixed.modules())
    assert torch.equal(fixed(mixture), expected)


def test_the_first_process_alone_writes_the_random_states_of_all(two):
    state = load_checkpoint(find_checkpoint(two / "group"))
    assert len(state["random"]) == 2
    assert len(list((two / "group" / "tensorboard").iterdir())) == 1


def test_a_bad_song_stops_both_with_the_same_words(two):
    for name in ("poisoned", "remixed"):  # into an item of either process
        said = [(two / f"{name}_{rank}.txt").read_text() for rank in (0, 1)]
        assert said[0] == said[1]
        assert "the loss is nan" in said[0]
        assert "song 3 at" in said[0]
        files = list((two / name).glob("non_finite_batch*"))
        assert len(files) == (1 if name == "poisoned" else 2)
        assert all(str(file) in said[0] for file in files)
