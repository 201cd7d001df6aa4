"""The sides of a method that take turns in training, and who may require gradients in whose turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from distill.frozen import Frozen
from distill.optimization import PlayerOptimization
from distill.types import Batch, Losses


@dataclass
class Player:
    """One side of a method: what it trains and how.

    Attributes:
        name: in the names of its losses.
        losses: what its turns minimise.
        module: what it trains.
        optimization: how.
        parameters: of the module, those that are trained.
    """

    name: str
    losses: Callable[[Batch], Losses]
    module: nn.Module
    optimization: PlayerOptimization
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def take_turn(self, own: bool) -> None:
        """In its ``own`` turn a player requires gradients and is in training mode, dropout on; in others' neither."""
        for parameter in self.parameters:
            parameter.requires_grad_(own)
        if self.module.training != own:
            self.module.train(own)


def check_players(players: Sequence[Player]) -> None:
    """Raises ValueError, naming it, for a player that trains nothing, and for parameters that two players train."""
    seen: dict[int, str] = {}
    for player in players:
        if not player.parameters:
            raise ValueError(f"the {player.name} has no parameter that is trained: give one that has (lora, or a copy).")
        for parameter in player.parameters:
            if (other := seen.setdefault(id(parameter), player.name)) is not player.name:
                raise ValueError(f"the {other} and the {player.name} train the same parameters: give each its own copy.")


def check_turn(owner: nn.Module, player: Player) -> None:
    """Asserts that of all that ``owner`` holds, frozen networks too, exactly the player's parameters require gradients.

    The host knows: no device is asked.

    Raises:
        RuntimeError: naming a parameter that requires gradients and is not the player's, or the other way round.
    """
    own = {id(parameter) for parameter in player.parameters}
    for name, parameter in all_parameters(owner):
        if parameter.requires_grad != (id(parameter) in own):
            state = "requires gradients, and is not its own" if parameter.requires_grad else "is its own, and requires none"
            raise RuntimeError(
                f"in the turn of the {player.name}, {name} {state}: a loss or a callback has changed `requires_grad`, or a "
                "part of the method is trained by no player."
            )


def all_parameters(owner: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by its name, those of `Frozen` networks included."""
    yield from owner.named_parameters()
    for name, part in owner.named_modules():
        if isinstance(part, Frozen):
            yield from part.module.named_parameters(prefix=name)
