"""A loader of batches that say what was rejected, and that does not wait for ever."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from datamodules.order import ResumableLoader
from datamodules.streams.rejects import Fetched
from datamodules.workers import iterate
from distill.types import Batch


class CheckedLoader(ResumableLoader):
    """Batches of a dataset that gives `Fetched`, in the order chosen, or as they come.

    Args:
        dataset: ``dataset[positions]`` is fetched, or what iterating gives.
        order: called when iteration starts, gives the positions of each batch; None for an iterable dataset, which goes on
            where the last epoch left it.
        length: batches of an epoch.
        num_workers: processes that prepare batches; 0 for none.
        receive: makes of what was fetched the batch; may raise.
        timeout: seconds to wait for a batch; None for ever.
        reading: called after that time, says what is being read.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Callable[[], list[Tensor]] | None,
        length: int,
        num_workers: int,
        receive: Callable[[Fetched], Batch],
        timeout: float | None,
        reading: Callable[[], str],
    ):
        super().__init__(dataset, order or list, length, num_workers)
        self.ordered, self.receive, self.timeout, self.reading = order is not None, receive, timeout, reading
        self.stream: Iterator[Fetched] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.ordered:
            for fetched in self._open(self.order()):
                yield self.receive(fetched)
            return
        self.stream = self._open(None) if self.stream is None else self.stream
        for _ in range(self.length):
            yield self.receive(next(self.stream))

    def _open(self, order: list | None) -> Iterator[Fetched]:
        wait = (self.timeout or 0.0) if self.num_workers else 0.0
        items = iterate(self.dataset, order, self.num_workers, wait)
        return items if self.timeout is None else Watched(items, self.timeout, not self.num_workers, self.reading)


class Watched(Iterator[Fetched]):
    """The items of a loader, or an error when one takes too long.

    Args:
        items: what iterating over the loader gives.
        timeout: seconds.
        on_thread: whether a thread takes the items, one by one as they are asked for, for a loader that cannot time out itself.
        reading: says what is being read.
    """

    def __init__(self, items: Iterator[Fetched], timeout: float, on_thread: bool, reading: Callable[[], str]):
        self.items, self.timeout, self.reading = items, timeout, reading
        self.asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.given: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.on_thread = on_thread
        if on_thread:  # a daemon: the process does not wait for a read that hangs when it ends
            threading.Thread(target=_advance, args=(self.items, self.asked, self.given), daemon=True).start()

    def __next__(self) -> Fetched:
        began = time.monotonic()
        try:
            if not self.on_thread:
                return next(self.items)
            self.asked.put(True)
            item, error = self.given.get(timeout=self.timeout)
        except (queue.Empty, RuntimeError) as failure:
            if time.monotonic() - began < self.timeout:
                raise
            _kill_workers(self.items)
            raise RuntimeError(
                f"no batch in data.timeout={self.timeout:g} seconds: {self.reading()}. A shard that hangs (a pipe, a server, a "
                "file system), or workers that are too slow: see to it, or raise data.timeout."
            ) from failure
        if error is not None:
            raise error
        return item

    def __del__(self) -> None:
        self.asked.put(False)


def _kill_workers(items: Any) -> None:
    """Ends the workers of a DataLoader's iterator at once, which torch would do one by one, waiting for each."""
    if getattr(items, "_worker_pids_set", False):
        _remove_worker_pids(id(items))  # else torch raises, wherever this process is, that they were killed
        items._worker_pids_set = False
        for worker in items._workers:
            worker.kill()


def _advance(items: Iterator[Any], asked: queue.SimpleQueue, given: queue.SimpleQueue) -> None:
    """Takes an item for each question, until the answer is no."""
    while asked.get():
        try:
            given.put((next(items), None))
        except BaseException as error:  # is raised where the item was asked for
            given.put((None, error))
