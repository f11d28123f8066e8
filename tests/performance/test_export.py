"""An exported file is the network at every size, or there is no file."""

import copy
import functools
import os
import pickle
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tfswa_lab.evaluation.estimates import model_digest
from tfswa_lab.inference import separate
from tfswa_lab.models.exported import METADATA, open_program
from tfswa_lab.models.mask_resunet import MaskResUNet
from tfswa_lab.models.separator import build_separator
from tfswa_lab.models.storage import load_separator
from tfswa_lab.models.tf_locoformer import TFLocoformer
from tfswa_lab.models.tfswa_resunet import TFSWAResUNet
from tfswa_lab.performance import export as exporting
from tfswa_lab.performance import export_check, export_cost
from tfswa_lab.performance.export import check_exported, export, int8_round, write_program
from tfswa_lab.performance.real_separator import RealSeparator
from tfswa_lab.weights import BAND

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "cases" / "performance"
CASES = Path(os.environ.get("TFSWA_LAB_CASES", BESIDE))
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".ts"}
TWO = ("vocals", "other")
ALL_SIZES, FEW_SIZES = export_check.sizes, [(1, 1), (1, 8), (1, 15), (2, 16), (3, 9)]
UNET = {"dims": (4, 4, 4, 4), "depths": (1, 1, 1, 2), "num_heads": 1, "window_size": 4}
LOCO = {"dim": 8, "num_blocks": 1, "hidden_dim": 8, "num_heads": 2, "attention_dim": 8}
MASK = {"channels": (8, 8), "bottleneck": 8, "num_heads": 2, "sub_bands": 2}
RES = {"channels": (4, 8), "num_tfswa": 1, "num_heads": 2}
BUILDS = {
    "unet": lambda: build_separator(TWO, "magnitude", None, 128, 32, True, **UNET),
    "loco": lambda: build_separator(
        TWO, "mapping", None, 128, 32, architecture=TFLocoformer, **LOCO
    ),
    "mask": lambda: build_separator(
        TWO, "complex", 4, 128, 32, bins=40, architecture=MaskResUNet, **MASK
    ),
    "res": lambda: build_separator(
        TWO, "magnitude mapping", None, 128, 32, architecture=TFSWAResUNet, **RES
    ),
}


def separator_of(kind):
    """With batch statistics and scales that are not those of a fresh network."""
    torch.manual_seed(0)
    separator = BUILDS[kind]()
    with torch.no_grad():
        separator.train()(torch.randn(2, 2, 3000))
    return separator.eval()


def case(name, **otherwise):
    """Arrays of a case that was given to developers; without the folder, what stands here."""
    path = CASES / name
    return dict(np.load(path)) if path.is_file() else otherwise


def runner(path):
    """A function that runs the file, by its own runtime alone."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    if path.suffix == ".ts":
        return torch.jit.load(path)
    return loaded_pt2(path).module()


loaded_pt2 = functools.cache(torch.export.load)  # it takes seconds


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    """All sizes are for the files of `exported`."""
    monkeypatch.setattr(export_check, "sizes", lambda *_: FEW_SIZES)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One export of each network and format for all tests that look at it."""
    made = {}

    def get(kind, form):
        if (kind, form) not in made:
            path = tmp_path_factory.mktemp("exports") / f"{kind}{ENDINGS[form]}"
            separator = separator_of(kind)
            with mock.patch.object(export_check, "sizes", ALL_SIZES):
                made[kind, form] = separator, path, export(separator, path, form)
        return made[kind, form]

    return get


KINDS_AND_FORMS = [
    *((kind, form) for kind in ("unet", "mask") for form in ENDINGS),
    *((kind, "onnx") for kind in ("loco", "res")),  # loco's pt2 is in the test with the STFT
]


@pytest.mark.parametrize(("kind", "form"), KINDS_AND_FORMS)
@torch.no_grad()
def test_a_file_is_its_network_at_every_size(exported, kind, form):
    separator, path, report = exported(kind, form)
    assert report.worst_error <= 1e-4
    batches, frames = (sorted(set(axis)) for axis in zip(*report.sizes, strict=True))
    assert batches == [1, 2, 3]
    assert len(frames) >= 12
    assert export_check.EXAMPLE[1] not in frames
    given = case("export_lengths.npz", **{"in.frames": [8, 16, 65], "in.batch": [1, 2]})
    run = runner(path)
    sizes = [(b, t) for b in given["in.batch"] for t in (1, *given["in.frames"])]
    for batch, length in sizes:
        x = torch.randn(int(batch), separator.model.sizes["in_channels"], int(length), 65)
        x = x[..., : separator.bins]
        right, found = separator.model(x), run(x)
        assert found.shape == right.shape
        assert (found - right).abs().max() <= 1e-4 * right.abs().max()


@pytest.mark.parametrize("kind", ["unet", "loco", "mask"])
def test_the_axes_of_an_onnx_file_have_names(exported, kind):
    _, path, _ = exported(kind, "onnx")
    graph = onnx.load(path).graph
    for value in (*graph.input, *graph.output):
        axes = value.type.tensor_type.shape.dim
        assert (axes[0].dim_param, axes[2].dim_param) == ("batch", "frames")


@pytest.mark.parametrize("kind", ["unet", "mask"])
def test_the_axes_of_a_pt2_file_are_free_from_one_on(exported, kind):
    _, path, _ = exported(kind, "pt2")
    program = loaded_pt2(path)
    (name,) = program.graph_signature.user_inputs
    (node,) = (node for node in program.graph.nodes if node.name == name)
    free = {axis for axis, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)}
    assert free == {0, 2}
    assert all(bounds.lower == 1 for bounds in program.range_constraints.values())


@pytest.mark.parametrize("form", ENDINGS)
def test_a_file_separates_songs_without_a_network(exported, form, monkeypatch):
    separator, path, _ = exported("mask", form)
    song = 0.1 * torch.randn(2, 5000)
    right = separate(song, 44_100, separator)

    def refuse(*_, **__):
        raise AssertionError("a network was built")

    monkeypatch.setattr(MaskResUNet, "__init__", refuse)
    found = separate(song, 44_100, path)
    assert list(found) == ["vocals", "other"]
    for stem, waveform in right.items():
        torch.testing.assert_close(found[stem], waveform, atol=1e-5, rtol=0)


def test_what_a_file_says_of_itself_is_what_the_separator_says(exported):
    separator, path, _ = exported("mask", "onnx")
    loaded = load_separator(path)
    for name in ("stems", "mask", "sample_rate", "audio_channels", "bins", "mixture_consistency"):
        assert getattr(loaded, name) == getattr(separator, name)
    assert loaded.stft.hop_length == separator.stft.hop_length
    assert loaded.model.sizes == {**separator.model.sizes, "channels": [8, 8]}  # JSON has lists
    assert METADATA in onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map


def test_a_loaded_file_goes_to_other_processes_and_has_a_digest_of_its_own(exported):
    loaded = load_separator(exported("mask", "onnx")[1])
    x = torch.randn(1, 2, 2000)
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), loaded(x))
    assert model_digest(loaded) != model_digest(load_separator(exported("mask", "pt2")[1]))


def test_running_statistics_of_a_normalizer_travel_along(tmp_path):
    from tfswa_lab.stft import RunningSpectrogramNormalizer

    torch.manual_seed(0)
    normalizer = RunningSpectrogramNormalizer(2, 65)
    separator = build_separator(TWO, n_fft=128, hop_length=32, normalizer=normalizer, **UNET)
    with torch.no_grad():
        separator.train()(5 * torch.randn(1, 2, 3000))
    export(separator.eval(), tmp_path / "a.ts", "torchscript")
    x = torch.randn(1, 2, 2000)
    torch.testing.assert_close(load_separator(tmp_path / "a.ts")(x), separator(x))


# With the transform ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDS)
@torch.no_grad()
def test_a_separator_in_real_numbers_is_the_separator(kind):
    separator = separator_of(kind)
    real = RealSeparator(separator)
    for length in (1, 31, 32, 500, 3000):
        x = torch.randn(2, 2, length)
        right = separator(x)
        assert (real(x) - right).abs().max() <= 1e-5 * right.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize(
    ("kind", "form"), [("mask", "onnx"), ("loco", "pt2"), ("unet", "torchscript")]
)
def test_with_the_stft_a_file_takes_waveforms_of_any_length(tmp_path, kind, form):
    separator, path = separator_of(kind), tmp_path / f"all{ENDINGS[form]}"
    report = export(separator, path, form, with_stft=True)
    assert report.worst_error <= 1e-4
    loaded, run = load_separator(path), runner(path)
    with torch.no_grad():
        for batch, length in ((1, 1), (1, 31), (2, 33), (3, 1000)):
            x = torch.randn(batch, 2, length)
            right = separator(x)
            assert (run(x) - right).abs().max() <= 1e-4 * right.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(loaded(x), right, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="waveforms only"):
        loaded.spectrograms(separator.stft(torch.randn(1, 2, 1000)))


# What the check catches --------------------------------------------------------------------------


class Frozen(nn.Module):
    """Looks back over as many frames as its first input has, which Python counts."""

    sizes = {"in_channels": 2, "out_channels": 2}

    def forward(self, x):
        return x + torch.arange(int(x.shape[2]))[None, None, :, None]


class Branch(nn.Module):
    """Does something else where the frames are a multiple of 8."""

    sizes = {"in_channels": 2, "out_channels": 2}

    def forward(self, x):
        return x if x.shape[2] % 8 else -x


@pytest.mark.parametrize(
    ("network", "form", "message"),
    [
        (Frozen(), "onnx", "1 × 1 frames"),
        (Frozen(), "torchscript", "1 × 1 frames"),
        (Branch(), "onnx", "1 × 8 frames: off by 2;"),
        (Branch(), "torchscript", "6 sizes agree|1 × 8 frames: off by 2;"),
        (Frozen(), "pt2", "cannot be exported as pt2|frames"),
        (Branch(), "pt2", "cannot be exported as pt2|1 × 8 frames: off by 2;"),
    ],
)
def test_what_python_decided_is_found_and_no_file_is_left(tmp_path, network, form, message):
    with pytest.raises(ValueError, match=message):
        export(network.eval(), tmp_path / f"a{ENDINGS[form]}", form, bins=5)
    assert list(tmp_path.iterdir()) == []


def test_a_file_can_be_checked_alone(tmp_path):
    network = Branch().eval()
    write_program(network, torch.zeros(2, 2, 37, 5), tmp_path / "a.onnx", "onnx", {})
    check = check_exported(tmp_path / "a.onnx", network, bins=5)
    assert not check.passed
    assert check.failed == [size for size in check.errors if size[1] % 8 == 0]
    assert check.worst == check.errors[1, 8] == 2
    with pytest.raises(ValueError, match=r"a\.onnx is not the network: .*1 × 8 frames: off by 2"):
        check.refuse(tmp_path / "a.onnx")
    assert "sizes agree, worst error 2.0e+00" in repr(check)


def test_a_file_that_fixes_an_axis_is_named(tmp_path):
    network = nn.Conv2d(2, 2, 1).eval()
    network.sizes = Branch.sizes
    torch.onnx.export(network, (torch.zeros(1, 2, 9, 5),), tmp_path / "a.onnx", dynamo=False)
    check = check_exported(tmp_path / "a.onnx", network, bins=5)
    assert "the file fixes its axis batch; the file fixes its axis frames" in str(check)


def test_a_good_file_passes_alone_and_another_network_fails(exported):
    separator, path, _ = exported("mask", "torchscript")
    assert check_exported(path, separator).passed
    other = copy.deepcopy(separator)
    nn.init.constant_(other.model.head[2].bias, 1.0)
    assert not check_exported(path, other).passed


def test_the_file_can_be_called(tmp_path):
    from tfswa_lab import performance

    report = performance.export(separator_of("mask"), tmp_path / "a.ts", "torchscript")
    assert report.path.is_file()
    assert performance.export.check_exported is check_exported


def test_a_value_that_is_no_number_is_a_failure():
    nan = torch.tensor([1.0, torch.nan])
    assert export_check.largest_error(nan, torch.ones(2)) == torch.inf


# The model stays as it was -----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_the_model_comes_back_as_it_was(tmp_path, form):
    separator = separator_of("mask")
    separator(torch.randn(1, 2, 2000)).square().sum().backward()
    separator.model.stem.weight.requires_grad_(False)
    before = copy.deepcopy(separator.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in separator.parameters()]
    identities = [id(p) for p in separator.parameters()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    export(separator, tmp_path / f"a{ENDINGS[form]}", form)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert [id(p) for p in separator.parameters()] == identities
    assert all(torch.equal(x, before[name]) for name, x in separator.state_dict().items())
    for parameter, grad in zip(separator.parameters(), grads, strict=True):
        assert grad is None or torch.equal(parameter.grad, grad)
    assert [p.requires_grad for p in separator.model.stem.parameters()] == [False, True]
    assert not any(module.training for module in separator.modules())


def test_training_mode_and_hooks_are_refused(tmp_path):
    separator = separator_of("mask")
    separator.model.stem.train()
    with pytest.raises(ValueError, match=r"Conv2d model\.stem is in training mode; call eval"):
        export(separator, tmp_path / "a.onnx")
    separator.eval()
    separator.model.head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"Sequential model\.head has hooks"):
        export(separator, tmp_path / "a.onnx")


def test_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(program, *_):
        assert program.path.is_file()  # the hidden one
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "check_program", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(separator_of("mask"), tmp_path / "new" / "a.ts", "torchscript")
    assert list(tmp_path.iterdir()) == []


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format='tflite' is unknown; choose onnx, pt2, torchscript"),
        ({"precision": "int4"}, "precision='int4' is unknown; choose fp32, fp16, int8"),
        ({"format": "pt2"}, r"ends in \.onnx, but format='pt2' needs \.pt2"),
    ],
)
def test_wrong_choices_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export(separator_of("mask"), tmp_path / "a.onnx", **options)


def test_existing_files_stay_unless_asked(exported, tmp_path):
    (tmp_path / "a.ts").write_text("mine")
    with pytest.raises(FileExistsError, match="use --overwrite"):
        export(separator_of("mask"), tmp_path / "a.ts", "torchscript")
    assert (tmp_path / "a.ts").read_text() == "mine"
    export(separator_of("mask"), tmp_path / "a.ts", "torchscript", overwrite=True)
    assert check_exported(tmp_path / "a.ts", separator_of("mask")).passed


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(exported, tmp_path, monkeypatch, name):
    _, path, _ = exported("mask", "onnx")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"ONNX files need {name}: pip install {name}"):
        export(separator_of("mask"), tmp_path / "a.onnx")
    if name == "onnxruntime":
        with pytest.raises(ValueError, match="pip install onnxruntime"):
            load_separator(path)


@pytest.mark.parametrize("ending", ENDINGS.values())
def test_broken_and_missing_files_are_named(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_program(path)
    path.write_bytes(b"not a program")
    with pytest.raises(ValueError, match=r"a\..* is broken, or no such program"):
        load_separator(path)


def test_a_foreign_file_says_nothing_of_stems(tmp_path):
    write_program(Branch().eval(), torch.zeros(2, 2, 37, 5), tmp_path / "a.onnx", "onnx", {})
    with pytest.raises(ValueError, match="does not say its stems, rate and STFT"):
        load_separator(tmp_path / "a.onnx")


def test_networks_alone_need_their_bins_and_sizes(tmp_path):
    with pytest.raises(ValueError, match="Branch is no Separator: give bins"):
        export(Branch().eval(), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="Linear has no `sizes`"):
        export(nn.Linear(1, 1).eval(), tmp_path / "a.onnx", bins=3)
    with pytest.raises(ValueError, match="no Separator and has no STFT"):
        export(Branch().eval(), tmp_path / "a.onnx", with_stft=True)


def test_a_program_is_not_exported_again(exported, tmp_path):
    loaded = load_separator(exported("mask", "onnx")[1])
    with pytest.raises(ValueError, match="exported program already"):
        export(loaded, tmp_path / "a.pt2", "pt2")


# Weights in fewer bytes --------------------------------------------------------------------------


def sdr(right, found):
    return 10 * np.log10((right**2).sum(1) / ((right - found) ** 2).sum(1))


def test_int8_per_row_follows_rows_60_db_apart_and_per_tensor_does_not():
    """Rounding at random errs by scale²/12, so that each row has its own SDR by theory."""
    generator = np.random.default_rng(0)
    gains = np.geomspace(1, 1e-3, 16)[:, None]
    given = case(
        "int8_channels.npz",
        **{
            "in.weight": gains * generator.standard_normal((16, 64)),
            "in.x": generator.standard_normal((64, 512)),
        },
    )
    weight, x = given["in.weight"], given["in.x"]
    for per_channel, name in ((False, "out.sdr_per_tensor"), (True, "out.sdr_per_channel")):
        rounded = int8_round(torch.from_numpy(weight), per_channel).numpy()
        found = sdr(weight @ x, rounded @ x)
        if name in given:
            np.testing.assert_allclose(found, given[name], atol=1e-6)
        if per_channel:
            assert found.min() > 40
        else:
            assert found[-1] < 1  # below half a step, where all becomes zero


def test_int8_of_zeros_and_of_transposed_kernels():
    assert not int8_round(torch.zeros(3, 4)).any()
    weight = torch.randn(5, 3, 2, 2) * torch.tensor([1.0, 1e-2, 1e-4])[:, None, None]
    error = (int8_round(weight, axis=1) - weight).abs().amax((0, 2, 3))
    assert (error <= weight.abs().amax((0, 2, 3)) / 254 * 1.001).all()


@pytest.mark.parametrize(("precision", "form"), [("fp16", "torchscript"), ("int8", "onnx")])
@torch.no_grad()
def test_a_file_of_small_weights_computes_with_those(tmp_path, monkeypatch, precision, form):
    """The oracle rounds each weight of the network in place, and runs it in eager mode."""
    monkeypatch.setattr(exporting, "read_excerpts", lambda *_: [])
    separator, path = separator_of("unet"), tmp_path / f"a{ENDINGS[form]}"
    export(separator, path, form, precision, accept_loss=True)
    for module in separator.model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight
            weight.copy_(weight.half() if precision == "fp16" else int8_round(weight))
        elif isinstance(module, nn.ConvTranspose2d):
            weight = module.weight
            rounded = weight.half() if precision == "fp16" else int8_round(weight, axis=1)
            weight.copy_(rounded)
    x = torch.randn(2, 2, 21, 65)
    right = separator.model(x)
    assert (runner(path)(x) - right).abs().max() <= 1e-4 * right.abs().max()
    assert check_exported(path, separator_of("unet")).passed


@pytest.fixture
def one_short_song(monkeypatch):
    monkeypatch.setattr(export_cost, "SONGS", 1)
    monkeypatch.setattr(export_cost, "SONG_SECONDS", 3.0)


def test_weights_are_smaller_and_the_songs_say_what_that_costs(tmp_path, one_short_song, band_root):
    separator = load_separator(BAND)
    report = export(separator, tmp_path / "a.onnx", precision="int8", songs=band_root)
    plain, small, tensor, dynamic = report.variants
    assert small.bytes < 0.4 * plain.bytes
    assert abs(report.sdr_change) < 0.5
    assert tensor.name == "int8 per tensor, eager"
    assert dynamic.name == "dynamic int8 by onnxruntime"
    assert None not in (tensor.sdr, dynamic.sdr, dynamic.seconds, report.seconds_eager)
    text = str(report)
    assert len(text.splitlines()) <= 25
    assert "dynamic int8" in text
    assert repr(report).startswith("ExportReport(a.onnx, int8, worst error")
    assert "dynamic int8 by onnxruntime" in report._repr_html_()


def spread_over_60_db(separator):
    """Scale channels between a convolution and its batch norm: the same function of the input."""
    for block in separator.model.modules():
        if type(block).__name__ == "ResidualConvModule":
            convolution, norm = block.body[2], block.body[3]
            gains = torch.logspace(0, 3, convolution.out_channels)
            with torch.no_grad():
                convolution.weight *= gains[:, None, None, None]
                convolution.bias *= gains
                norm.running_mean *= gains
                norm.running_var *= gains**2
    return separator


def test_per_tensor_int8_of_uneven_channels_fails_unless_its_loss_is_accepted(
    tmp_path, one_short_song, band_root
):
    separator = spread_over_60_db(load_separator(BAND))
    good = export(separator, tmp_path / "a.ts", "torchscript", "int8")
    assert abs(good.sdr_change) < 0.2
    path = tmp_path / "b.ts"
    with pytest.raises(ValueError, match=r"int8 changes the SDR by -\d+\.\d+ dB, more than 0.5 dB"):
        export(separator, path, "torchscript", "int8", per_channel=False)
    assert not path.exists()
    bad = export(separator, path, "torchscript", "int8", per_channel=False, accept_loss=True)
    assert bad.sdr_change < -0.5
    assert bad.worst_error <= 1e-4  # it is what it should be, only worse


def test_a_loss_that_nobody_can_measure_must_be_accepted(tmp_path):
    network = nn.Conv2d(2, 2, 3, padding=1).eval()
    network.sizes = Branch.sizes
    with pytest.raises(ValueError, match=r"the loss of fp16 cannot be measured .*--accept-loss"):
        export(network, tmp_path / "a.ts", "torchscript", "fp16", bins=5)
    report = export(network, tmp_path / "a.ts", "torchscript", "fp16", accept_loss=True, bins=5)
    assert report.sdr_change is None
    assert "SDR: not measured" in str(report)


def test_a_weight_beyond_float16_is_refused(tmp_path):
    network = nn.Conv2d(2, 2, 1).eval()
    network.sizes = Branch.sizes
    nn.init.constant_(network.weight, 1e5)
    with pytest.raises(ValueError, match="beyond float16"):
        export(network, tmp_path / "a.ts", "torchscript", "fp16", accept_loss=True, bins=5)
