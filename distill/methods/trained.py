"""The training loop that methods and the parts they stand on (autoencoders, text towers) share.

Optimisation is manual, for one and two players alike: one optimiser step for each batch (or each ``accumulate_batches``), so
that ``global_step`` counts them. Every batch seeds its draws from (seed, batch, rank): a resumed run repeats nothing, ranks
differ, and a batch can be replayed alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.ema import EMA
from distill.lora import checkpoint_gradients
from distill.methods.players import Player, check_players, check_turn
from distill.networks.base import inner_models, put_channels_last, unets
from distill.optimization import Optimization, SkippedSteps, clip_gradients, match_layouts, step_unless
from distill.sharding import Outline, check_whole, is_sharded, networks_of, scattered_state, shard
from distill.types import Batch, DataSpec, Losses


class TrainedModule(LightningModule, ABC):
    """Trains ``student`` by ``losses(batch)``.

    Args:
        student: the module that is trained.
        optimization: optimiser, learning rate, clipping, accumulation, averaging.

    Raises:
        ValueError: a setting for networks of diffusers (checkpointing, compilation, channels last) and a student that holds
            none.

    Attributes:
        ema: the average of the student.
        batches_seen: training batches that this rank has worked on since the run began.
        playing: whose turn it is, an index into the players; None before the first turn.
    """

    student: Any

    def __init__(self, student: nn.Module, optimization: Optimization):
        super().__init__()
        self.automatic_optimization = False
        self.student = student.train()
        if optimization.compile and not inner_models(student):
            raise ValueError("optimization.compile=true: only networks of distill/networks are compiled; set it to false.")
        if optimization.channels_last and not unets(student):
            raise ValueError("optimization.channels_last=true: only U-Nets of diffusers can; set it to false.")
        if optimization.gradient_checkpointing:
            checkpoint_gradients(student, "optimization")
        self.optimization = optimization
        self.ema = EMA(student, optimization.averaging)
        self.skipped = SkippedSteps(optimization.max_skipped)
        self.batches_seen = 0
        self._accumulated_bad: Tensor | None = None
        self.playing: int | None = None
        self._players: list[Player] = []

    @abstractmethod
    def losses(self, batch: Batch) -> Losses:
        """The student's losses on a batch, with gradient; ``loss`` is minimised."""

    @abstractmethod
    def check_data(self, spec: DataSpec) -> None:
        """Refuses data that does not fit. Raises ValueError, naming the keys and both values."""

    def prepare(self, batch: Batch) -> Batch:
        """The batch as `losses` is given it."""
        return batch

    @property
    def student_step(self) -> int:
        """Steps that the student has made: what curricula count."""
        return self.player_step(0, self.batches_seen // self.optimization.accumulate_batches)

    # ---------------------------------------------------------------------------------------------------- sharding

    def sharded_parts(self) -> list[nn.Module]:
        """What is sharded, each on its own: modules that are called as a whole."""
        return networks_of(self)

    def frozen_parts(self) -> list[nn.Module]:
        """Of these the ones that are never trained nor saved."""
        return []

    def configure_model(self) -> None:
        """Shards the networks, under a strategy that wants it.

        Raises:
            ValueError: what cannot be sharded: networks that share weights, trained weights outside of networks, compilation,
                channels last.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy) or is_sharded(self):
            return
        for name in ("compile", "channels_last"):
            if getattr(self.optimization, name):
                raise ValueError(f"optimization.{name}=true: not known to work under trainer.strategy=fsdp2; set it to false.")
        self.ema.outline = Outline(self.ema.module)
        precision = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        offloaded = self.frozen_parts() if getattr(strategy, "offload_teacher", False) else []
        shard(self.sharded_parts(), strategy.device_mesh["data_parallel"], precision, offloaded)
        check_whole(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` gave; of whole tensors a sharded module takes the rows of its rank."""
        return super().load_state_dict(scattered_state(state_dict, self), strict, assign)

    # ------------------------------------------------------------------------------------------------ optimisation

    def players(self) -> list[Player]:
        """The sides of the method, in the order of their optimisers."""
        return [Player("student", self.losses, self.student, self.optimization)]

    def turn(self, step: int) -> int:
        """Whose turn it is at optimiser step ``step``: an index into `players`."""
        return 0

    def player_step(self, index: int, step: int) -> int:
        """Steps of its own that player ``index`` has made before optimiser step ``step``; its schedules count these."""
        return step

    def setup(self, stage: str) -> None:
        """Changes the layout of weights, if it is asked for, before DDP and the optimisers see them."""
        if self.optimization.channels_last:
            for owner in self.owners:
                put_channels_last(owner)

    @property
    def owners(self) -> list[nn.Module]:
        """Where networks are: this module, and what it holds without registering it."""
        return [self]

    def seated_players(self) -> list[Player]:
        """The players of this run, each with all that it trains.

        They are kept for the next run of the same method: after one that failed, some parameters require no gradients.

        Raises:
            ValueError: a player with nothing to train, or two with the same parameters.
        """
        self._players = self._players or self.players()
        check_players(self._players)
        return self._players

    def configure_optimizers(self) -> list[Optimizer]:
        optimizers = [player.optimization.optimizer(player.parameters) for player in self.seated_players()]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["initial_lr"] = group["lr"]
        for optimizer in optimizers:
            optimizer.register_load_state_dict_post_hook(match_layouts)
        return optimizers

    def on_train_start(self) -> None:
        """No turn has been taken in this run."""
        self.playing = None

    def on_train_end(self) -> None:
        """All players are as they were before the first turn."""
        for player in self._players:
            player.take_turn(True)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step, part = divmod(self.batches_seen, self.optimization.accumulate_batches)
        index = self.turn(step)
        player = self._players[index]
        self.give_turn(index)
        self.seed_draws()
        losses = player.losses(self.prepare(batch))
        last = part + 1 == self.optimization.accumulate_batches
        with self._gradient_sync(last):
            self.manual_backward(losses["loss"] / self.optimization.accumulate_batches)
        bad = ~torch.isfinite(losses["loss"].detach())
        self._accumulated_bad = bad if part == 0 or self._accumulated_bad is None else self._accumulated_bad | bad
        if last:
            self._optimizer_step(index, step, len(batch) * self.optimization.accumulate_batches * self.trainer.world_size)
        self.batches_seen += 1
        for name, value in losses.items():
            self.log(f"train/{player.name}/{name}", value.detach(), prog_bar=name == "loss", batch_size=len(batch))

    def give_turn(self, index: int) -> None:
        """It is the turn of player ``index``; where it was another's before, what is trained is asserted by `check_turn`."""
        for number, player in enumerate(self._players):
            player.take_turn(number == index)
        if index != self.playing:
            check_turn(self, self._players[index])
            self.playing = index

    def _gradient_sync(self, wanted: bool) -> contextlib.AbstractContextManager:
        """Ranks exchange gradients in the last backward of a step only."""
        strategy = self.trainer.strategy
        if wanted or not isinstance(strategy, ParallelStrategy):
            return contextlib.nullcontext()
        return strategy.block_backward_sync()

    def _optimizer_step(self, index: int, step: int, images: int) -> None:
        player, optimizer = self._players[index], self.optimizers(use_pl_optimizer=True)
        optimizer = optimizer[index] if isinstance(optimizer, list) else optimizer
        norm = clip_gradients(player.parameters, player.optimization.gradient_clip_norm)
        assert self._accumulated_bad is not None
        bad = self._accumulated_bad | ~torch.isfinite(norm)
        if self.trainer.world_size > 1:
            # The largest over the ranks: all skip, or none does. (Lightning's own reduction waits in a barrier first.)
            flag = bad.float()
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            bad = flag > 0
        own_step, rate = self.player_step(index, step), self.rate_factor(index, step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        step_unless(bad, optimizer.optimizer, optimizer.step)
        optimizer.zero_grad(set_to_none=True)
        self.skipped.count(bad)
        if index == 0:
            self.after_student_step(own_step, images, bad)
        self.log(f"train/{player.name}/gradient_norm", norm, batch_size=1)
        # A tensor made on the device: Lightning would copy a number to it, and wait.
        shown = torch.full((), optimizer.param_groups[0]["lr"], device=self.device)
        self.log(f"train/{player.name}/learning_rate", shown, batch_size=1)
        self.log("train/skipped_steps", self.skipped.total.float(), batch_size=1)

    def rate_factor(self, index: int, step: int) -> float:
        """The factor on the learning rate of player ``index`` at optimiser step ``step``."""
        budget = self.trainer.max_steps  # -1 for a run that ends by time
        own_budget = budget if budget < 0 else self.player_step(index, budget)
        return self._players[index].optimization.learning_rate.factor(self.player_step(index, step), own_budget)

    def after_student_step(self, step: int, images: int, skipped: Tensor) -> None:
        """Moves the averages after the student's 0-based ``step`` on ``images`` images, unless the step was ``skipped``."""
        self.ema.update(self.student, step, images, skipped)

    def seed_draws(self, stream: str = "") -> None:
        """Seeds torch's generators from (seed, batch, rank) and the name of a ``stream`` of draws within the batch."""
        torch.manual_seed(self.draw_key(f"{self.global_rank}/{stream}"))

    def draw_key(self, stream: str) -> int:
        """A number, 64 bits with a sign, that depends on (seed, batch) and the name of a stream, and not on the rank."""
        key = f"{os.environ.get('PL_GLOBAL_SEED', '0')}/{self.batches_seen}/{stream}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)

    # ----------------------------------------------------------------------------------------------------- contracts

    @property
    def within_step(self) -> bool:
        """Whether some, not all, batches of an accumulated step are done; their gradients are in no checkpoint."""
        return self.batches_seen % self.optimization.accumulate_batches > 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.within_step:
            raise RuntimeError(
                f"A checkpoint after batch {self.batches_seen} would lose gradients: a step accumulates "
                f"{self.optimization.accumulate_batches} batches (optimization.accumulate_batches); save at the end of a step."
            )
        checkpoint["distill"] = {"batches_seen": self.batches_seen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches_seen = checkpoint["distill"]["batches_seen"]
