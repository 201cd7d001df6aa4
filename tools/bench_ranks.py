"""How training scales to several processes, each with a batch of the same size: what ``tools/bench.py --ranks 2`` runs.

First one process alone, then all of them under DDP, which exchange gradients in every other round of turns; the rounds between,
in which everything else is the same, say what the exchange costs. So the share of communication is of the gradients alone, with
the wait for the slowest rank; the flag of bad steps, a few bytes, is exchanged in all.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from datamodules.digits import DigitsDataModule
from distill.methods.base import Method


class RoundTimes(Callback):
    """The time of each batch, by whose turn it is and whether gradients are exchanged in it.

    Args:
        turns: batches of a round.
        warmup: rounds that are not timed.
    """

    def __init__(self, turns: int, warmup: int):
        self.turns, self.warmup = turns, warmup
        self.seconds: dict[tuple[bool, int], list[float]] = defaultdict(list)
        self.ended = 0.0

    def exchanged(self, step: int) -> bool:
        return (step // self.turns) % 2 == 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = self.exchanged(pl_module.batches_seen)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, ended = pl_module.batches_seen - 1, time.perf_counter()
        if step >= self.warmup * self.turns:
            self.seconds[self.exchanged(step), step % self.turns].append(ended - self.ended)
        self.ended = ended

    def round(self, exchanged: bool) -> float:
        """Seconds of a round: the sum of its turns' medians."""
        return sum(statistics.median(self.seconds[exchanged, turn]) for turn in range(self.turns))


def timed(method: Method, ranks: int, rounds: int, warmup: int, batch_size: int) -> RoundTimes:
    """Trains for so many rounds, half of them with exchange, after the warm-up ones."""
    times = RoundTimes(getattr(method, "critic_steps", 0) + 1, warmup)
    trainer = Trainer(
        max_steps=(warmup + rounds) * times.turns,
        callbacks=[times],
        strategy=DDPStrategy(find_unused_parameters=times.turns > 1) if ranks > 1 else "auto",
        devices=ranks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(method, datamodule=DigitsDataModule(batch_size))
    return times


def scaling(build: Callable[[], Method], ranks: int, steps: int, warmup: int, batch_size: int) -> dict[str, float]:
    """Images a second of one process and of ``ranks``, the efficiency of the latter, and the share of communication.

    Lightning starts the other ranks by this very command; they leave the first measurement out.
    """
    turns = getattr(build(), "critic_steps", 0) + 1
    rounds, untimed = max(2, steps // turns), max(1, -(-warmup // turns))
    first = "LOCAL_RANK" not in os.environ
    alone = timed(build(), 1, rounds, untimed, batch_size) if first else None
    together = timed(build(), ranks, rounds, untimed, batch_size)
    if alone is None:
        return {}
    own = statistics.mean([alone.round(True), alone.round(False)])
    rate = {"one": turns * batch_size / own, "all": turns * batch_size * ranks / together.round(True)}
    return {
        "images_per_second_one_rank": round(rate["one"], 1),
        "images_per_second": round(rate["all"], 1),
        "scaling_efficiency": round(rate["all"] / (ranks * rate["one"]), 3),
        "communication_share": round(1 - together.round(False) / together.round(True), 3),
    }
