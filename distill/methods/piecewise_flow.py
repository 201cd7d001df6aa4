"""Piecewise rectified flow, windows solved online (PeRFlow, Yan et al. 2405.07510, algorithm 1).

    L = E w(c) d( p(x_c, c), p* ),   x_s = alpha_s x0 + sigma_s eps,   x_e = teacher's ODE from (x_s, s) to e
    x_c = x_s + (c - s) / (e - s) (x_e - x_s),   c uniform in a window (e, s] of K
    x0, eps, x_s, x_e, x_c: (b, *shape), s, e, c: (b,)

p is a velocity or a noise made of the student's x0, p* what it is on the chord from x_s to x_e (`distill.piecewise`). The only
division by what may vanish is p's by sigma_c: c is drawn strictly above e. As x_s is real data under noise, no pairs are
stored, and an error at one window's end does not pass into the next.

Conditions are dropped for the student. Unguided, the teacher solves with the same conditions, so that the student stands for
it in guided sampling (the published ``cfg_sync``); a guided teacher keeps its conditions, as in the published code.

Departures from that code (magic-research/piecewise-rectified-flow): windows' edges and times are not rounded to DDPM's
indices, and the network is told the index whose noise it sees, there one more.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.denoiser import Denoiser
from distill.distances import Distance, SquaredDistance
from distill.evaluation import Evaluation
from distill.guidance import GuidanceRule, check_null_share, drop_conditions
from distill.lora import LoRA, start_student
from distill.methods.base import Method
from distill.optimization import Optimization
from distill.piecewise import Parameterisation, PiecewiseSampler
from distill.samplers import Sampler
from distill.schedules import NoiseSchedule, per_sample
from distill.solvers import Solver
from distill.space import ModelSpace
from distill.types import Batch, Cond, Losses, Sample, Time
from distill.weights import ConstantWeight, Weight


class PiecewiseFlow(Method):
    """Straightens a teacher's flow window by window, on real data.

    Args:
        teacher: frozen; the student starts from it.
        solver: of the teacher's ODE.
        windows: K; 4 in the paper. Sampling takes at least as many steps.
        solver_steps: equal steps of the solver in a window; 8 of DDIM in the paper (10 for Stable Diffusion XL).
        parameterisation: ``velocity``; on a schedule that starts with signal, ``ddim_eps`` or ``diff_eps`` too.
        schedule: in whose time the windows are equal and chords straight; None is the teacher's own.
        distance: d; None is the mean squared difference.
        weight: w, of p's distance, at c (and the window's end); None is 1.
        guidance: the teacher's rule; None leaves guidance to sampling.
        null_probability: in [0, 1), share of samples whose conditions the student is not given.
        student: the student at first, if it is not to be the teacher.
        lora: the student is LoRA layers on the teacher's weights; None trains all weights of a copy.
        optimization, evaluation, space: see `Method`; the student's sampler is `PiecewiseSampler`.

    Raises:
        ValueError: a number out of its range, a parameterisation that the schedule does not have, fewer evaluation steps than
            windows, an evaluation with a sampler of its own, ``student`` and ``lora`` both.
    """

    def __init__(
        self,
        teacher: Denoiser,
        solver: Solver,
        optimization: Optimization,
        evaluation: Evaluation,
        windows: int = 4,
        solver_steps: int = 8,
        parameterisation: Parameterisation = "velocity",
        schedule: NoiseSchedule | None = None,
        distance: Distance | None = None,
        weight: Weight | None = None,
        guidance: GuidanceRule | None = None,
        null_probability: float = 0.1,
        student: Denoiser | None = None,
        lora: LoRA | None = None,
        space: ModelSpace | None = None,
    ):
        if student is not None and lora is not None:
            raise ValueError(f"model.student and model.lora={lora} are both set: LoRA stands on the teacher; set one only.")
        if solver_steps < 1:
            raise ValueError(f"solver_steps={solver_steps}: give at least one step a window.")
        check_null_share(null_probability, teacher)
        sampler, schedule = PiecewiseSampler(windows, parameterisation), schedule or teacher.schedule
        sampler.flow.check(schedule)
        _check_evaluation(evaluation, windows)
        student = start_student(teacher, lora) if student is None else student
        super().__init__(student, teacher, guidance, optimization, evaluation, space)
        self.sampler, self.schedule, self.solver, self.solver_steps = sampler, schedule, solver, solver_steps
        self.distance, self.weight = distance or SquaredDistance(), weight or ConstantWeight()
        self.null_probability = null_probability

    def generator(self, student: Denoiser) -> Denoiser:
        return student.under(self.schedule)

    @property
    def student_sampler(self) -> Sampler:
        return self.sampler

    def losses(self, batch: Batch) -> Losses:
        assert batch.x0 is not None
        schedule, flow, x0 = self.schedule, self.sampler.flow, batch.x0
        c, s, e = flow.draw(len(x0), schedule, x0.device)
        eps = torch.randn_like(x0) if batch.noise is None else batch.noise
        cond = drop_conditions(batch.cond, batch.null, self.null_probability)
        x_s = schedule.add_noise(x0, eps, s)
        x_e = self.solve(x_s, s, e, cond if self.guidance is None else batch.cond, batch.null)
        x_c = x_s + per_sample((c - s) / (e - s), x0) * (x_e - x_s)
        # Weights that autocast has cast without a graph would be taken again, without one (pytorch #112583).
        torch.clear_autocast_cache()
        prediction = flow.prediction(schedule, x_c, self.generator(self.student)(x_c, c, cond), c)
        distances = self.distance(prediction, flow.target(schedule, x_s, x_e, s, e))
        return {"loss": (self.weight(schedule, c, e) * distances).mean(), "distance": distances.mean()}

    @torch.no_grad()
    def solve(self, x_s: Sample, s: Time, e: Time, cond: Cond, null: Cond) -> Sample:
        """``x_e`` ``(b, *shape)``: the teacher's ODE, each sample from its own ``s`` to its own ``e``, in equal steps."""
        teacher, rule = self.teacher.under(self.schedule), self.drawn(self.guidance)
        teacher = teacher if rule is None else rule(teacher, null)
        x, t, memory = x_s, s, None
        for left in reversed(range(self.solver_steps)):
            # Ends at e exactly: a solver must not take rounding for noise that is left on a flow at 0.
            u = e + left / self.solver_steps * (s - e)
            x, memory = self.solver.advance(teacher, x, t, u, cond, memory)
            t = u
        return x

    # ------------------------------------------------------------------------------------------------------- contracts

    @property
    def trained_sampling(self) -> dict[str, Any]:
        return self.sampler.settings()


def _check_evaluation(evaluation: Evaluation, windows: int) -> None:
    """Raises ValueError for an evaluation that the windows do not allow."""
    if evaluation.sampler is not None:
        raise ValueError("evaluation.sampler is set: the student is sampled by its windows; leave it out.")
    if min(evaluation.steps) < windows:
        raise ValueError(
            f"evaluation.steps={evaluation.steps}: each of windows={windows} takes a step; give {windows} steps or more."
        )
