"""MMD-DDM: finetuning of a sampler with few steps by the maximum mean discrepancy (Aiello et al. 2301.07969).

    L = sum_f w_f MMD^2( f(decode(S(z, c))), f(x) ),   S = the whole chain of k sampler steps from unit noise z
    z: (b, *shape) in model space, x: (b, c, h, w) pixels, f: pixels -> (b, d_f), MMD^2: `distill.kernels.squared_mmd`

The gradient passes feature network, decoder and all k denoiser calls. There is no regression on the teacher: it is where the
student starts. A method's one-step student is finetuned alike, by its own sampler and ``steps=1``.

Features of all ranks are compared together, as in the authors' code on several devices: the discrepancy is no mean of the
ranks' own. Beyond the paper: labels may be matched too, several feature networks summed, and the student guided. A sample that
is made for the conditions of an image is not independent of it: such pairs are left out of the unbiased estimate.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.chain import CheckpointedDenoiser
from distill.denoiser import Denoiser
from distill.evaluation import Evaluation
from distill.frozen import Frozen
from distill.guidance import GuidanceRule, guided
from distill.image_features import ImageFeatures, check_independent
from distill.kernels import Kernel, Matching, PolynomialKernel, gather, squared_mmd
from distill.lora import LoRA, start_student
from distill.methods.base import Method
from distill.optimization import Optimization
from distill.samplers import Sampler
from distill.space import ModelSpace
from distill.types import Batch, Cond, DataSpec, Losses, Sample


class MMDFinetuning(Method):
    """Moves the law of a sampler's output, in one or several feature spaces, to that of the data.

    Args:
        features: feature networks; with several, their discrepancies are summed.
        teacher: what the student starts from; its samples are drawn for comparison.
        student: the denoiser at first, another method's for instance; None starts from the teacher.
        sampler: the student's, in training and in evaluation; None is that of the evaluation.
        steps: k, of the chain; None is the only one of ``evaluation.steps``.
        kernel: of the features; None is KID's cubic polynomial, that of the paper.
        feature_weights: w_f, in the order of ``features``; None is 1 for each.
        matching: ``all`` compares the laws of images, ``joint`` those of images and labels together, ``class`` each class's:
            a class with a single sample in the batch of all ranks then teaches nothing.
        unbiased: whether pairs of a sample with itself are left out.
        chunk: rows of a kernel matrix that are held at once; None for all.
        checkpointing: whether each denoiser call is made again in the backward pass instead of being kept: memory of one call,
            not of k, for one more forward of each.
        guidance: of the student, in training and when it is sampled; and of the teacher.
        lora: the student is LoRA layers on the teacher's weights; None trains all weights of a copy.
        optimization, evaluation, space: see `Method`. If there are metrics, one must be a distance in features not trained on.

    Raises:
        ValueError: nothing to start from, no features, two of one name, weights that do not go with them, steps that the
            sampler or the evaluation does not have, or metrics that measure nothing but what is trained on.
    """

    def __init__(
        self,
        features: list[ImageFeatures],
        optimization: Optimization,
        evaluation: Evaluation,
        teacher: Denoiser | None = None,
        student: Denoiser | None = None,
        sampler: Sampler | None = None,
        steps: int | None = None,
        kernel: Kernel | None = None,
        feature_weights: list[float] | None = None,
        matching: Matching = "all",
        unbiased: bool = True,
        chunk: int | None = None,
        checkpointing: bool = False,
        guidance: GuidanceRule | None = None,
        lora: LoRA | None = None,
        space: ModelSpace | None = None,
    ):
        weights = _checked_weights(features, feature_weights)
        if evaluation.metrics:
            check_independent(evaluation.metrics, features)
        steps = _checked_steps(sampler, steps, evaluation)
        start = _start(teacher, student, lora)
        if optimization.gradient_checkpointing and not checkpointing and steps > 1 and _keeps_calls(start):
            raise ValueError(
                "optimization.gradient_checkpointing=true with a student that keeps what a call was given (a second time, "
                "adapters): its blocks would be computed again with that of the last call; set model.checkpointing=true."
            )
        super().__init__(start, teacher, guidance, optimization, evaluation, space)
        # Frozen: feature networks are neither trained nor saved.
        self._features = Frozen(nn.ModuleList(features))
        self.feature_weights, self.kernel, self.matching = weights, kernel or PolynomialKernel(), matching
        self.sampler, self.steps, self.unbiased, self.chunk = sampler, steps, unbiased, chunk
        self.checkpointing = checkpointing

    @property
    def trained_features(self) -> list[ImageFeatures]:
        """The features that the loss reads: figures in these say little of the samples."""
        return list(self._features.module)

    @property
    def student_sampler(self) -> Sampler:
        return self.sampler or self.evaluation.student_sampler

    @property
    def trained_sampling(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def check_data(self, spec: DataSpec) -> None:
        super().check_data(spec)
        if self.matching != "all" and spec.num_classes is None:
            raise ValueError(f"model.matching={self.matching!r}: data has no labels; give some that has, or set it to 'all'.")

    def prepare(self, batch: Batch) -> Batch:
        """Conditions in model space; ``x0``, what features are taken of, as pixels."""
        pixels = self.to_pixels(batch.x0) if batch.x0 is not None and batch.encoded else batch.x0
        return replace(super().prepare(replace(batch, x0=None)), x0=pixels)

    def losses(self, batch: Batch) -> Losses:
        if batch.x0 is None:
            raise ValueError("data delivers conditions without images, and there is nothing to match: give data with images.")
        samples = self.space.decode_with_gradient(self.rollout(self.unit_noise(batch), batch))
        losses: Losses = {}
        total = torch.zeros((), device=self.device)
        for weight, extract in zip(self.feature_weights, self.trained_features, strict=True):
            value = self.discrepancy(extract, samples, batch)
            losses[f"mmd_{extract.name}"] = value
            total = total + weight * value
        return {"loss": total, **losses}

    def discrepancy(self, extract: ImageFeatures, samples: Tensor, batch: Batch) -> Tensor:
        """``MMD^2`` of the features of all ranks' samples and images, a scalar; gradient through the samples alone."""
        labels = None if self.matching == "all" else gather(batch.cond["labels"])
        paired = bool(batch.cond)  # a sample is made for the conditions of an image
        with torch.no_grad():
            real = gather(extract(batch.x0))
        fake = gather(extract(samples))
        return squared_mmd(fake, real, self.kernel, self.unbiased, labels, labels, self.matching, self.chunk, paired)

    def unit_noise(self, batch: Batch) -> Sample:
        """What the chain starts from, fresh for each batch."""
        return torch.randn(len(batch), *self.model_shape, device=self.device)

    def rollout(self, noise: Sample, batch: Batch) -> Sample:
        """Samples ``(b, *shape)`` in model space for the batch's conditions, with gradient through every step.

        The student is in training mode: its dropout is active, with masks of their own in each step.
        """
        generator = self.generator(self.student)
        generator = CheckpointedDenoiser(generator) if self.checkpointing else generator
        rule = self.drawn(self.guidance)
        generator = generator if rule is None else rule(generator, batch.null)
        return self.student_sampler(generator, noise, batch.cond, self.steps)

    def guided_generator(
        self, generator: Denoiser, cond: Cond, null: Cond, guidance: float | None
    ) -> tuple[Denoiser, Cond]:
        """Guided by the rule that the student is trained under, if there is one, at its own or the given scale."""
        if self.guidance is None:
            return super().guided_generator(generator, cond, null, guidance)
        if guidance is None:
            return self.guidance(generator, null), cond
        return guided(generator, cond, null, guidance, self.guidance)


def _keeps_calls(student: Denoiser) -> bool:
    """Whether its network holds values of a call that differ between the calls of a chain."""
    network: Any = getattr(student, "network", None)
    return bool(getattr(network, "second_time", False) or getattr(network, "adapters", ()))


def _start(teacher: Denoiser | None, student: Denoiser | None, lora: LoRA | None) -> Denoiser:
    """The student at first."""
    if student is not None and lora is not None:
        raise ValueError(f"model.student and model.lora={lora} are both set: LoRA stands on the teacher; set one only.")
    if student is not None:
        return student
    if teacher is None:
        raise ValueError("model.teacher and model.student are both null: give what is finetuned as one of them.")
    return start_student(teacher, lora)


def _checked_weights(features: list[ImageFeatures], weights: list[float] | None) -> list[float]:
    """A weight for each of the features."""
    if not features:
        raise ValueError("features=[]: give at least one network whose features are matched.")
    names = [extract.name for extract in features]
    if len(set(names)) < len(names):
        raise ValueError(f"features={names}: give one network of each kind; feature_weights says how much it counts.")
    values = [1.0] * len(features) if weights is None else weights
    if len(values) != len(features) or not all(0 < value < math.inf for value in values):
        raise ValueError(f"feature_weights={weights}: give a positive number for each of the features {names}, or null.")
    return values


def _checked_steps(sampler: Sampler | None, steps: int | None, evaluation: Evaluation) -> int:
    """The number of steps of the chain."""
    if sampler is not None and evaluation.sampler is not None:
        raise ValueError("evaluation.sampler is set: the student is sampled by model.sampler; leave one of them out.")
    if steps is None:
        if len(evaluation.steps) > 1:
            raise ValueError(f"steps=null and evaluation.steps={evaluation.steps}: set steps to the one that is trained.")
        steps = evaluation.steps[0]
    if steps not in evaluation.steps:
        raise ValueError(f"steps={steps}: not among evaluation.steps={evaluation.steps}, so it would not be measured; add it.")
    chosen: Any = sampler or evaluation.student_sampler
    if hasattr(chosen, "__len__") and max(evaluation.steps) > len(chosen):
        raise ValueError(f"evaluation.steps={evaluation.steps}: model.sampler has {len(chosen)} times; give no more.")
    return steps
