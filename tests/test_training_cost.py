"""What training has cost: evaluations by closed forms and as planned, over batches, players, rounds and restarts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import score_methods
import torch
from helpers import Data, batch_of, evaluation, everything, fit, same, small, trainer
from test_progressive_rounds import progressive
from tiny_run import write_recipe

from distill import cli
from distill.callbacks import training_cost
from distill.callbacks.random_state import RandomState
from distill.callbacks.training_cost import KEY, TrainingCost, added_up
from distill.checkpoints import read_checkpoint
from distill.distances import SquaredDistance
from distill.ema import DecayAveraging
from distill.grids import ConstantPoints, UniformGrid
from distill.guidance import ClassifierFreeGuidance
from distill.methods.consistency import Consistency
from distill.methods.trained import TrainedModule
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.plan.turns import measure_turn
from distill.solvers import Heun

BATCHES = [batch_of(number) for number in range(4)]
VALIDATED = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}


def cost(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training_cost.json").read_text())


def trained(method: TrainedModule, folder: Path, updates: int, batches: list[Any] | None = None, **settings: Any) -> Any:
    """The file of a run in ``folder``."""
    fit(method, batches or BATCHES, updates, TrainingCost(), default_root_dir=folder, **settings)  # type: ignore[arg-type]
    return cost(folder)


def distillation(**optimization: Any) -> Consistency:
    """CD of a guided teacher, with an average as target."""
    teacher = small(num_classes=2)
    return Consistency(
        GridPairs(UniformGrid(), ConstantPoints(8)),
        SquaredDistance(),
        Optimization(**optimization),
        evaluation(),
        student=small(seed=1, num_classes=2),
        teacher=teacher,
        solver=Heun(),
        guidance=ClassifierFreeGuidance(2.0),
        target=DecayAveraging(0.9),
    )


def test_a_guided_teachers_heun_steps_cost_four_evaluations(tmp_path):
    """Each image: the student once, its average once, the teacher in two stages, each with and without its class."""
    found = trained(distillation(), tmp_path, 6, **VALIDATED)
    images = 6 * 8
    expected = {"teacher": 4 * images, "target average": images, "student": images}
    assert found["evaluations"] == expected | {"total": 6 * images}
    size = sum(parameter.numel() for parameter in small(num_classes=2).parameters())
    assert found["parameters"] == {"trained": size, "student": size}
    counts = [found[key] for key in ("method", "updates", "batches", "images", "devices", "device")]
    assert counts == ["Consistency", 6, 6, images, 1, "cpu"]


def test_an_update_of_two_batches_costs_both(tmp_path):
    found = trained(distillation(accumulate_batches=2), tmp_path, 3)
    assert [found[key] for key in ("updates", "batches", "images")] == [3, 6, 48]
    assert found["evaluations"]["total"] == 6 * 48


@pytest.mark.parametrize("kind", ["sid", "dmd2"])
def test_players_cost_what_their_turns_are_planned_to(tmp_path, kind):
    """Two turns of the fake score, one of the generator, twice."""
    found = trained(score_methods.method(kind, fake={"steps": 2}), tmp_path, 6, score_methods.BATCHES)
    planned = score_methods.method(kind, fake={"steps": 2})
    players = planned.players()
    turns = [measure_turn(planned, players, index, score_methods.batch()).evaluations for index in (0, 1, 1)]
    total = sum(turns, start=type(turns[0])())
    assert total["fake score"] > total["teacher"] > 0
    assert found["evaluations"] == {role: 2 * count for role, count in total.items()} | {"total": 2 * total.total()}
    assert found["parameters"]["trained"] > found["parameters"]["student"]


def test_a_student_that_has_become_the_teacher_is_one(tmp_path):
    """Four steps, two, one: two updates each; the teacher, later a copy of the student, makes two steps a sample."""
    method = progressive(4, 2)
    found = trained(method, tmp_path, 6, [batch_of(number, tied=False) for number in range(6)])
    assert found["evaluations"] == {"teacher": 2 * 48, "student": 48, "total": 3 * 48}
    assert not any(module._forward_pre_hooks for module in (method.previous.module.network, method.student.network))


def test_counting_changes_no_bit():
    ends = []
    for callbacks in ([], [TrainingCost()]):
        method = distillation()
        ready = trainer(5, *callbacks, fast_dev_run=5)
        ready.fit(method, datamodule=Data(BATCHES))
        ends.append(everything(ready, method))
    assert same(*ends)


def test_seconds_are_those_of_training(tmp_path, monkeypatch):
    """A step takes a second by the clock, a validation a hundred."""
    seconds = [0.0]
    monkeypatch.setattr(training_cost, "now", lambda: seconds[0])
    method = distillation()
    seed, validate = method.seed_draws, method.on_validation_end

    def slow(*words: Any) -> None:
        seconds[0] += 0.5  # drawn twice a step, beside the batch's own seed
        seed(*words)

    def validated() -> None:
        seconds[0] += 100
        validate()

    method.seed_draws, method.on_validation_end = slow, validated  # type: ignore[method-assign]
    found = trained(method, tmp_path, 4, **VALIDATED)
    assert found["seconds"] == found["device_seconds"] == pytest.approx(4 * 1.5)


# ------------------------------------------------------------------------------------------------------------- restarts


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["distill"])
    monkeypatch.chdir(tmp_path)
    return ["fit", "--config", str(write_recipe(tmp_path)), "--checkpoint.every_n_steps=2", "--ckpt_path=last"]


def without_seconds(run: str) -> dict[str, Any]:
    return {key: value for key, value in cost(Path(run)).items() if "seconds" not in key}


def test_a_run_that_was_cut_has_cost_what_a_whole_one_does(words, monkeypatch):
    """It is cut a step after a checkpoint: what that step cost is lost with it, and spent again."""

    class Cut(Exception):
        pass

    def stops(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 7:
            raise Cut

    cli.main([*words, "--trainer.default_root_dir=whole"])
    with monkeypatch.context() as patch:
        patch.setattr(RandomState, "on_train_batch_start", stops)
        with pytest.raises(Cut):
            cli.main([*words, "--trainer.default_root_dir=cut"])
    assert cost(Path("cut"))["updates"] == 6
    cli.main([*words, "--trainer.default_root_dir=cut"])
    whole = without_seconds("whole")
    assert without_seconds("cut") == whole
    assert whole["evaluations"] == {"student": 48, "total": 48} and whole["images"] == 48
    seconds = [read_checkpoint(f"{run}/checkpoints/last.ckpt")[KEY]["seconds"] for run in ("whole", "cut")]
    assert all(value > 0 for value in seconds)


def test_of_a_run_that_began_without_counting_nothing_is_said(words):
    cli.main([*words, "--trainer.default_root_dir=run", "--trainer.max_steps=4"])
    path = Path("run/checkpoints/last.ckpt")
    content = torch.load(path, weights_only=True)
    del content[KEY]
    torch.save(content, path)
    Path("run/training_cost.json").unlink()
    cli.main([*words, "--trainer.default_root_dir=run", "--trainer.max_steps=6"])
    assert not Path("run/training_cost.json").exists()


def test_ranks_are_added_up():
    """To what was spent before, on one device: all that the ranks did, for as long as the slower took."""
    before = {"evaluations": {"student": 5, "teacher": 1}, "images": 5, "seconds": 2.0, "device_seconds": 2.0}
    ranks = [{"evaluations": {"student": 7}, "images": 7, "seconds": time} for time in (3.0, 4.0)]
    expected = {"evaluations": {"student": 19, "teacher": 1}, "images": 19, "seconds": 6.0, "device_seconds": 10.0}
    assert added_up(before, *ranks) == expected
