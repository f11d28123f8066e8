"""A pretend GPU for tests on a CPU: it counts bytes and runs out of them."""

import contextlib

import torch


class PretendGpu:
    """`with gpu.holding(n):` takes n bytes, or raises what torch raises if they are too many."""

    def __init__(self, size):
        self.size, self.used, self.failures = size, 0, 0

    @contextlib.contextmanager
    def holding(self, number):
        free = self.size - self.used
        if number > free:
            self.failures += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {number} bytes. GPU 0 has a total capacity "
                f"of {self.size} bytes of which {free} bytes is free."
            )
        self.used += number
        try:
            yield
        finally:
            self.used -= number
