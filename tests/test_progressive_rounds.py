"""Rounds of progressive distillation: who teaches, what begins anew at a boundary, runs that are cut at it and elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Watch, batch_of, fit, gaussian, of_part, same, small
from pytorch_lightning import Callback
from resuming import same as same_nest
from resuming import train_cut_and_whole

from distill.denoiser import NetworkDenoiser
from distill.ema import DecayAveraging
from distill.evaluation import Evaluation
from distill.grids import KarrasGrid
from distill.guidance import ClassifierFreeGuidance
from distill.lora import LoRA
from distill.methods.progressive import Progressive
from distill.networks.unet2d import UNet2D
from distill.optimization import LearningRate, Optimization
from distill.pretrained import save_denoiser
from distill.schedules import RectifiedFlow, VarianceExploding

RECIPES = Path(__file__).resolve().parent.parent / "configs/digits"
LR, KEPT = 1e-2, 0.9
BATCHES = [batch_of(number, tied=False) for number in range(6)]


def progressive(start: int = 4, lengths: Any = 2, accumulate: int = 1, dropout: float = 0.3, **settings: Any) -> Progressive:
    """Of a small network, with an average and a learning rate that falls."""
    optimization = Optimization(
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=LR),
        learning_rate=LearningRate(decay="linear"),
        averaging=DecayAveraging(KEPT, warmup=False),
        accumulate_batches=accumulate,
    )
    teacher = settings.pop("teacher", None) or small(num_classes=2, width=8, dropout=dropout)
    return Progressive(teacher, start, 1, lengths, optimization, Evaluation(), **settings)


class Rates(Callback):
    """The learning rate and the optimiser's count of steps after each batch."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *others: Any) -> None:
        (optimizer,) = trainer.optimizers
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.counts.append(max((int(state["step"]) for state in optimizer.state.values()), default=0))


def student(state: dict[str, torch.Tensor], part: str = "student") -> dict[str, torch.Tensor]:
    """Weights of a part, by their names in the student."""
    cut = {"student": len("student."), "ema": len("ema.module."), "previous": len("previous.module.")}[part]
    return {key[cut:]: value for key, value in of_part(state, part).items()}


def test_each_round_starts_as_its_teacher_with_a_new_optimiser_rate_and_average():
    method, watch, rates = progressive(lengths=[2, 3, 1]), Watch(), Rates()
    teacher = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    fit(method, BATCHES, 6, watch, rates)
    assert rates.counts == [1, 2, 1, 2, 3, 1]
    assert rates.rates == pytest.approx([LR, LR / 2, LR, LR * 2 / 3, LR / 3, LR])
    states = watch.states
    assert not any(key.startswith("previous") for state in states[:3] for key in state)
    for first, last in ((2, 5), (5, 6)):  # of a round: the state before its first batch, and after its last
        for state in states[first + 1 : last + 1]:
            assert same(student(state, "previous"), student(states[first]))
        begun, moved, average = student(states[first]), student(states[first + 1]), student(states[first + 1], "ema")
        assert all(torch.allclose(average[k], KEPT * begun[k] + (1 - KEPT) * moved[k], atol=1e-7) for k in average)
        assert not same(begun, student(states[first], "ema")) and not same(begun, moved)
    assert all(watch.moved(batch, "student") and watch.moved(batch, "ema") for batch in range(6))
    assert same(teacher, method.teacher.state_dict()) and not any("teacher" in key for key in method.state_dict())
    assert not any(p.requires_grad or p.grad is not None for p in method.previous.parameters())
    assert not any(part.training for part in method.previous.module.modules())


def test_the_previous_student_teaches():
    """It, not the given teacher, is what a later loss depends on."""
    method = progressive(start=2, lengths=[1, 5], dropout=0.0)
    fit(method, BATCHES, 2)

    def loss() -> float:
        torch.manual_seed(1)
        return float(method.losses(BATCHES[0])["loss"])

    before = loss()
    for part, moves in ((method.teacher, False), (method.previous, True)):
        next(part.parameters()).data += 1.0
        assert (loss() != before) == moves


def test_a_round_counts_optimiser_steps_not_batches():
    method, watch = progressive(start=2, lengths=[1, 2], accumulate=2), Watch()
    fit(method, BATCHES, 3, watch)
    held = [any(key.startswith("previous") for key in state) for state in watch.states]
    assert held == [False, False, False, True, True, True, True]
    assert same(student(watch.states[3], "previous"), student(watch.states[2]))


def test_lora_rounds_share_the_teachers_weights():
    """Student, average and previous student are layers on the teacher's very tensors; checkpoints hold the layers alone."""
    network = UNet2D(num_classes=2, in_channels=2, sample_size=8, channels=(8, 16), layers_per_block=1)
    teacher = NetworkDenoiser(network, RectifiedFlow(), "flow")
    method = progressive(start=2, lengths=[1, 2], teacher=teacher, lora=LoRA(rank=2))
    batches = [batch_of(number, 4, tied=False) for number in range(3)]
    for batch in batches:
        batch.x0 = batch.x0.repeat(1, 1, 8, 8)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    fit(method, batches, 3)
    base = {id(parameter) for parameter in teacher.parameters()}
    own = [parameter for parameter in method.previous.parameters() if id(parameter) not in base]
    assert 0 < sum(p.numel() for p in own) < 0.2 * sum(p.numel() for p in teacher.parameters())
    assert base <= {id(parameter) for parameter in method.previous.parameters()}
    assert {id(p) for p in own}.isdisjoint(id(p) for p in method.student.parameters())
    kept = [key for key in method.state_dict() if key.startswith("previous.")]
    assert len(kept) == len(own) and all("lora" in key for key in kept)
    assert same(before, {key: value for key, value in teacher.state_dict().items()})


# -------------------------------------------------------------------------------------------------- checkpoints, resume


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_a_run_that_was_cut_ends_in_the_same_bits(cut: int, tmp_path: Path) -> None:
    """Rounds of 2, 2 and 2: cut within each, and just at both boundaries. Dropout is on."""
    whole = progressive()
    expected = Watch()
    ended = fit(whole, BATCHES, 6, expected)
    first, resumed, found = progressive(), progressive(), Watch()
    fit(first, BATCHES, cut).save_checkpoint(tmp_path / "cut.ckpt")
    again = fit(resumed, BATCHES, 6, found, ckpt_path=tmp_path / "cut.ckpt")
    assert again.global_step == ended.global_step == 6
    assert same(found.states[-1], expected.states[-1]) and "optimizer.0.0.exp_avg" in found.states[-1]
    assert (first.previous is None) == (cut <= 2)


@pytest.mark.parametrize(("start", "lengths"), [(2, [2, 2]), (4, [1, 2, 1])], ids=["boundary", "within"])
def test_the_recipe_resumes_to_the_bit(start: int, lengths: list[int], tmp_path: Path, monkeypatch) -> None:
    """Cut after the second of four steps: where a round ends, and amid one that has a previous student."""
    monkeypatch.chdir(tmp_path)
    network = UNet2D(num_classes=10, channels=(8, 16), layers_per_block=1)
    save_denoiser(NetworkDenoiser(network, RectifiedFlow(), "flow"), "runs/digits/teacher/export")
    rounds = [f"--model.init_args.start_steps={start}", f"--model.init_args.round_steps={lengths}"]
    quick = ["--data.init_args.batch_size=8", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    recipe = str(RECIPES / "progressive.yaml")
    cut, whole = train_cut_and_whole(recipe, *rounds, *quick, "--trainer.limit_val_batches=0")
    for key in ("state_dict", "optimizer_states", "distill"):
        assert same_nest(cut[key], whole[key]), key
    assert any(key.startswith("previous.") for key in whole["state_dict"])


def test_rounds_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    fit(progressive(), BATCHES, 3).save_checkpoint(path)
    words = "at step 3 is of the round {'steps': 2, 'first': 2}, but .* make it {'steps': 4, 'first': 0}"
    with pytest.raises(ValueError, match=words):
        fit(progressive(lengths=4), BATCHES, 4, ckpt_path=path)
    # A later round may be longer than it was to be.
    assert fit(progressive(lengths=[2, 2, 9]), BATCHES, 5, ckpt_path=path).global_step == 5


# -------------------------------------------------------------------------------------------------------- bad settings


def test_a_run_that_is_longer_than_its_rounds_is_refused():
    with pytest.raises(ValueError, match=r"trainer.max_steps=7: the rounds of model.round_steps=\[2, 2, 2\] end after 6"):
        fit(progressive(), BATCHES, 7)


def reading() -> NetworkDenoiser:
    denoiser = small(num_classes=2)
    denoiser.network.add_scalar_input("guidance")
    return denoiser


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(start=3), "start_steps=3 and end_steps=1"),
        (dict(lengths=[2]), r"round_steps=\[2\]"),
        (dict(grid=KarrasGrid(sigma_min=0.1, sigma_max=9.0)), "grid=KarrasGrid: its 4 times"),
        (dict(guidance_range=(3.0, 1.0)), "guidance_range="),
        (dict(null_probability=1.0), "null_probability=1.0"),
        (dict(teacher=reading()), "guidance_range=null: the teacher reads a guidance scale"),
        (dict(teacher=reading(), guidance=ClassifierFreeGuidance(2.0)), "guidance=Class.*the teacher reads a guidance scale"),
        (dict(teacher=gaussian(VarianceExploding()), guidance_range=(1.0, 3.0)), "guidance_range="),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        progressive(**settings)
