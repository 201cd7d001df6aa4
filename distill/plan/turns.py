"""What one turn of a player does: evaluations, operations, the bytes that each network keeps, the peak and its moment."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.methods.players import Player
from distill.methods.sampled import SampledModule
from distill.operations import OperationCounter
from distill.optimization import clip_gradients
from distill.plan.live_bytes import LiveBytes
from distill.plan.roles import networks_by_role, tensors_of
from distill.plan.states import size_of
from distill.types import Batch

VALIDATION = "validation"


@dataclass
class Turn:
    """One batch of one player on one device, or a batch of samples in validation.

    Attributes:
        player: its name, or `VALIDATION`.
        evaluations: forwards of each role's network, in samples: two for one that is guided without a share.
        calls: the same in calls, of any number of samples.
        differentiated: those of the calls that a backward pass goes through.
        kept: bytes that each role's evaluations leave for the backward pass, without their outputs.
        activations: bytes that live when the losses are computed: those kept, outputs, and what the method itself holds.
        peaks: the most bytes that live beside weights and optimiser states, gradients among them, in each phase.
        others: the most of them that are no gradients.
        flops: floating-point operations of forward and backward, a multiplication and an addition being two.
    """

    player: str
    evaluations: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    differentiated: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    activations: int = 0
    peaks: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    flops: int = 0

    @property
    def when(self) -> str:
        """The phase of the peak."""
        return max(self.peaks, key=lambda phase: self.peaks[phase])

    @property
    def peak(self) -> int:
        """The largest of the peaks."""
        return self.peaks[self.when]


@contextlib.contextmanager
def _watched(method: Any, turn: Turn, live: LiveBytes) -> Iterator[None]:
    """Counts operations, evaluations of the method's networks, and what they keep."""
    names = networks_by_role(method)
    before: list[int] = []

    def enter(module: Any, inputs: Any) -> None:
        turn.evaluations[names[module]] += len(inputs[0])
        turn.calls[names[module]] += 1
        before.append(live.now)

    def leave(module: Any, inputs: Any, output: Any) -> None:
        made = size_of(output) if isinstance(output, Tensor) else 0  # none where only features were asked for
        turn.differentiated[names[module]] += output.requires_grad if made else torch.is_grad_enabled()
        turn.kept[names[module]] += max(live.now - before.pop() - made, 0)

    handles = [network.register_forward_pre_hook(enter) for network in names]
    handles += [network.register_forward_hook(leave, always_call=True) for network in names]
    try:
        with OperationCounter() as operations, live:
            yield
    finally:
        for handle in handles:
            handle.remove()
    turn.flops, turn.peaks, turn.others = operations.total, live.peaks, live.others


def _prepared(player: Player) -> torch.optim.Optimizer:
    """The player's optimiser after a first step, so that its states are there."""
    optimizer = player.optimization.optimizer(player.parameters)
    for parameter in player.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


@contextlib.contextmanager
def _gradients_noted(player: Player, live: LiveBytes) -> Iterator[None]:
    """Tells ``live`` how many of its bytes are gradients."""

    def note(parameter: Tensor) -> None:
        live.gradients += size_of(parameter)

    handles = [parameter.register_post_accumulate_grad_hook(note) for parameter in player.parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_turn(
    method: Any, players: Sequence[Player], index: int, batch: Batch, autocast: torch.dtype | None = None
) -> Turn:
    """Goes through a turn of player ``index`` on ``batch``, in model space, as `TrainedModule.training_step` does.

    Of a real method it trains it by two steps; of one of stand-ins nothing is computed and nothing held. Where gradients are
    accumulated it is the last batch of a step: those of the others are there when it begins.

    Args:
        method: a `distill.methods.trained.TrainedModule`.
        players: its players, as they were before any turn.
        index: whose turn it is.
        batch: as its losses are given it.
        autocast: the precision of ``trainer.precision=bf16-mixed``, or None.
    """
    player = players[index]
    for other in players:
        other.take_turn(other is player)
    turn, optimizer = Turn(player.name), _prepared(player)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    live = LiveBytes([*tensors_of(method), *states, *_tensors(batch)])
    with _watched(method, turn, live):
        live.phase = "forward"
        if method.optimization.accumulate_batches > 1:
            for parameter in player.parameters:
                parameter.grad = torch.zeros_like(parameter)
                live.gradients += size_of(parameter)
        with _cast(autocast):
            losses = player.losses(batch)
            turn.activations, live.phase = live.now, "backward"
            with contextlib.nullcontext() if live.gradients else _gradients_noted(player, live):
                losses["loss"].backward()
        bad = ~torch.isfinite(losses["loss"].detach())
        del losses
        live.phase = "optimiser step"
        clip_gradients(player.parameters, player.optimization.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        live.phase, live.gradients = "averages", 0
        if index == 0:
            method.after_student_step(0, len(batch), bad)
    return turn


def measure_validation(method: SampledModule, batch: Batch, autocast: torch.dtype | None = None) -> Turn:
    """Draws as many samples as there are in ``batch``, with the fewest of the evaluation's steps, and decodes them."""
    turn, live = Turn(VALIDATION), LiveBytes([*tensors_of(method), *_tensors(batch)])
    with torch.no_grad(), _watched(method, turn, live), _cast(autocast):
        live.phase = "sampling"
        settings = method.evaluation
        samples = method.draw(min(settings.steps), range(len(batch)), batch.cond, batch.null, settings.seed)
        live.phase = "decoding"
        method.to_pixels(samples)
    return turn


def _cast(autocast: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)


def _tensors(batch: Batch) -> list[Tensor]:
    values = [batch.x0, batch.noise, batch.time, *batch.cond.values(), *batch.null.values()]
    return [value for value in values if value is not None]
