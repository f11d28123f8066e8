"""The polite end of a run: what a cluster sends before it takes the machine away.

Notebook: 07_training
"""

from __future__ import annotations

import os
import signal
import threading


class Termination:
    """Puts off a SIGTERM until its block ends, so that a step and a checkpoint can end first.

    Handlers belong to the main thread; in any other, SIGTERM keeps its meaning.

    Notebook: 07_training
    """

    def __init__(self):
        self.requested = False
        self._before = None

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def _remember(self, *_) -> None:
        self.requested = True

    def __exit__(self, *_) -> None:
        if self._before is None:
            return
        signal.signal(signal.SIGTERM, self._before)
        if self.requested:
            os.kill(os.getpid(), signal.SIGTERM)
