"""A value without numbers that goes through the stages of a pipeline, to predict their memory.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tfswa_lab.memory.predict import predict
from tfswa_lab.performance.placement import HOST, Model, StorageKeys, map_tensors, tensors_in


class Blanks:
    """A value whose tensors have a size and no numbers, and the storages that they stand for.

    Args:
        example: the value.

    Attributes:
        value: tensors on the meta device, in the same places.
        bytes: of each storage that the value keeps alive; one that a stage only passes on keeps
            its key.
    """

    def __init__(self, example: Any):
        self._next, self._key_of = count(), {}
        keys = StorageKeys()
        self._renew(example, lambda tensor: ("example", keys.key(tensor)))

    def _renew(self, value: Any, key_of: Callable[[Tensor], Any]) -> None:
        names, self.bytes = {}, {}

        def blank(tensor: Tensor) -> Tensor:
            made = _empty_like(tensor, "meta")
            names[id(made)] = key = key_of(tensor)
            self.bytes[key] = tensor.untyped_storage().nbytes()
            return made

        self.value = map_tensors(blank, value)
        self._key_of = names

    def predict(
        self, make: Callable[[], Any], run: Callable[..., Any], half: torch.dtype | None
    ) -> int:
        """Send the value through a stage, and return the stage's activations in bytes.

        Args:
            make: builds the stage's model.
            run: as `Stage.called`.
            half: the dtype of inputs, if they are cast.

        Raises:
            ValueError: `make` returns a model that somebody keeps, which has no numbers now.
        """
        watched = []

        def make_step() -> Callable[[], None]:
            module = make()
            if isinstance(module, nn.Module):
                watched.append(weakref.ref(module))
                for tensor in tensors_in(module):
                    tensor.detach()  # a real one is counted from here on
            keys, given = StorageKeys(), {}

            def filled(blank: Tensor) -> Tensor:
                tensor = _empty_like(blank, "cpu")
                given[keys.key(tensor)] = self._key_of[id(blank)]
                return tensor

            state = SimpleNamespace(value=map_tensors(filled, self.value))
            model = Model(module, HOST)

            @torch.no_grad()
            def step() -> None:
                output = run(model, state, HOST, half)
                new: dict[int, tuple] = {}

                def key_of(tensor: Tensor) -> Any:
                    key = keys.key(tensor)
                    return given.get(key) or new.setdefault(key, ("made", next(self._next)))

                self._renew(output, key_of)

            return step

        prediction = predict(make_step, steps=1)
        self._refuse_kept(watched)
        allocated = prediction.timeline.allocated()
        began = prediction.timeline.steps[0]
        return max(allocated[began:]) - allocated[began]

    def _refuse_kept(self, watched: list[weakref.ref]) -> None:
        if any(watch() is not None for watch in watched):
            gc.collect()
        for watch in watched:
            module = watch()
            fake = () if module is None else tensors_in(module)
            if any(isinstance(tensor, FakeTensor) for tensor in fake):
                raise ValueError(
                    "its load keeps the model that it returns, and that one has no numbers now; "
                    "make the loader again, and give weights=, a function that builds the module"
                )


def _empty_like(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
