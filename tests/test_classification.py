"""The digits classifier: its loss against torch, its folder, its recipe through the command line, and how well it reads."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from resuming import same, train_cut_and_whole
from torch.distributions import Categorical

from datamodules.digits import DigitsDataModule
from distill.classifier import ConvClassifier
from distill.cli import load_run, main
from distill.ema import DecayAveraging
from distill.methods.classification import ClassifierTraining
from distill.optimization import Optimization
from distill.types import Batch, DataSpec

RECIPE = str(Path(__file__).resolve().parent.parent / "configs/digits/classifier.yaml")
QUICK = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = ["--model.init_args.student.init_args.channels=[4,8]", "--model.init_args.student.init_args.hidden=12", *QUICK]


def training(**settings: float) -> ClassifierTraining:
    student = ConvClassifier(channels=(4, 8), hidden=12)
    return ClassifierTraining(student, Optimization(averaging=DecayAveraging(0.5)), **settings)


def batch(count: int = 6) -> Batch:
    return Batch(2 * torch.rand(count, 1, 8, 8) - 1, {"labels": torch.arange(count) % 10}, {})


def test_loss_is_the_cross_entropy_of_noisy_images() -> None:
    method, data = training(noise=0.5), batch()
    torch.manual_seed(1)
    losses = method.losses(data)
    torch.manual_seed(1)
    law = Categorical(logits=method.student(data.x0 + 0.5 * torch.randn(data.x0.shape)))
    torch.testing.assert_close(losses["loss"], -law.log_prob(data.cond["labels"]).mean())
    assert float(losses["accuracy"]) == float((law.logits.argmax(1) == data.cond["labels"]).float().mean())
    still = training(noise=0.0)
    assert torch.equal(still.losses(data)["loss"], still.losses(data)["loss"])


def test_training_on_one_batch_lowers_the_loss() -> None:
    method, data = training(), batch()
    optimizer = torch.optim.Adam(method.student.parameters(), 1e-2)
    values = []
    for _ in range(25):
        loss = method.losses(data)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < 0.3 * values[0]


def test_a_folder_gives_the_classifier_back(tmp_path: Path) -> None:
    for number, (size, channels) in enumerate([(8, (4, 8)), (12, (3, 5, 7)), (5, (6,))]):
        network = ConvClassifier(3, size, 4, channels, 9)
        network.save(tmp_path / str(number))
        again, x = ConvClassifier.load(str(tmp_path / str(number))), torch.randn(2, 3, size, size)
        assert again.config == network.config and torch.equal(again(x), network(x)) and again(x).shape == (2, 4)


def test_recipe_trains_resumes_and_exports_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cut, whole = train_cut_and_whole(RECIPE, *SMALL)
    assert same(cut["state_dict"], whole["state_dict"])
    exported, average = ConvClassifier.load("whole/export").state_dict(), load_run("whole")[1].ema.module.state_dict()
    assert exported.keys() == average.keys() and all(value.equal(exported[name]) for name, value in average.items())


def test_the_recipe_reads_unseen_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the recipe's steps; the logged accuracy is that of the exported weights on the 297 that are held out."""
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", RECIPE, "--trainer.max_steps=100", "--trainer.val_check_interval=100", *QUICK])
    rows = list(csv.DictReader(Path("runs/digits/classifier/csv/metrics.csv").open()))
    (logged,) = [float(row["val/held_out_accuracy"]) for row in rows if row.get("val/held_out_accuracy")]
    network, data = ConvClassifier.load("runs/digits/classifier/export").eval(), DigitsDataModule()
    right, unseen = 0, 0
    with torch.no_grad():
        for held_out in data.held_out_dataloader():
            right += int((network(held_out.x0).argmax(1) == held_out.cond["labels"]).sum())
            unseen += len(held_out)
    assert unseen == 297 and logged == pytest.approx(right / unseen, abs=1e-6) and logged > 0.93


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (DataSpec((3, 8, 8), 10), r"reads images of shape \(1, 8, 8\) of 10 classes, but data delivers \(3, 8, 8\) of 10"),
        (DataSpec((1, 8, 8), 7), "of 7 classes: give such images"),
        (DataSpec((1, 8, 8)), "of None classes"),
        (DataSpec((1, 8, 8), 10, codec="0" * 64), "latents of a codec"),
    ],
)
def test_data_that_does_not_fit_is_named(spec: DataSpec, words: str) -> None:
    training().check_data(DataSpec((1, 8, 8), 10))
    with pytest.raises(ValueError, match=words):
        training().check_data(spec)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="noise=-0.1: give a standard deviation"):
        training(noise=-0.1)
    with pytest.raises(ValueError, match="hidden=0: give a positive number"):
        ConvClassifier(hidden=0)
    for channels, size in (((), 8), ((4, 0), 8), ((4, 8, 8), 6)):
        with pytest.raises(ValueError, match=f"sample_size={size}: give at least one positive width"):
            ConvClassifier(sample_size=size, channels=channels)


def test_weights_of_another_config_are_named(tmp_path: Path) -> None:
    ConvClassifier(hidden=9).save(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"hidden": 9', '"hidden": 8'))
    with pytest.raises(ValueError, match="model.safetensors there does not fit config.json"):
        ConvClassifier.load(str(tmp_path))
