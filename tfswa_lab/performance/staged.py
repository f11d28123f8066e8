"""Pipelines of several models on a device that cannot hold all of them: plan, load, run, free.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tfswa_lab.device import pick_device
from tfswa_lab.memory import gauges
from tfswa_lab.memory.out_of_memory import free_what_it_holds
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.performance import precision
from tfswa_lab.performance.adapters import modules_in
from tfswa_lab.performance.placement import (
    HOST,
    Model,
    map_tensors,
    moved,
    on,
    tensors_in,
)
from tfswa_lab.performance.plan import (
    POLICIES,
    Plan,
    Room,
    total,
)
from tfswa_lab.performance.stage import Stage, StageStatus, Status, is_bytes
from tfswa_lab.performance.stage_bytes import StageBytes, add_note
from tfswa_lab.performance.timing import peak_bytes, profiler_runs
from tfswa_lab.performance.training_state import random_states

log = logging.getLogger(__name__)
_measuring = threading.Lock()  # torch has one profiler for all threads


@dataclass
class _Run:
    """What travels through a run. Functions hold this and not the value: an error keeps them."""

    value: Any  # the next stage's input
    plan: Plan
    modes: dict[str, str]
    measuring: bool = False  # activations
    comparing: bool = False  # outputs of stages with a dtype, with those without it


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

    On a CPU the device is the host: "offload" is the same as "resident" there. On a GPU, each stage
    starts torch's count of the peak anew.

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
        self._warned: dict[str, int] = {}  # of stages, and the bytes that they were said to need
        self._held: dict[str, Model] = {}
        self._ahead: tuple[str, Future] | None = None  # a model that a thread loads
        self._status = {name: StageStatus() for name in names}
        self._bytes = StageBytes(self.stages, self.device)
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
            self._bytes.predict(example)
        plan = self._plan()
        plan.check()
        return plan

    def _plan(self) -> Plan:
        found = self._bytes.found.items()
        notes = [f"{name}: {note}" for name, each in found for note in each.notes]
        return Plan(
            tuple(map(self._bytes.sizes, self.stages)),
            self._room(),
            self.keep_all,
            self.keep_on_host,
            self._bytes.input,
            tuple(notes),
        )

    def _room(self) -> Room:
        context = self.context
        if self.device.type != "cuda":
            held = (self._bytes.of_module(model.module, None)[0] for model in self._held.values())
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
        models = (model for model in self._held.values() if not model.lives_on_host)
        held = [x for model in models for x in model.tensors] + tensors_in(self.outputs)
        return total(self._bytes.keys.storages([x for x in held if on(x, self.device)]))

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
        self._go(_Run(value, plan, plan.modes_of("sequential"), measuring=True, comparing=True), 0)
        return self.plan()

    def _go(self, run: _Run, first: int) -> Any:
        if first == 0:
            self._bytes.take_input(run.value)
        self._keep_only(run.modes)
        try:
            with torch.no_grad():
                for stage in self.stages[first:]:
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
            failed = self._bytes.half_of(stage) and precision.needs_float32(error)
            if not failed:
                raise
        if failed:
            self._bytes.stay_float32(stage, failed)
            return self._step(run, index)
        run.value = self.outputs[stage.name]
        self._leave(stage, run.modes[stage.name])

    def _warn(self, run: _Run, index: int) -> None:
        running = run.plan.running(run.modes)
        if len(running) > len(self.stages) and self.stages[-1].name in self._held:
            index += len(self.stages)  # all models are there since an earlier run
        size, name = running[index].size, running[index].stage
        if size > run.plan.room.budget and self._warned.get(name) != size:
            self._warned[name] = size
            log.warning(
                "stage %r is predicted to need %s, and the budget is %s",
                name,
                format_bytes(size),
                format_bytes(run.plan.room.budget),
            )

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
        found, by_layer = self._bytes.found[stage.name], self._bytes.is_by_layer(stage)
        found.weights, found.host = self._bytes.of_module(model.module, None, by_layer)
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
        elif self._bytes.is_cast(stage):
            module = precision.cast_module(module, stage.dtype)
            if kept := precision.complex_in(module):
                self._bytes.note(stage, f"keeps what has no half precision: {', '.join(kept)}")
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
            self._bytes.note(
                following, "is not loaded ahead: there is no room, or its bytes are unknown"
            )
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
        others = (m for m in self._held.values() if m is not leaving and not m.lives_on_host)
        return {id(tensor) for model in others for tensor in model.tensors}

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
        status, found = self._status[stage.name], self._bytes.found[stage.name]
        model = self._held[stage.name]
        half = self._bytes.half_of(stage)
        work = partial(stage.called, model, run, self.device, half)
        compares = run.comparing and self._bytes.is_cast(stage) and not stage.layerwise
        generators = random_states() if compares else []
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
            found.activations = status.peak - before - self._bytes.to_move(run.value)
        status.runs += 1
        _named(partial(self._bytes.look_at, stage, output), stage, "looking at its output")
        if half is not None and not _is_finite(output):
            self._bytes.note(stage, f"in {half}, its output has numbers that are not finite")
        if compares:
            self._compare(stage, run, output, generators)
        return output

    def _compare(self, stage: Stage, run: _Run, output: Any, generators: list) -> None:
        """Run the stage as it was loaded, and note how much its dtype changes the output."""
        self._drop(stage.name)
        after = random_states()
        for put_back in generators:  # a run that draws noise draws the same
            put_back()
        plain = None
        try:
            plain = Model(stage.load(), self.device)
            plain.move_in()
            reference = stage.called(plain, run, self.device)
            change = precision.output_change_db(reference, output)
        except Exception as error:
            self._bytes.note(stage, f"in {stage.dtype}, was not compared with float32: {error}")
            free_what_it_holds(error)
        else:
            self._bytes.note(stage, f"in {stage.dtype}, its output has an SNR of {change:.1f} dB")
        finally:
            for put_back in after:
                put_back()
            if plain is not None:
                plain.let_go()

    def _keep(self, index: int, output: Any) -> None:
        if self.keep_on_host:
            output = map_tensors(lambda tensor: moved(tensor, HOST), output)
        if not self.keep_all:
            self.outputs = {}
        self.outputs[self.stages[index].name] = output
        self._done = index + 1

    # Looks ---------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Where each stage's model is, its bytes, and how often and how long it was used."""
        for stage in self.stages:
            status, model = self._status[stage.name], self._held.get(stage.name)
            status.place = "not loaded" if model is None else self._place(stage, model)
            status.notes = list(self._bytes.found[stage.name].notes)
        return Status({name: deepcopy(each) for name, each in self._status.items()})

    def _place(self, stage: Stage, model: Model) -> str:
        if stage.layerwise:
            return "cpu, layer by layer"
        return str(model.tensors[0].device) if model.tensors else "loaded"

    def __repr__(self) -> str:
        names = ", ".join(stage.name for stage in self.stages)
        return f"StagedPipeline({names}; {self.policy} on {self.device})"


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
