"""The best student of a run: chosen by a figure that training does not read, kept over a restart, what the run ends with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Data, batch_of, same, small, trainer
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from distill.callbacks.best_student import BestStudent
from distill.callbacks.export import ExportDenoiser
from distill.checkpoints import AtomicCheckpointIO, RunCheckpoint, read_checkpoint
from distill.evaluation import Evaluation
from distill.grids import UniformGrid
from distill.image_features import ImageFeatures
from distill.methods.denoising import DenoisingTraining
from distill.methods.mmd import MMDFinetuning
from distill.metrics import FeatureExtractor, FrechetDistance
from distill.optimization import Optimization
from distill.samplers import OdeSampler
from distill.solvers import Euler
from distill.times import UniformTimes

EULER = OdeSampler(Euler(), UniformGrid())


class Told(Metric):
    """Logs the next of the given figures at each validation."""

    name = "told"
    full_state_update = False
    higher_is_better = False

    def __init__(self, figures: list[float]):
        super().__init__()
        self.figures = list(figures)

    def update(self, samples: Tensor, real: Tensor, cond: dict[str, Tensor]) -> None:
        pass

    def compute(self) -> Float[Tensor, ""]:
        return torch.tensor(self.figures.pop(0))


class ToldUpwards(Told):
    """Of which more is better."""

    higher_is_better = True


class Flat(ImageFeatures):
    """The pixels as vectors."""

    name, protocol, identity = "flat", "the pixels, flat", {"path": "", "sha256": "flat"}

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return images.flatten(1)


class FlatForMeasuring(FeatureExtractor):
    """The same, as a metric reads them."""

    name, protocol = "flat", "the pixels, flat"

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return images.double().flatten(1)


def run(folder: Path, figures: list[float], *callbacks: Any, kind: Any = Told, steps: int = 0, ckpt_path: Any = None) -> Any:
    """A run that is validated after each of its steps; the method, as it is in the end."""
    measured = Evaluation(sampler=EULER, steps=[2], metrics=[kind(figures)])
    fast = Optimization(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    method = DenoisingTraining(small(num_classes=2), UniformTimes(), fast, measured)
    kept = [callback for callback in callbacks if isinstance(callback, RunCheckpoint)] or [RunCheckpoint()]
    others = [callback for callback in callbacks if not isinstance(callback, RunCheckpoint)] or [BestStudent("told/2")]
    settings: dict[str, Any] = dict(val_check_interval=1, limit_val_batches=1.0, num_sanity_val_steps=0)
    settings |= dict(default_root_dir=folder, plugins=[AtomicCheckpointIO()], enable_checkpointing=True)
    data = Data([batch_of(0)])
    data.val_dataloader = lambda: DataLoader(data.batches, batch_size=None)  # type: ignore[assignment, arg-type]
    trainer(steps or len(figures), *others, *kept, **settings).fit(method, datamodule=data, ckpt_path=ckpt_path)
    return method


def saved(folder: Path, which: str) -> dict[str, Any]:
    return read_checkpoint(folder / "checkpoints" / f"{which}.ckpt")


def test_a_run_ends_with_its_best_student_says_so_and_leaves_the_last_checkpoint_alone(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        method = run(tmp_path, [3.0, 1.0, 2.0])
    best, last = saved(tmp_path, "best"), saved(tmp_path, "last")
    assert (best["global_step"], last["global_step"]) == (2, 3)
    assert same(dict(method.state_dict()), best["state_dict"]) and not same(best["state_dict"], last["state_dict"])
    assert "best student: step 2, val/told/2 1.0000" in caplog.text and "best.ckpt" in caplog.text


def test_a_figure_of_which_more_is_better_is_followed_upwards(tmp_path):
    run(tmp_path, [3.0, 1.0, 2.0], kind=ToldUpwards)
    assert saved(tmp_path, "best")["global_step"] == 1


def test_a_resumed_run_replaces_the_best_only_by_a_better_one(tmp_path):
    run(tmp_path, [3.0, 1.0])
    last = tmp_path / "checkpoints" / "last.ckpt"
    method = run(tmp_path, [2.0], steps=3, ckpt_path=last)
    assert saved(tmp_path, "best")["global_step"] == 2 and saved(tmp_path, "last")["global_step"] == 3
    assert same(dict(method.state_dict()), saved(tmp_path, "best")["state_dict"])
    run(tmp_path, [0.5], steps=4, ckpt_path=last)
    assert saved(tmp_path, "best")["global_step"] == 4


def test_a_run_that_never_measured_keeps_its_last_student(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        method = run(tmp_path, [float("nan")])
    assert "no student was measured" in caplog.text
    assert same(dict(method.state_dict()), saved(tmp_path, "last")["state_dict"])


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([BestStudent("told/4")], ["told/4", "['told/2']"]),
        ([BestStudent("told/2"), RunCheckpoint(monitor="val/other/1")], ["checkpoint.monitor=val/other/1", "told/2"]),
        ([ExportDenoiser(), BestStudent("told/2")], ["ExportDenoiser before BestStudent", "swap"]),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, monkeypatch, callbacks, words):
    monkeypatch.setattr(ExportDenoiser, "setup", lambda *arguments, **named: None)  # the small network has no folder
    with pytest.raises(ValueError) as error:
        run(tmp_path, [1.0], *callbacks)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "checkpoints").exists()


def test_the_same_monitor_is_no_contradiction(tmp_path):
    run(tmp_path, [2.0, 1.0], BestStudent("told/2"), RunCheckpoint(monitor="val/told/2"))
    assert saved(tmp_path, "best")["global_step"] == 2


def test_a_metric_of_the_training_features_chooses_no_student():
    metrics = [FrechetDistance(FlatForMeasuring()), FrechetDistance()]
    measured = Evaluation(sampler=EULER, steps=[2], metrics=metrics)
    method = MMDFinetuning([Flat()], Optimization(), measured, student=small(num_classes=2))
    with pytest.raises(ValueError, match="evaluation.metrics=.'frechet_flat'.*'flat'"):
        BestStudent("frechet_flat/2").setup(trainer(3), method, "fit")
    kept = RunCheckpoint()
    independent = BestStudent("frechet_pixels/2")
    independent.setup(trainer(3, independent, kept, enable_checkpointing=True), method, "fit")
    assert (kept.monitor, kept.mode) == ("val/frechet_pixels/2", "min")
