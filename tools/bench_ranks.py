"""How training scales to several processes, each with a batch of the same size: what ``tools/bench.py --ranks 2`` runs.

First one process alone, then all of them under the strategy ``ddp`` of recipes, which exchange their gradients in every other
round of turns. In the rounds between everything else is the same (DDP's buckets, the flag of bad steps), so that they say what
the exchange costs, with the wait for the slowest rank.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from datamodules.digits import DigitsDataModule
from distill.callbacks.throughput import finish_work, now
from distill.methods.base import Method
from distill.strategies import DDPOfPlayers


class RoundTimes(Callback):
    """The time of each batch, by whether gradients are exchanged in it and its place in its round.

    Args:
        turns: batches of a round.
        warmup: rounds that are not timed, at least 1.

    Attributes:
        seconds: of each timed batch, by (exchanged, place).
    """

    def __init__(self, turns: int, warmup: int):
        self.turns, self.warmup = turns, warmup
        self.seconds: dict[tuple[bool, int], list[float]] = defaultdict(list)
        self.number, self.ended = 0, 0.0

    def exchanged(self, number: int) -> bool:
        """Whether gradients are exchanged in this 0-based batch: in every other round."""
        return (number // self.turns) % 2 == 0

    def exchange(self, group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        """What DDP does with a bucket of gradients in this batch."""
        return (allreduce_hook if self.exchanged(self.number) else noop_hook)(group, bucket)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        strategy: Any = trainer.strategy
        if not isinstance(strategy, DDPOfPlayers):
            return
        for model in strategy.exchanges or [strategy.model]:
            # Wrapped, because DDP refuses annotations that are strings.
            model.register_comm_hook(None, lambda group, bucket: self.exchange(group, bucket))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.number = pl_module.batches_seen

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        finish_work(trainer)
        ended = now()
        if self.number >= self.warmup * self.turns:
            self.seconds[self.exchanged(self.number), self.number % self.turns].append(ended - self.ended)
        self.ended = ended

    def round(self, exchanged: bool) -> float:
        """Seconds of a round: the sum of its turns' medians."""
        return sum(statistics.median(self.seconds[exchanged, turn]) for turn in range(self.turns))

    @property
    def count(self) -> int:
        """Batches that were timed."""
        return sum(len(times) for times in self.seconds.values())


def timed(method: Method, ranks: int, rounds: int, warmup: int, batch_size: int) -> RoundTimes:
    """The times of ``rounds`` rounds, half of them with exchange, after ``warmup`` others."""
    times = RoundTimes(turns_of(method), warmup)
    trainer = Trainer(
        max_steps=(warmup + rounds) * times.turns,
        callbacks=[times],
        strategy=DDPOfPlayers() if ranks > 1 else "auto",
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


def turns_of(method: Method) -> int:
    """Batches of a round: the critic's turns and the student's."""
    return getattr(method, "critic_steps", 0) + 1


def exchanged_bytes(method: Method) -> int:
    """Bytes of the gradients that a rank gives in a round: in each turn its player's."""
    players = method.seated_players()
    turns = [players[method.turn(turn)] for turn in range(turns_of(method))]
    return sum(value.numel() * value.element_size() for player in turns for value in player.parameters)


def scaling(build: Callable[[], Method], ranks: int, steps: int, warmup: int, batch_size: int) -> dict[str, float]:
    """Images a second of one process and of ``ranks``, the efficiency of the latter, and the share of communication.

    Lightning starts the other ranks by this very command; they leave the first measurement out, and are returned nothing.

    Args:
        build: makes the method.
        ranks: processes, at least 2.
        steps, warmup: batches that are timed and that come before, in whole rounds, at least two and one.
        batch_size: of each rank.
    """
    # Without it Lightning gives the processes a number of threads of its own once it has started them.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    method = build()
    turns = turns_of(method)
    rounds, untimed = max(2, steps // turns), max(1, -(-warmup // turns))
    first = "LOCAL_RANK" not in os.environ
    alone = timed(build(), 1, rounds, untimed, batch_size) if first else None
    together = timed(method, ranks, rounds, untimed, batch_size)
    if alone is None:
        return {}
    own = statistics.mean([alone.round(True), alone.round(False)])
    one, all_ranks = turns * batch_size / own, turns * batch_size * ranks / together.round(True)
    return {
        "steps": together.count,
        "images_per_second_one_rank": round(one, 1),
        "images_per_second": round(all_ranks, 1),
        "scaling_efficiency": round(all_ranks / (ranks * one), 3),
        "communication_share": round(1 - together.round(False) / together.round(True), 3),
        "gradient_mib_a_round": round(exchanged_bytes(method) / 2**20, 2),
    }
