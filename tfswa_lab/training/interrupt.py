"""The polite end of a run: Ctrl-C, and what a cluster sends before it takes the machine away.

Notebook: 07_training
"""

from __future__ import annotations

import os
import signal
import threading


class Termination:
    """Puts off a SIGTERM or Ctrl-C until its block ends: the step, and a checkpoint, come first.

    A second one is not put off, since a step may take minutes. Handlers belong to the main thread;
    in any other, signals keep their meaning.
    """

    def __init__(self):
        self.requested = False
        self._signal = signal.SIGTERM
        self._before = {}

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _frame: object) -> None:
        self.requested = True
        self._signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def __exit__(self, *_) -> None:
        self._restore()
        if self.requested and self._before:
            os.kill(os.getpid(), self._signal)
