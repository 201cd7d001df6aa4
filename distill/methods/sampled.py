"""How a method's networks are sampled and measured: from conditions to pixels, in validation and by the tools."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from distill.denoiser import Denoiser
from distill.ema import EMA
from distill.evaluation import Evaluation
from distill.frozen import Frozen
from distill.guidance import GuidanceRule, guided
from distill.noise import SeededNoise
from distill.pretrained import identity_of
from distill.samplers import Sampler
from distill.sharding import check_equal_batches
from distill.space import ModelSpace, check_fit
from distill.types import Batch, Cond, DataSpec, Sample


class SampledModule(LightningModule, ABC):
    """The half of a `Method` that draws: a student, its average and a teacher, between a data module and pixels.

    Attributes:
        student: the denoiser that is trained.
        ema: the average of the student, which is what is sampled.
        guidance: how the teacher is guided, or None.
        guidance_range: of the guidance scales that are drawn in training, ``(low, high)``, or None.
        evaluation: what is drawn and measured.
        sample_shape: shape of one sample in model space; `check_data` sets it from the data.
        reads_trajectories: whether `losses` take points of a teacher's trajectories, whose ``x0`` is a prediction and no data.
    """

    student: Denoiser
    ema: EMA
    metrics: Any
    guidance: GuidanceRule | None
    guidance_range: tuple[float, float] | None = None
    evaluation: Evaluation
    _teacher: Frozen | None
    _space: Frozen
    sample_shape: tuple[int, ...] | None = None
    reads_trajectories: bool = False

    def generator(self, student: Denoiser) -> Denoiser:
        """The denoiser that is sampled, made of the student or its average: itself, unless a method wraps it."""
        return student

    @property
    def teacher(self) -> Denoiser:
        """The frozen teacher. Raises ValueError if there is none."""
        if self._teacher is None:
            raise ValueError(f"{type(self).__name__} was built without a teacher: set model.teacher.")
        return self._teacher.module

    @property
    def has_teacher(self) -> bool:
        """Whether the method was built with a teacher."""
        return self._teacher is not None

    @property
    def student_sampler(self) -> Sampler:
        """What the student is sampled by."""
        return self.evaluation.student_sampler

    def guided_teacher(self, null: Cond) -> Denoiser:
        """The teacher under the method's guidance rule."""
        return self.teacher if self.guidance is None else self.guidance(self.teacher, null)

    @property
    def teacher_scale(self) -> float | None:
        """The guidance scale at which the teacher is drawn for comparison: the middle of a range; None for the rule's own."""
        return None if self.guidance_range is None else sum(self.guidance_range) / 2

    @property
    def space(self) -> ModelSpace:
        """What stands between the data and the networks; never trained and never saved."""
        return self._space.module

    def prepare(self, batch: Batch) -> Batch:
        """The batch in model space, as `losses` is given it."""
        return self.space.encode(batch)

    @property
    def model_shape(self) -> tuple[int, ...]:
        """Shape of one sample in model space. Raises ValueError if neither the data nor the student says it."""
        shape = self.sample_shape or self.student.shape
        if shape is None or None in shape:
            raise ValueError(f"samples have no shape: the student takes {shape}; call check_data with that of the data first.")
        return shape  # type: ignore[return-value]

    def to_pixels(self, samples: Sample) -> Tensor:
        """Samples ``(b, *shape)`` in model space as pixels in [-1, 1], not clamped."""
        return self.space.decode(samples)

    @torch.no_grad()
    def draw(
        self,
        steps: int,
        indices: Sequence[int],
        cond: Cond,
        null: Cond,
        seed: int = 0,
        source: str = "ema",
        guidance: float | None = None,
    ) -> Sample:
        """Samples number ``indices`` of a seed, ``(len(indices), *shape)`` in model space, each the same in any batch and rank.

        Args:
            steps: sampler steps.
            indices: numbers of the samples; ``cond`` and ``null`` have a row for each.
            cond, null: conditions on this module's device.
            seed: seed of the set.
            source: ``ema``, ``student`` or ``teacher``.
            guidance: a guidance scale (1 is none) for the sampled network; None leaves the teacher its rule, or the scale that
                it is compared at.
        """
        fresh = SeededNoise(seed, indices, self.model_shape)
        noise = fresh.draw(self.device)
        if source not in ("ema", "student", "teacher"):
            raise ValueError(f"source={source!r}: give 'ema', 'student' or 'teacher'.")
        if source == "teacher":
            if (scale := self.teacher_scale if guidance is None else guidance) is None:
                denoiser = self.guided_teacher(null)
            else:
                denoiser, cond = guided(self.teacher, cond, null, scale, self.guidance)
            return self.evaluation.sample_teacher(denoiser, noise, cond, steps, fresh)
        module: Denoiser = {"ema": self.ema.module, "student": self.student}[source]
        denoiser, cond = self.guided_generator(self.generator(module), cond, null, guidance)
        training = module.training
        samples = self.student_sampler(denoiser.eval(), noise, cond, steps, fresh)
        module.train(training)
        return samples

    def guided_generator(
        self, generator: Denoiser, cond: Cond, null: Cond, guidance: float | None
    ) -> tuple[Denoiser, Cond]:
        """The generator and conditions for sampling at a guidance scale: by default a classifier-free rule around it."""
        return (generator, cond) if guidance is None else guided(generator, cond, null, guidance)

    def on_validation_start(self) -> None:
        check_equal_batches(self, self.trainer.num_val_batches, "validation")

    def on_test_start(self) -> None:
        check_equal_batches(self, self.trainer.num_test_batches, "test")

    def on_predict_start(self) -> None:
        check_equal_batches(self, self.trainer.num_predict_batches, "prediction")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not any(len(metrics) for metrics in self.metrics.values()):
            return
        real = self.real_pixels(batch)
        for steps, pixels in self.predict_step(batch, batch_idx).items():
            for name, metric in self.metrics[str(steps)].items():
                metric.update(pixels, real, batch.cond)
                self.log(f"val/{name}/{steps}", metric, batch_size=len(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[int, Tensor]:
        """Samples, as pixels, for the conditions of the batch, by number of steps."""
        indices, ready = self.numbers(batch, batch_idx), self.prepare(replace(batch, x0=None))
        return {n: self.draw_pixels(n, indices, ready) for n in self.evaluation.steps}

    def numbers(self, batch: Batch, batch_idx: int) -> range:
        """Numbers of the samples that are drawn for a batch of the evaluation: no two of any batch or rank are the same."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        first = (batch_idx * self.trainer.world_size + self.global_rank) * data.eval_batch_size
        return range(first, first + len(batch))

    def real_pixels(self, batch: Batch) -> Tensor:
        """The data of a batch as pixels in [-1, 1]. Raises ValueError if it carries none."""
        if batch.x0 is None:
            raise ValueError("evaluation.metrics compare with data, but the validation batches carry none: set them to [].")
        return self.to_pixels(batch.x0) if batch.encoded else batch.x0

    def draw_pixels(self, steps: int, indices: Sequence[int], ready: Batch, source: str = "ema") -> Tensor:
        """`draw` for the conditions of a batch in model space and with the seed of the evaluation, as pixels."""
        return self.to_pixels(self.draw(steps, indices, ready.cond, ready.null, self.evaluation.seed, source))

    def check_data(self, spec: DataSpec) -> None:
        """Refuses data that a network does not fit or the method does not read, and takes the shape of samples from it.

        Raises:
            ValueError: naming the keys and both values.
        """
        if spec.trajectories and not self.reads_trajectories:
            raise ValueError(
                f"data delivers points of a teacher's trajectories, which {type(self).__name__} would take for data: give "
                "images, latents or pairs, or a method that distils guidance."
            )
        spec = self.space.spec(spec)
        if self.has_teacher:
            check_fit("model.teacher", self.teacher, spec)
            self._check_pairs(spec)
        check_fit("model.student", self.student, spec)
        self.sample_shape = spec.shape

    def _check_pairs(self, spec: DataSpec) -> None:
        """Refuses pairs or trajectories of another teacher."""
        own = identity_of(self.teacher)
        if spec.teacher is not None and spec.teacher != (own or {}).get("sha256"):
            made = "trajectories" if spec.trajectories else "pairs"
            raise ValueError(
                f"data holds {made} of a teacher with sha256 {spec.teacher[:12]}, but model.teacher is {own}: "
                f"give the same weights, or make {made} of these by tools/make_{made}.py."
            )
