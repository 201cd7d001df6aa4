"""The curve of distance against steps: the figures that were logged, each validation once, and nothing where there is none."""

from __future__ import annotations

import csv
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pytorch_lightning import LightningModule, Trainer
from tiny_run import write_recipe

from distill import cli
from distill.callbacks.random_state import RandomState
from distill.callbacks.steps_curve import StepsCurve, draw_curves, draw_panel, read_curve
from distill.checkpoints import read_checkpoint
from distill.methods.denoising import DenoisingTraining
from distill.metrics import FrechetDistance
from distill.types import Batch

LEVELS = torch.randint(0, 200, (6, 1, 2, 2), generator=torch.Generator().manual_seed(0))


def images(levels: torch.Tensor) -> torch.Tensor:
    return levels / 127.5 - 1


class FakeTrainer(SimpleNamespace):
    __class__ = Trainer  # type: ignore[assignment]


class FakeMethod:
    """Its teacher's samples are the data, 5 levels brighter, but for the numbers that it was not to draw."""

    __class__ = DenoisingTraining  # type: ignore[assignment]
    device = torch.device("cpu")

    def __init__(self, has_teacher: bool = True, measured: bool = True):
        self.has_teacher = has_teacher
        self.evaluation = SimpleNamespace(steps=[4, 1], teacher_steps=32)
        self.metrics = {steps: {"frechet_pixels": FrechetDistance()} if measured else {} for steps in ("4", "1")}

    def numbers(self, batch, batch_idx):
        return range(3 * batch_idx, 3 * batch_idx + 3)

    def prepare(self, batch):
        return batch

    def real_pixels(self, batch):
        return batch.x0

    def draw_pixels(self, steps, indices, ready, source):
        assert (steps, source, ready.x0) == (32, "teacher", None)
        return images(LEVELS[indices.start : indices.stop] + 5)


def trainer_of(folder, step: int = 10, figures: tuple[float, float] = (0.5, 0.25), **changed: Any) -> FakeTrainer:
    logged = {"val/frechet_pixels/1": torch.tensor(figures[0]), "val/frechet_pixels/4": torch.tensor(figures[1]), "loss": 1}
    known = {"default_root_dir": str(folder), "global_step": step, "callback_metrics": logged, "loggers": []}
    known |= {"state": SimpleNamespace(fn="fit"), "sanity_checking": False, "fast_dev_run": 0, "is_global_zero": True}
    return FakeTrainer(**known | changed)


def written(folder) -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads((folder / "curves/distance_against_steps.json").read_text(), parse_constant=refuse)


def validated(folder, method: Any, *trainers: FakeTrainer, teacher: bool = False) -> None:
    callback = StepsCurve(teacher)
    callback.setup(trainers[0], method, "fit")
    for trainer in trainers:
        for number, x0 in enumerate(images(LEVELS).split(3)):
            callback.on_validation_batch_end(trainer, method, None, Batch(x0, {}, {}), number)
        callback.on_validation_end(trainer, method)


def test_each_validation_is_there_once_in_order_of_steps(tmp_path):
    first, second, third = (trainer_of(tmp_path, step, (step / 10, step / 20)) for step in (10, 20, 30))
    validated(tmp_path, FakeMethod(), first, second, third)
    again = trainer_of(tmp_path, 20, (7.0, float("nan")))  # resumed from step 15: what came later is made again
    validated(tmp_path, FakeMethod(), again)
    values = [(entry["step"], entry["values"]["frechet_pixels"]) for entry in written(tmp_path)["validations"]]
    assert values == [(10, {"1": 1.0, "4": 0.5}), (20, {"1": 7.0, "4": None})]
    described = written(tmp_path)["metrics"]["frechet_pixels"]
    assert described == {"higher_is_better": False, "protocol": FrechetDistance().features.protocol}


def test_the_teacher_is_measured_once_over_all_batches(tmp_path):
    """5 levels brighter at each of 4 pixels: the covariances are equal, and the distance is that of the means."""
    callback, method = StepsCurve(teacher=True), FakeMethod()
    callback.setup(trainer_of(tmp_path), method, "fit")
    for step in (10, 20):
        trainer = trainer_of(tmp_path, step)
        for number, x0 in enumerate(images(LEVELS).split(3)):
            callback.on_validation_batch_end(trainer, method, None, Batch(x0, {}, {}), number)
        callback.on_validation_end(trainer, method)
        method.draw_pixels = None  # type: ignore[assignment]
    teacher = written(tmp_path)["teacher"]
    assert teacher == {"steps": 32, "values": {"frechet_pixels": pytest.approx(4 * (5 / 255) ** 2, rel=1e-9)}}
    assert int(method.metrics["4"]["frechet_pixels"].fake_count) == 0
    with pytest.raises(ValueError, match="steps_curve.teacher=true: .* has no teacher; set it to false"):
        StepsCurve(teacher=True).setup(trainer_of(tmp_path), FakeMethod(has_teacher=False), "fit")


def without(**changed: Any) -> tuple[Any, dict]:
    return FakeMethod(), changed


@pytest.mark.parametrize(
    "method, changed",
    [
        without(sanity_checking=True),
        without(fast_dev_run=1),
        without(state=SimpleNamespace(fn="validate")),
        without(is_global_zero=False),
        (FakeMethod(measured=False), {}),
        (LightningModule(), {}),
    ],
    ids=["sanity check", "fast_dev_run", "validate", "rank 1", "no metrics", "no samples"],
)
def test_nothing_is_written(tmp_path, method, changed):
    validated(tmp_path, method, trainer_of(tmp_path, **changed))
    assert not list(tmp_path.iterdir())


def test_another_file_of_that_name_is_refused_before_training(tmp_path):
    path = tmp_path / "curves/distance_against_steps.json"
    path.parent.mkdir()
    for text in ("{", "[]", '{"validations": [{"step": 1}], "metrics": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"distance_against_steps.json: is no curve .* remove it"):
            read_curve(path)


RECORD = {
    "metrics": {"frechet": {"higher_is_better": False}, "accuracy": {"higher_is_better": True}},
    "validations": [
        {"step": 5, "values": {"frechet": {"1": 4.0, "2": 2.0}, "accuracy": {"1": 0.25, "2": 0.5}}},
        {"step": 10, "values": {"frechet": {"1": 1.0, "2": None, "8": 0.5}, "accuracy": {"1": 0.75, "2": 1.0}}},
    ],
    "teacher": {"steps": 32, "values": {"frechet": 0.125}},
}


def test_a_line_a_validation_the_last_in_black_and_the_teachers_level():
    axes = Figure().add_subplot()
    draw_panel(axes, "frechet", RECORD)
    first, last, teacher = axes.lines
    assert [list(first.get_xdata()), list(first.get_ydata())] == [[1, 2], [4.0, 2.0]]
    assert [list(last.get_xdata()), list(last.get_ydata())] == [[1, 8], [1.0, 0.5]]
    assert to_rgb(last.get_color()) == (0, 0, 0) != to_rgb(first.get_color()) and list(teacher.get_ydata()) == [0.125] * 2
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == ["training step 5", "training step 10", "teacher, 32 steps"]
    assert axes.get_yscale() == "log" and [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "8"]


def test_what_is_no_positive_distance_has_a_linear_axis():
    for name, value in (("accuracy", 0.25), ("frechet", -0.1)):
        axes = Figure().add_subplot()
        record = RECORD | {"validations": [{"step": 5, "values": {name: {"1": value, "2": 0.5}}}]}
        draw_panel(axes, name, record)
        assert axes.get_yscale() == "linear"
    assert draw_curves(RECORD).size == (1100, 420)


def test_a_run_that_was_cut_leaves_the_curve_of_the_whole(tmp_path, monkeypatch):
    """Cut behind a validation that its checkpoint does not know of."""
    monkeypatch.setattr(sys, "argv", ["distill"])
    monkeypatch.chdir(tmp_path)
    kernel = "{class_path: TorchmetricsKID, init_args: {features: PixelFeatures, subsets: 3, subset_size: 9}}"
    words = ["fit", "--config", str(write_recipe(tmp_path)), f"--model.evaluation.metrics=[FrechetDistance, {kernel}]"]
    words += ["--sample_grid.comparison_steps=[]", "--sample_grid.lines=1"]

    def stops(self, trainer, *_):
        if trainer.global_step == 11:
            raise KeyError("cut")

    cli.main([*words, "--trainer.default_root_dir=whole"])
    with monkeypatch.context() as patch:
        patch.setattr(RandomState, "on_train_batch_start", stops)
        with pytest.raises(KeyError):
            cli.main([*words, "--trainer.default_root_dir=cut"])
    assert read_checkpoint("cut/checkpoints/last.ckpt")["global_step"] == 8
    assert [entry["step"] for entry in written(tmp_path / "cut")["validations"]] == [5, 10]
    cli.main([*words, "--trainer.default_root_dir=cut", "--ckpt_path=last"])
    for name in ("distance_against_steps.json", "distance_against_steps.png"):
        whole, cut = ((tmp_path / run / "curves" / name).read_bytes() for run in ("whole", "cut"))
        assert whole == cut
    assert list(written(tmp_path / "whole")["metrics"]) == ["frechet_pixels", "kid_pixels"]
    figures = [entry["values"]["frechet_pixels"] for entry in written(tmp_path / "whole")["validations"]]
    rows = [row for row in csv.DictReader(open("whole/csv/metrics.csv")) if row["val/frechet_pixels/1"]]
    assert [[float(row[f"val/frechet_pixels/{n}"]) for n in (1, 2)] for row in rows] == [
        pytest.approx([each["1"], each["2"]]) for each in figures
    ]
