"""Inductive moment matching (Zhou et al. 2503.07565, algorithm 1): jumps from t and from a nearer r must end in the same law.

    L = E_{t, s} w(t) MMD^2( {f(x_t^j, t -> s)}_j, {sg f(x_r^j, r -> s)}_j ),   j = 1 ... M,   s <= r(t, s) <= t
    x_t = alpha_t x0 + sigma_t eps,   x_r = alpha_r x0 + sigma_r eps: the same eps;   x0, eps, f: (b, *shape), t, r, s: (b / M,)

f is a DDIM step to s with the student's x0, which reads s too (`distill.jumps`). The M particles of a group share their times.
MMD^2 is the mean of ``k(A_i, A_j) + k(B_i, B_j) - 2 k(A_i, B_j)`` over all pairs, i = j included, with the kernel of distances
times ``1 / |c_out(t, s)|``, so that it compares predictions. A and B draw the same dropout masks; B is computed in float32.

With one particle and a kernel as wide as everything it is consistency training: with `LaplaceKernel` on the norm of the
difference, with `RadialKernel` on its square, of jumps to s.

A departure: a sample whose conditions are dropped is without them in A and in B, where a public file in the authors' style
drops them in A alone. At the exact jumps the two sides have the same law either way; but with one particle only the former
compares points of one map, as consistency training must.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from distill.couplings import Coupling, noise_for, refuse_pairs
from distill.denoiser import Denoiser, NetworkDenoiser
from distill.evaluation import Evaluation
from distill.guidance import GuidanceRule, check_null_share, drop_conditions
from distill.jump_times import CutGrid, Decrement, JumpMap, JumpTimes
from distill.jumps import jump, jump_coefficients
from distill.kernels import DistanceKernel, LaplaceKernel
from distill.lora import LoRA, start_student
from distill.methods.base import Method
from distill.optimization import Optimization
from distill.samplers import JumpSampler, OdeSampler, Sampler
from distill.space import ModelSpace
from distill.types import Batch, DataSpec, Losses, Sample, Time
from distill.weights import SigmoidWeight, Weight

SMALLEST_OUT = 1e-6
"""Of |c_out|, which is 0 where s is t: there both sides are x_t, and the kernel's gradient must not be 0 times infinity."""


class MomentMatching(Method):
    """Trains jumps from any time to any earlier one, from scratch or from a teacher's weights.

    Args:
        times: law of t and s, in the student's schedule.
        student: a denoiser whose network can read a second time; None starts from the teacher.
        teacher: where the student starts from if there is no ``student``; it is not called in training.
        mapping: r(t, s); None for the paper's `Decrement`.
        particles: M, >= 1; it must divide the batch size.
        kernel: of the particles' distances; None for the paper's `LaplaceKernel`.
        weight: w(t); None for the paper's `SigmoidWeight`.
        stride: whether the network embeds t - s instead of s; not for one that reads a second time already.
        null_probability: in [0, 1), share of samples trained without their conditions.
        guidance: of the teacher when it is drawn for comparison.
        lora: the student is LoRA layers on the teacher's weights; None trains all weights of a copy.
        coupling: of data and noise; None draws noise freely.
        optimization, evaluation, space: see `Method`; the sampler is `JumpSampler` in equal steps by default: the paper's
            pushforward sampler. `RenoiseSampler` is its restart sampler.

    Raises:
        ValueError: neither student nor teacher, or a setting out of range; a network that cannot read a second time; a sampler
            that follows velocities.
    """

    def __init__(
        self,
        times: JumpTimes,
        optimization: Optimization,
        evaluation: Evaluation,
        student: Denoiser | None = None,
        teacher: Denoiser | None = None,
        mapping: JumpMap | None = None,
        particles: int = 4,
        kernel: DistanceKernel | None = None,
        weight: Weight | None = None,
        stride: bool = False,
        null_probability: float = 0.1,
        guidance: GuidanceRule | None = None,
        lora: LoRA | None = None,
        coupling: Coupling | None = None,
        space: ModelSpace | None = None,
    ):
        if particles < 1:
            raise ValueError(f"particles={particles}: give 1 (consistency training) or more; the paper has 4.")
        if student is not None and lora is not None:
            raise ValueError(f"model.student and model.lora={lora} are both set: LoRA stands on the teacher; set one only.")
        if student is None:
            if teacher is None:
                raise ValueError("model.student and model.teacher are both missing: give one of them to start from.")
            student = start_student(teacher, lora)
        if isinstance(evaluation.sampler, OdeSampler):
            raise ValueError(
                "evaluation.sampler=OdeSampler takes jumps to the end for a velocity: give JumpSampler (pushforward), or "
                "RenoiseSampler (restart)."
            )
        check_null_share(null_probability, student)
        ends = times.ends(student.schedule)
        if isinstance(student, NetworkDenoiser):
            student.add_second_time(stride)
        super().__init__(student, teacher, guidance, optimization, evaluation, space)
        self.ends = ends
        self.times, self.mapping, self.particles = times, mapping or Decrement(), particles
        self.kernel, self.weight = kernel or LaplaceKernel(), weight or SigmoidWeight()
        self.null_probability, self.coupling = null_probability, coupling
        if evaluation.sampler is None:
            CutGrid(ends[1]).times(student.schedule, 1)  # refuses an end that sampling cannot start from

    @property
    def student_sampler(self) -> Sampler:
        return self.evaluation.sampler or JumpSampler(CutGrid(self.ends[1]))

    def check_data(self, spec: DataSpec) -> None:
        super().check_data(spec)
        refuse_pairs(self.coupling, spec)

    def losses(self, batch: Batch) -> Losses:
        assert batch.x0 is not None
        schedule, x0, eps = self.student.schedule, batch.x0, noise_for(batch, self.coupling)
        t, r, s = self.draw_times(len(x0), x0.device)
        cond = drop_conditions(batch.cond, batch.null, self.null_probability)
        each_t, each_r, each_s = (time.repeat_interleave(self.particles) for time in (t, r, s))
        # B before A: activations that are computed again in A's backward pass find A's stride in the network.
        with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
            self.seed_draws("network")
            x_r = schedule.add_noise(x0, eps, each_r)
            target = self.grouped(jump(self.student, x_r, each_r, each_s, cond))
        self.seed_draws("network")
        made = self.grouped(jump(self.student, schedule.add_noise(x0, eps, each_t), each_t, each_s, cond))
        discrepancy = self.discrepancy(made, target, t, s)
        return {"loss": (self.weight(schedule, t, s) * discrepancy).mean(), "discrepancy": discrepancy.mean()}

    def draw_times(self, size: int, device: torch.device) -> tuple[Time, Time, Time]:
        """``t, r, s`` of each group, ``(size / M,)``.

        Raises:
            ValueError: a batch that is not made of whole groups.
        """
        if size % self.particles:
            raise ValueError(
                f"a batch of {size} is not made of groups of model.particles={self.particles}: set data.batch_size to a "
                "multiple of it."
            )
        schedule = self.student.schedule
        t, s = self.times.sample(size // self.particles, schedule, device)
        return t, self.mapping(t, s, self.ends, schedule), s

    def grouped(self, samples: Sample) -> Float[Tensor, "g m d"]:
        """``(b, *shape)`` as ``(b / M, M, d)``."""
        return samples.reshape(-1, self.particles, samples[0].numel())

    def discrepancy(
        self, made: Float[Tensor, "g m d"], target: Float[Tensor, "g m d"], t: Time, s: Time
    ) -> Float[Tensor, " g"]:
        """Squared MMD of each group, float64."""
        scale = 1 / jump_coefficients(self.student, t, s)[1].abs().clamp(min=SMALLEST_OUT)
        within = self.kernel(made, made, scale) + self.kernel(target, target, scale)
        return (within - 2 * self.kernel(made, target, scale)).mean((1, 2))
