"""How a method is optimised: optimiser, learning rate, clipping, accumulation, averaging, and what a bad step does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jsonargparse import lazy_instance
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distill.ema import Averaging, DecayAveraging
from distill.sharding import local

OptimizerFactory = Callable[[Iterable], Optimizer]


@dataclass(frozen=True)
class LearningRate:
    """Factor on the optimiser's learning rate at each step; a function of the step alone.

    Attributes:
        warmup_steps: steps of linear rise from 0 (the first step has ``1 / warmup_steps``).
        decay: ``constant``; ``linear`` or ``cosine`` to ``end`` at ``total_steps``; ``inverse_sqrt``:
            ``1 / sqrt(max(step / reference_steps, 1))`` (EDM2, Karras et al. 2312.02696).
        total_steps: the step budget of ``linear`` and ``cosine``; None for that of the run, ``trainer.max_steps``.
        end: last factor of ``linear`` and ``cosine``.
        reference_steps: of ``inverse_sqrt``.
    """

    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    total_steps: int | None = None
    end: float = 0.0
    reference_steps: int = 2000

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: give 0 or more.")
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise ValueError(f"total_steps={self.total_steps}: give more than warmup_steps={self.warmup_steps}, or null.")

    def factor(self, step: int, run_steps: int = -1) -> float:
        """Factor in [0, 1] at 0-based ``step`` of a run of ``run_steps``.

        Raises:
            ValueError: a decay to an end, and neither ``total_steps`` nor the run says where it is.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "inverse_sqrt":
            return 1 / math.sqrt(max(step / self.reference_steps, 1))
        if self.decay == "constant":
            return 1.0
        total = run_steps if self.total_steps is None else self.total_steps
        if total < 0:
            raise ValueError(f"learning_rate.total_steps=null: decay={self.decay!r} needs it, or trainer.max_steps.")
        done = min((step - self.warmup_steps) / max(total - self.warmup_steps, 1), 1.0)
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.end + (1 - self.end) * left


def default_optimizer(parameters: Iterable) -> Optimizer:
    """Adam at 3e-4, fused."""
    return torch.optim.Adam(parameters, lr=3e-4, fused=True)


@dataclass
class PlayerOptimization:
    """How one player's parameters are stepped.

    Attributes:
        optimizer: makes the optimiser from the parameters. A fused Adam or AdamW skips a bad step without a
            host-device synchronisation; other optimisers need one a step.
        learning_rate: the factor on its learning rate.
        gradient_clip_norm: bound on the norm of the whole gradient; None for none.
        gradient_checkpointing: whether the player computes activations again in the backward pass instead of keeping them.
    """

    optimizer: OptimizerFactory = default_optimizer
    learning_rate: LearningRate = field(default_factory=LearningRate)
    gradient_clip_norm: float | None = 1.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.gradient_clip_norm is not None and self.gradient_clip_norm <= 0:
            raise ValueError(f"gradient_clip_norm={self.gradient_clip_norm}: give a positive norm, or null for no clipping.")


@dataclass
class Optimization(PlayerOptimization):
    """Settings of a method's optimisation: of the student, and what holds for the run. (More: `PlayerOptimization`.)

    Attributes:
        accumulate_batches: batches whose gradients make one step, of every player.
        averaging: of the evaluation average of the student.
        compile: whether the inner networks are compiled by torch.compile; checkpoints are the same.
        channels_last: whether U-Nets of diffusers keep their channels last in memory, for which some devices have faster
            convolutions; results are the same but for rounding (and the masks of dropout), and runs with and without continue
            each other's checkpoints.
        max_skipped: this many steps skipped in a row, for a loss or gradient that is not finite, end the run.
    """

    accumulate_batches: int = 1
    averaging: Averaging = field(default_factory=lambda: lazy_instance(DecayAveraging))
    compile: bool = False
    channels_last: bool = False
    max_skipped: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate_batches < 1:
            raise ValueError(f"accumulate_batches={self.accumulate_batches}: give at least 1.")
        if self.max_skipped < 1:
            raise ValueError(f"max_skipped={self.max_skipped}: give at least 1.")


def clip_gradients(parameters: Sequence[Tensor], max_norm: float | None) -> Tensor:
    """Clips the gradients to ``max_norm`` if it is given; returns their norm before, a scalar tensor.

    Of sharded parameters every rank has the norm over all ranks.
    """
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return clip_sharded_gradients(parameters, max_norm)
    if max_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def match_layouts(optimizer: Optimizer) -> None:
    """Lays states out in memory as their parameters are; a checkpoint may hold them otherwise.

    A fused step on a CPU goes through both in the order of memory, and would take wrong elements together without a word.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def clip_sharded_gradients(parameters: Sequence[Any], max_norm: float | None) -> Tensor:
    """The same over shards: each rank's own rows are measured and scaled. All ``parameters`` must be sharded over one mesh."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    squared = nn.utils.get_total_norm(gradients).square()
    torch.distributed.all_reduce(squared, group=parameters[0].device_mesh.get_group())
    norm = squared.sqrt()
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))  # as in torch's own
    return norm


def step_unless(bad: Tensor, optimizer: Optimizer, step: Callable[[], Any]) -> None:
    """Runs ``step``, the step of ``optimizer``, so that parameters and optimiser state stay as they are where ``bad`` is true.

    A fused optimiser reads the flag on the device (as it reads a gradient scaler's); for any other the host must know.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    elif bool(bad):
        optimizer.zero_grad(set_to_none=True)
    step()


class SkippedSteps(nn.Module):
    """Counts the steps that were skipped, on the device, and raises when too many come in a row.

    The count in a row is read by the host one or more steps late, when its copy has arrived, so that no step waits for it.

    Args:
        limit: so many skipped steps in a row are an error.
    """

    total: Tensor
    in_a_row: Tensor

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit
        self.register_buffer("total", torch.zeros((), dtype=torch.long))
        self.register_buffer("in_a_row", torch.zeros((), dtype=torch.long))
        self._arrived: torch.cuda.Event | None = None
        self._copy: Tensor | None = None

    def count(self, bad: Tensor) -> None:
        """Counts one step; ``bad`` is a scalar bool tensor, the same on every rank.

        Raises:
            FloatingPointError: after ``limit`` skipped steps in a row.
        """
        self.total += bad
        self.in_a_row.copy_((self.in_a_row + 1) * bad)
        if not self.in_a_row.is_cuda:
            self._raise_if(int(self.in_a_row))
            return
        if self._arrived is None or self._copy is None:
            self._arrived, self._copy = torch.cuda.Event(), torch.zeros((), dtype=torch.long, pin_memory=True)
        if self._arrived.query():
            self._raise_if(int(self._copy))
            self._copy.copy_(self.in_a_row, non_blocking=True)
            self._arrived.record()

    def _raise_if(self, in_a_row: int) -> None:
        if in_a_row >= self.limit:
            raise FloatingPointError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite (optimization.max_skipped={self.limit}): "
                "lower the learning rate, clip the gradient (optimization.gradient_clip_norm), or train in 32 bits."
            )
