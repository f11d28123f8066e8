"""A separator as a program that runs without this package, checked before the file appears.

Exported is the spectrogram network: real tensors in and out, any batch, any number of frames. The
transform, the normalizer and the head stay outside, or are exported too (`with_stft`).

Weights of linear layers and convolutions can be stored as float16, or as whole numbers of 8 bits
with one scale per output channel. The program turns them back into float32 before it computes, so
the file is smaller and the sums are those of float32.

Axis letters: `b` batch, `c` channels, `o` output channels, `s` samples, `t` frames, `f` bins.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from tfswa_lab.durable import hidden_files, parts_of, refuse_existing
from tfswa_lab.memory.display import Shown, aligned, html_table
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.models.exported import (
    FORMATS,
    METADATA,
    ExportedNetwork,
    Program,
    needed,
    open_program,
)
from tfswa_lab.models.separator import Separator
from tfswa_lab.models.storage import describe
from tfswa_lab.performance.export_check import EXAMPLE, Check, check_program, random_input
from tfswa_lab.performance.export_cost import (
    Excerpt,
    Variant,
    dynamic_int8,
    mean_sdr,
    of_file,
    of_network,
    read_excerpts,
    seconds_per_call,
    tensor_bytes,
)
from tfswa_lab.performance.real_separator import RealSeparator
from tfswa_lab.performance.timing import format_seconds

PRECISIONS = ("fp32", "fp16", "int8")
COLUMNS = ("", "bytes", "seconds", "SDR", "change")  # of a report
MOST_LOSS = 0.5  # dB of SDR
TIMED_FRAMES = 64  # of the input that is timed, as a batch of one
ROUNDED = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
OPSET = 17  # of ONNX, the first with layer norm


@dataclass(frozen=True, repr=False)
class ExportReport(Shown):
    """What was exported, and what the check found.

    Args:
        path: of the file.
        format: one of `FORMATS`.
        precision: one of `PRECISIONS`.
        check: of the program against the network, whose weights are rounded in the same way.
        variants: the network in eager mode first, then the file, then others beside it.
        notes: what was not measured and why.
    """

    path: Path
    format: str
    precision: str
    check: Check
    variants: tuple[Variant, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes_before(self) -> int:
        """Of the network's parameters and buffers."""
        return self.variants[0].bytes

    @property
    def bytes_after(self) -> int:
        """Of the file."""
        return self.variants[1].bytes

    @property
    def seconds_eager(self) -> float | None:
        """Of one call of the network."""
        return self.variants[0].seconds

    @property
    def seconds_exported(self) -> float | None:
        """Of one call of the program."""
        return self.variants[1].seconds

    @property
    def worst_error(self) -> float:
        """As a share of the largest value, at any size."""
        return self.check.worst

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Batches and frames (or samples) that were checked."""
        return list(self.check.errors)

    @property
    def sdr_change(self) -> float | None:
        """In dB, negative for a loss; None if it was not measured."""
        return self.variants[1].change(self.variants[0])

    @property
    def brief(self) -> str:
        """File, precision, error."""
        return f"{self.path.name}, {self.precision}, worst error {self.worst_error:.1e}"

    def __str__(self) -> str:
        head = [f"{self.path}: {self.precision}", f"check: {self.check}", ""]
        return "\n".join([*head, *aligned([COLUMNS, *map(self._row, self.variants)]), *self.notes])

    def _row(self, variant: Variant) -> tuple[str, ...]:
        seconds = "–" if variant.seconds is None else format_seconds(variant.seconds)
        sdr = "–" if variant.sdr is None else f"{variant.sdr:.2f} dB"
        change = variant.change(self.variants[0])
        shown = "–" if change is None or variant is self.variants[0] else f"{change:+.2f} dB"
        return variant.name, format_bytes(variant.bytes), seconds, sdr, shown

    def _repr_html_(self) -> str:
        notes = (f"check: {self.check}", *self.notes)
        return (
            f"<b>{escape(str(self.path))}: {self.precision}</b>"
            + html_table([COLUMNS, *map(self._row, self.variants)])
            + "".join(f"<p>{escape(note)}</p>" for note in notes)
        )


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "onnx",
    precision: str = "fp32",
    with_stft: bool = False,
    accept_loss: bool = False,
    songs: str | Path | None = None,
    *,
    per_channel: bool = True,
    overwrite: bool = False,
    bins: int | None = None,
) -> ExportReport:
    """Write a network as a program, once the program gives what the network gives.

    The program is written under a hidden name, loaded again, and compared at sizes that the
    exporter has not seen. The file appears if all agree. The model is copied and left alone.

    ONNX has no fused attention here: the program keeps all scores, whose bytes grow with the square
    of the frames. Where memory runs out, separate in shorter segments.

    Args:
        model: a separator in evaluation mode, or a network `(b, c, t, f)` with `sizes`.
        path: of the file; its ending is that of the format: .onnx, .pt2 or .ts.
        format: "onnx", "pt2" (`torch.export`) or "torchscript" (a trace).
        precision: of the stored weights: "fp32", "fp16" or "int8".
        with_stft: export the whole separator, from waveform `(b, c, s)` to stems `(b, n, c, s)`.
        accept_loss: keep a program that separates worse than the model by more than 0.5 dB.
        songs: a MUSDB18-shaped tree on whose test songs the SDR is measured; None for the band's
            where the precision is not fp32, and no measurement where it is.
        per_channel: one scale of int8 per output channel; False for one per matrix or kernel.
        overwrite: whether a file that is there is replaced.
        bins: of the input of a network that is no separator.

    Raises:
        FileExistsError: the file is there.
        ValueError: the model is in training mode or has hooks, there is no such format or precision
            or the path's ending is another, a package is missing, the exporter refuses the network,
            the program does not agree (names the sizes), or it separates worse.
    """
    path = Path(path).expanduser()
    _check_choices(path, format, precision)
    refuse_unready(model)
    if not overwrite:
        refuse_existing([path])
    subject = Subject.of(model, with_stft, bins)
    excerpts, notes = _excerpts(model, precision, songs, accept_loss)
    with _untouched(), parts_of([path], overwrite, _folder_of(path)) as (part,):
        network = lightened(subject.network, precision, per_channel)
        metadata = subject.metadata | {"precision": precision, "per_channel": per_channel}
        write_program(network, subject.example, part, format, metadata)
        program = open_program(part)
        right = subject.reference if precision == "fp32" else network
        check = check_program(program, right, subject.channels, subject.bins)
        check.refuse(path)
        variants, more = _variants(subject, model, program, excerpts)
        report = ExportReport(path, format, precision, check, variants, (*notes, *more))
        if not accept_loss:
            _refuse_loss(report)
    return report


def check_exported(
    path: str | Path, model: nn.Module, bins: int | None = None, tolerance: float = 1e-4
) -> Check:
    """Compare an exported file with a model.

    Args:
        path: of a file of `export`, or of any program of one input with the same axes.
        model: what it should compute; with the weights rounded as the file says.
        bins: of the input of a network that is no separator.
        tolerance: the largest error allowed, as a share of the largest value.

    Returns:
        Its `passed` says whether all agree, its `refuse` raises if not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, or the model is in training mode or has hooks.
    """
    refuse_unready(model)
    program = open_program(Path(path).expanduser())
    about = program.metadata
    subject = Subject.of(model, about.get("with_stft", False), bins)
    precision, right = about.get("precision", "fp32"), subject.reference
    with _untouched():
        if precision != "fp32":
            right = lightened(subject.network, precision, about.get("per_channel", True))
        check = check_program(program, right, subject.channels, subject.bins)
    return Check(check.errors, check.reasons, check.fixed, tolerance, check.unit)


# What is exported --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What of a model is exported, on the CPU in float32; the model keeps its own weights.

    Args:
        network: a copy of the spectrogram network, or of the separator in real numbers.
        reference: what the program has to give: the network, or the separator as it is.
        channels: of its input.
        bins: of its input; None for waveforms.
        metadata: what a loader must know.
    """

    network: nn.Module
    reference: nn.Module
    channels: int
    bins: int | None
    metadata: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, with_stft: bool, bins: int | None) -> Subject:
        """What to export of a separator, or of a network alone.

        Raises:
            ValueError: a network alone has no STFT, no `sizes`, or its bins were not given.
        """
        if any(isinstance(module, ExportedNetwork) for module in model.modules()):
            raise ValueError("the model is an exported program already; export what it came from")
        if isinstance(model, Separator):
            return cls._of_separator(model, with_stft)
        name = type(model).__name__
        if with_stft:
            raise ValueError(f"{name} is no Separator and has no STFT: leave with_stft out")
        if not hasattr(model, "sizes") or "in_channels" not in model.sizes:
            raise ValueError(f"{name} has no `sizes` with in_channels; add them, or a Separator")
        if bins is None:
            raise ValueError(f"{name} is no Separator: give bins, the f of its input (b, c, t, f)")
        about = {"model": name, "sizes": dict(model.sizes)}
        network = _copy(model)
        return cls(network, network, model.sizes["in_channels"], bins, about)

    @classmethod
    def _of_separator(cls, separator: Separator, with_stft: bool) -> Subject:
        state = separator.normalizer.state_dict()
        about = describe(separator) | {
            "with_stft": with_stft,
            "normalizer_state": {name: tensor.tolist() for name, tensor in state.items()},
        }
        if with_stft:
            whole = _copy(separator)
            real = RealSeparator(whole).eval().requires_grad_(False)
            return cls(real, whole, separator.audio_channels, None, about)
        bins = separator.bins or separator.stft.n_fft // 2 + 1
        network = _copy(separator.model)
        return cls(network, network, separator.model.sizes["in_channels"], bins, about)

    @property
    def example(self) -> Tensor:
        """An input that the program is made with."""
        return self.random(*EXAMPLE)

    def random(self, batch: int, frames: int) -> Tensor:
        """An input of so many frames."""
        hop = self.metadata["hop_length"] if self.bins is None else 1
        length = frames if self.bins else (frames - 1) * hop + hop // 2
        return random_input(batch, self.channels, length, self.bins)


def _copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu().float().eval().requires_grad_(False)


def refuse_unready(model: nn.Module) -> None:
    """Refuse training mode, and hooks, which a program would lose or freeze.

    Raises:
        ValueError: names the module.
    """
    for name, module in model.named_modules():
        where = f"{type(module).__name__} {name}".strip()
        if module.training:
            raise ValueError(f"{where} is in training mode; call eval() on the model first")
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(module, kind) for kind in kinds):
            raise ValueError(f"{where} has hooks, which no program keeps; remove them first")
        if is_parametrized(module):
            raise ValueError(
                f"{where} is parametrized, so its weights cannot be stored in fewer bytes; call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )


@contextmanager
def _untouched() -> Iterator[None]:
    """Neither gradients nor inference mode inside; what exporters warn of is not shown."""
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_choices(path: Path, format: str, precision: str) -> None:
    for name, value, known in (
        ("format", format, FORMATS),
        ("precision", precision, PRECISIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose {', '.join(known)}")
    if path.suffix != FORMATS[format]:
        raise ValueError(
            f"{path} ends in {path.suffix or 'nothing'}, but format={format!r} needs "
            f"{FORMATS[format]}: {path.with_suffix(FORMATS[format])}"
        )


def _folder_of(path: Path) -> Path:
    """Where the hidden file goes: the path's folder, or what there is of it."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


# Weights in fewer bytes --------------------------------------------------------------------------


def int8_round(weight: Tensor, per_channel: bool = True, axis: int = 0) -> Tensor:
    """The nearest values that 8 bits and a scale can hold: whole numbers from -127 to 127.

    A scale per tensor is set by its largest weight, and rows far below it become zero; a scale per
    channel follows each row.

    Args:
        weight: floats.
        per_channel: one scale for each row along `axis`; False for one in all.
        axis: of the output channels: 0 in linear layers and convolutions, 1 in transposed ones.

    >>> weight = torch.tensor([[100.0, 50.0], [0.1, 0.05]])
    >>> int8_round(weight, per_channel=False)[1]
    tensor([0., 0.])
    >>> int8_round(weight)[1]
    tensor([0.1000, 0.0504])
    """
    codes, scale = int8_codes(weight, per_channel, axis)
    return codes.to(weight.dtype) * scale


def int8_codes(weight: Tensor, per_channel: bool = True, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Codes in int8 and the scale that turns them back into weights."""
    others = [other for other in range(weight.ndim) if other != axis or not per_channel]
    largest = weight.abs().amax(others, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / 127).to(weight.dtype)
    return (weight / scale).round().to(torch.int8), scale


class Stored(nn.Module):
    """Turns stored weights back into float32."""

    def __init__(self, scale: Tensor | None):
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, stored: Tensor) -> Tensor:
        """Stored numbers to weights."""
        return stored.float() if self.scale is None else stored.float() * self.scale


def lightened(network: nn.Module, precision: str, per_channel: bool = True) -> nn.Module:
    """A copy whose matrices and kernels are stored in this precision.

    Raises:
        ValueError: a weight is too large for float16.
    """
    network = copy.deepcopy(network)
    if precision == "fp32":
        return network
    for name, module in list(network.named_modules()):
        if isinstance(module, ROUNDED):
            _store(name, module, precision, per_channel)
    return network


def _store(name: str, module: nn.Module, precision: str, per_channel: bool) -> None:
    weight, scale = module.weight.detach(), None
    if precision == "fp16":
        stored = weight.half()
        if not stored.isfinite().all():
            raise ValueError(f"{name}: a weight of {weight.abs().max():.3g} is beyond float16")
    else:
        axis = int("Transpose" in type(module).__name__)
        stored, scale = int8_codes(weight, per_channel, axis)
    register_parametrization(module, "weight", Stored(scale), unsafe=True)
    module.parametrizations.weight.original = nn.Parameter(stored, requires_grad=False)


# Writing -----------------------------------------------------------------------------------------


def write_program(
    network: nn.Module, example: Tensor, path: Path, format: str, metadata: dict[str, Any]
) -> None:
    """Write a program without any check.

    Raises:
        ValueError: a package is missing, or the exporter refuses the network.
    """
    writer = {"onnx": _write_onnx, "pt2": _write_pt2, "torchscript": _write_torchscript}[format]
    if format == "onnx":
        needed("onnx")
        needed("onnxruntime")
    try:
        writer(network, example, path, json.dumps(metadata))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # exporters raise errors of many kinds
        reason = " ".join(str(error).split())[:400]
        raise ValueError(
            f"{type(network).__name__} cannot be exported as {format}: {reason}"
        ) from error


def _write_onnx(network: nn.Module, example: Tensor, path: Path, metadata: str) -> None:
    onnx, unit = needed("onnx"), "frames" if example.ndim == 4 else "samples"
    axes, out_axes = {0: "batch", 2: unit}, {0: "batch", 2 if example.ndim == 4 else 3: unit}
    # Without `dynamo`: that exporter needs onnxscript, and takes much longer.
    with mock.patch("torch._C._jit_onnx_log"):  # prints the whole graph after an error
        torch.onnx.export(
            network,
            (example,),
            path,
            dynamo=False,
            do_constant_folding=False,  # it would store float32 weights in place of their codes
            opset_version=OPSET,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": axes, "output": out_axes},
        )
    model = onnx.load(path)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, metadata
    onnx.save(model, path)


def _write_pt2(network: nn.Module, example: Tensor, path: Path, metadata: str) -> None:
    from torch.fx.experimental import _config

    # Torch refuses what it cannot prove of sizes, as that a padded plane is not below the plane.
    # Here it assumes, and the check at many sizes proves.
    with _config.patch(backed_size_oblivious=True):
        program = torch.export.export(
            network,
            (example,),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    _forget_assumptions(program)
    program.example_inputs = None  # random numbers, which would go into the file
    torch.export.save(program, path, extra_files={METADATA: metadata})


def _forget_assumptions(program: torch.export.ExportedProgram) -> None:
    """Allow any size from 1 on: one frame would be refused, though it comes out right."""
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    for symbol in program.range_constraints:
        program.range_constraints[symbol] = ValueRanges(1, int_oo)
    for part in program.graph_module.modules():  # there is one for each autocast block
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.find_nodes(
                op="call_function", target=torch.ops.aten._assert_scalar.default
            ):
                part.graph.erase_node(node)
            part.graph.eliminate_dead_code()
            part.recompile()


def _write_torchscript(network: nn.Module, example: Tensor, path: Path, metadata: str) -> None:
    program = torch.jit.trace(network, example, check_trace=False)
    torch.jit.save(program, path, _extra_files={METADATA: metadata})


# What it costs -----------------------------------------------------------------------------------


def _excerpts(
    model: nn.Module, precision: str, songs: str | Path | None, accept_loss: bool
) -> tuple[list[Excerpt], tuple[str, ...]]:
    """Songs to measure the SDR on, or a note why not."""
    if precision == "fp32" and songs is None:
        return [], ("SDR: not measured, because the outputs agree; songs=… measures it",)
    try:
        return read_excerpts(model, songs), ()
    except ValueError as error:
        if precision == "fp32" or accept_loss:
            return [], (f"SDR: not measured ({error})",)
        raise ValueError(
            f"the loss of {precision} cannot be measured ({error}); accept it with --accept-loss "
            "(accept_loss=True)"
        ) from error


def _variants(
    subject: Subject, model: nn.Module, program: Program, excerpts: list[Excerpt]
) -> tuple[tuple[Variant, ...], tuple[str, ...]]:
    """The network in eager mode, the file, and for int8 what else could have been done; notes."""
    x, about = subject.random(1, TIMED_FRAMES), program.metadata
    sdr = mean_sdr(model, excerpts)
    eager = model.model if isinstance(model, Separator) and subject.bins else model
    where = next(model.parameters(), x)
    seconds = seconds_per_call(eager, x.to(where.device, where.dtype))
    suffix, precision = program.path.suffix, about["precision"]
    found = [
        Variant("network, eager", tensor_bytes(subject.network), seconds, sdr),
        of_file(program, x, excerpts, f"{suffix}, {precision}"),
    ]
    if precision == "int8" and excerpts:
        other = lightened(_copy(model.model), "int8", not about["per_channel"])
        scales = "tensor" if about["per_channel"] else "channel"
        found.append(of_network(model, other, excerpts, f"int8 per {scales}, eager"))
    notes = []
    if precision == "int8" and suffix == ".onnx":
        try:
            found.append(_dynamic(subject, program, x, excerpts))
        except Exception as error:  # of onnxruntime's tool; the file itself is good
            reason = " ".join(str(error).split())[:160]
            notes.append(f"dynamic int8 by onnxruntime: not possible ({reason})")
    return tuple(found), tuple(notes)


def _dynamic(subject: Subject, program: Program, x: Tensor, excerpts: list[Excerpt]) -> Variant:
    """The network with activations in int8 as well, by onnxruntime's own tool."""
    name, folder = "dynamic int8 by onnxruntime", program.path.parent
    with hidden_files([folder, folder], [program.path, program.path]) as (plain, quantised):
        write_program(subject.network, subject.example, plain, "onnx", {})
        other = dynamic_int8(plain, quantised, program.metadata)
        return of_file(other, x, excerpts, name)


def _refuse_loss(report: ExportReport) -> None:
    """Raise if the program separates worse than the model by too much.

    Raises:
        ValueError: names the loss.
    """
    change = report.sdr_change
    if change is not None and not change >= -MOST_LOSS:
        raise ValueError(
            f"{report.path.name}: {report.precision} changes the SDR by {change:+.2f} dB, more "
            f"than {MOST_LOSS} dB; use another precision, or accept it with --accept-loss "
            f"(accept_loss=True)\n{report}"
        )


class _Callable(ModuleType):
    __call__ = staticmethod(export)
    __signature__ = signature(export)  # without it, the first parameter would be taken for `self`


sys.modules[__name__].__class__ = _Callable  # `performance.export` is this file or its function
