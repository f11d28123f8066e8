"""The bytes of a pipeline's stages: given, counted, predicted or measured.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import nn

from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.performance import precision
from tfswa_lab.performance.blanks import Blanks
from tfswa_lab.performance.lean_load import weight_bytes
from tfswa_lab.performance.placement import HOST, StorageKeys, strided, tensors_in
from tfswa_lab.performance.plan import StageSizes, Storages, total
from tfswa_lab.performance.stage import Stage

log = logging.getLogger(__name__)


@dataclass
class Found:
    """What runs have found out about a stage, as in `StageSizes`."""

    weights: Storages | None = None
    host: int | None = None
    activations: int | None = None
    hands_on: Storages | None = None
    notes: dict[str, None] = field(default_factory=dict)  # in their order, each once


class StageBytes:
    """What is known of the bytes of each stage.

    Args:
        stages: of a pipeline.
        device: where they run.

    Attributes:
        found: by stage, what runs and predictions have found out.
        keys: of all storages.
        input: bytes of the first stage's input that have to be moved to the device.
        given: keys of the storages of that input.
    """

    def __init__(self, stages: Sequence[Stage], device: torch.device):
        self.stages, self.device = stages, device
        self.found = {stage.name: Found() for stage in stages}
        self.keys = StorageKeys()
        self.input, self.given = 0, set()
        self._in_float32: set[str] = set()  # stages that half precision failed in
        self._drafts: dict[str, nn.Module] = {}  # on the meta device
        self._headers: dict[tuple, dict[str, int]] = {}

    # Counted -------------------------------------------------------------------------------------

    def sizes(self, stage: Stage) -> StageSizes:
        """All that is known of a stage."""
        found = self.found[stage.name]
        try:
            weights, host = self._weights(stage)
        except Exception as error:
            add_note(error, f"in stage {stage.name!r}, while its weights were counted")
            raise
        activations = found.activations if stage.activations is None else int(stage.activations)
        hands_on = found.hands_on
        if stage.carries is not None:
            hands_on = {("output", stage.name): int(stage.carries)}
        by_layer, halved = self.is_by_layer(stage), partial(self._halved, stage, weights)
        return StageSizes(stage.name, weights, activations, hands_on, host, by_layer, halved)

    def _halved(self, stage: Stage, weights: Storages | None) -> int | None:
        """Bytes of the weights on the device in half precision."""
        if weights is None or self.is_cast(stage):
            return None
        if isinstance(stage.weights, Real) or stage.weights is None:
            return total(weights) // 2
        return total(self._weights(replace(stage, dtype=torch.float16), again=True)[0])

    def is_by_layer(self, stage: Stage) -> bool:
        """Whether the device has one layer at a time; the host has all, also as the device."""
        return stage.layerwise and self.device != HOST

    def _weights(self, stage: Stage, again: bool = False) -> tuple[Storages | None, int | None]:
        """On the device, and on the host where that is more; None where unknown.

        Args:
            again: count what `weights` names also where a loaded model has been counted.
        """
        given, found = stage.weights, self.found[stage.name]
        if isinstance(given, Real):
            return {("weights", stage.name): int(given)}, None
        if given is None or (found.weights is not None and not again):
            return found.weights, found.host
        dtype = None if stage.name in self._in_float32 else stage.dtype
        if callable(given):  # a module, too
            return self.of_module(self._draft(stage), dtype, self.is_by_layer(stage))
        sizes = self._in_files(stage, dtype)
        if not self.is_by_layer(stage):
            return {(stage.name, name): size for name, size in sizes.items()}, None
        layers = Counter()
        for name, size in sizes.items():
            layers[name.rpartition(".")[0]] += size
        return {("layer", stage.name): max(layers.values(), default=0)}, sum(sizes.values())

    def _in_files(self, stage: Stage, dtype: torch.dtype | None) -> dict[str, int]:
        """Bytes by tensor; a file that has been read may go, as its model may stay."""
        if (stage.name, dtype) not in self._headers:
            self._headers[stage.name, dtype] = weight_bytes(stage.weights, dtype)
        return self._headers[stage.name, dtype]

    def _draft(self, stage: Stage) -> nn.Module:
        """The module of a stage without its numbers."""
        if isinstance(stage.weights, nn.Module):
            return stage.weights
        if stage.name not in self._drafts:
            with torch.device("meta"):
                self._drafts[stage.name] = stage.weights()
        return self._drafts[stage.name]

    def of_module(
        self, module: Any, dtype: torch.dtype | None, layerwise: bool = False
    ) -> tuple[Storages, int | None]:
        """As `_weights`, for a module that is there, or a draft that will get a dtype."""
        casts = precision.cast_plan(module, dtype) if isinstance(module, nn.Module) else ()
        sizes = {
            self.keys.key(part): precision.bytes_as(part, to)
            for tensor, to in casts
            for part in strided(tensor)
        }
        if not layerwise:
            return sizes, None
        if dtype is not None and dtype.is_floating_point:
            module = precision.cast_module(deepcopy(module), dtype)
        largest = precision.largest_layer_bytes(module)
        return {("layer", min(sizes, default=0)): largest}, total(sizes)

    # Predicted -----------------------------------------------------------------------------------

    def predict(self, example: Any) -> None:
        """Find out activations and outputs on tensors that have no values."""
        self.input = self.to_move(example)
        blanks = Blanks(example)
        given = set(blanks.bytes)
        for stage in self.stages:
            found = self.found[stage.name]
            try:
                found.activations = self._predicted(stage, blanks)
            except Exception as error:
                raise ValueError(
                    f"stage {stage.name!r} cannot be predicted ({type(error).__name__}: {error}); "
                    "give its activations and carries, or call measure(value)"
                ) from error
            found.hands_on = {
                ("predicted", key): size for key, size in blanks.bytes.items() if key not in given
            }

    def _predicted(self, stage: Stage, blanks: Blanks) -> int:
        half = self.half_of(stage)
        try:
            return blanks.predict(partial(self._for_prediction, stage, half), stage.called, half)
        except Exception as error:
            failed = half and precision.needs_float32(error)
            if not failed:
                raise
        self.stay_float32(stage, failed)
        return blanks.predict(partial(self._for_prediction, stage, None), stage.called, None)

    def _for_prediction(self, stage: Stage, half: torch.dtype | None) -> Any:
        """The stage's model, built among tensors without values; it must not be kept by anyone."""
        if callable(stage.weights) and not isinstance(stage.weights, nn.Module):
            module = stage.weights()
        elif isinstance(stage.weights, nn.Module):
            module = self._without_numbers(stage.weights, half)
        else:
            module = getattr(stage.load, "__wrapped__", stage.load)()
        return module if half is None else precision.cast_module(module, half)

    @staticmethod
    def _without_numbers(module: nn.Module, half: torch.dtype | None) -> nn.Module:
        """A draft with room for numbers; a module that has them is not changed."""
        if any(tensor.is_meta for tensor in tensors_in(module)):
            return deepcopy(module).to_empty(device="cpu")
        return module if half is None else deepcopy(module)

    def half_of(self, stage: Stage) -> torch.dtype | None:
        """The dtype of a stage in half precision; None for a stage that is not, or cannot be."""
        return stage.dtype if stage.is_half and stage.name not in self._in_float32 else None

    def is_cast(self, stage: Stage) -> bool:
        """Whether a stage has another dtype than float32, and can have it."""
        plain = stage.dtype in (None, torch.float32)
        return not plain and stage.name not in self._in_float32

    def stay_float32(self, stage: Stage, why: str) -> None:
        """A stage has failed in half precision."""
        self._in_float32.add(stage.name)
        self.note(stage, f"stays float32: {why}")

    def note(self, stage: Stage, note: str) -> None:
        """A sentence for the plan and the status."""
        log.info("stage %r %s", stage.name, note)
        self.found[stage.name].notes[note] = None

    # Measured ------------------------------------------------------------------------------------

    def take_input(self, value: Any) -> None:
        """Note what the first stage is given."""
        self.input = self.to_move(value)
        self.given = set(self.keys.storages(value))

    def look_at(self, stage: Stage, output: Any) -> None:
        """Note which storages an output keeps alive, of those that were not given to the run."""
        storages = self.keys.storages(output)
        self.found[stage.name].hands_on = {
            key: size for key, size in storages.items() if key not in self.given
        }
        parts = [part for tensor in tensors_in(output) for part in strided(tensor)]
        own, kept = sum(part.nbytes for part in parts), total(storages)
        if kept > 2 * own:
            self.note(
                stage,
                f"hands on {format_bytes(own)} that keep {format_bytes(kept)} alive, as a view of "
                "a larger tensor does; clone() it in its run",
            )

    def to_move(self, value: Any) -> int:
        """Bytes of a value that are not on the device."""
        elsewhere = [x for x in tensors_in(value) if x.device.type != self.device.type]
        return sum(tensor.nbytes for tensor in elsewhere)


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error, once; some errors take none."""
    if note not in getattr(error, "__notes__", ()):
        with suppress(Exception):
            error.add_note(note)
