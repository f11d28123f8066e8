"""Casts against torch's own, int8 against given ratios, and what half precision cannot do."""

import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from tfswa_lab.performance.lean_load import weight_bytes
from tfswa_lab.performance.precision import (
    bytes_as,
    cast_module,
    cast_value,
    complex_in,
    int8_weights,
    needs_float32,
    output_change_db,
    quiet,
)

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "performance"
HALVES = [torch.float16, torch.bfloat16]


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.full((4,), 1 + 2j))
        self.linear = nn.Linear(4, 4)
        self.again = self.linear
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.linear.weight
        self.register_buffer("window", torch.hann_window(4))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("shared", self.window)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_cast_keeps_what_torch_would_throw_away(dtype):
    module = Complex()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parameter = module.linear.weight
    assert cast_module(module, dtype) is module
    assert complex_in(module) == ["filter"]
    assert module.linear.weight is module.tied.weight is parameter
    assert module.shared is module.window
    for name, tensor in module.state_dict().items():
        kept = name in ("filter", "count")
        assert torch.equal(tensor, before[name] if kept else before[name].to(dtype))
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        cast_module(module, torch.int8)


class Pair(NamedTuple):
    spectrum: torch.Tensor
    rate: int


@dataclass
class Song:
    audio: torch.Tensor
    parts: list


def test_values_are_cast_wherever_tensors_are():
    x, mask, z = torch.rand(3), torch.tensor([True, False]), torch.ones(2, dtype=torch.complex64)
    value = {"pair": Pair(x, 44100), "song": Song(x, [(x, mask)]), "z": z, "name": "a"}
    cast = cast_value(value, torch.float16)
    assert type(cast["pair"]) is Pair
    assert cast["pair"].rate == 44100
    assert torch.equal(cast["pair"].spectrum, x.half())
    assert torch.equal(cast["song"].audio, x.half())
    assert torch.equal(cast["song"].parts[0][0], x.half())
    assert cast["song"].parts[0][1] is mask
    assert cast["z"] is z
    assert cast["name"] == "a"
    assert value["song"].audio.dtype == torch.float32
    assert cast_value(cast, torch.float32)["pair"].spectrum.dtype == torch.float32


def unsupported(dtype):
    """Calls that fail in half precision on a CPU and work in float32."""
    x, window = torch.rand(2, 512).to(dtype), torch.hann_window(64).to(dtype)
    spectrum = torch.stft(x.float(), 64, window=window.float(), return_complex=True)
    return {
        "stft": lambda: torch.stft(x, 64, window=window, return_complex=True),
        "istft": lambda: torch.istft(spectrum.to(torch.complex32), 64, window=window),
        "rfft": lambda: torch.fft.rfft(x),
        "irfft": lambda: torch.fft.irfft(spectrum.to(torch.complex32)),
        "polar": lambda: torch.polar(x, x),
        "qr": lambda: torch.linalg.qr(x),
        "quantile": lambda: torch.quantile(x, 0.5),
        "constant": lambda: nn.Linear(512, 2).to(dtype)(torch.rand(2, 512)),
        "float32 layer": lambda: nn.Conv1d(2, 2, 3)(x),
        "complex layer": lambda: nn.Linear(512, 2, dtype=torch.complex64)(x),
    }


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", unsupported(torch.float16))
def test_knows_what_half_precision_cannot_do(name, dtype):
    with pytest.raises((RuntimeError, TypeError)) as caught:
        unsupported(dtype)[name]()
    assert needs_float32(caught.value) in str(caught.value)
    assert needs_float32(caught.value)


def test_other_errors_are_no_reason_for_float32():
    for error in (
        KeyError("dtype"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate half of it"),
        ValueError("no song"),
        KeyboardInterrupt("Half"),
    ):
        assert needs_float32(error) == ""


def test_change_of_an_output_in_db():
    torch.manual_seed(1)
    x, noise = torch.rand(1000), torch.randn(1000)
    expected = 10 * np.log10(np.sum(x.numpy() ** 2.0) / np.sum((0.01 * noise.numpy()) ** 2.0))
    assert output_change_db(x, x + 0.01 * noise) == pytest.approx(expected, abs=0.01)
    both = output_change_db({"a": [x], "b": (x, 3)}, {"a": [x + 0.01 * noise], "b": (x, 3)})
    assert both == pytest.approx(expected + 10 * np.log10(2), abs=0.01)
    assert output_change_db(x, x) == float("inf")
    assert output_change_db(0 * x, x) == -float("inf")
    assert output_change_db(x, x / 0) == -float("inf")
    turned = x * torch.exp(0.1j * torch.ones(1))
    assert output_change_db(x + 0j, turned) == pytest.approx(-20 * np.log10(2 * np.sin(0.05)))
    for wrong in (x[:5], [x, x], "text"):
        with pytest.raises(ValueError, match="cannot be compared"):
            output_change_db(x, wrong)


def ratios_db(reference, changed):
    return 10 * np.log10((reference**2).sum(1) / ((reference - changed) ** 2).sum(1))


@pytest.mark.skipif(not CASES.is_dir(), reason="the given cases are not part of the project")
def test_int8_has_a_scale_for_each_row():
    case = np.load(CASES / "int8_channels.npz")
    weight, x = case["in.weight"], case["in.x"]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = torch.tensor(weight, dtype=torch.float32)
    module = int8_weights(nn.Sequential(linear))
    with torch.no_grad():
        out = module(torch.tensor(x.T, dtype=torch.float32)).T.double().numpy()
    found = ratios_db(weight @ x, out)
    expected = case["out.sdr_per_channel"]  # steps of a 127th; torchao's are of a 127.5th
    assert found == pytest.approx(expected, abs=1.5)
    assert found.mean() == pytest.approx(expected.mean(), abs=0.2)
    assert found.min() > case["out.sdr_per_tensor"].min() + 20


def test_int8_takes_a_quarter_of_the_linear_layers():
    module = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64), nn.LayerNorm(64))
    predicted = sum(bytes_as(tensor, torch.int8) for tensor in module.parameters())
    plain = sum(tensor.nbytes for tensor in module.parameters())
    assert sum(map(bytes_as, module.parameters())) == plain
    x = torch.rand(8, 256)
    reference = module(x)
    assert int8_weights(module) is module
    assert sum(map(bytes_as, module.parameters())) == predicted
    assert predicted < 0.27 * plain
    assert output_change_db(reference, module(x)) > 35
    with pytest.raises(ValueError, match=r"Conv1d has no nn\.Linear"):
        int8_weights(nn.Conv1d(1, 1, 1))


def test_int8_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="pip install torchao"):
        int8_weights(nn.Linear(2, 2))


def test_int8_prints_nothing():
    code = (
        "from torch import nn; from tfswa_lab.performance.precision import int8_weights; "
        "int8_weights(nn.Linear(64, 64))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float64, torch.int8])
def test_bytes_from_a_header_are_those_of_the_module(tmp_path, dtype):
    from safetensors.torch import save_file

    module = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 16))
    module.register_buffer("steps", torch.arange(5))
    save_file(module.state_dict(), tmp_path / "x.safetensors")
    found = weight_bytes(tmp_path / "x.safetensors", dtype)
    assert found == {name: bytes_as(x, dtype) for name, x in module.state_dict().items()}
    if dtype == torch.int8:
        int8_weights(module)
    elif dtype is not None:
        module.to(dtype)
    assert found == {name: bytes_as(x) for name, x in module.state_dict().items()}


def test_while_packages_are_quiet_others_may_warn(caplog):
    with quiet():
        logging.getLogger("torchao.quantization").warning("of other GPUs")
        logging.warning("of shapes")  # as onnxruntime does
        logging.getLogger("another thread").warning("of the user's memory")
    logging.getLogger("torchao").warning("again")
    assert caplog.messages == ["of the user's memory", "again"]
