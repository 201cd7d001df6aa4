"""A plan: what a run holds on each device and sends to the others, for any number of them, replicated or sharded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from distill.methods.sampled import SampledModule
from distill.networks.base import Network
from distill.plan.roles import OTHERS, reachable, roots
from distill.plan.stand_ins import batch_for, sample_shape, stand_in, widen_norms
from distill.plan.states import States, size_of, states_by_role
from distill.plan.turns import VALIDATION, Turn, measure_turn, measure_validation
from distill.sharding import check_parts

Strategy = Literal["ddp", "fsdp2"]
WHOLE = ("codec", "text encoders", OTHERS)
"""Roles that no strategy shards."""


@dataclass
class Work:
    """What is gone through for a plan.

    Attributes:
        batch_size: of training, on one device.
        eval_batch_size: of validation.
        shape: of a sample in model space; None for the one that the student was made for.
        trajectories: whether the data are points of a teacher's trajectories.
        autocast: the precision of ``trainer.precision=bf16-mixed``; None computes in that of the weights.
        accelerator: whether on one: its autocast leaves normalisations in 32 bits.
    """

    batch_size: int
    eval_batch_size: int
    shape: tuple[int, ...] | None = None
    trajectories: bool = False
    autocast: torch.dtype | None = None
    accelerator: bool = False


@dataclass
class Gathered:
    """Bytes of a role's networks as FSDP2 gathers them.

    Attributes:
        all: that a call gathers, one block after the other.
        most: that are there at once: what is in no block, the block that computes, and the next.
    """

    all: int
    most: int


@dataclass
class Peak:
    """The most bytes that one device holds: in whose turn, and in which phase of it."""

    size: int
    turn: str
    phase: str


@dataclass
class Plan:
    """What a method's turns need on one device, and what follows for several.

    Attributes:
        rows: states by role.
        turns: of each player, and of validation if the method draws samples.
        accumulate_batches: batches of one step.
        gathered: by role.
        shardable: whether FSDP2 takes the method: not if networks share weights, as LoRA layers on the teacher's do.
    """

    rows: dict[str, States]
    turns: list[Turn]
    accumulate_batches: int
    gathered: dict[str, Gathered]
    shardable: bool = True

    def lasting(self, devices: int = 1, strategy: Strategy = "ddp") -> int:
        """Bytes of weights, optimiser states and what the strategy adds, that one device holds in every turn.

        DDP copies the gradients of all players into buckets of its own.
        """
        if strategy == "fsdp2":
            return sum(row.lasting if name in WHOLE else -(-row.lasting // devices) for name, row in self.rows.items())
        buckets = sum(row.gradients for row in self.rows.values()) if devices > 1 else 0
        return sum(row.lasting for row in self.rows.values()) + buckets

    def gradients(self, player: str) -> int:
        """Bytes of the gradients of a player."""
        return sum(row.gradients for row in self.rows.values() if row.player == player)

    def peak(self, devices: int = 1, strategy: Strategy = "ddp") -> Peak:
        """The most that one device holds. Sharded it is a bound: autocast's copies of weights are in it, and are not made."""
        peaks = [self._peak(turn, phase, devices, strategy) for turn in self.turns for phase in turn.peaks]
        if not self.turns:  # states alone
            gradients = max(self.gradients(row.player) for row in self.rows.values() if row.player)
            share = -(-gradients // devices) if strategy == "fsdp2" else gradients
            peaks = [Peak(self.lasting(devices, strategy) + share, "", "")]
        return max(peaks, key=lambda peak: peak.size)

    def _peak(self, turn: Turn, phase: str, devices: int, strategy: Strategy) -> Peak:
        size = turn.peaks[phase]
        if strategy == "fsdp2" and phase in ("optimiser step", "averages"):
            size = -(-size // devices)
        elif strategy == "fsdp2":
            gathered = [self.gathered[role].most for role in turn.calls if role in self.gathered]
            size = turn.others[phase] + max(gathered, default=0)
            if phase == "backward" or self.batches(turn) > 1:
                size += -(-self.gradients(turn.player) // devices)
        return Peak(self.lasting(devices, strategy) + size, turn.player, phase)

    def sent(self, turn: Turn, devices: int = 1, strategy: Strategy = "ddp") -> int:
        """Bytes that one device sends in one step of this turn's player, by rings.

        DDP sums the player's gradients once a step (under ``ddp_find_unused_parameters_true`` those of all players). FSDP2
        gathers weights for each call and again for its backward pass, and sums the gradients in each batch.
        """
        share = (devices - 1) / devices
        if strategy == "ddp":
            return round(2 * share * self.gradients(turn.player))
        gathers = turn.calls + turn.differentiated
        gathered = sum(gathers[role] * size.all for role, size in self.gathered.items())
        return round(share * self.batches(turn) * (gathered + self.gradients(turn.player)))

    def batches(self, turn: Turn) -> int:
        """Batches of one step of this turn's player."""
        return 1 if turn.player == VALIDATION else self.accumulate_batches

    def seconds(
        self, turn: Turn, operations: float, bytes_sent: float, devices: int = 1, strategy: Strategy = "ddp"
    ) -> float:
        """Of one step, at ``operations`` and ``bytes_sent`` a second, where a device waits for what is sent."""
        return self.batches(turn) * turn.flops / operations + self.sent(turn, devices, strategy) / bytes_sent


def make_plan(method: Any, work: Work | None) -> Plan:
    """The plan of a method as it was built, on the meta device or not; it stays as it is, and nothing is computed.

    Args:
        method: a `distill.methods.trained.TrainedModule`.
        work: None counts states alone.

    Raises:
        ValueError: a turn that needs more than the shapes of tensors.
    """
    rows = states_by_role(method, method.players())
    autocast = work.autocast if work is not None else None
    accumulate_batches, gathered = method.optimization.accumulate_batches, gathered_by_role(method, autocast)
    plan = Plan(rows, [], accumulate_batches, gathered, shardable(method))
    if work is None or not isinstance(method, SampledModule):
        return plan
    try:
        with stand_in(method) as planned:
            plan.turns = _turns(planned, work)
    except RuntimeError as error:
        raise ValueError(f"a turn of {type(method).__name__} cannot be gone through without values: {error}") from error
    return plan


def _turns(planned: Any, work: Work) -> list[Turn]:
    """Of a method of stand-ins."""
    shape, players = work.shape or sample_shape(planned.student), planned.players()
    if work.accelerator:
        widen_norms(planned)
    batch = batch_for(planned, work.batch_size, shape, work.trajectories)
    turns = [measure_turn(planned, players, index, batch, work.autocast) for index in range(len(players))]
    planned.eval()
    return [*turns, measure_validation(planned, batch_for(planned, work.eval_batch_size, shape), work.autocast)]


def shardable(method: Any) -> bool:
    """Whether `distill.sharding` takes the method."""
    try:
        check_parts(method.sharded_parts())
    except ValueError:
        return False
    return True


def gathered_by_role(method: Any, autocast: torch.dtype | None) -> dict[str, Gathered]:
    """What FSDP2 gathers of each role's networks; 32-bit ones in the type of autocast."""
    found: dict[str, Gathered] = {}
    for name, root in roots(method):
        networks = [module for module in reachable(root) if isinstance(module, Network)]
        if name in WHOLE or name in found or not networks:
            continue
        units = [unit for network in networks for unit in network.units()]
        whole, sizes = _gathered(networks, autocast), [_gathered([unit], autocast) for unit in units]
        nested = _gathered(units, autocast)  # a block may hold another
        found[name] = Gathered(whole, whole - nested + sum(sorted(sizes)[-2:]))
    return found


def _gathered(modules: Iterable[torch.nn.Module], autocast: torch.dtype | None) -> int:
    parameters = list({id(parameter): parameter for module in modules for parameter in module.parameters()}.values())
    if autocast is None or any(parameter.dtype != torch.float32 for parameter in parameters):
        return sum(map(size_of, parameters))
    return sum(parameter.numel() * autocast.itemsize for parameter in parameters)
