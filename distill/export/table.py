"""A student's sampler as a table of numbers: between two calls of its network every sampler here is linear.

What a call of the network sees is a linear combination of what the call before saw, of the x0 of the calls so far and of fresh
noises; the x0 of a call is one of what it sees and of its output. Running the sampler itself on basis vectors, in float64,
gives all coefficients, whatever prediction type, boundary condition, view under another schedule and solver it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.samplers import RenoiseSampler, Sampler
from distill.types import Cond, Sample, Time

MEMORY = 4
"""Basis vectors kept free for each step: the x0 of its calls, two of Heun's, and the noises drawn."""

ROUNDING = 1e-13
"""A smaller share is what rounding left of none."""


@dataclass
class Step:
    """One call of the network, and what becomes of it.

    Attributes:
        time: the network's time input.
        keep, gain: ``x0 = keep * state + gain * output``, the state being what the network sees.
        clip: bound on ``|x0|``, or None.
        carry: share of this state in the next one (or in the sample, after the last call).
        x0: shares of the x0 of this call and of those before it, this call's first.
        noise: shares of the fresh noises that were drawn so far, the latest first.
        draws: number of fresh noises drawn in this step.
    """

    time: float
    keep: float
    gain: float
    clip: float | None
    carry: float
    x0: list[float]
    noise: list[float]
    draws: int


@dataclass
class Table:
    """A sampler for one number of steps. ``start`` is what unit noise is multiplied by to be the first state."""

    start: float
    steps: list[Step]

    def rows(self) -> list[dict[str, Any]]:
        """The steps as JSON holds them."""
        return [asdict(step) for step in self.steps]


class Basis:
    """Unit vectors ``(1, width)``, float64, handed out one after another."""

    def __init__(self, width: int):
        self.width, self.used = width, 0

    def next(self) -> Tensor:
        """The next one. Raises ValueError if all are used."""
        if self.used == self.width:
            raise ValueError("this sampler draws or calls more often than its number of steps explains: it has no table.")
        self.used += 1
        return torch.eye(self.width, dtype=torch.float64)[self.used - 1 : self.used].clone()


class Recorder(Denoiser):
    """Stands for a denoiser: notes the state and time of each call and returns the next basis vector as its x0."""

    def __init__(self, like: Denoiser, basis: Basis):
        super().__init__()
        self.describe_as(like)
        self.basis = basis
        self.calls: list[tuple[Tensor, Tensor, int]] = []

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        if r is not None:
            raise ValueError("this sampler jumps to a second time, which no network of diffusers reads: it is not exported.")
        x0 = self.basis.next()
        self.calls.append((x[0], t, self.basis.used - 1))
        return x0


class NetworkProbe(nn.Module):
    """Stands for a raw network: notes its input and time and returns the second basis vector."""

    def forward(self, x: Sample, time: Time, cond: Cond, r: Time | None = None) -> Sample:
        self.input, self.time = x, time
        return torch.tensor([[0.0, 1.0]], dtype=torch.float64)


def trace(generator: Denoiser, sampler: Sampler, steps: int) -> Table:
    """The table of ``sampler`` around ``generator``, a `NetworkDenoiser` with boundary conditions and views around it.

    Raises:
        ValueError: a sampler that is not linear in what it has seen, or needs a network that reads a second time.
    """
    clip = sampler.clip if isinstance(sampler, RenoiseSampler) else None
    if isinstance(sampler, RenoiseSampler):
        sampler = RenoiseSampler(sampler.grid, sampler.times)  # whose clipping is a number of each step
    basis = Basis(1 + MEMORY * (steps + 1))
    recorder, noises = Recorder(generator, basis), []

    def fresh(x: Sample) -> Sample:
        noises.append(basis.used)
        return basis.next()

    sample = sampler(recorder, basis.next(), {}, steps, fresh)
    calls, seen = recorder.calls, [index for _, _, index in recorder.calls]
    functions = [read_function(generator, time) for _, time, _ in calls]
    # Samplers know states, networks see them scaled: the table is of what networks see, so that no pipeline need scale it.
    states = [function.scale * state for function, (state, _, _) in zip(functions, calls, strict=True)] + [sample[0]]
    rows = []
    for call, end in enumerate([*seen[1:], basis.used]):
        carry = _carry(states[call], states[call + 1])
        gained = states[call + 1] - carry * states[call]
        drawn = [index for index in noises if index < end]
        shares = _shares(gained, seen[: call + 1]), _shares(gained, drawn)
        function = functions[call]
        row = (function.time, function.keep / function.scale, function.gain, clip, carry, *shares)
        rows.append(Step(*row, sum(index > seen[call] for index in drawn)))
    return Table(float(states[0][0]), rows)


def _carry(state: Tensor, following: Tensor) -> float:
    """The share of a state in the following one that accounts for the initial noise in it."""
    return float(following[0] / state[0]) if state[0] != 0 else 0.0


def _shares(gained: Tensor, indices: list[int]) -> list[float]:
    """Coordinates at ``indices``, the last first, without what is rounding and without zeros at the end."""
    shares = [float(gained[index]) for index in reversed(indices)]
    shares = [share if abs(share) > ROUNDING else 0.0 for share in shares]
    while shares and shares[-1] == 0:
        shares.pop()
    return shares


@dataclass
class Function:
    """A generator at one time: the network sees ``scale * x`` at its own ``time``, and ``x0 = keep * x + gain * output``."""

    time: float
    scale: float
    keep: float
    gain: float


def read_function(generator: Denoiser, time: Time) -> Function:
    """A generator at ``time``, which is float32 as when samples are drawn."""
    inner = network_denoiser(generator)
    with _replaced(inner, NetworkProbe()) as probe:
        out = generator(torch.tensor([[1.0, 0.0]], dtype=torch.float64), time.float(), {})
    return Function(float(probe.time), float(probe.input[0, 0]), float(out[0, 0]), float(out[0, 1]))


def network_denoiser(generator: Denoiser) -> NetworkDenoiser:
    """The one `NetworkDenoiser` inside a generator. Raises ValueError if there is none, or more than one."""
    inner = [part for part in generator.modules() if isinstance(part, NetworkDenoiser)]
    if len(inner) != 1:
        raise ValueError(f"a student of {len(inner)} networks is not exported: it must be one network and its boundary.")
    return inner[0]


@contextmanager
def _replaced(denoiser: NetworkDenoiser, probe: NetworkProbe) -> Iterator[NetworkProbe]:
    network = denoiser.network
    denoiser.network = probe
    try:
        yield probe
    finally:
        denoiser.network = network
