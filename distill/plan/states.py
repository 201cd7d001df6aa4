"""Bytes that a run holds from its first step to its last: weights, gradients and optimiser states, by network.

They are counted of the built method, on any device: of one on the meta device (`distill.hub.configs_only`) as of a real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.methods.players import Player
from distill.plan.roles import OTHERS, tensors_by_role
from distill.plan.stand_ins import KnownValues


@dataclass
class States:
    """Bytes of one role.

    Attributes:
        weights: of parameters and buffers that it does not share with a role before it.
        gradients: of those that are trained, while their player's turn lasts.
        optimizer: of its optimiser's states.
        player: who trains it, "" if nobody does.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    player: str = ""

    @property
    def lasting(self) -> int:
        """What is there in every turn: all but gradients."""
        return self.weights + self.optimizer


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def optimizer_states(player: Player) -> list[int]:
    """Bytes of optimiser state that each of the player's parameters has after the first step.

    The player's own optimiser makes one step on stand-ins of the parameters, which have no memory.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        stand_ins = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu")) for p in player.parameters]
        for parameter in stand_ins:
            parameter.grad = torch.empty_like(parameter)
        optimizer = player.optimization.optimizer(stand_ins)
        with KnownValues():
            optimizer.step()
        return [state_bytes(optimizer.state[parameter]) for parameter in stand_ins]


def state_bytes(state: dict[str, Any]) -> int:
    """Bytes of the tensors among the states of one parameter."""
    return sum(size_of(value) for value in state.values() if isinstance(value, Tensor))


def states_by_role(method: Any, players: Sequence[Player]) -> dict[str, States]:
    """The table's rows, in the order of `distill.plan.roles.roots`.

    Args:
        method: a `distill.methods.trained.TrainedModule`, as it was built.
        players: its players.
    """
    roles = tensors_by_role(method)
    rows = {name: States(weights=sum(map(size_of, tensors))) for name, tensors in roles.items()}
    owner = {id(tensor): name for name, tensors in roles.items() for tensor in tensors}
    for player in players:
        for parameter, state in zip(player.parameters, optimizer_states(player), strict=True):
            row = rows[owner.get(id(parameter), OTHERS)]
            row.player = player.name
            row.gradients += size_of(parameter)
            row.optimizer += state
    return rows


def gradient_bytes(rows: dict[str, States], player: str) -> int:
    """Bytes of the gradients that are there in the turn of ``player``."""
    return sum(row.gradients for row in rows.values() if row.player == player)
