"""Lean loading against torch's own way of loading, and its memory as /proc counts it."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from tfswa_lab.memory import predict
from tfswa_lab.memory.trace import trace
from tfswa_lab.performance.lean_load import load, weight_bytes


class Song(nn.Module):
    """Tied weights, tables and masks that no file holds, numbers of four kinds."""

    def __init__(self, width=8, words=10):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.spectrum = nn.Parameter(torch.randn(width, dtype=torch.complex64))
        self.order = nn.Parameter(torch.arange(width).flip(0), requires_grad=False)
        self.embed.weight.decay = False
        self.register_buffer("mask", torch.ones(5, 5).triu(1).bool(), persistent=False)
        self.register_buffer("table", torch.arange(width) / width, persistent=False)
        self.register_buffer("mean", torch.rand(width))
        self.register_buffer("mean_again", self.mean)
        self.gains = [torch.linspace(0.5, 1, width)]

    def forward(self, x):
        y = self.embed(x) * self.table * self.gains[0] + self.mean_again
        y = self.block(y, src_mask=self.mask[: x.shape[1], : x.shape[1]])
        y = y[..., self.order] * self.spectrum.abs()
        return self.head(y)


class Recurrent(nn.Module):
    """Layers that keep lists, hooks and statistics of their own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
        self.old = nn.utils.weight_norm(nn.Conv1d(4, 4, 3))
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.lstm = nn.LSTM(4, 4, 2, bidirectional=True)

    def forward(self, x):
        return self.lstm(self.linear(self.norm(self.old(self.conv(x))).transpose(1, 2)))[0]


CASES = {
    Song: torch.tensor([[1, 2, 3, 9, 0], [4, 4, 8, 0, 1]]),
    Recurrent: torch.linspace(-1, 1, 80).view(2, 4, 10),
}


def saved(module, folder, **also):
    path = folder / "model.safetensors"
    save_model(module, str(path))
    if also:
        save_file(load_file(path) | also, path)
    return path


@pytest.fixture(params=CASES, ids=lambda cls: cls.__name__)
def case(request, tmp_path):
    torch.manual_seed(1)
    module = request.param().eval()
    return request.param, module, CASES[request.param], saved(module, tmp_path)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_equals_the_module_that_was_saved(case):
    cls, original, x, path = case
    before = torch.get_rng_state()
    loaded = load(cls, path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    for kind in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(original, kind)(), getattr(loaded, kind)(), strict=True)
        for (name, ours), (same, theirs) in pairs:
            assert name == same
            assert ours.requires_grad == theirs.requires_grad
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert torch.equal(loaded(x), original(x))


def test_what_is_shared_stays_shared_and_marks_stay(tmp_path):
    loaded = load(Song, saved(Song(), tmp_path), dtype=torch.float64)
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.mean is loaded.mean_again
    assert loaded.embed.weight.decay is False
    assert loaded.spectrum.dtype == torch.complex64
    assert loaded.order.dtype == torch.int64
    assert {loaded.mean.dtype, loaded.table.dtype, loaded.head.weight.dtype} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_as_torch_does(tmp_path, dtype):
    torch.manual_seed(1)
    original = nn.TransformerEncoderLayer(8, 2, 16).eval()
    path = saved(original, tmp_path)
    loaded = load(lambda: nn.TransformerEncoderLayer(8, 2, 16), path, dtype=dtype)
    original.to(dtype)
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_takes_the_dtype_of_the_file(tmp_path):
    path = saved(nn.Linear(4, 4).half(), tmp_path)
    assert load(nn.Linear, path, in_features=4, out_features=4).weight.dtype == torch.float16


def test_several_files_are_one_module(tmp_path):
    whole = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for index, path in enumerate(paths):
        save_file({f"{index}.{n}": t for n, t in whole[index].state_dict().items()}, path)
    loaded = load(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), paths)
    assert torch.equal(loaded[1].weight, whole[1].weight)
    assert sum(weight_bytes(paths).values()) == 4 * (12 + 4 + 12 + 3)
    with pytest.raises(ValueError, match=r"a\.safetensors and .*a\.safetensors both hold '0.bias'"):
        weight_bytes([paths[0], paths[0]])
    with pytest.raises(ValueError, match="name at least one"):
        weight_bytes([])


def test_bytes_are_those_of_the_tensors(tmp_path):
    tensors = {
        "half": torch.zeros(3, 5, dtype=torch.float16),
        "complex": torch.zeros(7, dtype=torch.complex64),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 4),
        "small": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"made by": "us"})
    expected = {name: tensor.nbytes for name, tensor in tensors.items()}
    assert weight_bytes(tmp_path / "x.safetensors") == expected


def test_each_tensor_has_a_storage_of_its_own_size(tmp_path):
    loaded = load(Song, saved(Song(), tmp_path))
    for parameter in loaded.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_training_leaves_the_file_alone(tmp_path):
    torch.manual_seed(1)
    original = nn.Linear(64, 64)
    path = saved(original, tmp_path)
    before = path.read_bytes()
    loaded = load(nn.Linear, path, in_features=64, out_features=64).train()
    for module in (original, loaded):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        module(torch.ones(2, 64)).square().sum().backward()
        optimizer.step()
    assert torch.equal(loaded.weight, original.weight)
    assert path.read_bytes() == before
    assert not torch.equal(load_file(path)["weight"], loaded.weight)


def test_a_module_survives_the_end_of_its_file(tmp_path):
    original = nn.Linear(8, 8)
    path = saved(original, tmp_path)
    loaded = load(nn.Linear, path, in_features=8, out_features=8)
    path.unlink()
    assert torch.equal(loaded.weight, original.weight)


def linear(path, **sizes):
    return load(nn.Linear, path, **({"in_features": 3, "out_features": 2} | sizes))


def test_what_does_not_fit_is_named_with_its_file(tmp_path):
    path = saved(nn.Linear(3, 2), tmp_path)
    with pytest.raises(ValueError, match=r"'weight' in .*model\.safetensors has shape \(2, 3\)"):
        linear(path, in_features=4)
    with pytest.raises(ValueError, match=r"'bias' in .*model\.safetensors is unknown to it"):
        linear(path, bias=False)
    path = saved(nn.Linear(3, 2, bias=False), tmp_path)
    with pytest.raises(ValueError, match=r"'bias' is missing in .*model\.safetensors"):
        linear(path)
    save_file({"weight": torch.ones(2, 3, dtype=torch.int32), "bias": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"'weight' in .* holds whole numbers, .* floating-point"):
        linear(path)
    save_file({f"{i}.weight": torch.ones(1) for i in range(9)}, path)
    with pytest.raises(ValueError, match=r"; and 6 more\. Build it with the sizes"):
        linear(path)  # 9 unknown, 2 missing, 5 named
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        linear(path, dtype=torch.int8)


def test_shared_weights_that_differ_in_the_file_are_refused(tmp_path):
    path = saved(Song(), tmp_path, **{"head.weight": torch.zeros(10, 8)})
    with pytest.raises(ValueError, match=r"'embed\.weight' and 'head\.weight' are one parameter"):
        load(Song, path)
    path = saved(Song(), tmp_path)
    equal = load_file(path)
    both = {"head.weight": equal.get("head.weight", equal.get("embed.weight"))}
    both["embed.weight"] = both["head.weight"].clone()
    save_file(equal | both, path)
    assert torch.equal(load(Song, path).head.weight, both["head.weight"])


def test_a_cut_file_names_the_tensor(tmp_path):
    path = saved(nn.Linear(3, 2), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off: tensor 'weight' ends"):
        linear(path)
    for bad in (
        b"",
        b"abc",
        whole[:20],
        b"\x80\x02}q\x00." * 9,
        whole + b"more",
        b"\2" + 7 * b"\0" + b"[]",
    ):
        path.write_bytes(bad)
        for read in (linear, weight_bytes):
            with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
                read(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        linear(tmp_path / "absent.safetensors")


class TakesWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.double = self.weight.detach() * 2


class KeepsParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        mine = nn.Parameter(torch.ones(3))
        self.mine, self.all = mine, [mine]


class AsksWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.largest = self.weight.max().item()


def test_what_needs_weights_while_it_is_built_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'double' takes weights .* load it as usual"):
        load(TakesWeights, saved(TakesWeights(), tmp_path))
    with pytest.raises(ValueError, match="'all' takes weights"):
        load(KeepsParameters, saved(KeepsParameters(), tmp_path))
    with pytest.raises(RuntimeError, match="meta") as caught:
        load(AsksWeights, saved(AsksWeights(), tmp_path))
    assert "load it as usual" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="built a dict"):
        load(dict, saved(nn.Linear(1, 1), tmp_path))


def test_a_class_that_fails_leaves_torch_as_it_was(tmp_path):
    path = saved(nn.Linear(3, 2), tmp_path)
    with pytest.raises(TypeError):
        load(nn.Linear, path, no_such_size=3)
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_other_threads_build_as_usual(tmp_path):
    path = saved(nn.Linear(3, 2), tmp_path)
    inside, built = threading.Event(), threading.Event()
    modules = []

    def slow():
        inside.set()
        built.wait(10)
        return nn.Linear(3, 2)

    thread = threading.Thread(target=lambda: modules.append(load(slow, path)))
    thread.start()
    inside.wait(10)
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    built.set()
    thread.join()
    assert modules[0].weight.device.type == "cpu"


def test_under_a_trace_and_in_a_prediction(tmp_path):
    path = saved(nn.Linear(1024, 256), tmp_path)

    def lean():
        module = load(nn.Linear, path, "cuda", in_features=1024, out_features=256)
        x = torch.ones(8, 1024, device="cuda")
        return lambda: module(x)

    def usual():
        module, x = nn.Linear(1024, 256).cuda(), torch.ones(8, 1024, device="cuda")
        return lambda: module(x)

    assert predict(lean).peak == predict(usual).peak
    with trace():
        loaded = linear(path, in_features=1024, out_features=256)
    assert torch.equal(loaded.weight, load_file(path)["weight"])


MEASURE = """
import gc, json, re, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from torch import nn
from tfswa_lab.performance.lean_load import load

way, path = sys.argv[1:]

def now(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) * 1024

def make():
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(24)))

def usual():
    module = make()
    module.load_state_dict(load_file(path))
    return module

def read_away(tensor, *of):  # a stand-in for a device that reads what it is given
    tensor.sum()
    return to(tensor, "meta")

ways = {
    "usual": usual,
    "mapped": lambda: load(make, path),
    "half": lambda: load(make, path, dtype=torch.float16),
    "away": lambda: load(make, path, device="meta"),
}
load(lambda: nn.Linear(1, 1), sys.argv[2] + ".small")  # what is imported late
x = torch.ones(1, 1024)
nn.Linear(1024, 1024)(x)
to = torch.Tensor.to
if way == "away":
    torch.Tensor.to = read_away
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = {field: now(field) for field in ("RssAnon", "RssFile", "VmRSS")}
module = ways[way]()
peak = now("VmHWM") - before["VmRSS"]
after = {field: now(field) - before[field] for field in before}
with torch.no_grad():
    used = module(x) if way in ("usual", "mapped") else None
run = now("RssFile") - before["RssFile"]
print(json.dumps({"peak": peak, "anon": after["RssAnon"], "file": after["RssFile"], "run": run}))
"""


def measured(way, path):
    command = [sys.executable, "-c", MEASURE, way, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts so")
def test_memory_as_the_system_counts_it(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(nn.Linear(1, 1).state_dict(), f"{path}.small")
    layers = {
        f"{i}.{name}": torch.full((1024, 1024)[: 1 + (name == "weight")], 0.01)
        for i in range(24)
        for name in ("weight", "bias")
    }
    save_file(layers, path)
    weights, largest = sum(weight_bytes(path).values()), 4 * 2**20
    noise = 2**20
    usual = measured("usual", path)
    assert usual["peak"] > 1.9 * weights
    assert usual["anon"] > 0.9 * weights
    mapped = measured("mapped", path)
    assert mapped["peak"] < noise
    assert mapped["run"] > 0.95 * weights  # as pages of the file, when the module first runs
    away = measured("away", path)
    assert away["peak"] < 1.1 * largest + noise
    assert max(away["anon"], away["file"]) < noise
    half = measured("half", path)
    assert half["peak"] < weights / 2 + 1.1 * largest + noise
    assert half["file"] < noise
