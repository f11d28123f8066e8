"""Predictions against what others have read on their GPUs, and of networks that others wrote."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_readings
import memory_models

from tfswa_lab.memory.predict import predict

QUICK = (
    *("gpt2", "damek_attention", "griceww_attention", "yyin_attention", "markmrli_attention"),
    *("shared_linear", "issue_104604", "issue_72450"),
)
READINGS = gpu_readings.readings(*QUICK) + gpu_readings.readings("griceww")[:4]


def name_of(row):
    return f"{row['program']}{row['arguments']}{row['of']}".replace(" ", "")


@pytest.mark.parametrize("row", READINGS, ids=name_of)
def test_a_public_reading_is_met_within_one_percent(row):
    found = gpu_readings.compared(row)
    assert abs(found["error"]) < 0.01
    if row["program"].endswith("attention"):  # every byte beside tensors is cuBLAS's
        assert abs(found["error"]) < 3e-5


def test_there_are_enough_readings_with_their_sources():
    every = gpu_readings.readings()
    assert sum(map(gpu_readings.is_new, every)) >= 150
    assert len({row["source"] for row in every}) >= 15
    assert all(row["unit"] in gpu_readings.UNITS and row["gpu"] for row in every)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("HTDemucs", "aten._fft_r2c.default"),
        ("Conformer", "aten.native_layer_norm.default"),
        ("Open-Unmix", "aten.native_batch_norm.default"),
        ("Llama, grouped heads, bf16", "aten._scaled_dot_product_flash_attention.default"),
        ("wav2vec 2.0", "aten.convolution.default"),
    ],
)
def test_networks_of_others_are_predicted(name, operator):
    found = predict(memory_models.MODELS[name])
    assert operator in {block.op for block in found.timeline.blocks}
    parameters = sum(b.size for b in found.timeline.blocks if b.category == "parameter")
    update = next(b.born for b in found.timeline.blocks if b.phase == "optimizer" and b.step == 1)
    held = found.timeline.held_by(update, lambda block: block.category)
    assert held["gradient"] == pytest.approx(parameters, rel=0.02)
    assert held["optimizer state"] == pytest.approx(2 * parameters, rel=0.02)
    assert found.host.allocated >= parameters, "the model is made on the host"
    assert not torch.is_inference_mode_enabled()
