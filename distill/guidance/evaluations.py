"""What a rule of two evaluations works on: what is asked, what came back, and what is remembered along a trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from distill.denoiser import Denoiser, FreshNoise
from distill.schedules import NoiseSchedule
from distill.types import Cond, Sample, Time

Some = Float[Tensor, "k *shape"]
"""Of the samples that are guided."""


@dataclass
class Query:
    """What a denoiser is asked: its arguments, of ``b`` samples each."""

    x: Sample
    t: Time
    cond: Cond
    r: Time | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Tensor | None) -> Query:
        """The samples with these numbers ``(k,)``; None for all."""
        if rows is None:
            return self
        r = None if self.r is None else self.r[rows]
        return Query(self.x[rows], self.t[rows], {key: value[rows] for key, value in self.cond.items()}, r)

    def joined(self, other: Query) -> Query:
        """Its samples, then those of ``other``."""
        cond = {key: torch.cat([value, other.cond[key]]) for key, value in self.cond.items()}
        r = None if self.r is None or other.r is None else torch.cat([self.r, other.r])
        return Query(torch.cat([self.x, other.x]), torch.cat([self.t, other.t]), cond, r)

    def asked(self, denoiser: Denoiser) -> Sample:
        """The denoiser's ``x0``."""
        return denoiser(self.x, self.t, self.cond, self.r)


@dataclass
class Memory:
    """What a rule knows along one trajectory and nowhere else.

    Attributes:
        fresh: where randomness comes from, so that sample i depends on its own numbers alone; called for whole batches.
        values: what the rule keeps from one evaluation to the next, by name, each with the batch dimension first.
    """

    fresh: FreshNoise
    values: dict[str, Tensor] = field(default_factory=dict)


def unit_numbers(x: Sample, count: int, memory: Memory | None) -> Tensor:
    """``(b, count)`` unit Gaussian numbers: from the trajectory's source, or from torch's generator where there is none."""
    fresh = torch.randn_like if memory is None else memory.fresh
    draws = [fresh(x).flatten(1) for _ in range(-(-count // x[0].numel()))]
    return torch.cat(draws, dim=1)[:, :count]


@dataclass
class Evaluations:
    """Both evaluations of the k samples that are guided, and what a rule makes its ``x0`` of.

    Attributes:
        query: the samples.
        x0: of the denoiser itself.
        reference: the ``x0`` that it is guided away from.
        scale: guidance scale, shaped to multiply ``x0``.
        schedule: of the denoiser.
        rows: their numbers ``(k,)`` in the batch; None if they are all of it.
        batch: samples in the batch.
        memory: along a trajectory, else None.
    """

    query: Query
    x0: Some
    reference: Some
    scale: Tensor
    schedule: NoiseSchedule
    rows: Tensor | None
    batch: int
    memory: Memory | None

    def recall(self, name: str, default: Tensor) -> Tensor:
        """What was kept of these samples, like ``default`` ``(k, ...)``, which it is before anything is kept."""
        kept = None if self.memory is None else self.memory.values.get(name)
        return default if kept is None else kept if self.rows is None else kept[self.rows]

    def keep(self, name: str, value: Tensor) -> None:
        """Keeps ``value`` ``(k, ...)`` of these samples for the next evaluation of the trajectory, if there is one."""
        if self.memory is None:
            return
        if self.rows is not None:
            all_rows = self.memory.values.get(name, value.new_zeros(self.batch, *value.shape[1:]))
            value = all_rows.index_copy(0, self.rows, value)
        self.memory.values[name] = value
