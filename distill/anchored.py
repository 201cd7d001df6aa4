"""Anchored guidance: FlashAudio's anchored optimisation (2410.12266), which is null-text inversion's (2211.09794, algorithm 1).

Guided samples leave the law that a flow was trained on, the further the larger the scale; pairs of them are harder to reflow.
Here a guided trajectory, from the noise z of an unguided one, the pivot x*, is held near it by its null conditions n: at each
step, with the weights and the conditions frozen and n as the last step left it,

    n <- n - Adam's step on  |x*_s - step(x_t, n, cond; scale)|^2 / D,   at most ``iterations`` times or until <= ``tolerance``,

and then ``x_s = step(x_t, n, cond; scale)``. The more iterations, the nearer the samples are to unguided ones. For making pairs
offline: it waits for the device at each iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from distill.guidance import ClassifierFreeGuidance
from distill.samplers import OdeSampler
from distill.schedules import per_sample
from distill.types import Cond, Sample

Step = Callable[[Cond], tuple[Sample, Any]]
"""The guided step from where a trajectory is, given the null conditions: the next point and the solver's memory."""


@dataclass
class AnchoredGuidance:
    """Classifier-free guidance whose null conditions are optimised at each step towards the unguided trajectory.

    Attributes:
        scale: guidance scale in the house convention, at least 0; 1 is the unguided trajectory itself.
        iterations: of the optimisation at each step, at most; 0 is plain guidance.
        learning_rate: Adam's, > 0. The defaults of these three are those of null-text inversion.
        tolerance: squared distance to the unguided point, mean over a sample's elements, at which that sample is left as it is.

    Raises:
        ValueError: a value outside of these ranges.
    """

    scale: float
    iterations: int = 10
    learning_rate: float = 1e-2
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("scale", "iterations", "tolerance"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or a positive number.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}: give a positive number.")

    @torch.no_grad()
    def sample(self, denoiser: Denoiser, null: Cond, sampler: OdeSampler, noise: Sample, cond: Cond, steps: int) -> Sample:
        """``x0`` ``(b, *shape)`` from unit ``noise``, by the solver and over the grid of ``sampler``; its last step too.

        A sample depends on its own noise and conditions alone; ``null`` and the weights stay as they are.

        Raises:
            ValueError: no step; no null condition of floating type to optimise.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}: give at least one step.")
        if self.scale == 1:
            return sampler(denoiser, noise, cond, steps)
        rule, free = ClassifierFreeGuidance(self.scale), free_rows(cond, null)
        null = {key: null[key].expand_as(value) for key, value in cond.items() if key in null}
        times = sampler.grid.times(denoiser.schedule, steps)
        pivot = x = denoiser.schedule.prior_scale * noise
        pivot_memory = memory = None
        for t, s in zip(times, [*times[1:], None], strict=True):
            pivot, pivot_memory = _move(sampler, denoiser, pivot, t, s, cond, pivot_memory)

            def step(null: Cond) -> tuple[Sample, Any]:
                return _move(sampler, rule(denoiser, null), x, t, s, cond, memory)

            null = self.anchor(step, pivot, null, free)
            x, memory = step(null)
        return x

    def anchor(self, step: Step, target: Sample, null: Cond, free: dict[str, Tensor]) -> Cond:
        """Null conditions by which ``step`` lands nearer to ``target`` ``(b, *shape)``; only the ``free`` rows move."""
        # In float32 at least: a step of 0.01 is lost in bfloat16.
        values = {key: null[key].to(torch.promote_types(null[key].dtype, torch.float32), copy=True) for key in free}
        optimizer = torch.optim.Adam(list(values.values()), self.learning_rate)

        def current() -> Cond:
            return null | {key: value.to(null[key].dtype) for key, value in values.items()}

        for _ in range(self.iterations):
            with torch.enable_grad():
                for value in values.values():
                    value.requires_grad_()
                errors = (step(current())[0] - target).square().flatten(1).mean(1)
                far = errors.detach() > self.tolerance
                if not far.any():
                    break
                # The sum, and Adam's steps, which are element by element, keep the samples apart.
                leaves = list(values.values())
                gradients = torch.autograd.grad(errors.sum(), leaves, allow_unused=True, materialize_grads=True)
            before = {key: value.detach().clone() for key, value in values.items()}
            for value, gradient in zip(values.values(), gradients, strict=True):
                value.grad = gradient
            optimizer.step()
            for key, value in values.items():
                value.copy_(torch.where(per_sample(far & free[key], value), value, before[key]))
        return {key: value.detach() for key, value in current().items()}


def free_rows(cond: Cond, null: Cond) -> dict[str, Tensor]:
    """The null conditions that are optimised, by name, and the samples ``(b,)`` in which they differ from the condition.

    What is the same in both (the size of an image, say) is not what guidance is about, and stays.

    Raises:
        ValueError: none is of floating type, or those that are differ in no sample while others do.
    """
    differ = {key: (null[key] != value).reshape(len(value), -1).any(1) for key, value in cond.items() if key in null}
    free = {key: rows for key, rows in differ.items() if null[key].is_floating_point()}
    if not free or (not any(rows.any() for rows in free.values()) and any(rows.any() for rows in differ.values())):
        types = {key: str(value.dtype) for key, value in null.items()}
        raise ValueError(
            f"null={types}: anchored guidance optimises a floating null condition (prompt_embeds) that differs from its "
            "condition, and this has none; use plain guidance for labels."
        )
    return free


def _move(
    sampler: OdeSampler, denoiser: Denoiser, x: Sample, t: Tensor, s: Tensor | None, cond: Cond, memory: Any
) -> tuple[Sample, Any]:
    """`OdeSampler`'s step from ``t`` to ``s``, and from the last time, where ``s`` is None, to the data."""
    start = t.to(x).repeat(len(x))
    if s is None:
        return denoiser(x, start, cond), None
    return sampler.solver.advance(denoiser, x, start, s.to(x).repeat(len(x)), cond, memory)
