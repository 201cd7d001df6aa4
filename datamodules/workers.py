"""What processes that prepare batches do about the signals that a cluster sends to every process of a job."""

from __future__ import annotations

import signal


def outlive_signals(worker: int) -> None:
    """For a DataLoader's ``worker_init_fn``: SIGUSR1 and SIGTERM are for the process that trains, which saves and leaves.

    torch's workers die of SIGTERM unless it is from their own parent, and that ends training in the middle of a step. One that
    is stuck can no longer be ended by SIGTERM either; `distill.callbacks.preemption` bounds how long that may take.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
