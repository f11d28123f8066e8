"""Pipelines of several models on a device that cannot hold all of them: plan, load, run, free.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import nn

from tfswa_lab.device import pick_device
from tfswa_lab.memory import gauges
from tfswa_lab.memory.out_of_memory import free_what_it_holds
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.performance import precision
from tfswa_lab.performance.adapters import modules_in
from tfswa_lab.performance.blanks import Blanks
from tfswa_lab.performance.lean_load import weight_bytes
from tfswa_lab.performance.placement import (
    HOST,
    Model,
    StorageKeys,
    map_tensors,
    moved,
    on,
    strided,
    tensors_in,
)
from tfswa_lab.performance.plan import (
    POLICIES,
    Plan,
    Room,
    StageSizes,
    Storages,
    total,
)
from tfswa_lab.performance.stage import Stage, StageStatus, Status, is_bytes
from tfswa_lab.performance.timing import peak_bytes, profiler_runs

log = logging.getLogger(__name__)
_measuring = threading.Lock()  # torch has one profiler for all threads


@dataclass
class _Found:
    """What runs have found out about a stage, as in `StageSizes`."""

    weights: Storages | None = None
    host: int | None = None
    activations: int | None = None
    hands_on: Storages | None = None
    notes: dict[str, None] = field(default_factory=dict)  # in their order, each once


@dataclass
class _Run:
    """What travels through a run. Functions hold this and not the value: an error keeps them."""

    value: Any  # the next stage's input
    plan: Plan
    modes: dict[str, str]
    measuring: bool = False


class StagedPipeline:
    """Stages in a row, each with a model of its own, on a device that may not hold all of them.

    Stages run without gradients: an output with a graph would keep the weights alive. Each stage's
    output is kept in `outputs`, under its name.

    - "resident": all models are loaded before the first stage runs, and stay on the device.
    - "lazy": each is loaded when it is first used, and stays.
    - "sequential": each is loaded, runs, and is freed. Nothing of it is on the device afterwards.
    - "offload": each stays on the host, and is on the device while it runs.
    - "auto": those stay that fit beside the largest of the others, most often used first; the
      others are offloaded if the host has room, else sequential. Where a size is unknown, the
      first run is sequential, and measures.

    On a CPU the device is the host: "offload" is the same as "resident" there.

    Args:
        stages: in their order.
        device: as for `pick_device`.
        policy: one of the above.
        budget: bytes that this process may use on the device, with the CUDA context; None for all
            there is: the GPU's memory, up to torch's memory fraction, or the host's free memory.
        context: bytes that are taken before anything is loaded; None reads what the GPU's memory
            holds beside torch's allocator, which counts other processes too. 0 on a CPU.
        keep_all: keep each stage's output in `outputs` until the next run; else the last one only.
        keep_on_host: move outputs to the host. On the device, an output counts by its storage: a
            small view keeps all of it alive.
        prefetch: load the next stage's model on the host while a stage runs, if there is room.

    Raises:
        ValueError: no stage, two of the same name, an unknown policy or device, or a budget that is
            no number of bytes.

    >>> double = Stage("double", lambda: nn.Linear(1, 1), lambda model, x: 2 * x, activations=8)
    >>> add = Stage("add", lambda: nn.Linear(1, 1), lambda model, x: x + 1, activations=8)
    >>> with StagedPipeline([double, add], device="cpu", policy="sequential") as pipeline:
    ...     pipeline.run(torch.ones(2))
    tensor([3., 3.])
    >>> pipeline.outputs["double"]
    tensor([2., 2.])
    """

    def __init__(
        self,
        stages: Iterable[Stage],
        device: str | torch.device = "auto",
        policy: str = "auto",
        budget: float | None = None,
        *,
        context: float | None = None,
        keep_all: bool = True,
        keep_on_host: bool = False,
        prefetch: bool = False,
    ):
        self.stages = tuple(stages)
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise TypeError(f"{stage!r} is no Stage: write Stage(name, load, run)")
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"stages={names}: name one or more stages, each once")
        for what, size in (("budget", budget), ("context", context)):
            if size is not None and not is_bytes(size):
                raise ValueError(f"{what}={size!r} is no number of bytes")
        self.device = pick_device(device)
        self.budget, self.context = budget, context
        self.keep_all, self.keep_on_host, self.prefetch = keep_all, keep_on_host, prefetch
        self.outputs: dict[str, Any] = {}
        self._done = 0  # stages of the last run that have finished
        self._held: dict[str, Model] = {}
        self._ahead: tuple[str, Future] | None = None  # a model that a thread loads
        self._status = {name: StageStatus() for name in names}
        self._found = {name: _Found() for name in names}
        self._in_float32: dict[str, str] = {}  # stages that half precision failed in, and why
        self._drafts: dict[str, nn.Module] = {}  # on the meta device
        self._keys = StorageKeys()
        self._input_bytes = 0
        self._given: set[int] = set()  # keys of the storages of the first stage's input
        self.policy = policy

    @property
    def policy(self) -> str:
        """What happens to the models. A change frees them all."""
        return self._policy

    @policy.setter
    def policy(self, policy: str) -> None:
        if policy not in (*POLICIES, "auto"):
            raise ValueError(f"policy={policy!r}; choose among {', '.join((*POLICIES, 'auto'))}")
        self.cleanup()
        self._policy = policy

    # Plan ----------------------------------------------------------------------------------------

    def plan(self, example: Any = None) -> Plan:
        """What each policy needs, found out without loading anything.

        Args:
            example: an input of the first stage, on any device. Activations that nobody has given
                or measured are predicted for it by `memory.predict`; without one they are unknown.

        Raises:
            ValueError: no policy fits; names the stage, what it needs, what there is, and what
                would help. Or a stage cannot be predicted.
        """
        if example is not None:
            self._predict(example)
        plan = self._plan()
        plan.check()
        return plan

    def _plan(self) -> Plan:
        notes = [f"{name}: {note}" for name, found in self._found.items() for note in found.notes]
        return Plan(
            tuple(map(self._sizes, self.stages)),
            self._room(),
            self.keep_all,
            self.keep_on_host,
            self._input_bytes,
            tuple(notes),
        )

    def _room(self) -> Room:
        context = self.context
        if self.device.type != "cuda":
            held = (self._of_module(model.module, None)[0] for model in self._held.values())
            free = gauges.host_available() + total(*held)
            budget = free if self.budget is None else self.budget
            return Room(int(budget), int(context or 0))
        host = gauges.host_available()
        if self.budget is not None and context is not None:
            return Room(int(self.budget), int(context), host)
        memory = gauges.device_memory(self.device)
        if context is None:  # what others hold in torch's allocator counts, too
            others = gauges.allocated(self.device) - self._own_bytes()
            context = memory.used - gauges.reserved(self.device) + others
        share = torch.cuda.get_per_process_memory_fraction(self.device) * memory.total
        budget = min(memory.total, share + context) if self.budget is None else self.budget
        return Room(int(budget), int(context), host)

    def _own_bytes(self) -> int:
        """Bytes of models and outputs on the device."""
        models = [model.module for model in self._held.values() if not model.lives_on_host]
        modules = [module for module in models if isinstance(module, nn.Module)]
        held = [x for thing in (*modules, self.outputs) for x in tensors_in(thing)]
        return total(self._keys.storages([x for x in held if on(x, self.device)]))

    def _sizes(self, stage: Stage) -> StageSizes:
        found = self._found[stage.name]
        try:
            weights, host = self._weights(stage)
        except Exception as error:
            add_note(error, f"in stage {stage.name!r}, while its weights were counted")
            raise
        activations = found.activations if stage.activations is None else int(stage.activations)
        hands_on = found.hands_on
        if stage.carries is not None:
            hands_on = {("output", stage.name): int(stage.carries)}
        by_layer, halved = self._is_by_layer(stage), self._halved(stage, weights)
        return StageSizes(stage.name, weights, activations, hands_on, host, by_layer, halved)

    def _halved(self, stage: Stage, weights: Storages | None) -> int | None:
        """Bytes of the weights on the device in half precision."""
        if weights is None or stage.dtype not in (None, torch.float32):
            return None
        if isinstance(stage.weights, Real) or stage.weights is None:
            return total(weights) // 2
        return total(self._weights(replace(stage, dtype=torch.float16), again=True)[0])

    def _is_by_layer(self, stage: Stage) -> bool:
        """Whether the device has one layer at a time; the host has all, also as the device."""
        return stage.layerwise and self.device != HOST

    def _weights(self, stage: Stage, again: bool = False) -> tuple[Storages | None, int | None]:
        """On the device, and on the host where that is more; None where unknown.

        Args:
            again: count what `weights` names also where a loaded model has been counted.
        """
        given, found = stage.weights, self._found[stage.name]
        if isinstance(given, Real):
            return {("weights", stage.name): int(given)}, None
        if given is None or (found.weights is not None and not again):
            return found.weights, found.host
        dtype = None if stage.name in self._in_float32 else stage.dtype
        if callable(given):  # a module, too
            return self._of_module(self._draft(stage), dtype, self._is_by_layer(stage))
        sizes = weight_bytes(given, dtype)
        if not self._is_by_layer(stage):
            return {(stage.name, name): size for name, size in sizes.items()}, None
        layers = Counter()
        for name, size in sizes.items():
            layers[name.rpartition(".")[0]] += size
        return {("layer", stage.name): max(layers.values(), default=0)}, sum(sizes.values())

    def _draft(self, stage: Stage) -> nn.Module:
        """The module of a stage without its numbers."""
        if isinstance(stage.weights, nn.Module):
            return stage.weights
        if stage.name not in self._drafts:
            with torch.device("meta"):
                self._drafts[stage.name] = stage.weights()
        return self._drafts[stage.name]

    def _of_module(
        self, module: Any, dtype: torch.dtype | None, layerwise: bool = False
    ) -> tuple[Storages, int | None]:
        """As `_weights`, for a module that is there, or a draft that will get a dtype."""
        casts = precision.cast_plan(module, dtype) if isinstance(module, nn.Module) else ()
        sizes = {
            self._keys.key(part): precision.bytes_as(part, to)
            for tensor, to in casts
            for part in strided(tensor)
        }
        if not layerwise:
            return sizes, None
        if dtype is not None and dtype.is_floating_point:
            module = precision.cast_module(deepcopy(module), dtype)
        largest = precision.largest_layer_bytes(module)
        return {("layer", min(sizes, default=0)): largest}, total(sizes)

    def _predict(self, example: Any) -> None:
        """Find out activations and outputs on tensors that have no values."""
        self._input_bytes = self._bytes_to_move(example)
        blanks = Blanks(example)
        given = set(blanks.bytes)
        for stage in self.stages:
            found = self._found[stage.name]
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
        half = stage.dtype if stage.is_half and stage.name not in self._in_float32 else None
        make = partial(self._for_prediction, stage, half)
        run = partial(_called, stage.run)
        try:
            return blanks.predict(make, run, half)
        except Exception as error:
            failed = half and precision.needs_float32(error)
            if not failed:
                raise
        self._stays_float32(stage, failed)
        return blanks.predict(partial(self._for_prediction, stage, None), run, None)

    def _for_prediction(self, stage: Stage, half: torch.dtype | None) -> Any:
        """The stage's model, built among tensors without values; it must not be kept by anyone."""
        if callable(stage.weights) and not isinstance(stage.weights, nn.Module):
            module = stage.weights()
        elif isinstance(stage.weights, nn.Module):
            module = deepcopy(self._draft(stage).to("meta")).to_empty(device="cpu")
        else:
            module = getattr(stage.load, "__wrapped__", stage.load)()
        return module if half is None else precision.cast_module(module, half)

    # Run -----------------------------------------------------------------------------------------

    def run(self, value: Any = None, *, resume: bool = False, reload: bool = False) -> Any:
        """All stages in their order.

        A stage that raises is freed, also where somebody keeps the error; what earlier stages made
        stays in `outputs`. Ctrl-C frees all models.

        Args:
            value: the input of the first stage, on any device.
            resume: continue after the last stage that finished, with its output instead of
                `value`.
            reload: load all models again, also those that have stayed.

        Returns:
            The output of the last stage.

        Raises:
            ValueError: no policy fits ("auto"), or there is nothing to resume.
            Exception: a stage's own, with a note that names the stage.
        """
        first = self._first(resume)
        if resume and first == 0 and value is None:
            raise ValueError(
                f"resume=True: stage {self.stages[0].name!r} has not finished; give its input again"
            )
        if reload:
            self.cleanup()
        if first:
            value = self.outputs[self.stages[first - 1].name]
        else:
            self.outputs, self._done = {}, 0
        plan = self._plan()
        measuring = self.policy == "auto" and bool(plan.unknown)
        if self.policy == "auto" and not measuring:
            plan.check()
        modes = plan.modes_of("sequential" if measuring else self.policy)
        state = _Run(value, plan, modes, measuring)
        del value  # it is kept no longer than it is needed
        return self._go(state, first)

    __call__ = run

    def _first(self, resume: bool) -> int:
        if not resume:
            return 0
        if self._done == len(self.stages):
            raise ValueError("resume=True: the last run has finished; there is nothing to resume")
        return self._done

    def measure(self, value: Any) -> Plan:
        """Run once, one model at a time, and find out all bytes; the plan that follows from them.

        Where a stage has a dtype of its own, it is loaded again and runs without it, and a note in
        `status` and plan says how much that changes its output.

        Raises:
            ValueError: no policy fits.
            Exception: as for `run`.
        """
        self.cleanup()
        self.outputs, self._done = {}, 0
        plan = self._plan()
        self._go(_Run(value, plan, plan.modes_of("sequential"), measuring=True), first=0)
        return self.plan()

    def _go(self, run: _Run, first: int) -> Any:
        if first == 0:
            self._input_bytes = self._bytes_to_move(run.value)
            self._given = set(self._keys.storages(run.value))
        self._keep_only(run.modes)
        try:
            with torch.no_grad():
                for stage in self.stages:
                    if run.modes[stage.name] == "resident":
                        self._bring(stage, "resident")
                for index in range(first, len(self.stages)):
                    self._step(run, index)
            return run.value
        except BaseException as error:
            self._forget_ahead()
            if not isinstance(error, Exception):
                self.cleanup()
            raise
        finally:
            run.value = None

    def _step(self, run: _Run, index: int) -> None:
        """One stage: load, move, run, and free what does not stay."""
        stage = self.stages[index]
        self._warn(run, index)
        failed = None
        try:
            self._bring(stage, run.modes[stage.name])
            self._load_next(run, index)
            self._keep(index, self._run(run, stage))
        except BaseException as error:
            self._drop(stage.name)
            failed = stage.is_half and precision.needs_float32(error)
            if not failed or stage.name in self._in_float32:
                raise
        if failed:
            self._stays_float32(stage, failed)
            return self._step(run, index)
        run.value = self.outputs[stage.name]
        self._leave(stage, run.modes[stage.name])

    def _warn(self, run: _Run, index: int) -> None:
        running = [moment for moment in run.plan.moments(run.modes) if moment.doing != "loading"]
        if len(running) > len(self.stages) and self.stages[-1].name in self._held:
            index += len(self.stages)  # all have stayed from an earlier run
        if (size := running[index].size) > run.plan.room.budget:
            log.warning(
                "stage %r is predicted to need %s, and the budget is %s",
                running[index].stage,
                format_bytes(size),
                format_bytes(run.plan.room.budget),
            )

    def _stays_float32(self, stage: Stage, why: str) -> None:
        self._in_float32[stage.name] = why
        self._note(stage, f"stays float32: {why}")

    def _note(self, stage: Stage, note: str) -> None:
        log.info("stage %r %s", stage.name, note)
        self._found[stage.name].notes[note] = None

    # Models --------------------------------------------------------------------------------------

    def _bring(self, stage: Stage, mode: str) -> None:
        """The stage's model to where it runs."""
        status = self._status[stage.name]
        if (model := self._held.get(stage.name)) is None:
            with status.clocked("loading"):
                module = _named(partial(self._loaded, stage), stage, "loading")
            status.loads += 1
            model = self._held[stage.name] = Model(module, self.device, mode == "offload")
            del module
        try:
            with status.clocked("moving"):
                if not stage.layerwise:
                    _named(model.move_in, stage, "moving")
        except BaseException:
            self._drop(stage.name)
            raise
        found = self._found[stage.name]
        by_layer = self._is_by_layer(stage)
        found.weights, found.host = self._of_module(model.module, None, by_layer)
        status.weights = total(found.weights) if found.host is None else found.host

    def _loaded(self, stage: Stage) -> Any:
        """The stage's model, from the thread that has begun to load it, or loaded now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == stage.name:
            return ahead[1].result()
        if ahead is not None:
            _wait(ahead[1])
        return self._load(stage)

    def _load(self, stage: Stage) -> Any:
        module = stage.load()
        if not isinstance(module, nn.Module):
            refuse_hidden_modules(module)
            return module
        if stage.dtype is not None and sys.getrefcount(module) > 2:
            module = deepcopy(module)  # somebody else uses it as it is
        if stage.dtype is torch.int8:
            module = precision.int8_weights(module)
        elif stage.dtype is not None and stage.name not in self._in_float32:
            module = precision.cast_module(module, stage.dtype)
            if kept := precision.complex_in(module):
                self._note(stage, f"keeps what has no half precision: {', '.join(kept)}")
        if stage.layerwise and not precision.is_layerwise(module):
            module = precision.layerwise(module, self.device)
        return module

    def _load_ahead(self, stage: Stage) -> Any:
        """In a thread: with the pages of the file, which a mapped model would read when it runs."""
        with torch.no_grad():
            module = self._load(stage)
            for tensor in tensors_in(module) if isinstance(module, nn.Module) else ():
                if on(tensor, HOST) and tensor.layout == torch.strided:
                    tensor.detach().flatten()[:: 4096 // tensor.element_size()].any()
        return module

    def _load_next(self, run: _Run, index: int) -> None:
        """Begin to load the next stage's model in a thread, if it is wanted and there is room."""
        if not self.prefetch or index + 1 == len(self.stages):
            return
        following = self.stages[index + 1]
        if following.name in self._held:
            return
        if not run.plan.has_room_for_next(run.modes, index):
            self._note(following, "is not loaded ahead: there is no room, or its bytes are unknown")
            return
        pool = ThreadPoolExecutor(1, "tfswa-lab-load")
        self._ahead = following.name, pool.submit(self._load_ahead, following)
        pool.shutdown(wait=False)

    def _forget_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            _wait(ahead[1])

    def _leave(self, stage: Stage, mode: str) -> None:
        """What happens to a stage's model after its run."""
        if mode == "sequential":
            self._drop(stage.name)
        elif mode == "offload" and not stage.layerwise:
            with self._status[stage.name].clocked("moving"):
                model = self._held[stage.name]
                model.move_out(self._staying(model))
            self._empty_cache()

    def _keep_only(self, modes: dict[str, str]) -> None:
        """Free models that an earlier run has left and this one does not keep."""
        for name, model in list(self._held.items()):
            if modes[name] == "sequential" or (modes[name] == "offload") != model.lives_on_host:
                self._drop(name)

    def _drop(self, name: str) -> None:
        if (model := self._held.pop(name, None)) is not None:
            if isinstance(model.module, nn.Module):
                precision.remove_layerwise(model.module)
            model.let_go(self._staying(model))
            self._empty_cache()

    def _staying(self, leaving: Model) -> set[int]:
        """Tensors of the other models on the device, which a model that leaves may share."""
        others = (m.module for m in self._held.values() if m is not leaving and not m.lives_on_host)
        modules = (module for module in others if isinstance(module, nn.Module))
        return {id(tensor) for module in modules for tensor in tensors_in(module)}

    def _empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def cleanup(self) -> None:
        """Free all models. Outputs stay. It may be called again, and the next run works."""
        self._forget_ahead()
        for name in list(self._held):
            self._drop(name)

    def __enter__(self) -> StagedPipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.cleanup()

    # Values --------------------------------------------------------------------------------------

    def _run(self, run: _Run, stage: Stage) -> Any:
        status, found = self._status[stage.name], self._found[stage.name]
        model = self._held[stage.name]
        half = stage.dtype if stage.is_half and stage.name not in self._in_float32 else None
        work = partial(_called, stage.run, model, run, self.device, half)
        generators = get_rng_state() if run.measuring else None
        on_gpu = self.device.type == "cuda"
        before = gauges.allocated(self.device) if on_gpu else 0
        if on_gpu:
            gauges.reset_peak(self.device)
        with status.clocked("running"):
            if run.measuring and not on_gpu:
                output, activations = _named(partial(_measured, work), stage, "running")
                found.activations = found.activations if activations is None else activations
            else:
                output = _named(work, stage, "running")
        if on_gpu:
            status.peak = gauges.peak_allocated(self.device)
            found.activations = status.peak - before - self._bytes_to_move(run.value)
        status.runs += 1
        _named(partial(self._look_at, stage, output), stage, "looking at its output")
        if half is not None and not _is_finite(output):
            self._note(stage, f"in {half}, its output has numbers that are not finite")
        if run.measuring and stage.dtype is not None and stage.name not in self._in_float32:
            self._compare(stage, run, output, generators)
        return output

    def _look_at(self, stage: Stage, output: Any) -> None:
        """Note which storages an output keeps alive, of those that were not given to the run."""
        storages = self._keys.storages(output)
        self._found[stage.name].hands_on = {
            key: size for key, size in storages.items() if key not in self._given
        }
        parts = [part for tensor in tensors_in(output) for part in strided(tensor)]
        own, kept = sum(part.nbytes for part in parts), total(storages)
        if kept > 2 * own:
            self._note(
                stage,
                f"hands on {format_bytes(own)} that keep {format_bytes(kept)} alive, as a view of "
                "a larger tensor does; clone() it in its run",
            )

    def _compare(self, stage: Stage, run: _Run, output: Any, generators: Any) -> None:
        """Run the stage as it was loaded, and note how much its dtype changes the output."""
        if stage.layerwise:
            return  # there may be no room for all of it
        self._drop(stage.name)
        after = get_rng_state()
        set_rng_state(generators)  # a run that draws noise draws the same
        plain = None
        try:
            plain = Model(stage.load(), self.device)
            plain.move_in()
            reference = _called(stage.run, plain, run, self.device)
            change = precision.output_change_db(reference, output)
        except Exception as error:
            self._note(stage, f"in {stage.dtype}, was not compared with float32: {error}")
            free_what_it_holds(error)
        else:
            self._note(stage, f"in {stage.dtype}, its output has an SNR of {change:.1f} dB")
        finally:
            set_rng_state(after)
            if plain is not None:
                plain.let_go()

    def _keep(self, index: int, output: Any) -> None:
        if self.keep_on_host:
            output = map_tensors(lambda tensor: moved(tensor, HOST), output)
        if not self.keep_all:
            self.outputs = {}
        self.outputs[self.stages[index].name] = output
        self._done = index + 1

    def _bytes_to_move(self, value: Any) -> int:
        elsewhere = [x for x in tensors_in(value) if x.device.type != self.device.type]
        return sum(tensor.nbytes for tensor in elsewhere)

    # Looks ---------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Where each stage's model is, its bytes, and how often and how long it was used."""
        for stage in self.stages:
            status, model = self._status[stage.name], self._held.get(stage.name)
            status.place = "not loaded" if model is None else self._place(stage, model)
            status.notes = list(self._found[stage.name].notes)
        return Status({name: deepcopy(each) for name, each in self._status.items()})

    def _place(self, stage: Stage, model: Model) -> str:
        if stage.layerwise:
            return "cpu, layer by layer"
        tensors = tensors_in(model.module) if isinstance(model.module, nn.Module) else []
        return str(tensors[0].device) if tensors else "loaded"

    def __repr__(self) -> str:
        names = ", ".join(stage.name for stage in self.stages)
        return f"StagedPipeline({names}; {self.policy} on {self.device})"


def get_rng_state() -> tuple:
    """The states of torch's generators, of the host and of all GPUs in use."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), on_gpus


def set_rng_state(states: tuple) -> None:
    """What `get_rng_state` has returned."""
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])


def refuse_hidden_modules(thing: Any) -> None:
    """Refuse a model that is no module and holds some, which nobody would move or count.

    Raises:
        TypeError: it does.
    """
    if held := modules_in(thing):
        raise TypeError(
            f"load returned a {type(thing).__name__} that holds a {type(held[0]).__name__}; return "
            "the module, or wrap the object: adapters.Wrapped(thing, call='__call__')"
        )


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error, once; some errors take none."""
    if note not in getattr(error, "__notes__", ()):
        with suppress(Exception):
            error.add_note(note)


def _is_finite(output: Any) -> bool:
    floats = (x for x in tensors_in(output) if x.is_floating_point() and x.layout == torch.strided)
    return all(bool(x.isfinite().all()) for x in floats)


def _wait(future: Future) -> None:
    """Wait until a thread has ended, whatever became of it."""
    if not future.cancel():
        future.exception()


def _named(work: Callable[[], Any], stage: Stage, doing: str) -> Any:
    """`work()`. An error gets a note with the stage's name, and its frames let go of all."""
    try:
        return work()
    except BaseException as error:
        add_note(error, f"in stage {stage.name!r}, while {doing}")
        free_what_it_holds(error)
        raise
    finally:
        del work


def _called(
    function: Callable[[Any, Any], Any],
    model: Model,
    run: _Run,
    device: torch.device,
    half: torch.dtype | None = None,
) -> Any:
    """A stage's output, with tensors moved to the device, and cast on both sides."""
    value = map_tensors(lambda tensor: moved(tensor, device), run.value)
    if half is None:
        return function(model.module, value)
    output = function(model.module, precision.cast_value(value, half))
    return precision.cast_value(output, torch.float32)


def _measured(work: Callable[[], Any]) -> tuple[Any, int | None]:
    """What it returns, and the most bytes that it held; None while something else is profiled."""
    if not _measuring.acquire(blocking=False):
        return work(), None
    try:
        if profiler_runs():
            return work(), None
        outputs = []
        peak = peak_bytes(lambda: outputs.append(work()))
    finally:
        _measuring.release()
    return outputs[0], peak
