"""The sampler of few-step students that are trained at given times: training and sampling walk through the same code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from distill.denoiser import Denoiser, refuse_own_noise
from distill.samplers import FreshNoise, Sampler
from distill.schedules import NoiseSchedule
from distill.types import Cond, Sample, Time


class FewStepSampler(Sampler):
    """Denoises, adds fresh noise of the next level, denoises, at the very times at which the student is trained.

    This is multi-step consistency sampling (Song et al. 2303.01469, algorithm 1) with fixed times, as DMD2 samples
    (Yin et al. 2405.14867, section 4.4); `simulate`, all of it but the last call, is that paper's backward simulation. ``k``
    steps use the first k times: a student is trained on what each number of steps, up to all, leads to.

    Args:
        times: in the student's schedule (DDPM indices for one), noisiest first.
        sigmas: the same as noise-to-signal ratios, in any schedule; give one of the two. ``[2.5]`` is SiD's (2404.04057).
        start: scale of the first input: ``marginal`` is ``sigma(t) z``, what is left of ``x_t`` without data (SiD, SIM,
            Diff-Instruct, SiD-LSG); ``prior`` is that of the schedule's prior whatever the first time is, unit noise for DDPM
            schedules (DMD2, SwiftBrush).

    Raises:
        ValueError: both or neither of ``times`` and ``sigmas``, no time, or times that do not decrease.
    """

    def __init__(
        self,
        times: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        start: Literal["marginal", "prior"] = "marginal",
    ):
        if (times is None) == (sigmas is None):
            raise ValueError(f"times={times} and sigmas={sigmas}: give one of the two.")
        name, values = ("times", times) if sigmas is None else ("sigmas", sigmas)
        assert values is not None
        if not values or any(later >= earlier for earlier, later in zip(values, values[1:])):
            raise ValueError(f"{name}={values}: give at least one, each lower than the one before.")
        self.times = None if times is None else [float(time) for time in times]
        self.sigmas = None if sigmas is None else [float(sigma) for sigma in sigmas]
        self.start = start
        self._placed: dict[str, list[float]] = {}

    def __len__(self) -> int:
        """Number of times: the most steps that a student can be sampled in."""
        return len(self.times or self.sigmas or [])

    def takes(self, steps: int) -> bool:
        return 1 <= steps <= len(self)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint keeps: the constructor's arguments."""
        return {"times": self.times, "sigmas": self.sigmas, "start": self.start}

    def times_in(self, schedule: NoiseSchedule) -> list[float]:
        """The times in a schedule, found once.

        Raises:
            ValueError: a time outside of it, or at its noiseless end.
        """
        if (key := repr(schedule)) not in self._placed:
            self._placed = {key: self._place(schedule)}
        return self._placed[key]

    def _place(self, schedule: NoiseSchedule) -> list[float]:
        """`times_in`, computed."""
        if self.times is not None:
            times = self.times
        else:
            sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
            times = schedule.time_of_nsr(sigmas).tolist()
            reached = schedule.nsr(torch.tensor(times, dtype=torch.float64))
            if not torch.allclose(reached, sigmas, rtol=1e-6):
                raise ValueError(
                    f"sampler.sigmas={self.sigmas}: the nearest of {schedule} are {reached.tolist()}; give some that it has."
                )
        if not schedule.t_min < times[-1] <= times[0] <= schedule.t_max:
            raise ValueError(
                f"sampler.times={times}: give times above {schedule.t_min} and up to {schedule.t_max} of {schedule}."
            )
        return times

    def simulate(
        self, denoiser: Denoiser, noise: Sample, cond: Cond, index: int, fresh: FreshNoise = torch.randn_like
    ) -> tuple[Sample, Time]:
        """``(x_t, t)``, the denoiser's inputs at the 0-based ``index``-th time, after ``index`` steps from unit ``noise``."""
        schedule = denoiser.schedule
        times = self.times_in(schedule)
        first = torch.tensor(times[0], dtype=torch.float64)
        x = (schedule.prior_scale if self.start == "prior" else float(schedule.sigma(first))) * noise
        for earlier, later in zip(times[:index], times[1:]):
            x0 = denoiser(x, _all(earlier, x), cond)
            x = schedule.add_noise(x0, fresh(x0), _all(later, x0))
        return x, _all(times[index], x)

    def __call__(
        self, denoiser: Denoiser, noise: Sample, cond: Cond, steps: int, fresh: FreshNoise = torch.randn_like
    ) -> Sample:
        if not self.takes(steps):
            raise ValueError(f"steps={steps}: this student was trained for {len(self)} of them at most; give no more.")
        refuse_own_noise(self, denoiser)
        denoiser = denoiser.trajectory(fresh)
        x, t = self.simulate(denoiser, noise, cond, steps - 1, fresh)
        return denoiser(x, t, cond)


def _all(time: float, x: Sample) -> Time:
    """A time for the whole batch, made on the device: nothing is copied to it."""
    return torch.full((len(x),), time, dtype=x.dtype, device=x.device)
