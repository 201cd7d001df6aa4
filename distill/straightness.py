"""How straight a flow is, and how far it carries: the two measures of rectified flow (Liu et al. 2209.03003).

With ``x_t`` a trajectory in the schedule ``RectifiedFlow()``, ``z`` its noise at t = 1 and ``x`` its sample at t = 0:

    straightness   S = int_0^1 |(z - x) - dx_t/dt|^2 dt
    transport cost     |z - x|^2

Norms run over a sample's elements; the paper's measures are the means over ``z``. As ``z - x`` is the mean of ``dx_t/dt`` over
time, S is the variance of the velocity along the trajectory and the cost the square of its mean. Where S is zero, one Euler
step is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distill.denoiser import Denoiser
from distill.grids import UniformGrid
from distill.schedules import RectifiedFlow, per_sample
from distill.solvers import Euler, Solver
from distill.types import Cond, PerSample, Sample


@dataclass(frozen=True)
class Trajectories:
    """Where trajectories end and how they went there; means over any samples estimate the paper's expectations.

    Attributes:
        samples: ``(b, *shape)``.
        straightness: ``(b,)``, at least 0.
        cost: transport cost ``(b,)``, at least 0.
    """

    samples: Sample
    straightness: PerSample
    cost: PerSample

    @property
    def relative(self) -> PerSample:
        """Straightness over transport cost ``(b,)``: free of the number of elements and of the scale of the data."""
        return self.straightness / self.cost


def follow(denoiser: Denoiser, noise: Sample, cond: Cond, steps: int, solver: Solver | None = None) -> Trajectories:
    """Follows the flow of a denoiser of any schedule in ``steps`` equal steps of the rectified flow's time, and measures it.

    One pass: a step's mean velocity is what it moved over its length. So the measures are those of the discretised path,
    exactly (one step is always straight), and come near to the flow's own as ``steps`` grows.

    Args:
        denoiser: of any schedule; it is read by equal noise-to-signal ratio.
        noise: unit noise ``(b, *shape)``.
        cond: conditions.
        steps: at least 1.
        solver: None is Euler's.

    Raises:
        ValueError: ``steps`` below 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: give at least one step.")
    flow, step = denoiser.under(RectifiedFlow()), (solver or Euler()).advance
    times = UniformGrid().nodes(RectifiedFlow(), steps).to(noise)
    x, memory, mean, spread = noise, None, torch.zeros_like(noise), noise.new_zeros(len(noise))
    for number, (t, s) in enumerate(zip(times[:-1], times[1:]), start=1):
        last, (x, memory) = x, step(flow, x, t.repeat(len(x)), s.repeat(len(x)), cond, memory)
        # Welford's running mean and variance: the difference of two large sums would lose what a nearly straight flow has.
        off = (x - last) / per_sample(s - t, x) - mean
        mean = mean + off / number
        spread = spread + off.square().flatten(1).sum(1) * ((number - 1) / number)
    return Trajectories(x, spread / steps, (noise - x).square().flatten(1).sum(1))
