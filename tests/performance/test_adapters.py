"""Objects of another pipeline become stages, and the eight stand-ins have the sizes they should."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tfswa_lab import audio
from tfswa_lab.performance.adapters import Wrapped, instantiate, stages_from_config
from tfswa_lab.performance.eight_stages import SIZES, build, eight_stages, write_random
from tfswa_lab.performance.lean_load import load, weight_bytes
from tfswa_lab.performance.song_stages import song_stages
from tfswa_lab.performance.staged import StagedPipeline

PLAN = Path(__file__).resolve().parents[3] / "shared/cases/performance/plan_eight_stages.json"
HERE = __name__
SONG = "Amber Pilots - Painting Open Water"


class Encoder:
    """As in other people's code: built without weights, loaded later, called by another name."""

    def __init__(self, width, act):
        self.width, self.act, self.models = width, act, {}

    def load_weights(self):
        torch.manual_seed(self.width)
        self.models["main"] = nn.Linear(self.width, self.width)

    def encode(self, x):
        return self.act(self.models["main"](x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def load_weights(self):
        torch.manual_seed(2)
        self.layer.reset_parameters()

    def encode(self, x):
        return self.layer(x)


CONFIG = {
    "encoder": {
        "_target_": f"{HERE}.Encoder",
        "width": 4,
        "act": {"_target_": "torch.nn.Threshold", "threshold": 0.1, "value": 0.0},
    },
    "decoder": {"_target_": f"{HERE}.Decoder"},
}


@pytest.mark.parametrize("policy", ["sequential", "resident"])
def test_objects_run_as_stages(policy):
    stages = stages_from_config(CONFIG, "load_weights", "encode", {"decoder": {"activations": 64}})
    x = torch.rand(3, 4)
    with StagedPipeline(stages, device="cpu", policy=policy) as pipeline:
        found = pipeline.run(x)
        assert pipeline.status()["encoder"].weights == 4 * (16 + 4)
    for key, value in CONFIG.items():
        thing = instantiate(value)
        thing.load_weights()
        x = thing.encode(x)
        assert torch.equal(pipeline.outputs[key], x)
    assert torch.equal(found, x)
    assert stages[1].activations == 64


def test_what_is_wrong_with_a_configuration_is_named():
    with pytest.raises(ValueError, match="stage 'a' has no _target_"):
        stages_from_config({"a": {"width": 3}})
    with pytest.raises(ValueError, match=r"of_stages=\['b'\]"):
        stages_from_config(CONFIG, of_stages={"b": {}})
    for target in ("torch.nn.Nothing", "no_such_package.Thing", "Thing"):
        with pytest.raises(ValueError, match=f"_target_='{target}' cannot be imported"):
            stages_from_config({"a": {"_target_": target}})[0].load()
    with pytest.raises(ValueError, match="Encoder has no method 'load'"):
        stages_from_config(CONFIG)[0].load()
    with pytest.raises(ValueError, match="Linear has no method 'encode'"):
        Wrapped(nn.Linear(1, 1), "encode")


@pytest.mark.skipif(not PLAN.exists(), reason="the given cases are not part of the project")
def test_sizes_are_those_of_the_plan():
    given = json.loads(PLAN.read_text())["stages"]
    assert [stage["name"] for stage in given] == list(SIZES)
    for stage in given:
        size = SIZES[stage["name"]]
        assert (size.weights, size.carries) == (stage["weights"] * 1e9, stage["carries"] * 1e9)


@pytest.mark.parametrize("scale", [1, 1 / 50, 1 / 333, 1 / 1000])
def test_weights_meet_their_bytes_at_any_scale(scale):
    for name, size in SIZES.items():
        with torch.device("meta"):
            module = build(name, scale)
        found = sum(parameter.nbytes for parameter in module.parameters())
        assert found == pytest.approx(scale * size.weights, rel=0.01)


def test_files_are_written_once_and_hold_the_weights(tmp_path):
    stages = eight_stages(tmp_path, 1 / 1000, tokens=64)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(written) == 8
    eight_stages(tmp_path, 1 / 1000, tokens=64)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    value, carried = torch.rand(1, 64, 64), []
    with torch.no_grad():
        for stage, size in zip(stages, SIZES.values(), strict=True):
            total = sum(weight_bytes(stage.weights).values())
            assert total == pytest.approx(size.weights / 1000, rel=0.01)
            value = stage.run(stage.load(), value)
            assert value.isfinite().all()
            assert value.std() > 0
            carried.append(value.untyped_storage().nbytes())
    assert carried[5] == pytest.approx(0.3e6, rel=0.01)  # the mesh decoder's


def test_random_weights_keep_the_size_of_a_signal(tmp_path):
    module = nn.Sequential(nn.Linear(300, 200), nn.LayerNorm(200), nn.Conv1d(200, 10, 3))
    write_random(module, tmp_path / "new" / "x.safetensors")
    loaded = load(lambda: module, tmp_path / "new" / "x.safetensors")
    assert loaded[0].weight.std().item() == pytest.approx(300**-0.5, rel=0.02)
    assert loaded[2].weight.std().item() == pytest.approx(600**-0.5, rel=0.03)
    assert torch.equal(loaded[1].weight, torch.ones(200))
    assert not loaded[0].bias.any()


def test_a_song_goes_through_four_models(band_root):
    song, rate = audio.read(band_root / "test" / SONG / "mixture.wav", 44_100, 2 * 44_100)
    assert rate == 44_100
    stages = song_stages()
    value = song
    with torch.no_grad():
        for stage in stages:
            value = stage.run(stage.load(), value)
    with StagedPipeline(stages, device="cpu", policy="sequential") as pipeline:
        voice = pipeline.run(song)
    assert torch.equal(voice.audio, value.audio)
    assert voice.audio.untyped_storage().nbytes() == voice.audio.nbytes
    # The stand-ins at work: where somebody sings, the pitch is that of the stem, mostly.
    vocals, _ = audio.read(band_root / "test" / SONG / "vocals.wav", 44_100, 2 * 44_100)
    (alone,) = (stage for stage in stages if stage.name == "pitch")
    true = alone.run(alone.load(), voice._replace(audio=vocals)).pitch_hz
    assert voice.sung.any()
    cents = 1200 * torch.log2(voice.pitch_hz / true)[voice.sung].abs()
    assert (cents < 50).double().mean() > 0.7
