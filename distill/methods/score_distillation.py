"""What the methods of score distillation share: a generator, a frozen teacher, a fake score that learns the generator's law.

    x_g = G(scale z, t_1, c),  x_t = alpha_t x_g + sigma_t eps,   x_g, x_t: (b, *shape), t: (b,)
    fake score:  E w(t) |X_psi(x_t, t, c) - sg x_g|^2 / D

X_phi and X_psi are the x0-views of the teacher and of the fake score: ``score = (alpha X - x_t) / sigma^2``. The generator's
losses (`score_identity.py`, `score_implicit.py`, `distribution_matching.py`) are written in them, so that they are the same on
every schedule and for every type of prediction. No data is read unless a method says so: batches give the conditions.

The players draw samples of their own, as SiD does (Zhou et al. 2404.04057). DMD2 and SwiftBrush let the fake score learn from
the samples of the generator's last step instead, which spares one generator evaluation in a cycle, but would have to be kept
in checkpoints.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.denoiser import Denoiser, refuse_own_noise
from distill.evaluation import Evaluation
from distill.few_step import FewStepSampler
from distill.gradients import Call, Gradient, denoise, evaluate
from distill.guidance import GuidanceRule, drop_conditions
from distill.lora import LoRA, checkpoint_gradients, start_student
from distill.methods.fake_score import FakeScore, check_laws, check_sampling, check_student
from distill.methods.two_player import TwoPlayerMethod
from distill.optimization import Optimization
from distill.samplers import Sampler
from distill.space import ModelSpace
from distill.times import TimeDistribution
from distill.types import Batch, Cond, Losses, Sample, Time


class ScoreDistillation(TwoPlayerMethod, ABC):
    """A generator whose samples' noisy law is moved to the teacher's; a method writes ``losses(batch)``.

    Args:
        teacher: frozen; the generator and the fake score start from it.
        sampler: the times at which the generator is trained and sampled.
        times: law of the times at which the two scores are compared.
        fake_score: the other player.
        guidance: the teacher's rule.
        fake_guidance: the fake score's in the generator's loss; ``teacher`` for the teacher's, a drawn scale included.
        student: the generator at first, if it is not to be the teacher.
        lora: the generator is LoRA layers on the teacher's weights; None trains all weights of a copy.
        optimization, evaluation, space: see `Method`.

    Raises:
        ValueError: an evaluation with a sampler of its own or with steps that the student is not trained for, times outside of
            the teacher's schedule, settings that contradict each other.
    """

    teacher_gradient: Gradient = "none"
    """What the generator's loss differentiates the two frozen networks in."""

    critic: nn.ModuleDict
    critic_key = "fake_score.optimization"
    reads_data = False
    """Whether any loss reads ``batch.x0``: where none does, pixels are not encoded."""

    def __init__(
        self,
        teacher: Denoiser,
        sampler: FewStepSampler,
        times: TimeDistribution,
        fake_score: FakeScore,
        optimization: Optimization,
        evaluation: Evaluation,
        guidance: GuidanceRule | None = None,
        fake_guidance: GuidanceRule | Literal["teacher"] | None = None,
        student: Denoiser | None = None,
        lora: LoRA | None = None,
        space: ModelSpace | None = None,
    ):
        check_student(teacher, student, lora)
        check_sampling(teacher, sampler, evaluation)
        check_laws(teacher.schedule, {"times": times, "fake_score.times": fake_score.times})
        refuse_own_noise(self, guidance)
        if fake_guidance == "teacher" and guidance is None:
            raise ValueError("fake_guidance='teacher' and guidance=null: there is no rule to share; set both, or neither.")
        if (share := fake_score.null_probability) and teacher.num_classes is not None and not teacher.null_class:
            raise ValueError(f"fake_score.null_probability={share}: the network has no null class; set it to 0.")
        student = start_student(teacher, lora) if student is None else student
        critic = nn.ModuleDict({"score": start_student(teacher, fake_score.lora)})
        players, turns = (optimization, fake_score.optimization), (fake_score.steps, fake_score.warmup_steps)
        super().__init__(student, teacher, critic, guidance, *players, evaluation, *turns, space)
        self.sampler, self.times, self.fake_score, self.fake_guidance = sampler, times, fake_score, fake_guidance
        if optimization.gradient_checkpointing and self.teacher_gradient != "none":
            checkpoint_gradients(self.teacher, "optimization")

    @property
    def fake(self) -> Denoiser:
        """The fake score's denoiser."""
        return self.critic["score"]  # type: ignore[return-value]

    @property
    def head(self) -> nn.Module:
        """The discriminator's, of methods that have one."""
        return self.critic["head"]

    @property
    def student_sampler(self) -> Sampler:
        return self.sampler

    def sharded_parts(self) -> list[nn.Module]:
        return super().sharded_parts() + ([self.head] if "head" in self.critic else [])

    def prepare(self, batch: Batch) -> Batch:
        return super().prepare(batch if self.reads_data else replace(batch, encoded=True))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.teacher_gradient != "none" and getattr(self.teacher, "frozen_dtype", None) == torch.float16:
            raise ValueError(
                "model.teacher.dtype=float16: this method differentiates the teacher in its input, and gradients would pass "
                "float16 unscaled; set it to null, or to bfloat16."
            )

    # -------------------------------------------------------------------------------------------------- the generator

    def generate(self, batch: Batch, gradient: Gradient) -> Sample:
        """The generator's samples ``(b, *shape)`` for the batch's conditions, at one of its times drawn for all ranks."""
        noise = torch.randn(len(batch), *self.model_shape, device=self.device)
        return self.generate_from(noise, batch.cond, gradient)

    def generate_from(self, noise: Sample, cond: Cond, gradient: Gradient) -> Sample:
        """The same from unit ``noise``; only the last of its steps is differentiated, the others are taken as in sampling."""
        if (index := self.exit_index()) > 0:
            training = self.student.training
            self.student.eval()
            with torch.no_grad():
                x, t = self.sampler.simulate(self.student, noise, cond, index)
            self.student.train(training)
            # Weights that autocast has cast without a graph would be taken again, without one (pytorch #112583).
            torch.clear_autocast_cache()
        else:
            x, t = self.sampler.simulate(self.student, noise, cond, index)
        return evaluate(gradient, self.student, x, t, cond)

    def exit_index(self) -> int:
        """Which of the generator's times this batch trains: uniform, the same on every rank (DMD2, section 4.4)."""
        return self.draw_key("exit") % len(self.sampler)

    # --------------------------------------------------------------------------------------------------- the two scores

    def noisy(self, x_g: Sample, times: TimeDistribution) -> tuple[Sample, Time]:
        """``(x_t, t)``: samples with fresh noise at times of a law."""
        schedule = self.student.schedule
        t = times.sample(len(x_g), schedule, x_g.device)
        return schedule.add_noise(x_g, torch.randn_like(x_g), t), t

    def scores(self, x_t: Sample, t: Time, batch: Batch, call: Call = denoise) -> tuple[Sample, Any]:
        """``(X_phi, X_psi)`` at the same inputs, guided; the second is what ``call`` makes of the fake score."""
        rule = self.drawn(self.guidance)
        fake_rule = rule if isinstance(self.fake_guidance, str) else self.drawn(self.fake_guidance)
        teacher = self.teacher if rule is None else rule(self.teacher, batch.null)
        fake = self.fake if fake_rule is None else fake_rule(self.fake, batch.null)
        return self.view(teacher, x_t, t, batch.cond), self.view(fake, x_t, t, batch.cond, call)

    def view(self, denoiser: Denoiser, x_t: Sample, t: Time, cond: Cond, call: Call = denoise) -> Any:
        """One of the two frozen networks in the generator's loss."""
        return evaluate(self.teacher_gradient, denoiser, x_t, t, cond, call)

    @staticmethod
    def real_samples(batch: Batch) -> Sample:
        """What a discriminator compares with: the batch's data. Raises ValueError if there is none."""
        if batch.x0 is None:
            raise ValueError("model.adversarial is set, but data delivers no samples to compare with: set it to null.")
        return batch.x0

    def critic_losses(self, batch: Batch) -> Losses:
        return {"loss": self.denoising_loss(self.generate(batch, "none"), batch)}

    def denoising_loss(self, x_g: Sample, batch: Batch) -> Tensor:
        """The fake score's loss on samples of the generator."""
        settings = self.fake_score
        x_t, t = self.noisy(x_g, settings.times)
        cond = drop_conditions(batch.cond, batch.null, settings.null_probability)
        rule = self.drawn(settings.guidance)
        fake = self.fake if rule is None else rule(self.fake, batch.null)
        return self.weighted_error(evaluate("parameters", fake, x_t, t, cond), x_g, t)

    def weighted_error(self, x0: Sample, x_g: Sample, t: Time) -> Tensor:
        """The fake score's squared error, a scalar."""
        errors = (x0 - x_g).square().flatten(1).mean(1)
        return (self.fake_score.weight(self.student.schedule, t, t) * errors).mean()

    # ------------------------------------------------------------------------------------------------------- contracts

    @property
    def trained_sampling(self) -> dict[str, Any]:
        return self.sampler.settings()


def teacher_residual(x_g: Sample, x_phi: Sample) -> Tensor:
    """``mean |x_g - X_phi|`` over a sample's elements, ``(b,)``, at least 1e-5 and without gradient.

    What SiD's and DMD's losses are divided by (2404.04057, section 3.3; 2311.18828, equation 8).
    """
    return (x_g - x_phi).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
