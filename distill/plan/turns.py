"""What one turn of a player does: evaluations, operations, the bytes that each network keeps, the peak and its moment."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distill.methods.trained import Player
from distill.networks.base import Network
from distill.optimization import clip_gradients
from distill.plan.live_bytes import LiveBytes
from distill.plan.roles import reachable, roots, tensors_of
from distill.plan.states import size_of
from distill.types import Batch

PHASES = ("forward", "backward", "optimiser step", "averages")


@dataclass
class Turn:
    """One turn of one player on one device.

    Attributes:
        player: its name.
        evaluations: forwards of each role's network, in samples: two for one that is guided without a share.
        kept: bytes that each role's evaluations leave for the backward pass, without their outputs.
        activations: bytes that live when the losses are computed: those kept, outputs, and what the method itself holds.
        peak: the most bytes that live beside weights and optimiser states; gradients are in it.
        when: the phase of the peak, one of `PHASES`.
        flops: floating-point operations of forward and backward, a multiplication and an addition being two.
    """

    player: str
    evaluations: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    activations: int = 0
    peak: int = 0
    when: str = ""
    flops: int = 0


@contextlib.contextmanager
def _watched(method: Any, turn: Turn, live: LiveBytes) -> Iterator[None]:
    """Counts evaluations of the method's networks, and what they keep."""
    names: dict[Network, str] = {}
    for name, root in roots(method):
        for module in reachable(root):
            if isinstance(module, Network):
                names.setdefault(module, name)
    before: list[int] = []

    def enter(module: Any, inputs: Any) -> None:
        turn.evaluations[names[module]] += len(inputs[0])
        before.append(live.now)

    def leave(module: Any, inputs: Any, output: Any) -> None:
        made = size_of(output) if isinstance(output, Tensor) else 0  # none where only features were asked for
        turn.kept[names[module]] += max(live.now - before.pop() - made, 0)

    handles = [network.register_forward_pre_hook(enter) for network in names]
    handles += [network.register_forward_hook(leave, always_call=True) for network in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _prepared(player: Player) -> torch.optim.Optimizer:
    """The player's optimiser after a first step, so that its states are there."""
    optimizer = player.optimization.optimizer(player.parameters)
    for parameter in player.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def measure_turn(
    method: Any, players: Sequence[Player], index: int, batch: Batch, autocast: torch.dtype | None = None
) -> Turn:
    """Goes through a turn of player ``index`` on ``batch``, in model space, as `TrainedModule.training_step` does.

    Of a real method it trains it by two steps; under a `FakeTensorMode`, with stand-ins, nothing is computed and nothing held.

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
    precision = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with FlopCounterMode(display=False) as flops, live, _watched(method, turn, live):
        with precision:
            live.phase = "forward"
            losses = player.losses(batch)
            turn.activations, live.phase = live.now, "backward"
            losses["loss"].backward()
        bad = ~torch.isfinite(losses["loss"].detach())
        del losses
        live.phase = "optimiser step"
        clip_gradients(player.parameters, player.optimization.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        live.phase = "averages"
        if index == 0:
            method.after_student_step(0, len(batch), bad)
    (turn.peak, turn.when), turn.flops = live.peak, flops.get_total_flops()
    return turn


def _tensors(batch: Batch) -> list[Tensor]:
    values = [batch.x0, batch.noise, batch.time, *batch.cond.values(), *batch.null.values()]
    return [value for value in values if value is not None]
