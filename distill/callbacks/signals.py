"""The signals by which a cluster announces the end of a job, kept until training is at a point where it can be left.

Imports nothing heavy: ``python -m distill`` listens from its first lines on, long before there is a Trainer.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""SIGUSR1 is what ``sbatch --signal=USR1@300`` sends ahead of the time limit; SIGTERM comes with preemption and ``scancel``."""


class Listener:
    """Remembers the first of `SIGNALS` that has come to this process; its handler does nothing else.

    Attributes:
        received: the number of that signal, 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def start(self) -> bool:
        """Listens from now on. False if it does so already."""
        if self._before:
            return False
        self.received = 0
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return True

    def ignore(self) -> None:
        """Lets further signals pass without effect, to the very end of the process: what was to be done has been decided."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def stop(self) -> None:
        """Puts back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number


LISTENER = Listener()
"""The one of this process: handlers are the process's."""
