"""Processes that prepare batches: the signals that a cluster sends to every process of a job, and how they end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def outlive_signals(worker: int) -> None:
    """For a DataLoader's ``worker_init_fn``: SIGUSR1 and SIGTERM are for the process that trains, which saves and leaves.

    torch's workers die of SIGTERM unless it is from their own parent, and that ends training in the middle of a step. See
    `iterate` for how those end that do not answer.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def iterate(dataset: Dataset, order: list | None, num_workers: int, timeout: float = 0.0) -> Iterator[Any]:
    """What a DataLoader gives of ``dataset[batch]`` for each batch of ``order``, or of an iterable dataset.

    Workers outlive SIGUSR1 and SIGTERM, and end all the same: torch waits 5 s for each that is stuck when its iterator is left,
    then it and, at the end of the process, multiprocessing send SIGTERM. Here that is SIGKILL. (A read that not even SIGKILL
    ends, of a network file system that is gone, still holds up the process.)

    Args:
        dataset: to be read.
        order: the items of each batch; None for an iterable dataset.
        num_workers: processes that prepare batches; 0 for none.
        timeout: seconds that workers may take for a batch; 0 for any time.
    """
    # A generator of its own keeps DataLoader from drawing its workers' seed from torch's global one, which would then differ
    # between a resumed run and an uninterrupted one.
    own = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"num_workers": num_workers, "timeout": timeout, "worker_init_fn": outlive_signals}
    items = iter(DataLoader(dataset, sampler=order, batch_size=None, generator=own, **settings))
    for worker in getattr(items, "_workers", []):
        worker._popen.terminate = worker._popen.kill
    return items
