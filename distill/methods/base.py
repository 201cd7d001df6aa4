"""The training loop that every method shares; a method writes ``losses(batch)``. (`two_player.py` has those with a critic.)

Optimisation is manual, for one and two players alike: one optimiser step for each batch (or each ``accumulate_batches``), so
that ``global_step`` counts them. Every batch seeds its draws from (seed, batch, rank): a resumed run repeats nothing, ranks
differ, and a batch can be replayed alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.denoiser import Denoiser
from distill.ema import EMA
from distill.evaluation import Evaluation
from distill.frozen import Frozen
from distill.guidance import GuidanceRule
from distill.lora import diffusers_networks
from distill.methods.sampled import SampledModule
from distill.optimization import Optimization, SkippedSteps, clip_gradients, step_unless
from distill.pretrained import identity_of
from distill.space import ModelSpace
from distill.types import Batch, Losses


@dataclass
class Player:
    """One side of a method: what it trains and how."""

    name: str
    losses: Callable[[Batch], Losses]
    parameters: list[nn.Parameter]
    optimization: Optimization


class Method(SampledModule, ABC):
    """Trains ``student``, with the help of a frozen ``teacher`` if there is one.

    Args:
        student: the denoiser that is trained.
        teacher: a denoiser that is never trained and never saved; checkpoints keep its path and hash.
        guidance: how the teacher is guided, in training and in its samples; None for not.
        optimization: optimiser, learning rate, clipping, accumulation, averaging.
        evaluation: what is drawn and measured in validation.
        space: how pixels and prompts become what the networks see; None if the data is that already.

    Attributes:
        batches_seen: training batches that this rank has worked on since the run began.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | None,
        guidance: GuidanceRule | None,
        optimization: Optimization,
        evaluation: Evaluation,
        space: ModelSpace | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.student: Denoiser = student.train()
        self._teacher: Frozen | None = None if teacher is None else Frozen(teacher)
        if optimization.gradient_checkpointing:
            checkpoint_activations(student)
        self._space = Frozen(space or ModelSpace())
        self.guidance, self.optimization, self.evaluation = guidance, optimization, evaluation
        self.ema = EMA(student, optimization.averaging)
        self.skipped = SkippedSteps(optimization.max_skipped)
        self.metrics = nn.ModuleDict(
            {str(n): nn.ModuleDict({str(m.name): m.clone() for m in evaluation.metrics}) for n in evaluation.steps}
        )
        self.batches_seen = 0
        self._accumulated_bad: Tensor | None = None

    @abstractmethod
    def losses(self, batch: Batch) -> Losses:
        """The student's losses on a batch, with gradient; ``loss`` is minimised."""

    def on_fit_start(self) -> None:
        """Compiles the inner networks, in place: the names of their weights stay as they are."""
        if self.optimization.compile:
            for part in (self.student, self.ema.module, self._teacher and self._teacher.module):
                for network in diffusers_networks(part) if part is not None else []:
                    network.model.compile()

    # ------------------------------------------------------------------------------------------------ optimisation

    def players(self) -> list[Player]:
        """The sides of the method, in the order of their optimisers."""
        return [Player("student", self.losses, trained_parameters(self.student), self.optimization)]

    def turn(self, step: int) -> int:
        """Whose turn it is at optimiser step ``step``: an index into `players`."""
        return 0

    def player_step(self, index: int, step: int) -> int:
        """Steps of its own that player ``index`` has made before optimiser step ``step``; its schedules count these."""
        return step

    @property
    def student_step(self) -> int:
        """Steps that the student has made: what curricula count."""
        return self.player_step(0, self.batches_seen // self.optimization.accumulate_batches)

    def configure_optimizers(self) -> list[Optimizer]:
        self._players = self.players()
        optimizers = [player.optimization.optimizer(player.parameters) for player in self._players]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["initial_lr"] = group["lr"]
        return optimizers

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step, part = divmod(self.batches_seen, self.optimization.accumulate_batches)
        index = self.turn(step)
        player = self._players[index]
        for other in self._players:
            for parameter in other.parameters:
                parameter.requires_grad_(other is player)
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
        own_step = self.player_step(index, step)
        budget = self.trainer.max_steps  # -1 for a run that ends by time
        own_budget = budget if budget < 0 else self.player_step(index, budget)
        rate = player.optimization.learning_rate.factor(own_step, own_budget)
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

    def after_student_step(self, step: int, images: int, skipped: Tensor) -> None:
        """Moves the averages after the student's 0-based ``step`` on ``images`` images, unless the step was ``skipped``."""
        self.ema.update(self.student, step, images, skipped)

    def seed_draws(self, stream: str = "") -> None:
        """Seeds torch's generators from (seed, batch, rank) and the name of a ``stream`` of draws within the batch."""
        run_seed = os.environ.get("PL_GLOBAL_SEED", "0")
        key = f"{run_seed}/{self.batches_seen}/{self.global_rank}/{stream}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True))

    # ----------------------------------------------------------------------------------------------------- contracts

    @property
    def within_step(self) -> bool:
        """Whether some, not all, batches of an accumulated step are done; their gradients are in no checkpoint."""
        return self.batches_seen % self.optimization.accumulate_batches > 0

    def shared_names(self) -> set[str]:
        """The names under which parameters of the teacher itself appear: LoRA layers stand on them. They are not saved."""
        own = set() if self._teacher is None else {id(parameter) for parameter in self._teacher.module.parameters()}
        return {name for name, parameter in self.named_parameters(remove_duplicate=False) if id(parameter) in own}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Everything but what is the teacher's."""
        state, shared = super().state_dict(*args, **kwargs), self.shared_names()
        return type(state)((name, value) for name, value in state.items() if name not in shared)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` gave; a key too few or too many is an error if ``strict``."""
        shared, present = self.shared_names(), super().state_dict()
        return super().load_state_dict({**state_dict, **{name: present[name] for name in shared}}, strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.within_step:
            raise RuntimeError(
                f"A checkpoint after batch {self.batches_seen} would lose gradients: a step accumulates "
                f"{self.optimization.accumulate_batches} batches (optimization.accumulate_batches); save at the end of a step."
            )
        teacher = None if self._teacher is None else identity_of(self._teacher.module)
        checkpoint["distill"] = {"batches_seen": self.batches_seen, "teacher": teacher, "space": self.space.identity}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["distill"]
        own: dict[str, Any] = {"teacher": None if self._teacher is None else identity_of(self._teacher.module)}
        theirs = {"teacher": saved["teacher"], **{f"space.{part}": value for part, value in saved["space"].items()}}
        own |= {f"space.{part}": value for part, value in self.space.identity.items()}
        for part, identity in theirs.items():
            if (identity or {}).get("sha256") != (own[part] or {}).get("sha256"):
                raise ValueError(
                    f"The checkpoint was trained with the {part} {identity}, but model.{part} is {own[part]}: "
                    "give the same, or start a new run."
                )
        self.batches_seen = saved["batches_seen"]


def checkpoint_activations(student: nn.Module) -> None:
    """Turns gradient checkpointing on. Raises ValueError for a network that is not one of diffusers."""
    networks = diffusers_networks(student)
    if not networks:
        raise ValueError("optimization.gradient_checkpointing=true: only networks of diffusers can; set it to false.")
    for network in networks:
        network.model.enable_gradient_checkpointing()


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that are trained."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
