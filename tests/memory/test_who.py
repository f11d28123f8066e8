"""What holds memory now: in a real kernel, each planted holder is named, and its line frees it."""

import gc
import json
import re
import sys
from types import ModuleType, SimpleNamespace
from weakref import ref

import pytest
import torch
from jupyter_client.manager import start_new_kernel
from torch import nn

from tfswa_lab.memory import who
from tfswa_lab.memory.who.heap import Heap
from tfswa_lab.memory.who.who import Held, Holder

MB = 4_000_000  # bytes of 1000 × 1000 floats
PREPARE = """
import functools, gc, json, sys, types
from weakref import ref
import matplotlib; matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from torch import nn
%load_ext tfswa_lab.memory
watched = []
def big(*shape):
    made = torch.ones(*(shape or (1000, 1000)))
    watched.append(ref(made.untyped_storage()))
    return made
"""
ASK = """
held = get_ipython().run_line_magic("memory", "who")
print(json.dumps([(h.names, h.size, h.free, [(p.names, p.free) for p in h.parts])
                  for h in held.holders]))
"""
ALIVE = "print(sum(one() is not None for one in watched)); watched.clear()"
FRAMES = "the last error (OutOfMemoryError)"

# By name: cells, the holder's name, and its bytes.
PLANTED = {
    "variable": (["x = big()"], "x", MB),
    "two variables": (["x = big(); y = x"], "x (also y)", MB),
    "list": (["xs = [big() for _ in range(3)]"], "xs", 3 * MB),
    "output": (["big()", "1 + 1"], "Out[", MB),
    "output and variable": (["x = big()\nx"], "x (also Out[", MB),
    "output with a part of a variable": (["x = big()", "[x, 1]"], "x and Out[", MB),
    "traceback": (
        [
            "def step():\n    kept = big()\n    raise torch.OutOfMemoryError('CUDA out of memory')",
            "step()",
        ],
        FRAMES,
        MB,
    ),
    "chained errors": (
        [
            "def inner():\n    kept = big()\n    raise ValueError",
            "def outer():\n    also = big()\n    try:\n        inner()\n"
            "    except ValueError as error:\n        raise torch.OutOfMemoryError from error",
            "outer()",
        ],
        FRAMES,
        2 * MB,
    ),
    "figure": (["fig = plt.figure(); fig.data = big(); del fig"], "figure 1", MB),
    "figure and variable": (["fig, ax = plt.subplots(); ax.data = big()"], "fig and", MB),
    "closure": (
        ["def make():\n    kept = big()\n    return lambda: kept.sum()", "step = make()"],
        "step",
        MB,
    ),
    "module attribute": (
        ["sys.modules['mine'] = types.ModuleType('mine'); sys.modules['mine'].buffer = big()"],
        "mine.buffer",
        MB,
    ),
    "cache of a module": (
        ["sys.modules['mine'] = types.ModuleType('mine'); sys.modules['mine'].seen = {1: big()}"],
        "mine.seen",
        MB,
    ),
    "class attribute": (
        ["class Trainer:\n    seen = []", "Trainer.seen.append(big()); trainer = Trainer()"],
        "Trainer.seen",
        MB,
    ),
    "cycle": (
        ["class Cell: pass", "cell = Cell(); cell.me, cell.data = cell, big(); del cell"],
        "reference cycles",
        MB,
    ),
    "variable in a cycle": (
        ["class Cell: pass", "cell = Cell(); cell.me, cell.data = cell, big()"],
        "cell",
        MB,
    ),
    "output in a cycle": (
        ["class Cell: pass", "cell = Cell(); cell.me, cell.data = cell, big()\ncell"],
        "cell (also Out[",
        MB,
    ),
    "shared view": (["whole = big(); row = whole[0]"], "whole and row", MB),
    "array": (["array = big().numpy()"], "array", MB),
    "generator": (
        [
            "def rows():\n    data = big()\n    for row in data:\n        yield row.sum()",
            "rows_left = rows(); _ = next(rows_left); del _",
        ],
        "rows_left",
        MB,
    ),
    "cache": (
        ["@functools.lru_cache\ndef window(n):\n    return big(n)", "window(10**6);"],
        "window",
        MB,
    ),
    "hook": (
        [
            "net = nn.Sequential(nn.Linear(2, 2)); kept = big()",
            "net[0].register_forward_hook(lambda *_, kept=kept: None); del kept",
        ],
        "net",
        MB,
    ),
    "graph": (
        ["w = torch.ones(1000, requires_grad=True); loss = (big() * w).exp().sum()"],
        "loss",
        2 * MB,  # exp keeps its result, and the product its factor
    ),
    "node of a graph": (
        ["w = torch.ones(1000, requires_grad=True); node = (big() * w).sum().grad_fn"],
        "node",
        MB,
    ),
    "gradient": (["w = big().requires_grad_(); (w * 2).sum().backward()"], "w", 2 * MB),
    "attribute with slots": (
        ["class Slotted:\n    __slots__ = ('a',)", "slotted = Slotted(); slotted.a = big()"],
        "slotted",
        MB,
    ),
    "default argument": (["def f(x, cache=big()):\n    return x"], "f", MB),
    "partial": (["f = functools.partial(torch.add, big())"], "f", MB),
    "exception that was stored": (
        [
            "def fail():\n    kept = big()\n    raise ValueError",
            "errors = []\ntry:\n    fail()\nexcept ValueError as error:\n    errors.append(error)",
        ],
        "errors",
        MB,
    ),
    "group of errors": (
        [
            "def fails():\n    kept = big()\n    raise ValueError",
            "def several():\n    found = []\n"
            "    for _ in range(2):\n        try:\n            fails()\n"
            "        except ValueError as error:\n            found.append(error)\n"
            "    raise ExceptionGroup('all', found)",
            "several()",
        ],
        "the last error (ExceptionGroup)",
        2 * MB,
    ),
    "dictionary": (["d = {'cache': [big()], 'x': 1}"], "d", MB),
    "widget": (
        [
            "import ipywidgets",
            "def calls():\n    kept = big()\n    return lambda x: float(kept.sum()) * x",
            "slider = ipywidgets.interactive(calls(), x=(0, 4))",
        ],
        "slider (also open widgets)",
        MB,
    ),
    "task": (
        [
            "import asyncio",
            "async def sleeps():\n    kept = big()\n    await asyncio.sleep(1000)",
            "task = asyncio.create_task(sleeps())",
            "1 + 1;",
        ],
        "task",
        MB,
    ),
    "object in the place of a module": (
        ["class Lazy: pass", "sys.modules['lazy'] = Lazy(); sys.modules['lazy'].data = big()"],
        "sys.modules['lazy']",
        MB,
    ),
    "registry of a library": (
        ["json.cache = {'a': big()}"],
        "json.cache['a']",
        MB,
    ),
    "an event of IPython": (
        [
            "def calls():\n    kept = big()\n    return lambda *_: kept",
            "get_ipython().events.register('post_run_cell', calls())",
        ],
        "IPython's event post_run_cell",
        MB,
    ),
}


class Kernel:
    """A kernel of Jupyter that runs cells one after another."""

    def __init__(self):
        self._manager, self._client = start_new_kernel(kernel_name="python3")

    def run(self, cell):
        """What a cell prints; its errors are shown by the kernel, as to a user."""
        seen = []
        self._client.execute_interactive(cell, timeout=600, output_hook=seen.append)
        contents = [each["content"] for each in seen]
        shown = (each.get("data", {}).get("text/plain", "") for each in contents)
        return "".join([*(each.get("text", "") for each in contents), *shown])

    def close(self):
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    kernel.run(PREPARE)
    yield kernel
    kernel.close()


@pytest.mark.parametrize("planted", PLANTED)
def test_the_holder_is_named_and_its_line_frees_it(kernel, planted):
    cells, name, size = PLANTED[planted]
    for cell in cells:
        kernel.run(cell)
    holders = json.loads(kernel.run(ASK))
    found = [each for each in holders if each[0].startswith(name)]
    assert found, holders
    assert abs(found[0][1] - size) <= 0.01 * size, found
    kernel.run(found[0][2])
    assert kernel.run(ALIVE).strip() == "0", found
    kernel.run("get_ipython().run_line_magic('reset', '-f out'); gc.collect()")


def test_the_part_that_holds_most_is_named_with_its_line(kernel):
    kernel.run(
        "class Trainer:\n"
        "    def __init__(self):\n"
        "        self.best, self.history = big(10), [big() for _ in range(5)]\n"
        "trainer = Trainer(); net = nn.Sequential(nn.Linear(2, 2))\n"
        "net[0].register_forward_hook(functools.partial(print, big()))"
    )
    parts = {names: dict(parts) for names, *_, parts in json.loads(kernel.run(ASK))}
    assert parts["trainer"] == {"trainer.history": "trainer.history.clear()"}
    assert parts["net"] == {"net[0]._forward_hooks": "net[0]._forward_hooks.clear()"}
    kernel.run("trainer.history.clear()\nnet[0]._forward_hooks.clear()")
    assert kernel.run(ALIVE).strip() == "1"  # trainer.best
    kernel.run("del trainer, net")


def test_the_magics_say_what_they_can(kernel):
    said = kernel.run("%memory nonsense")
    assert "%memory nonsense: use %memory, %memory who" in said


def test_a_cell_shows_its_peak_and_what_stays(kernel):
    cell = "%%memory\nfirst = torch.zeros(1000, 1000)\nsecond = first + 1\ndel first"
    said = kernel.run(cell)
    assert "3.81 MiB stay" in said
    assert re.search(r"stays, by line:\n +3.81 MiB  cell:2", said)
    assert "with the trace, which adds about" in said
    kernel.run("del second")


def test_strange_objects_do_not_spoil_the_answer():
    """Their own code must not run: it may raise anything, or lie."""

    class Raises:
        def __getattribute__(self, name):
            raise RuntimeError(name)

    class Lies:
        @property
        def __class__(self):
            return torch.Tensor

    class NoLength(dict):
        def __len__(self):
            raise RuntimeError

        items = __iter__ = values = clear = __len__

    class Meta(type):
        def __getattribute__(self, name):
            raise RuntimeError(name)

        def __eq__(self, other):
            raise RuntimeError

        def __hash__(self):
            return 1

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_):
            raise RuntimeError

    strange = [object.__new__(kind) for kind in (Raises, Lies, Meta("Strange", (), {}))]
    for each in strange:
        object.__getattribute__(each, "__dict__")["data"] = torch.zeros(77_777)
    kept = NoLength(data=torch.zeros(77_777))
    own = torch.Tensor._make_subclass(Own, torch.zeros(77_777))
    shell = SimpleNamespace(user_ns={"a": strange, "b": kept, "c": own, "_oh": {}})
    found = [holder for holder in who(shell).holders if "strange in" in holder.names]
    assert sum(holder.size for holder in found) == 3 * 4 * 77_777


def test_what_reset_out_leaves_is_named():
    """IPython's `%reset out` sets `_` anew, and forgets its hidden copy."""
    hidden = {"_": torch.zeros(88_888)}
    shell = SimpleNamespace(user_ns={"_": "", "_oh": {}}, user_ns_hidden=hidden)
    (found,) = (each for each in who(shell).holders if each.size == 4 * 88_888)
    assert found.names == "IPython's hidden _"
    assert found.free == "del get_ipython().user_ns_hidden['_']"


def test_objects_that_are_frozen_are_announced():
    gc.freeze()
    try:
        assert "hidden by gc.freeze()" in str(who())
    finally:
        gc.unfreeze()


def sizes():
    heap = Heap()
    found = {at: memory.size for at, memory in heap.storages.items()}
    heap.close()
    return found


def test_every_storage_counts_once():
    whole = torch.zeros(1000, 100)
    before = sum(sizes().values())
    views, array = [whole[0], whole.T, whole.view(-1)], whole.numpy()
    assert sum(sizes().values()) == before
    sparse = torch.eye(500).to_sparse()
    assert sum(sizes().values()) == before + sparse.indices().nbytes + sparse.values().nbytes
    meta = torch.empty(10**9, device="meta")
    assert sum(sizes().values()) == before + sparse.indices().nbytes + sparse.values().nbytes
    del views, array, meta


def test_the_holders_add_up_to_all_tensors():
    kept = [torch.zeros(1000), torch.zeros(2000)]
    held = who()
    assert sum(holder.size for holder in held.holders) == sum(held.sizes.values())
    assert held.sizes["cpu"] >= sum(each.nbytes for each in kept)


def test_asking_keeps_nothing_alive():
    gc.collect()
    gc.disable()
    try:
        tensor = torch.zeros(1000)
        gone = ref(tensor)
        who()
        del tensor
        assert gone() is None
    finally:
        gc.enable()


def test_variables_of_running_functions_are_named():
    mine = torch.zeros(123_457)
    (found,) = (each for each in who().holders if each.size == mine.nbytes)
    assert found.names.startswith("mine in test_variables_of_running_functions_are_named (running")
    assert found.free == ""


def test_a_module_that_two_names_lead_to_is_emptied_once():
    module = ModuleType("planted_module")
    sys.modules[module.__name__] = module
    module.cache = [torch.zeros(54_321)]
    try:
        (found,) = (each for each in who().holders if each.size == 4 * 54_321)
        assert found.names == "planted_module.cache"
        exec(found.free)
        assert module.cache == []
    finally:
        del sys.modules[module.__name__]


def test_shared_parameters_need_all_their_holders_gone():
    space = SimpleNamespace(net=nn.Linear(321, 123))
    space.optimizer = torch.optim.SGD(space.net.parameters())
    shell = SimpleNamespace(user_ns=vars(space) | {"_oh": {}})
    del space
    found = [each for each in who(shell).holders if each.names == "net and optimizer"]
    assert [each.size for each in found] == [4 * (321 * 123 + 123)]
    assert found[0].free == "del net, optimizer"


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_named_with_their_bytes():
    mine = torch.zeros(1234, 567, device="cuda")
    held = who()
    assert any(holder.size == mine.nbytes and "mine" in holder.names for holder in held.holders)
    assert held.sizes[str(mine.device)] <= torch.cuda.memory_allocated()


@pytest.mark.gpu
def test_the_last_error_of_a_gpu_is_forgotten_by_its_line(kernel):
    kernel.run(
        "def fails():\n"
        "    kept = torch.ones(1000, 1000, device='cuda')\n"
        "    watched.append(ref(kept.untyped_storage()))\n"
        "    torch.empty(2**50, device='cuda')"
    )
    kernel.run("fails()")
    (found,) = [each for each in json.loads(kernel.run(ASK)) if each[0] == FRAMES]
    assert found[1] == MB
    kernel.run(found[2])
    assert kernel.run(ALIVE).strip() == "0"


def test_thousands_of_variables_are_a_matter_of_memory_not_of_their_square():
    names = {f"x{number}": torch.zeros(3) for number in range(5_000)}
    shell = SimpleNamespace(user_ns=names | {"_oh": {}})
    held = who(shell)
    assert len(held.holders) < 200
    assert sum(holder.size for holder in held.holders) == sum(held.sizes.values())


def test_what_is_shown_is_short():
    rows = tuple(Holder(f"name{at}", "a list", 100 - at, f"del name{at}") for at in range(40))
    held = Held({"cpu": 10**6}, rows, who().gauges)
    assert len(str(held).splitlines()) <= 25
    assert re.search(r"\d+ others", str(held))
    assert "\n" not in repr(held)
    assert "del name3" in held._repr_html_()
