"""The noise from which a sampler would have drawn given data: the probability-flow ODE, run upwards."""

from __future__ import annotations

import torch

from distill.denoiser import Denoiser
from distill.grids import Grid
from distill.solvers import Solver
from distill.types import Cond, Sample

LEAST_LEVEL = 0.002
"""Noise-to-signal ratio at which data is taken to lie on its trajectory: EDM's sigma_min (Karras et al. 2206.00364)."""


@torch.no_grad()
def invert(denoiser: Denoiser, x0: Sample, cond: Cond, solver: Solver, grid: Grid, steps: int) -> Sample:
    """Noise ``(b, *shape)``, unit where the denoiser is exact, whose trajectory ends in ``x0`` (rf++ 2405.20320, section 4.3).

    Data is taken for the point of its trajectory at noise-to-signal ratio 0.002, or at ``t_min`` where that is noisier: at no
    noise at all the ODE's slope is not defined.

    Args:
        denoiser: a flow's, guided or not.
        x0: data ``(b, *shape)`` in model space.
        cond: conditions.
        solver: goes from each time to the next noisier one.
        grid: its points above the start, up to ``t_max``, are the times.
        steps: at least 1.

    Raises:
        ValueError: no step; a grid with points below the start.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: give at least one step.")
    schedule = denoiser.schedule
    least = schedule.time_of_nsr(torch.tensor([LEAST_LEVEL], dtype=torch.float64))
    times = torch.cat([least.clamp(min=schedule.t_min), grid.starts(schedule, steps).flip(0)])
    if not bool((times.diff() > 0).all()):
        raise ValueError(f"steps={steps}: the grid's least times {times[1:3].tolist()} lie at or below the start; give fewer.")
    x, memory = float(schedule.alpha(times[0])) * x0, None
    for t, s in zip(times[:-1], times[1:], strict=True):
        x, memory = solver.advance(denoiser, x, t.to(x).repeat(len(x)), s.to(x).repeat(len(x)), cond, memory)
    return x / schedule.prior_scale
