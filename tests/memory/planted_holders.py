"""Planted scripts: cycles, exceptions, frames, and host memory."""

from __future__ import annotations

import contextvars
import logging
import threading

import numpy as np
import torch
from planted import CYCLE, FRAMES, GRAPH, HOST, TENSORS, Training, batch, network, planter

HELD_LEAKS = []
planted = planter(HELD_LEAKS)


@planted(CYCLE, words=("Cell", "me"))
def object_that_refers_to_itself():
    class Cell:
        pass

    def step():
        cell = Cell()
        cell.me, cell.data = cell, torch.randn(8, 32)

    return step


@planted(CYCLE, words=("closure",))
def closure_that_refers_to_itself():
    training = Training()

    def step():
        x = batch()

        def again(n):
            return x.sum() if n == 0 else again(n - 1)

        again(2)
        training()

    return step


@planted(CYCLE, words=("parent",))
def tree_with_parents():
    class Node:
        def __init__(self, parent, value):
            self.parent, self.value, self.children = parent, value, []

    def step(i):
        root = Node(None, batch())
        root.children = [Node(root, batch()) for _ in range(3)]

    return step


@planted(CYCLE, words=("Scale",))
def tensor_kept_on_ctx():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.y = x * 2
            return ctx.y

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    model = network()

    def step():
        Scale.apply(model(batch())).sum().backward()

    return step


@planted(FRAMES, words=("errors", "train"))
def exceptions_stored():
    errors, model = [], network()

    def train(x):
        y = model(x)
        raise RuntimeError("shape of the target is wrong")
        return y

    def step():
        try:
            train(batch())
        except RuntimeError as error:
            errors.append(error)

    return step


@planted(FRAMES, words=("failures",))
def exceptions_stored_by_their_context():
    failures, model = [], network()

    def step(i):
        if i % 3:
            return
        try:
            y = model(batch())
            raise ValueError(f"bad {tuple(y.shape)}")
        except ValueError:
            try:
                raise RuntimeError("step failed") from None
            except RuntimeError as error:
                failures.append(error.with_traceback(None))

    return step


@planted(FRAMES, words=("records",))
def logger_that_keeps_exc_info():
    class Keep(logging.Handler):
        def __init__(self):
            super().__init__()
            self.records = []

        def emit(self, record):
            self.records.append(record)

    logger = logging.Logger("planted")
    logger.addHandler(Keep())

    def step():
        try:
            x = batch()
            raise ValueError(x.shape)
        except ValueError:
            logger.exception("failed")

    return step


@planted(FRAMES, words=("error",))
def one_failed_step_stays():
    training, error = Training(), None

    def step(i):
        nonlocal error
        try:
            loss = training.loss()
            if i == 3:
                raise RuntimeError("NaN")
            training.update(loss)
        except RuntimeError as caught:
            error = caught

    return step


@planted(FRAMES, words=("streams", "chunks"))
def generators_left_in_the_middle():
    streams, model = [], network()

    def chunks():
        y = model(batch()).detach()
        for row in y:
            yield row.sum().item()

    def step():
        stream = chunks()
        next(stream)
        streams.append(stream)

    return step


@planted(TENSORS, words=("seen",))
def list_in_a_suspended_generator():
    def stream():
        seen = []
        while True:
            seen.append(batch())
            yield

    running = stream()
    return lambda: next(running)


@planted(TENSORS, words=("thread",))
def thread_local_list():
    local, model = threading.local(), network()
    local.outputs = []

    def step():
        with torch.no_grad():
            local.outputs.append(model(batch()))

    return step


@planted(TENSORS, words=("outputs",))
def made_in_another_thread():
    outputs, model = [], network()

    def work():
        with torch.no_grad():
            outputs.append(model(batch()))

    def step():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    return step


@planted(TENSORS, words=("context",))
def context_variable():
    kept = contextvars.ContextVar("kept", default=())

    def step():
        kept.set((*kept.get(), batch()))

    return step


@planted(TENSORS, GRAPH, words=("previous",))
def linked_list():
    class Link:
        def __init__(self, previous, value):
            self.previous, self.value = previous, value

    head = None

    def step():
        nonlocal head
        head = Link(head, batch())

    return step


@planted(HOST, words=("rows",))
def rows_of_floats():
    rows, training = [], Training()

    def step():
        training()
        with torch.no_grad():
            rows.append(training.model(batch()).tolist())

    return step


@planted(HOST, words=("arrays",))
def copied_arrays():
    arrays, training = {}, Training()

    def step(i):
        training()
        arrays[i] = np.random.default_rng(i).standard_normal(2_000)

    return step


@planted(HOST, words=("planted_holders.py",))
def text_that_grows():
    class Log:
        text = ""

        def __call__(self, i):
            loss = Training().loss().item()
            self.text += f"{i:5d} {loss:.3f} " + "=" * 4_000 + "\n"

    return Log()
