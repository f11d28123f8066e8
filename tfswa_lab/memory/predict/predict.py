"""How much GPU memory a step will take, found out without a GPU.

The step runs once or twice on tensors that have a shape and no values, with CUDA's kernels, casts
and rounding. The prediction is the peak of that run. It takes seconds, whatever the sizes are.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)
from torch.nn.attention import _cur_sdpa_kernel_backends, sdpa_kernel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from tfswa_lab.memory.display import Shown, page
from tfswa_lab.memory.predict.allocator import replay
from tfswa_lab.memory.predict.calls import calls_answered
from tfswa_lab.memory.predict.cuda_attention import present_gpu
from tfswa_lab.memory.predict.cuda_kernels import (
    FULL_LOSSES,
    WORKSPACES,
    cublas_workspaces,
    cuda_like,
    error_budget,
    with_full_storage,
    workspace,
)
from tfswa_lab.memory.predict.cuda_module import cuda_module
from tfswa_lab.memory.predict.fake_tensors import FakeTensors, fake_tensors, seen_by_cpp
from tfswa_lab.memory.predict.values import Values, traits
from tfswa_lab.memory.sizes import format_bytes, is_whole, rounded
from tfswa_lab.memory.trace.timeline import Block, Moment, Peak, Timeline
from tfswa_lab.memory.trace.tracer import DEVICE, Tracer, has_storage

Step = Callable[[], Any]
aten = torch.ops.aten
OLDER = (Tensor, nn.Parameter)  # types of real tensors
COUNTS = (aten._foreach_add_.Scalar, aten._foreach_add_.Tensor)
LIFTS = (aten.lift_fresh.default, aten.lift.default)


@dataclass(frozen=True, repr=False)
class Prediction(Moment, Shown):
    """The memory that a step will take, and who will hold it at the peak.

    Args:
        peak: bytes of the tensors on the GPU. It may be a little above the sum of the blocks: the
            allocator does not split a large one for less than 1 MiB.
        workspaces: bytes that cuBLAS keeps beside them. `torch.cuda.max_memory_allocated` reports
            the sum of both (older versions than 1.12 the tensors alone).
        reserved: bytes that a simulated allocator takes from the GPU, for both.
        host: when the program's tensors hold the most memory of the host, and which do.
        names_gpu: whether the program puts a tensor on a GPU. If it never does, all its tensors are
            taken to live there, and none on the host.
        budget: one sentence for each kind of memory that a prediction cannot see.
        seconds: how long the prediction took.
    """

    peak: int
    workspaces: int
    reserved: int
    host: Peak
    names_gpu: bool
    budget: tuple[str, ...]
    seconds: float

    @property
    def head(self) -> str:
        """Both peaks in a sentence."""
        peak, reserved = format_bytes(self.peak), format_bytes(self.reserved)
        if self.names_gpu:
            host = f"{format_bytes(self.host.allocated)} on the host"
        else:
            host = "the program names no GPU, so all of its tensors are taken to live there"
        cublas = f" and {format_bytes(self.workspaces)} by cuBLAS" if self.workspaces else ""
        return f"GPU: {peak} allocated at the peak{cublas}, about {reserved} reserved; {host}"

    @property
    def brief(self) -> str:
        """The peaks."""
        sizes = {"peak": self.peak, "reserved": self.reserved, "host": self.host.allocated}
        return ", ".join(f"{name}={format_bytes(size)}" for name, size in sizes.items())

    def __str__(self) -> str:
        modules = (f"  {format_bytes(n):>12}  {name}" for name, n in self.by_module(2, 5).items())
        parts = [self.head, self.table(), "by module:", *modules, "not in these numbers:"]
        return "\n".join([*parts, *(f"  {sentence}" for sentence in self.budget)])

    def _repr_html_(self) -> str:
        return page(
            self.head,
            {"by category": self.by_category(), "by module": self.by_module(2, 8)},
            {"not in these numbers": self.budget},
        )


def predict(
    make_step: Callable[[], Step],
    attention: str = "auto",
    steps: int = 2,
    gpu: str | None = None,
    values: Mapping[str, Any] | None = None,
) -> Prediction:
    """The memory of a step on a CUDA GPU.

    Args:
        make_step: makes the model, the optimizer and the input, and returns a function without
            arguments that runs one step. All of it runs on tensors without values, as on a machine
            with a GPU: what the program puts there is counted there, the rest on the host. If it
            names no GPU, all its tensors are taken to live there.
        attention: the kernel of `scaled_dot_product_attention`: "flash" (half precision, no mask),
            "efficient", "cudnn", or "math", which keeps all scores; "auto" takes the first one that
            supports the inputs, in the GPU's order, of those that the program allows.
        steps: how many to run; the second step finds the optimizer's state already allocated.
        gpu: the GPU that attention="auto" chooses for: "hopper" (H100, H200, B200) or "ampere" (all
            others); None for the GPU of this machine, or "ampere" where there is none.
        values: numbers that only tensors with values would tell, by the line that asks for them,
            such as `{"train.py:12": 4000}`. The error names the line.

    Raises:
        TypeError: `make_step` does not return a function.
        ValueError: the attention kernel or the GPU is unknown, the kernel does not support these
            inputs, `steps` is no number of steps, or a line of `values` asks for nothing.
        NotImplementedError: a number that nobody knows becomes a size, an index or a branch; the
            message names the line. Checks (`assert`, `if …: raise`) are taken to pass.

    >>> from torch import nn
    >>> def make_step():
    ...     model, x = nn.Linear(1024, 1024, bias=False), torch.empty(512, 1024)
    ...     return lambda: model(x).sum().backward()
    >>> predict(make_step).peak / 2**20  # 4 of weights, 4 and 4 of gradients, 2 of input
    14.0009765625
    """
    if not is_whole(steps) or steps < 1:
        raise ValueError(f"steps={steps!r} must be a whole number of at least 1")
    began = time.perf_counter()
    known, gpu = Values(values), gpu or present_gpu()
    with (
        torch.random.fork_rng(devices=()),
        _defaults_restored(),
        fake_tensors() as fake,
        FakeTracer(fake, known) as tracer,
        cuda_like(fake, known, attention, gpu),
        cuda_module(gpu, known, tracer.allocated, tracer.empty_cache),
        calls_answered(fake, known) as tracer.calls,
    ):
        try:
            step = make_step()
            if not callable(step):
                raise TypeError(
                    "make_step must return a function that runs one step, not "
                    f"{type(step).__name__}"
                )
            for _ in range(steps):
                tracer.step()
                step()
        except Exception as error:
            hidden = known.refusal or (known.tried if isinstance(error, TypeError) else None)
            if hidden is None or hidden is error:
                raise
            raise hidden from error
    if known.refusal is not None:  # a library went on without the number
        raise known.refusal
    if known.unused():
        raise ValueError(f"values: no number was asked for at {', '.join(known.unused())}")
    gpu_timeline, host = tracer.both()
    del step
    gc.collect()
    operators = {block.op for block in gpu_timeline.blocks}
    replayed = replay(gpu_timeline)  # counts the blocks that the allocator leaves unsplit
    peak, event = replayed.peak_allocated
    workspaces = cublas_workspaces(gpu_timeline, gpu)
    full = replace(gpu_timeline, blocks=[*gpu_timeline.blocks, *workspaces])
    reserved, _ = replay(full, empty_cache_after=tracer.emptied).peak_reserved
    budget = (*error_budget(operators), *known.notes)
    seconds = time.perf_counter() - began
    return Prediction(
        timeline=gpu_timeline,
        event=event,
        peak=peak,
        workspaces=sum(block.size for block in workspaces),
        reserved=reserved,
        host=host.peak(),
        names_gpu=fake.names_gpu,
        budget=budget,
        seconds=seconds,
    )


@contextmanager
def _defaults_restored() -> Iterator[None]:
    """A program may set defaults, and the next one should not find them."""
    dtype, device, grad = torch.get_default_dtype(), _default_device(), torch.is_grad_enabled()
    try:
        with sdpa_kernel(_cur_sdpa_kernel_backends(with_priority=True), set_priority=True):
            yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if _default_device() != device:
            torch.set_default_device(device)


def _default_device() -> torch.device | None:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return context and context.device


def _is_counter(block: Block) -> bool:
    """An optimizer's count of steps, which stays on the host unless its kernels are fused."""
    return block.category == "optimizer state" and block.shape == ()


class FakeTracer(Tracer):
    """Records the requests that CUDA's allocator would get, and those of the host.

    Args:
        fake: the mode that makes tensors fake.
        values: what is known of their numbers.
    """

    def __init__(self, fake: FakeTensors, values: Values):
        super().__init__()
        self.fake, self.values, self.calls = fake, values, None
        self.emptied: list[int] = []  # events after which the program emptied torch's cache
        self._fakes = WeakIdKeyDictionary()  # of real tensors
        self._gradients = WeakIdKeyDictionary()  # of parameters older than the prediction
        self._states: dict[Optimizer, dict] = {}  # of optimizers, before their first step

    def allocated(self) -> tuple[int, int]:
        """Bytes of the tensors on the GPU, now and at most."""
        on = "cuda:0" if self.fake.names_gpu else "cpu"
        bytes_after = self.timeline(on).allocated()
        return bytes_after[-1], max(bytes_after)

    def empty_cache(self) -> None:
        """The program gives cached segments back here."""
        self.emptied.append(self.event)

    def both(self) -> tuple[Timeline, Timeline]:
        """The timelines of the GPU and of the host."""
        host = self.timeline("cpu")
        if self.fake.names_gpu:
            return self.timeline("cuda:0"), host
        fused = any("_fused_" in block.op for block in host.blocks)
        blocks = [block for block in host.blocks if fused or not _is_counter(block)]
        for block in blocks:
            block.rounded = rounded(block.size)
        return replace(host, blocks=blocks), replace(host, blocks=[])

    def label(self, tensor: Tensor, category: str, module: str = "") -> None:
        """Remember the gradient of a tensor that is older than the prediction."""
        if not isinstance(tensor, FakeTensor) and tensor.is_leaf and tensor not in self._gradients:
            self._gradients[tensor] = tensor.grad
        super().label(tensor, category, module)

    def _before_optimizer(self, optimizer: Optimizer, *rest: Any) -> None:
        if optimizer not in self._states:
            state = {of: dict(each) for of, each in optimizer.state.items()}
            self._states[optimizer] = state
        super()._before_optimizer(optimizer, *rest)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient
        for optimizer, state in self._states.items():
            optimizer.state.clear()
            optimizer.state.update(state)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        """Below the program's calls, nothing needs to be answered."""
        if func is DEVICE:
            return seen_by_cpp(args[0])
        with torch._C.DisableTorchFunction():
            if func in LIFTS and type(args[0]) in OLDER:  # of `torch.tensor`: nothing is copied
                made = func(*args)
                self.label(made, "input")
                self.values.follow(func, args, {}, list(args), made)
                self.values.forget(args[0].untyped_storage()._cdata)  # which ends here
                return made
            return super().__torch_dispatch__(func, types, args, kwargs)

    def call(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor]) -> Any:
        """Run an operator; one that needs values is given those that are known."""
        if func is aten._local_scalar_dense.default:
            return self.values.scalar(args[0], self.calls.running)
        if func is aten.equal.default:
            return False  # torch's own checks ask whether something is wrong
        if func in COUNTS and all(map(self.values.knows, inputs)):
            return None  # counters of an optimizer: `Values` adds, and fake tensors do not change
        older = None
        if any(type(tensor) in OLDER for tensor in inputs):
            # Such a tensor stays as it is, and `x += 1` keeps its name.
            writes = args and type(args[0]) in OLDER and traits(func)[0] == (0,)
            older = args[0] if writes else None
            args, kwargs = tree_map_only(OLDER, self._fake_of, (args, kwargs))
        try:
            result = func(*args, **kwargs)
            if func in FULL_LOSSES:
                result = with_full_storage(func, args, result)
            return result if older is None else older
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self.values.sized(func, args, kwargs)
        except UnsupportedOperatorException as error:
            where = next(iter(self._sites.here()), "an unknown line")
            raise NotImplementedError(
                f"{func} at {where}: torch cannot tell the size of its result without running it; "
                "keep it out of the step"
            ) from error

    def _fake_of(self, tensor: Tensor) -> Tensor:
        """The fake tensor of a real one; its memory is counted as the same."""
        if type(tensor) not in OLDER or not has_storage(tensor):
            return tensor
        if tensor not in self._fakes:
            fake = self._fakes[tensor] = self.fake.from_tensor(tensor)
            birth = self._live.get(tensor.untyped_storage()._cdata)
            if birth is not None:
                storage = fake.untyped_storage()
                gone = partial(self._live.pop, storage._cdata, None)
                alias = birth._replace(storage=ref(storage, lambda _: gone()))
                self._live[storage._cdata] = alias
        return self._fakes[tensor]

    def seen(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], result: Any) -> None:
        """Follow the values."""
        self.values.follow(func, args, kwargs, inputs, result)

    def scratch(self, func: Any, args: tuple, result: Any) -> int:
        """Bytes of the operator's workspace, if its size is known."""
        return workspace(func, args) if func in WORKSPACES and self.fake.runs_on_gpu(args[0]) else 0

    def _died(self, key: int) -> None:
        self.values.forget(key)
        super()._died(key)


OF_PREDICT = ("attention", "steps", "gpu")  # arguments of `predict`, the rest are `make_step`'s


@dataclass(frozen=True)
class Row:
    """A configuration and the memory of its step.

    Args:
        choices: names and values, such as `{"batch": 4, "attention": "flash"}`.
        prediction: the memory of one step.
    """

    choices: dict[str, Any]
    prediction: Prediction


def compare(make_step: Callable[..., Step], choices: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    """Predict all combinations, one after the other.

    Args:
        make_step: as for `predict`. It takes the choices as keyword arguments, except `attention`,
            `steps` and `gpu`, which are passed to `predict`.
        choices: values to try, by name; the last one changes fastest.
    """
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        yield Row(chosen, predict_choices(make_step, chosen))


def predict_choices(make_step: Callable[..., Step], choices: Mapping[str, Any]) -> Prediction:
    """Predict one combination."""
    of_predict = {name: choices[name] for name in OF_PREDICT if name in choices}
    of_step = {name: value for name, value in choices.items() if name not in OF_PREDICT}
    return predict(lambda: make_step(**of_step), **of_predict)


def to_markdown(rows: Sequence[Row], budget: int | None = None) -> str:
    """A table of configurations, and whether each fits.

    Args:
        rows: of `compare`.
        budget: bytes that are available; None for a table without the column "fits".
    """
    names = list(rows[0].choices)
    columns = [*names, "peak", "reserved, about", *(["fits"] if budget else [])]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        found = row.prediction
        cells = [*(str(row.choices[name]) for name in names)]
        cells += [format_bytes(found.peak), format_bytes(found.reserved)]
        lines.append(cells + (["yes" if found.peak <= budget else "no"] if budget else []))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def max_batch_size(
    make_step: Callable[[int], Step], budget: int, slack: float = 0.05, **of_predict: Any
) -> int:
    """The largest batch whose step is predicted to fit.

    The peak grows by the same amount with each example. Two predictions therefore give the largest
    batch, and a third one checks it.

    Args:
        make_step: as for `predict`; takes the batch size.
        budget: bytes that may be *allocated*.
        slack: share of the budget to leave free, for memory that a prediction cannot see.
        of_predict: arguments of `predict`.

    Returns:
        Examples in a batch, 0 if not even one fits.

    Raises:
        ValueError: the budget is not above 0, the slack is not in [0, 1), or the peak does not grow
            with the batch.
    """
    if not (budget > 0 and 0 <= slack < 1):
        raise ValueError(f"budget={budget} must be above 0 and slack={slack} in [0, 1)")
    room = budget * (1 - slack)

    def peak(batch: int) -> int:
        return predict(lambda: make_step(batch), **of_predict).peak

    low, high = 2, 4
    at_low, at_high = peak(low), peak(high)
    if at_high <= at_low:
        raise ValueError(
            f"a batch of {high} takes no more than one of {low} ({format_bytes(at_low)}); does "
            "make_step use its batch size?"
        )
    per_example = (at_high - at_low) / (high - low)
    batch = max(0, int(low + (room - at_low) // per_example))
    too_many, stride = batch + 1, 1
    while batch and peak(batch) > room:  # small batches may have their peak elsewhere
        too_many, batch, stride = batch, max(0, batch - stride), 2 * stride
    while too_many - batch > 1:
        half = (batch + too_many) // 2
        batch, too_many = (batch, half) if peak(half) > room else (half, too_many)
    return batch
