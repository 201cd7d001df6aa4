"""The callback that measures a student against its guided teacher: what it logs, and what it refuses before training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from guided_run import train, write_teacher
from helpers import FixedTimes, evaluation, small, trainer

from distill.callbacks.guidance_error import GuidanceError
from distill.cli import load_run
from distill.guidance import ClassifierFreeGuidance
from distill.guidance_error import squared_errors
from distill.methods.denoising import DenoisingTraining
from distill.methods.guidance_distillation import GuidanceDistillation
from distill.optimization import Optimization
from distill.types import Batch, label_conditions

KEY = "val/guidance_error/4"
SEEDED = {"steps": [1], "teacher_steps": 1, "seed": 3}


def whole(data: Any) -> list[Batch]:
    """All validation data in one batch."""
    batches = list(data.val_dataloader())
    images, labels = torch.cat([b.x0 for b in batches]), torch.cat([b.cond["labels"] for b in batches])
    assert len(batches) > 1
    return [Batch(images, *label_conditions(labels, 10))]


def test_it_logs_the_averaged_students_error_at_each_scale_and_each_validation(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher")
    callback = {"class_path": "GuidanceError", "init_args": {"scales": [1.5, 4]}}
    # Rescaled, so that a plain rule in its place would show.
    rule = {"class_path": "ClassifierFreeGuidance", "init_args": {"scale": 2.0, "rescale": 0.7, "rescale_space": "flow"}}
    train(tmp_path / "run", teacher, callbacks=(callback,), guidance=rule, guidance_range=[1.0, 5.0], evaluation=SEEDED)
    rows = list(csv.DictReader((tmp_path / "run/csv/metrics.csv").open()))
    logged = [[float(row[f"val/guidance_error/{scale}"]) for scale in ("1.5", "4")] for row in rows if row.get(KEY)]
    _, method, data = load_run(tmp_path / "run")

    def errors(student: Any, rule: Any = method.guidance, seed: int = 3) -> list[float]:
        with torch.no_grad():
            sums = squared_errors(student, method.teacher, whole(data), (1.5, 4.0), rule, seed)
        return (sums[:, 0] / sums[:, 1]).sqrt().tolist()

    assert len(logged) == 1 and logged[0] == pytest.approx(errors(method.ema.module), rel=1e-5)
    others = [errors(method.student), errors(method.ema.module, ClassifierFreeGuidance(2.0)), errors(method.ema.module, seed=0)]
    assert all(abs(logged[0][1] / other[1] - 1) > 1e-4 for other in others)


def distilled(**settings: Any) -> GuidanceDistillation:
    return GuidanceDistillation(small(num_classes=2), Optimization(), evaluation(), **settings)


@pytest.mark.parametrize(
    ("build", "scales", "words"),
    [
        (
            lambda: DenoisingTraining(small(), FixedTimes(), Optimization(), evaluation()),
            (2.0,),
            "DenoisingTraining has no teacher to compare with",
        ),
        (lambda: distilled(guidance=ClassifierFreeGuidance(2.0)), (2.0, 3.0), r"scales=\[2.0, 3.0\]: the student reads no"),
        (lambda: distilled(guidance=ClassifierFreeGuidance(2.0)), (3.0,), r"scales=\[3.0\]: .* give that of its rule, \[2.0\]"),
    ],
    ids=["no teacher", "no scale is read", "another scale"],
)
def test_what_it_cannot_measure_is_refused_before_training(build: Any, scales: tuple[float, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GuidanceError(scales).setup(trainer(1), build(), "fit")
    GuidanceError((2.0,)).setup(trainer(1), distilled(guidance=ClassifierFreeGuidance(2.0)), "fit")


@pytest.mark.parametrize("scales", [(), (2.0, -1.0)])
def test_scales_out_of_range_are_named(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="scales=.*each 0 or more"):
        GuidanceError(scales)
