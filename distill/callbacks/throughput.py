"""How fast training goes: images a second, time a step, the wait for data, peak memory, and use of the device's arithmetic."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from distill.operations import OperationCounter
from distill.types import Batch

UNTIMED_TURNS = 2
"""The first batches of each player are not timed: in them operations are counted, networks compiled and algorithms chosen."""


@dataclass
class Interval:
    """What happened on this rank since the clock was started, at ``began`` seconds.

    Attributes:
        began, paused, waited: seconds: when it began, for how long it did not count, and how long the host waited for data.
        batches, images: that were trained on.
        operations: floating point operations.
    """

    began: float
    paused: float = 0.0
    waited: float = 0.0
    batches: int = 0
    images: int = 0
    operations: float = 0.0


class Throughput(Callback):
    """Logs the speed of the steps since the log before, every ``trainer.log_every_n_steps``, as ``throughput/...``:

    - ``images_per_second``: trained on, of all ranks together;
    - ``step_ms``: of an optimiser step, saves and logging included;
    - ``data_wait``: the share of the time, in [0, 1], that the host waited for its loader (of the rank that waited longest).
      An accelerator may have had work left meanwhile;
    - ``peak_memory_mib``: of the rank with most, since the process began: allocated by tensors on a CUDA device, else resident;
    - ``utilisation``: with ``peak_tflops``, operations a second over that peak of all ranks' devices. Matrix products,
      convolutions and attentions are counted as they are executed, those that gradient checkpointing repeats among them.

    The time of validations, and of what follows them until the next batch is fetched, is left out. The host waits for an
    accelerator at a log (where the figures are read anyway), before a validation, and in the first two turns of each player.

    Args:
        peak_tflops: 1e12 operations a second that one device can do at best, in the precision that is computed in (its data
            sheet's, without sparsity); None to count none. They are counted in each player's first batch, which changes no
            result; a method that draws how many evaluations it makes is taken to make as many as then. Under
            ``optimization.compile`` that batch runs uncompiled.

    Raises:
        ValueError: a peak that is not positive.
    """

    def __init__(self, peak_tflops: float | None = None):
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"peak_tflops={peak_tflops}: give a positive number, or null.")
        self.peak_tflops = peak_tflops
        self.operations: dict[int, int] = {}
        self.turns: Counter[int] = Counter()
        self.player = 0
        self.interval: Interval | None = None
        self.pause_began: float | None = None
        self._counting, self._counter = ExitStack(), OperationCounter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, and watches over the fetching of batches."""
        self.operations, self.turns = {}, Counter()
        self._start_clock(trainer)
        loop: Any = trainer.fit_loop.epoch_loop
        before, after, fetch_began = type(loop)._on_before_fetch, type(loop)._on_after_fetch, 0.0

        def before_fetch() -> None:
            nonlocal fetch_began
            before(loop)
            fetch_began = now()
            if self.interval is not None and self.pause_began is not None:
                self.interval.paused += fetch_began - self.pause_began
                self.pause_began = None

        def after_fetch() -> None:
            if self.interval is not None:
                self.interval.waited += now() - fetch_began
            after(loop)

        loop._on_before_fetch, loop._on_after_fetch = before_fetch, after_fetch  # Lightning has no hook around the fetch

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Notes whose turn it is, and counts the operations of a player's first."""
        self.player = pl_module.turn(pl_module.batches_seen // pl_module.optimization.accumulate_batches)
        if self.peak_tflops is not None and self.player not in self.operations:
            if pl_module.optimization.compile:  # compiled code hides its operations
                self._counting.enter_context(torch.compiler.set_stance("force_eager"))
            self._counter = self._counting.enter_context(OperationCounter())

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Adds the batch to the interval, and logs it."""
        self._counting.close()
        if self.peak_tflops is not None and self.player not in self.operations:
            self.operations[self.player] = self._counter.total
        self.turns[self.player] += 1
        if self.turns[self.player] <= UNTIMED_TURNS or self.interval is None:
            self._start_clock(trainer)
            return
        self.interval.batches += 1
        self.interval.images += len(batch)
        self.interval.operations += self.operations.get(self.player, 0)
        if pl_module.batches_seen % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for name, value in self._figures(trainer, pl_module.optimization.accumulate_batches).items():
                shown = name in ("images_per_second", "data_wait", "utilisation")
                pl_module.log(f"throughput/{name}", value, prog_bar=shown, batch_size=1)
            self._start_clock(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock; the next fetch of a batch for training starts it again."""
        if self.interval is not None and self.pause_began is None:
            finish_work(trainer)
            self.pause_began = now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock is off, for validations apart from training."""
        self.interval = self.pause_began = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise; nothing is counted any more."""
        self._counting.close()
        self.interval = self.pause_began = None

    # ------------------------------------------------------------------------------------------------------------------

    def _start_clock(self, trainer: Trainer) -> None:
        finish_work(trainer)
        self.interval, self.pause_began = Interval(now()), None

    def _figures(self, trainer: Trainer, accumulate_batches: int) -> dict[str, float]:
        """Of the interval that ends now, of all ranks; each waits for all others."""
        finish_work(trainer)
        assert self.interval is not None
        part, device = self.interval, trainer.strategy.root_device
        seconds = now() - part.began - part.paused
        memory = peak_memory(device) / 2**20
        own = torch.tensor([part.images, part.operations, seconds, part.waited / seconds, memory], device=device)
        ranks = trainer.strategy.all_gather(own).reshape(-1, len(own)).cpu()
        images, operations = ranks[:, :2].double().sum(0).tolist()
        longest, wait, memory = ranks[:, 2:].amax(0).tolist()
        figures = {
            "images_per_second": images / longest,
            "step_ms": 1000 * longest * accumulate_batches / part.batches,
            "data_wait": wait,
            "peak_memory_mib": memory,
        }
        if self.peak_tflops is not None:
            figures["utilisation"] = operations / (longest * len(ranks) * self.peak_tflops * 1e12)
        return figures


def now() -> float:
    """Seconds of a clock that only goes forward."""
    return time.perf_counter()


def finish_work(trainer: Trainer) -> None:
    """Waits until the device has done what it was given."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes at once since the process began: allocated by tensors on a CUDA device, resident in memory for any other."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
