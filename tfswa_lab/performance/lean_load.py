"""Load the weights of a module without holding them twice.

The usual way builds a module with random weights, reads the file beside it, and copies: twice the
weights, and on the way to a GPU twice in the host's memory. Here the module is built without
weights, and the file takes their place: its pages are read when something uses them first.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import gc
import json
import math
import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

Paths = str | Path | Sequence[str | Path]
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
AS_USUAL = "load it as usual: module.load_state_dict(safetensors.torch.load_file(path))"
NAMED = 5  # problems that an error tells one by one
_building = threading.RLock()  # torch keeps one list of hooks for all threads


class Stored(NamedTuple):
    """Where a tensor lies in a safetensors file.

    Args:
        path: of the file.
        dtype: its name in the file, such as `F32`.
        shape: of the tensor.
        start: the first byte, from the beginning of the file.
        end: the first byte behind the tensor.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def load(
    module_class: Callable[..., nn.Module],
    path: Paths,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **sizes: Any,
) -> nn.Module:
    """Build a module without weights and give it those of safetensors files.

    On the CPU, with the dtype of the file, nothing is copied: the weights *are* the file, and each
    page is read when something uses it first, so the first run is slower and the memory appears
    then, as pages of the file that the system can drop again. Who writes to the weights gets own
    copies of the pages, and the file stays as it is. The file must not be written to in the
    meantime; to replace it, rename another one to its name, as `save_separator` does.

    To another device, or in another dtype, the tensors go one by one, and no more than one of them
    is in the host's memory beside those that stay there.

    A parameter or buffer that the class makes of numbers (`torch.randn(…) * 0.02`) takes its memory
    while the module is built; what torch's own layers make does not.

    Buffers that are in no file keep the values that the class computes, and so do tensors that are
    plain attributes. Parameters that the module shares stay shared; the file may hold any one of
    their names. An optimizer has to be made afterwards. torch's random generator is left alone.

    Args:
        module_class: a class, or a function, that builds the module.
        path: of a safetensors file, or of several that hold a part of the tensors each.
        device: that the parameters and buffers go to.
        dtype: a floating-point type for all floating-point parameters and buffers; None for the
            types in the file. Complex numbers and integers keep theirs.
        sizes: arguments of `module_class`.

    Returns:
        The module, in evaluation mode as `load_separator` does it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is cut off or foreign; a tensor is missing, is unknown to the module, has
            another shape, or numbers of another kind; or `dtype` is no floating-point type.

    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import save_file
    >>> saved = nn.Linear(3, 2)
    >>> with TemporaryDirectory() as folder:
    ...     save_file(saved.state_dict(), f"{folder}/model.safetensors")
    ...     loaded = load(nn.Linear, f"{folder}/model.safetensors", in_features=3, out_features=2)
    >>> bool((loaded.weight == saved.weight).all())
    True
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is no floating-point type, such as torch.float16")
    stored = _stored(path)
    module, given, stand_ins = _without_weights(module_class, sizes)
    files = {each.path: _mapped(each.path) for each in stored.values()}
    tensors = {name: _tensor(files[each.path], each) for name, each in stored.items()}
    _assign(module, tensors, stored)
    _refuse_left_out(module, given, files)
    _refuse_kept(module, given, stand_ins)
    untouched = not module._load_state_dict_post_hooks  # else a hook may have written to the pages
    forget = partial(_forget_pages, files.values()) if untouched else lambda: None
    move(module, torch.device(device), dtype, forget)
    return module.eval()


def weight_bytes(path: Paths, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes of each tensor in safetensors files; only their headers are read.

    Args:
        path: of a file, or of several.
        dtype: that the tensors will be in, as for `bytes_in`; None for that of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is cut off or foreign, or two files hold the same tensor.
    """
    return {
        name: each.end - each.start
        if dtype is None
        else bytes_in(each.shape, DTYPES[each.dtype], dtype)
        for name, each in _stored(path).items()
    }


def bytes_in(shape: Sequence[int], dtype: torch.dtype, to: torch.dtype) -> int:
    """Bytes of a parameter in another dtype; only floating-point numbers change theirs.

    To int8, each matrix is taken for the weight of a linear layer: a number a byte, and for each
    row 4 bytes of scale and 1 of offset. All else stays.

    >>> bytes_in((8, 4), torch.float32, torch.float16), bytes_in((8, 4), torch.float32, torch.int8)
    (64, 72)
    """
    count = math.prod(shape)
    if not dtype.is_floating_point or (to == torch.int8 and len(shape) != 2):
        return count * dtype.itemsize
    return count * to.itemsize + (5 * shape[0] if to == torch.int8 else 0)


# The files ---------------------------------------------------------------------------------------


def _stored(path: Paths) -> dict[str, Stored]:
    """What lies where, in one file or several."""
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not paths:
        raise ValueError("path=[]; name at least one safetensors file")
    found: dict[str, Stored] = {}
    for each in map(Path, paths):
        for name, stored in _header(each).items():
            if name in found:
                raise ValueError(
                    f"{found[name].path} and {each} both hold {name!r}; leave out one of the files"
                )
            found[name] = stored
    return found


def _header(path: Path) -> dict[str, Stored]:
    """Read a header: 8 bytes that say how long it is, then JSON, then the tensors."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        entries = _entries(path, file.read(min(length, size)))
    found = {}
    for name, entry in entries.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), start, end)
        if end > size:
            raise ValueError(
                f"{path} is cut off: tensor {name!r} ends at byte {end}, and the file has {size}; "
                "copy the file again"
            )
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {name!r} has dtype {entry['dtype']}, not {', '.join(DTYPES)}"
            )
    _check_with_safetensors(path)
    return found


def _entries(path: Path, text: bytes) -> dict[str, dict]:
    try:
        entries = dict(json.loads(text))
        entries.pop("__metadata__", None)
        for entry in entries.values():
            _ = [entry[key] for key in ("dtype", "shape", "data_offsets")]
    except (ValueError, TypeError, KeyError) as error:
        raise _foreign(path, error) from error
    return entries


def _check_with_safetensors(path: Path) -> None:
    """Let the library check what it knows of a header: gaps, overlaps, shapes against bytes."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise _foreign(path, error) from error


def _foreign(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is no safetensors file, or its header is cut off ({error}); copy the file again, "
        "or save the weights with safetensors.torch.save_file"
    )


def _mapped(path: Path) -> mmap.mmap:
    """The file as memory; what is written there goes to copies of its pages."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _tensor(file: mmap.mmap, stored: Stored) -> Tensor:
    """A tensor in the file's pages, with a storage of its own size."""
    dtype, count = DTYPES[stored.dtype], math.prod(stored.shape)
    if count == 0:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(file, dtype=dtype, count=count, offset=stored.start).view(stored.shape)


# The module --------------------------------------------------------------------------------------


def _without_weights(
    module_class: Callable[..., nn.Module], sizes: dict[str, Any]
) -> tuple[nn.Module, WeakIdKeyDictionary, list[ref]]:
    """Build a module whose parameters have no memory; everything else has its values.

    Returns:
        The module, its own parameters as far as they are alive, and what stands in for them.
    """
    try:
        with (
            _parameters_on_meta() as (given, stand_ins),
            torch.random.fork_rng(devices=()),
            torch.device("cpu"),
        ):
            module = module_class(**sizes)
    except (RuntimeError, NotImplementedError) as error:
        error.add_note(f"{module_class} was built without weights. If it needs them, {AS_USUAL}")
        raise
    if not isinstance(module, nn.Module):
        raise ValueError(f"module_class built a {type(module).__name__}; it must build a Module")
    return module, given, stand_ins


@contextmanager
def _parameters_on_meta() -> Iterator[tuple[WeakIdKeyDictionary, list[ref]]]:
    """Give modules that this thread builds parameters without memory instead of their own.

    Fresh memory costs nothing until it is written to, and the initialisation comes later.
    """
    thread, given, stand_ins = threading.get_ident(), WeakIdKeyDictionary(), []

    def instead(module: nn.Module, name: str, own: nn.Parameter) -> nn.Parameter | None:
        if own.is_meta or is_lazy(own) or isinstance(own, FakeTensor):
            return None  # it has no memory
        if threading.get_ident() != thread:
            return None
        if own not in given:  # else two modules share it
            given[own] = nn.Parameter(own.detach().to("meta"), own.requires_grad)
            given[own].__dict__.update(own.__dict__)
            stand_ins.append(ref(given[own]))
        return given[own]

    with _building:
        hook = register_module_parameter_registration_hook(instead)
        try:
            yield given, stand_ins
        finally:
            hook.remove()


def _assign(module: nn.Module, tensors: dict[str, Tensor], stored: dict[str, Stored]) -> None:
    """Put the tensors of the files into the module, and tell all that does not fit at once."""
    expected = module.state_dict(keep_vars=True)
    misfits = {
        name: _misfit(expected[name], tensor)
        for name, tensor in tensors.items()
        if name in expected
    }
    problems = [f"{name!r} in {stored[name].path} {how}" for name, how in misfits.items() if how]
    if not problems:
        state = tensors | _shared(expected, tensors)
        try:
            missing, unknown = module.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:
            missing, unknown, problems = (), (), [str(error)]
        files = ", ".join(dict.fromkeys(str(each.path) for each in stored.values()))
        problems += [f"{name!r} is missing in {files}" for name in missing]
        problems += [f"{name!r} in {stored[name].path} is unknown to it" for name in unknown]
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise ValueError(
            f"the weights do not fit {type(module).__name__}: {'; '.join(problems[:NAMED])}{more}. "
            "Build it with the sizes that it was saved with, or name the file that belongs to it"
        )


def _misfit(expected: Any, tensor: Tensor) -> str:
    """How a stored tensor does not suit its place; empty if it does."""
    if not isinstance(expected, Tensor) or is_lazy(expected):
        return ""
    if expected.shape != tensor.shape:
        return f"has shape {tuple(tensor.shape)}, the module's has {tuple(expected.shape)}"
    kinds = _kind(tensor.dtype), _kind(expected.dtype)
    return "" if kinds[0] == kinds[1] else f"holds {kinds[0]} numbers, the module's {kinds[1]} ones"


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating-point"
    return "complex" if dtype.is_complex else "boolean" if dtype == torch.bool else "whole"


def _shared(expected: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One object for all names that the module shares a parameter or buffer between."""
    names_of = defaultdict(list)
    for name, old in expected.items():
        if isinstance(old, Tensor) and not is_lazy(old):
            place = old.untyped_storage()._cdata, old.storage_offset(), old.shape, old.stride()
            names_of[place].append(name)
    made: dict[int, Tensor] = {}
    state = {}
    for names in names_of.values():
        present = [name for name in names if name in tensors]
        _check_equal(tensors, present)
        for name in names if present else ():
            old, tensor = expected[name], tensors[present[0]]
            if id(old) not in made:
                made[id(old)] = _in_the_place_of(old, tensor)
            state[name] = made[id(old)]
    return state


def _in_the_place_of(old: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(old, nn.Parameter):
        return tensor
    parameter = nn.Parameter(tensor, old.requires_grad)
    parameter.__dict__.update(old.__dict__)
    return parameter


def _check_equal(tensors: dict[str, Tensor], names: list[str]) -> None:
    for name in names[1:]:
        if not torch.equal(tensors[names[0]], tensors[name]):
            raise ValueError(
                f"{names[0]!r} and {name!r} are one parameter of the module, and the file holds "
                "different numbers for them; load a file of a module that shares it"
            )


def _refuse_left_out(module: nn.Module, given: WeakIdKeyDictionary, files: Iterable[Path]) -> None:
    """Refuse what is made from weights in `__init__`, or loaded in a way of its own.

    What a hook computes before each run, such as that of `weight_norm`, is no problem.
    """

    def waits(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return any(map(waits, value))
        return isinstance(value, Tensor) and (value.is_meta or value in given)

    for prefix, part in module.named_modules():
        computed = {getattr(hook, "name", "") for hook in part._forward_pre_hooks.values()}
        held = {**vars(part), **part._parameters, **part._buffers}
        for name in sorted(held.keys() - computed):
            if waits(held[name]):
                raise ValueError(
                    f"{'.'.join(filter(None, (prefix, name)))!r} takes weights before they are "
                    f"loaded from {', '.join(map(str, files))}. Take them in forward, or {AS_USUAL}"
                )


def _refuse_kept(module: nn.Module, given: WeakIdKeyDictionary, stand_ins: list[ref]) -> None:
    """Refuse a module that keeps parameters where none can be put: in a closure, an optimizer.

    Without numbers, they would be wrong, or fail when the module runs.
    """

    def kept() -> bool:
        return bool(len(given)) or any(stand_in() is not None for stand_in in stand_ins)

    if kept():
        gc.collect()
    if kept():
        raise ValueError(
            f"{type(module).__name__} keeps parameters outside of its modules, such as in a "
            f"function, a dictionary or an optimizer. Take them from the module in forward, or "
            f"{AS_USUAL}"
        )


def move(
    module: nn.Module,
    device: torch.device | None,
    dtype: torch.dtype | None,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Move parameters and buffers one by one; shared ones stay shared, complex ones complex.

    Args:
        module: changed in place.
        device: None to leave them where they are.
        dtype: for floating-point ones; None to leave them all as they are.
        after_each: is called whenever one has been copied.
    """
    moved = WeakIdKeyDictionary()

    def to(tensor: Tensor) -> Tensor:
        if tensor not in moved:
            cast = dtype if tensor.is_floating_point() else None
            moved[tensor] = tensor.to(device or tensor.device, cast or tensor.dtype)
            if moved[tensor] is not tensor:
                after_each()
        return moved[tensor]

    module._apply(to)


def _forget_pages(files: Iterable[mmap.mmap]) -> None:
    """Give back the pages that have been read; they would be read again if somebody needed them."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for file in files:
            file.madvise(mmap.MADV_DONTNEED)
