"""Ordinary scripts that one special rule of the diagnosis is for: without it, they come out wrong.

`benchmarks/leak_rules.py` shows which.
"""

from __future__ import annotations

import queue
import random
import threading
from collections import deque
from functools import partial
from itertools import count

import numpy as np
import torch
from planted import CACHE, HEALTHY, HOOKS, TENSORS, batch, network, planter
from torch.nn.modules.module import register_module_forward_hook

RULES = []
planted = planter(RULES)


@planted(TENSORS, words=("held by `outputs`",))
def step_under_a_decorator():
    outputs, model = [], network()

    @torch.no_grad()
    def step():
        outputs.append(model(batch()))

    return step


@planted(TENSORS, words=("results", "local of", "work"))
def worker_thread_that_collects():
    waiting, done = queue.SimpleQueue(), queue.SimpleQueue()

    def work():
        results = []
        while True:
            results.append(waiting.get())
            done.put(None)

    threading.Thread(target=work, daemon=True).start()

    def step():
        waiting.put(batch())
        done.get()

    return step


@planted(TENSORS, words=("held by `graphs`",))
def sparse_matrices_kept():
    graphs = []
    return lambda: graphs.append(torch.eye(100).to_sparse())


@planted(TENSORS, words=("(a list of",))
def two_lists_in_turn():
    even, odd = [], []
    return lambda number: (odd if number % 2 else even).append(batch())


@planted(TENSORS, words=("held by `seen`",))
def hard_batches_by_step():
    seen, chance = {}, random.Random(5)

    def step(number):
        if chance.random() < 0.5 or number < 6:
            seen[f"step_{number}"] = batch()

    return step


@planted(CACHE, words=("`frames`",))
def large_deque_that_is_not_full():
    frames = deque(maxlen=1000)
    return lambda: frames.append(torch.zeros(2**16))


@planted(CACHE, words=("`pool`",))
def pool_that_takes_most_of_the_steps_to_fill():
    pool = []

    def step(number):
        if len(pool) < 32:
            pool.append(batch())
        pool[number % len(pool)] = batch()

    return step


@planted(HEALTHY)
def arrays_replaced_in_turn():
    arrays, turns = [np.ones(3000) for _ in range(200)], count()

    def step():
        arrays[next(turns) % 200] = np.ones(3000)

    return step


@planted(HOOKS, words=("`torch._global_forward_hooks`", "planted_rules.py"))
def hook_on_all_modules():
    model = network()

    def step():
        register_module_forward_hook(lambda module, inputs, output: None)
        model(batch())

    return step


@planted(HOOKS, words=("planted_rules.py", "note"))
def partial_hook():
    model = network()

    def note(names, module, inputs, output):
        names.add(type(module).__name__)

    def step():
        model[0].register_forward_hook(partial(note, set()))
        model(batch())

    return step
