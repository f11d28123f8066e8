"""Records when each tensor is made and when its memory is released, on any device.

All operations pass through a dispatch mode. A storage that it has not seen before is a new block; a
weak reference tells when the storage is gone. Memory that an operator allocates for itself and does
not return, such as the workspace of a convolution, is not seen.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import wraps
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.parameter import UninitializedTensorMixin
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
)
from torch.utils.weak import WeakIdKeyDictionary

from tfswa_lab.memory.sizes import rounded
from tfswa_lab.memory.trace.module_paths import ModulePaths, NodeId, NodeNumbers
from tfswa_lab.memory.trace.stacks import CallSites, Frame
from tfswa_lab.memory.trace.threads import entered_in_threads, this_thread, undone_in_children
from tfswa_lab.memory.trace.timeline import Block, Timeline

DEVICE = torch.ops.prim.device.default


class Birth(NamedTuple):
    """The circumstances in which a block was made; they decide later what it is."""

    block: Block
    storage: ref
    backward: int  # the last backward pass
    root: int  # how many modules had been called outside of others
    grad: bool  # whether autograd was recording
    thread: int  # that made it


class _OfThread(threading.local):
    """What each thread does."""

    optimizing = False


def _alone(method: Callable) -> Callable:
    """A method of a tracer that one thread runs at a time: tensors end in any thread."""

    @wraps(method)
    def locked(self: Tracer, *arguments: Any, **options: Any) -> Any:
        with self._lock:
            return method(self, *arguments, **options)

    return locked


class Tracer(TorchDispatchMode):
    """A dispatch mode that records the timeline of all storages.

    It follows the program into its threads, unless it is entered inside of another mode, such as
    that of fake tensors: the threads would not have that one.

    Args:
        stacks: whether to record the lines of Python.
    """

    def __init__(self, stacks: bool = True):
        super().__init__()
        self.modules = ModulePaths(self.add_module)
        self.event, self.steps = 0, []
        self._blocks: dict[str, list[Block]] = {}
        self._live: dict[int, Birth] = {}
        self._sites = CallSites() if stacks else None
        self._nodes = NodeNumbers()
        self._lines: dict[NodeId, tuple[Frame, ...]] = {}  # of forward operations
        self._parameters = WeakIdKeyDictionary()  # tensors compare by element, so no WeakSet
        self._backward = -1
        self._thread = _OfThread()
        self._lock = threading.RLock()
        self._ended = False
        self._watching = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Without this, torch would wrap every dispatch and take twice as long."""
        return False

    def __enter__(self) -> Tracer:
        self._watching.enter_context(self.modules.watching())
        if not _get_current_dispatch_mode_stack():
            self._watching.enter_context(entered_in_threads(self))
            self._watching.enter_context(undone_in_children(self._forget))
        for register, hook in (
            (register_optimizer_step_pre_hook, self._before_optimizer),
            (register_optimizer_step_post_hook, self._after_optimizer),
        ):
            self._watching.callback(register(hook).remove)
        self._nodes.begin()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._watching.close()
        self._end()

    @_alone
    def _end(self) -> None:
        self._label_gradients()
        for birth in list(self._live.values()):
            self._settle(birth)
        self._live = {}  # drops the weak references, so later releases are not recorded
        self._ended = True  # threads that began under the trace go on

    def _forget(self) -> None:
        """In a forked child nobody reads a trace, and it would grow for as long as the child."""
        self._ended = True
        self._lock = threading.RLock()  # a thread that is not here may hold the other one
        self._watching.close()
        if _get_current_dispatch_mode_stack()[-1:] == [self]:
            _pop_mode()

    @_alone
    def step(self) -> None:
        """A step begins here."""
        self._label_gradients()
        self.steps.append(self.event)

    def timeline(self, device: str) -> Timeline:
        """The timeline of a device, such as `cpu` or `cuda:0`."""
        return Timeline(self._blocks.get(device, []), self.event, self.steps, device)

    @property
    def devices(self) -> list[str]:
        """Where tensors have been seen, the one with the highest peak first."""
        return sorted(self._blocks, key=lambda each: -self.timeline(each).peak().allocated)

    def living(self) -> list[tuple[Block, torch.UntypedStorage]]:
        """The living blocks and their storages; holding a storage keeps it alive."""
        pairs = [(birth.block, birth.storage()) for birth in list(self._live.values())]
        return [(block, storage) for block, storage in pairs if storage is not None]

    @_alone
    def add_module(self, root: nn.Module) -> None:
        """Label the parameters and buffers of a module."""
        for module in root.modules():
            path = self.modules.path_of(module)
            for parameter in _present(module._parameters):
                self.label(parameter, "parameter", path)
                self._parameters[parameter] = None
            for buffer in _present(module._buffers):
                self.label(buffer, "buffer", path)
        self._label_gradients()

    @_alone
    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Label an optimizer's parameters, their gradients and its state."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._parameters[parameter] = None
                self.label(parameter, "parameter")
        self._label_gradients()
        for parameter, state in optimizer.state.items():
            module = self._module_of(parameter)
            for tensor in tensors_in(state):
                self.label(tensor, "optimizer state", module)

    def lines_of(self, node: Any) -> tuple[Frame, ...]:
        """The lines of the forward operation that made a node; empty if unknown."""
        return self._lines.get(self._nodes.identify(node), ())

    @_alone
    def label(self, tensor: Tensor, category: str, module: str = "") -> None:
        """Set the category of a tensor's block; a tensor not seen before gets a block."""
        if not has_storage(tensor):
            return
        block = self._block_of(tensor) or self._add(tensor)
        block.category = category
        block.module = module or block.module

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if func is DEVICE:  # autograd asks fake tensors thousands of times
            return args[0].fake_device
        if self._ended:
            return func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        with self._lock:
            self._look_at(inputs)
        result = self.call(func, args, kwargs, inputs)
        with self._lock:
            self._record(func, args, result)
        self.seen(func, args, kwargs, inputs, result)
        return result

    def _look_at(self, inputs: list[Tensor]) -> None:
        for tensor in inputs:
            if self._block_of(tensor) is None:  # made outside of the mode, as by from_numpy
                self.label(tensor, "input")
            if self._nodes.elsewhere and (node := tensor.grad_fn) is not None:
                self._nodes.sign(node, this_thread())
                self._nodes.sign(node, self._live[tensor.untyped_storage()._cdata].thread)

    def _record(self, func: Any, args: tuple, result: Any) -> None:
        """New blocks that an operator has made, and its workspace."""
        if self._ended:  # meanwhile, by the thread that entered the mode
            return
        task = torch._C._current_graph_task_id()
        node = self._nodes.new(task)
        new = [tensor for tensor in tensors_in(result) if self._block_of(tensor) is None]
        scratch = self.scratch(func, args, result)
        if new or node or scratch:
            op = str(func)
            origin = self._origin(node, task) | {"op": op}
            for tensor in new:
                self._add(tensor, **origin)
            if scratch:
                self._pass(scratch, _device_of(new[0] if new else result), origin)
            if node is not None and task == -1:
                self._nodes.made_elsewhere(node, op)

    def call(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor]) -> Any:
        """Run an operator; subclasses may explain its errors."""
        return func(*args, **kwargs)

    def seen(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], result: Any) -> None:
        """An operator has run; subclasses may follow what it calculates."""

    def rounded(self, size: int, device: str) -> int:
        """Bytes that the allocator gives for a request: CUDA's gives multiples of 512."""
        return rounded(size) if device.startswith("cuda") else size

    def scratch(self, func: Any, args: tuple, result: Any) -> int:
        """Bytes of an operator's own workspace; subclasses may know them."""
        return 0

    def _pass(self, size: int, device: str, origin: dict) -> None:
        """Record memory that is allocated and released at once."""
        given = self.rounded(size, device)
        block = Block(size, given, self.event + 1, self.event + 2, **origin)
        self.event += 2
        self._blocks.setdefault(device, []).append(block)

    def _origin(self, node: NodeId | None, task: int) -> dict:
        """Phase, module, step and lines of a new block.

        Args:
            node: of the operation that made it.
            task: the running backward pass, -1 for none.
        """
        calls = self.modules.calls
        self._backward = max(self._backward, task)
        origin = {"step": len(self.steps) - 1, "module": self.modules.now}
        if task != -1 and not (calls and calls[-1].graph_task == task):
            return origin | {"phase": "backward"} | self._origin_in_backward(task)
        frames = self._sites.here() if self._sites else ()
        if node is not None:
            self._lines[node] = frames
        if self._thread.optimizing:
            phase = "optimizer"
        elif task != -1:
            phase = "recompute"
        else:
            phase = "forward" if calls or node is not None else "outside"
        return origin | {"phase": phase, "frames": frames}

    def _origin_in_backward(self, task: int) -> dict:
        """Module and lines of the forward operation whose gradient is computed."""
        node = torch._C._current_autograd_node()
        if node is None:
            return {}
        if hasattr(node, "variable"):  # accumulates the gradient of a parameter
            return {"module": self._module_of(node.variable)}
        made = self._nodes.identify(node, task)
        lines = self._lines.get(made) or (self._sites.here() if self._sites else ())
        return {"module": self.modules.that_made(made), "frames": lines}

    def _block_of(self, tensor: Tensor) -> Block | None:
        """The block of a tensor; None if it is unknown or its storage was resized."""
        storage = tensor.untyped_storage()
        birth = self._live.get(storage._cdata)
        if birth is None:
            return None
        if birth.block.size != storage.nbytes():
            self._died(storage._cdata)
            return None
        return birth.block

    def _add(self, tensor: Tensor, **origin: Any) -> Block:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        device = _device_of(tensor)
        given = 0 if device == "meta" else self.rounded(size, device)
        self.event += 1
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        block = Block(size, given, self.event, shape=shape, dtype=dtype, **origin)
        self._blocks.setdefault(device, []).append(block)
        gone = ref(storage, lambda _: self._died(key))
        roots, grad = self.modules.roots, torch.is_grad_enabled()
        self._live[key] = Birth(block, gone, self._backward, roots, grad, this_thread())
        return block

    @_alone
    def _died(self, key: int) -> None:
        birth = self._live.pop(key, None)
        if birth is not None:
            self.event += 1
            birth.block.died = self.event
            self._settle(birth)

    def _settle(self, birth: Birth) -> None:
        """Decide from a block's lifetime whether it is more than temporary."""
        block = birth.block
        if block.category != "temporary":
            return
        if block.phase == "outside" and self.modules.roots > birth.root:
            block.category = "input"
        elif block.phase == "forward" and birth.grad:
            if self._backward > birth.backward or block.died is None:
                block.category = "activation"
        elif block.phase == "recompute" and not self.modules.calls:
            block.category = "activation"

    def _before_optimizer(self, optimizer: Optimizer, *_: Any) -> None:
        self._label_gradients()
        self._thread.optimizing = True

    def _after_optimizer(self, optimizer: Optimizer, *_: Any) -> None:
        self._thread.optimizing = False
        self.add_optimizer(optimizer)

    @_alone
    def _label_gradients(self) -> None:
        for parameter in list(self._parameters):
            if parameter.grad is not None:
                self.label(parameter.grad, "gradient", self._module_of(parameter))

    def _module_of(self, parameter: Tensor) -> str:
        block = self._block_of(parameter) if has_storage(parameter) else None
        return block.module if block else ""


def _present(named: dict[str, Tensor | None]) -> Iterable[Tensor]:
    return (tensor for tensor in named.values() if tensor is not None)


def _device_of(tensor: Tensor) -> str:
    """The name of a tensor's device; on fake tensors the attribute is faster than the property."""
    return str(getattr(tensor, "fake_device", None) or tensor.device)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors with a storage in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        if has_storage(value):
            yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            if not isinstance(each, PLAIN):
                yield from tensors_in(each)


PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)


ROWS = ("crow_indices", "col_indices", "values")
COLUMNS = ("ccol_indices", "row_indices", "values")
PARTS = {torch.sparse_coo: ("_indices", "_values"), torch.sparse_csr: ROWS, torch.sparse_bsr: ROWS}
PARTS |= {torch.sparse_csc: COLUMNS, torch.sparse_bsc: COLUMNS}


def has_storage(thing: Any) -> bool:
    """Whether it is a tensor with one storage that can be accessed.

    Sparse tensors have several storages, parameters of lazy modules have none yet, tensors inside
    `torch.func.vmap` and `grad` wrap others, and tensors of `torch.export` have symbolic sizes.

    >>> has_storage(torch.ones(2)), has_storage(torch.nn.LazyLinear(3).weight)
    (True, False)
    """
    if not issubclass(type(thing), Tensor) or isinstance(thing, UninitializedTensorMixin):
        return False
    if thing.layout is not torch.strided or is_functorch_wrapped_tensor(thing):
        return False
    return isinstance(thing.untyped_storage().nbytes(), int)  # no SymInt: a part may have sizes


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that make up a tensor: itself, or the indices and values of a sparse one.

    >>> [part.numel() for part in parts_of(torch.eye(3).to_sparse())]
    [6, 3]
    """
    if has_storage(tensor):
        return [tensor]
    names = PARTS.get(getattr(tensor, "layout", None), ())
    return [getattr(tensor, name)() for name in names]
