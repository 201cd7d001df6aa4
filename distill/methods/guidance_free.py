"""Teachers that are guided by themselves in one evaluation: guidance-free training (Chen et al. 2501.15420, algorithm 1) and
model guidance (Tang et al. 2502.12154, algorithm 1 and eqs. 18, 20 and 22).

    guidance-free:   L = E w(t) | F* - [ b F(x_t, t, c, 1/b) + (1 - b) sg F(x_t, t, null, 1) ] |^2 / D,   b in [1/max_scale, 1]
    model guidance:  L = E w(t) | F* + w sg[ F'(x_t, t, c) - F'(x_t, t, null) ] - F(x_t, t, c) |^2 / D
    x_t = alpha_t x0 + sigma_t eps: (b, *shape), t, b, w: (b,)

F is the network's own output and F* its target, as in training from data alone (`distill.methods.denoising`); all are linear
in x0, so that guidance is the same in any of them. A sample whose conditions are dropped trains the unguided null prediction.
The minimum is what classifier-free guidance makes of the exact predictions:

- guidance-free: at scale 1/b, which is what the network reads as the scalar input ``guidance``. The mixing b of a dropped
  sample stays, only what is embedded becomes 1 (so does the release).
- model guidance at a fixed scale: the network stands on both sides, ``F_c = F*_c + w (F_c - F_null)``, so the minimum is
  guidance at scale ``1 / (1 - w)`` and not ``1 + w``: w here is ``1 - 1 / scale``. (The paper's best "w = 1.5" is, its row 1
  being no guidance, w = 0.5 in eq. 18: scale 2. From w = 1 on there is no minimum.)
- model guidance over a range of scales: the network reads the scale and the difference is of its unguided predictions
  (eq. 22), so that w is ``scale - 1``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distill.couplings import Coupling
from distill.denoiser import Denoiser, NetworkDenoiser
from distill.evaluation import Evaluation
from distill.guidance import draw_scales, drop_conditions
from distill.lora import read_guidance
from distill.methods.from_data import TrainingFromData
from distill.optimization import Optimization
from distill.schedules import per_sample
from distill.space import ModelSpace
from distill.times import TimeDistribution
from distill.types import Batch, Cond, DataSpec, Losses, Sample, Time
from distill.weights import Weight


class SelfGuided(TrainingFromData):
    """What both share: a sample costs one evaluation a step, at a scale that is an input.

    Both papers drop the conditions of a tenth of the samples.
    """

    sample_scale: float | None = None
    """The scale at which a student that reads one is sampled, if no other is asked for."""

    def check_data(self, spec: DataSpec) -> None:
        super().check_data(spec)
        if spec.num_classes is None and not spec.prompts and not spec.widths:
            raise ValueError(
                f"{type(self).__name__} guides towards conditions, and data carries none: give data with labels or prompts, or "
                "DenoisingTraining."
            )

    def guided_generator(
        self, generator: Denoiser, cond: Cond, null: Cond, guidance: float | None
    ) -> tuple[Denoiser, Cond]:
        """A student that reads the guidance scale is given it, in one evaluation."""
        return super().guided_generator(generator, cond, null, self.sample_scale if guidance is None else guidance)


class GuidanceFreeTraining(SelfGuided):
    """Guidance-free training (GFT): the guided network is trained through a mixture that is the conditional prediction.

    Args:
        max_scale: > 1. b is uniform in [1 / max_scale, 1]. The paper draws from (0, 1), but what is embedded is the scale 1/b
            (as in its Stable Diffusion, whose ``1/b - 1`` is our scalar input with origin 1), which has no bound there; and
            the loss tells the network little about a scale whose b is small.
        sample_scale: the scale of validation's samples, in [1, max_scale].
        student, times, weight, null_probability, coupling, optimization, evaluation, space: see `TrainingFromData`. A
            pretrained student whose null prediction is good may have ``null_probability: 0``, as the paper's Stable Diffusion.

    Raises:
        ValueError: a scale out of range; a network that takes no scalar input.
    """

    def __init__(
        self,
        student: NetworkDenoiser,
        times: TimeDistribution,
        optimization: Optimization,
        evaluation: Evaluation,
        max_scale: float = 10.0,
        sample_scale: float = 2.0,
        weight: Weight | None = None,
        null_probability: float = 0.1,
        coupling: Coupling | None = None,
        space: ModelSpace | None = None,
    ):
        if not 1 <= sample_scale <= max_scale or max_scale == 1:
            raise ValueError(f"max_scale={max_scale}, sample_scale={sample_scale}: give 1 <= sample_scale <= max_scale > 1.")
        read_guidance(student, f"model.class_path={type(self).__name__}")
        super().__init__(student, times, optimization, evaluation, weight, null_probability, coupling, space)
        self.max_scale, self.sample_scale = max_scale, sample_scale

    def losses(self, batch: Batch) -> Losses:
        x_t, t, target = self.noised(batch)
        b = 1 - (1 - 1 / self.max_scale) * torch.rand_like(t)
        null = {**batch.null, "guidance": torch.ones_like(b)}
        cond = drop_conditions({**batch.cond, "guidance": 1 / b}, null, self.null_probability)
        with torch.no_grad(), _evaluation_mode(self.student):
            unguided = self.student.raw(x_t, t, null)
        # Weights that autocast has cast without a graph would be taken again, without one (pytorch #112583).
        torch.clear_autocast_cache()
        mixing = per_sample(b, x_t)
        mixture = mixing * self.student.raw(x_t, t, cond) + (1 - mixing) * unguided
        return self.squared(mixture - target, t)


class ModelGuidance(SelfGuided):
    """Model guidance (MG): the target of training is moved by what the network itself makes of the conditions.

    Of the paper's options the removal of the null class (eq. 23) is left out, and so is the automatic w: the paper gives no
    rule that could be checked.

    Args:
        guidance_scale: >= 1, the classifier-free scale that the student learns and then has without an input; the paper's w
            is ``1 - 1 / guidance_scale``, as derived above. None if there is a range.
        guidance_range: ``(low, high)`` with ``low <= 1 < high`` of a scale drawn for each sample and read by the student.
        average: whether F' is the average of the student (eq. 18), which also stands in validation, or its present weights
            (algorithm 1), in evaluation mode.
        sample_scale: with a range, the scale of validation's samples; None for the middle of the range.
        student, times, weight, null_probability, coupling, optimization, evaluation, space: see `TrainingFromData`.

    Raises:
        ValueError: neither or both of scale and range, or one out of range; a network that takes no scalar input.
    """

    def __init__(
        self,
        student: NetworkDenoiser,
        times: TimeDistribution,
        optimization: Optimization,
        evaluation: Evaluation,
        guidance_scale: float | None = None,
        guidance_range: tuple[float, float] | None = None,
        average: bool = True,
        sample_scale: float | None = None,
        weight: Weight | None = None,
        null_probability: float = 0.1,
        coupling: Coupling | None = None,
        space: ModelSpace | None = None,
    ):
        _check_scales(guidance_scale, guidance_range, sample_scale, student)
        if guidance_range is not None:
            read_guidance(student, f"guidance_range={guidance_range}")
            sample_scale = sum(guidance_range) / 2 if sample_scale is None else sample_scale
        super().__init__(student, times, optimization, evaluation, weight, null_probability, coupling, space)
        self.guidance_scale, self.guidance_range, self.average = guidance_scale, guidance_range, average
        self.sample_scale = sample_scale

    def losses(self, batch: Batch) -> Losses:
        x_t, t, target = self.noised(batch)
        cond, null = batch.cond, batch.null
        if self.guidance_range is not None:
            cond = {**cond, "guidance": draw_scales(self.guidance_range, len(t), t.device)}
            null = {**null, "guidance": torch.ones_like(t)}
        cond = drop_conditions(cond, null, self.null_probability)
        if self.guidance_scale is not None:
            w = torch.full_like(t, 1 - 1 / self.guidance_scale)
        else:
            w = cond["guidance"] - 1
        # Of a dropped sample both halves of the difference are the same: its target stays as it is.
        target = target + per_sample(w, x_t) * self.difference(x_t, t, cond, null)
        torch.clear_autocast_cache()  # see `GuidanceFreeTraining.losses`
        return self.squared(self.student.raw(x_t, t, cond) - target, t)

    @torch.no_grad()
    def difference(self, x_t: Sample, t: Time, cond: Cond, null: Cond) -> Sample:
        """``F'(x_t, t, c) - F'(x_t, t, null)``, both at guidance 1 where that is read, in one batched evaluation."""
        denoiser = self.ema.module if self.average else self.student
        unguided = {**cond, **{key: value for key, value in null.items() if key == "guidance"}}
        both = {key: torch.cat([value, null.get(key, value).expand_as(value)]) for key, value in unguided.items()}
        with _evaluation_mode(denoiser):
            conditional, unconditional = denoiser.raw(torch.cat([x_t, x_t]), t.repeat(2), both).chunk(2)
        return conditional - unconditional


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Within the block a module is in evaluation mode: its dropout is off."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _check_scales(
    scale: float | None, scales: tuple[float, float] | None, sample_scale: float | None, student: Denoiser
) -> None:
    """Refuses scales that contradict each other, the objective or the student."""
    if (scale is None) == (scales is None):
        raise ValueError(f"guidance_scale={scale} and guidance_range={scales}: set one of the two.")
    if scale is not None and (scale < 1 or "guidance" in student.scalar_inputs or sample_scale is not None):
        raise ValueError(
            f"guidance_scale={scale}, sample_scale={sample_scale}: give a scale of at least 1 and no sample_scale; for a "
            "student that reads a scale give guidance_range instead."
        )
    if scales is not None and not 0 <= scales[0] <= 1 < scales[1]:
        raise ValueError(f"guidance_range={scales}: give 0 <= low <= 1 < high; the unguided prediction (scale 1) is needed.")
