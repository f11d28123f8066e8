"""One stage of a pipeline: what is loaded, what is run, and what has happened to it.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfswa_lab.memory.display import Shown, aligned, html_table, shown
from tfswa_lab.performance import precision
from tfswa_lab.performance.placement import Model, map_tensors, moved
from tfswa_lab.performance.timing import format_seconds, now

DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.int8)
Weights = int | float | str | Path | Sequence | nn.Module | Callable[[], nn.Module]


def is_bytes(size: Any) -> bool:
    """Whether it is a number of bytes.

    >>> is_bytes(1.5e9), is_bytes(-1), is_bytes(True)
    (True, False, False)
    """
    is_number = isinstance(size, Real) and not isinstance(size, bool)
    return is_number and 0 <= size < float("inf")


@dataclass(frozen=True, eq=False, repr=False)
class Stage:
    """One model of a pipeline, and what is done with it. Nothing is loaded yet.

    Args:
        name: unique in its pipeline; its output is found under it.
        load: returns the model, best on the host and from a file (`lean_load.load`); it is called
            once for each loading. A model without tensors of its own, such as a function, is left
            where it is. Several stages may return the same module, or modules that share tensors.
        run: called with the model and the value of the stage before; returns the next value.
        dtype: of its weights while it runs: float16 or bfloat16 (inputs are cast too, and outputs
            come back as float32), or int8 for weights alone (`precision.int8_weights`). This
            changes the module that `load` returns. None leaves all as it is.
        weights: where their bytes are known from before they are loaded: a number of bytes on the
            device, a safetensors file or several, a module on the meta device, or a function that
            builds the module.
        activations: bytes on the device, at most, beyond the weights and what earlier stages have
            handed on; with its own output.
        carries: bytes of the storages that its output keeps alive.
        layerwise: the device holds one layer at a time, for a model that is too large for it.

    Raises:
        ValueError: the name is empty, a dtype or a number makes no sense.
        TypeError: `load` or `run` cannot be called.
    """

    name: str
    load: Callable[[], Any]
    run: Callable[[Any, Any], Any]
    dtype: torch.dtype | None = None
    weights: Weights | None = None
    activations: float | None = None
    carries: float | None = None
    layerwise: bool = False

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name={self.name!r}: a stage's name is a text, such as 'separator'")
        for what in ("load", "run"):
            if not callable(getattr(self, what)):
                raise TypeError(
                    f"stage {self.name!r}: {what}={getattr(self, what)!r} is no function"
                )
        if self.dtype not in DTYPES:
            choices = ", ".join(map(str, DTYPES))
            raise ValueError(f"stage {self.name!r}: dtype={self.dtype!r}; choose among {choices}")
        numbers = {"activations": self.activations, "carries": self.carries}
        if isinstance(self.weights, Real):
            numbers["weights"] = self.weights
        for what, size in numbers.items():
            if size is not None and not is_bytes(size):
                raise ValueError(f"stage {self.name!r}: {what}={size!r} is no number of bytes")

    def __repr__(self) -> str:
        half = "" if self.dtype is None else f", {self.dtype}"
        return f"Stage({self.name!r}{half}{', layerwise' * self.layerwise})"

    @property
    def is_half(self) -> bool:
        """Whether inputs and outputs are cast."""
        return self.dtype in (torch.float16, torch.bfloat16)

    def called(
        self, model: Model, holder: Any, device: torch.device, half: torch.dtype | None = None
    ) -> Any:
        """The next value, with tensors moved to the device, and cast on both sides.

        Args:
            model: of this stage.
            holder: an object whose attribute `value` is the value. The caller passes a holder, so
                that it keeps no reference to the value itself.
            device: where the stage runs.
            half: that inputs are cast to; then outputs become float32.
        """
        value = map_tensors(lambda tensor: moved(tensor, device), holder.value)
        if half is None:
            return self.run(model.module, value)
        output = self.run(model.module, precision.cast_value(value, half))
        return precision.cast_value(output, torch.float32)


@dataclass
class StageStatus:
    """What has happened to a stage. Bytes and seconds; None where nothing is known.

    Args:
        place: where its model is: "not loaded", "cpu", "cuda:0".
        weights: bytes of its weights, as last loaded.
        peak: the most on the GPU during its last run; None without CUDA, not 0.
        loads: how often its model was loaded for it.
        runs: how often it has finished.
        loading: seconds spent loading, in all; likewise moving and running.
        notes: such as "stays float32: …".
    """

    place: str = "not loaded"
    weights: int | None = None
    peak: int | None = None
    loads: int = 0
    runs: int = 0
    loading: float = 0.0
    moving: float = 0.0
    running: float = 0.0
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def clocked(self, what: str) -> Iterator[None]:
        """Add the seconds of a block to `loading`, `moving` or `running`."""
        began = now()
        try:
            yield
        finally:
            setattr(self, what, getattr(self, what) + now() - began)


class Status(Shown, dict):
    """A `StageStatus` for each stage, by name."""

    @property
    def brief(self) -> str:
        """Which models are loaded."""
        places = [f"{name} on {each.place}" for name, each in self.items() if each.loads]
        return ", ".join(places) or "nothing loaded"

    def rows(self) -> list[list[str]]:
        """A table of texts, with its head."""
        counts = ["loads", "runs"]
        clocks = ["loading", "moving", "running"]
        rows = [["stage", "place", "weights", "peak", *counts, *clocks]]
        for name, each in self.items():
            row = [name, each.place, shown(each.weights), shown(each.peak)]
            row += [str(getattr(each, count)) for count in counts]
            rows.append(row + [format_seconds(getattr(each, clock)) for clock in clocks])
        return rows

    def __str__(self) -> str:
        notes = [f"{name}: {note}" for name, each in self.items() for note in each.notes]
        return "\n".join([*aligned(self.rows()), *notes][:25])

    def _repr_html_(self) -> str:
        return html_table(self.rows())
