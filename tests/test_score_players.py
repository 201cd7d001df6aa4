"""Who moves in score distillation: in each turn one player and nothing else, whatever weights the two stand on."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Watch, fit, same
from pytorch_lightning import Callback
from score_methods import BATCHES, CFG, KINDS, method
from torch import nn

from distill.lora import LoRA
from distill.methods.score_distillation import ScoreDistillation
from distill.types import Batch


class Phases(Callback):
    """For each turn: modes and ``requires_grad`` of every network when the losses are asked for, gradients before the step."""

    def __init__(self, watched: ScoreDistillation):
        self.parts: dict[str, nn.Module] = {
            "student": watched.student,
            "critic": watched.critic,
            "ema": watched.ema.module,
            "teacher": watched.teacher,
        }
        self.modes: list[dict[str, set[bool]]] = []
        self.trained: list[set[int]] = []
        self.gradients: list[set[int]] = []
        for name in ("losses", "critic_losses"):
            setattr(watched, name, partial(self.spy, getattr(watched, name)))

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.parts.values() for parameter in part.parameters()]

    def spy(self, losses: Any, batch: Batch) -> Any:
        self.modes.append({name: {module.training for module in part.modules()} for name, part in self.parts.items()})
        self.trained.append({id(parameter) for parameter in self.parameters() if parameter.requires_grad})
        return losses(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({id(parameter) for parameter in self.parameters() if parameter.grad is not None})


@pytest.mark.parametrize(
    ("kind", "fake_lora", "lora"),
    [("sid", None, None), ("sim", None, None), ("dmd2", None, None), ("dmd2", LoRA(2), None), ("sid", LoRA(2), LoRA(2))],
    ids=["sid", "sim", "dmd2", "dmd2, fake score by LoRA", "sid, both by LoRA"],
)
def test_each_turn_moves_its_own_player_and_nothing_else(kind: str, fake_lora: LoRA | None, lora: LoRA | None):
    """Fake score twice, generator once, twice over, with a validation after each turn."""
    trained, watch = method(kind, fake={"lora": fake_lora, "steps": 2}, lora=lora), Watch()
    before = {name: value.clone() for name, value in trained.teacher.state_dict().items()}
    own = {
        name: {id(parameter) for parameter in part.parameters() if parameter.requires_grad}
        for name, part in (("student", trained.student), ("critic", trained.critic))
    }
    assert own["student"] and own["critic"] and not own["student"] & own["critic"]
    phases = Phases(trained)
    ready = fit(trained, BATCHES, 6, phases, watch, limit_val_batches=1, val_check_interval=1)
    turns = ["critic", "critic", "student"] * 2
    assert phases.modes == [
        {"student": {turn == "student"}, "critic": {turn == "critic"}, "ema": {False}, "teacher": {False}} for turn in turns
    ]
    assert phases.trained == [own[turn] for turn in turns]
    # Inputs of layers that nothing is asked of have no gradient; nothing else may have one.
    assert all(found and found <= own[turn] for found, turn in zip(phases.gradients, turns, strict=True))
    for part in ("student", "ema", "optimizer.0"):
        assert [watch.moved(number, part) for number in range(6)] == [turn == "student" for turn in turns], part
    for part in ("critic.score", *(["critic.head"] if kind == "dmd2" else []), "optimizer.1"):
        assert [watch.moved(number, part) for number in range(6)] == [turn == "critic" for turn in turns], part
    assert same(before, dict(trained.teacher.state_dict()))
    assert all(parameter.grad is None for parameter in phases.parameters())
    held = [{id(p) for group in each.param_groups for p in group["params"]} for each in ready.optimizers]
    assert held == [own["student"], own["critic"]]


def test_layers_of_both_players_stand_on_the_teachers_own_weights():
    """One network's memory, and checkpoints without it, that load strictly."""
    settings: dict[str, Any] = {"fake": {"lora": LoRA(2)}, "lora": LoRA(2)}
    trained = method("dmd2", **settings)
    places = {value.data_ptr() for value in trained.teacher.parameters()}
    for denoiser in (trained.student, trained.fake, trained.ema.module):
        plain = [value for name, value in denoiser.named_parameters() if "lora_" not in name]
        assert {value.data_ptr() for value in plain} == places
    fit(trained, BATCHES, 4)
    state = trained.state_dict()
    assert all("lora_" in name or name.startswith(("critic.head.", "skipped.")) for name in state), list(state)
    assert {name.split(".network.")[0] for name in state if "lora_" in name} == {"student", "ema.module", "critic.score"}
    again = method("dmd2", **settings)
    again.load_state_dict(copy.deepcopy(state))
    assert same(dict(again.state_dict()), dict(state))
    lost = next(name for name in state if name.startswith("critic.score"))
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({name: value for name, value in state.items() if name != lost})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        again.load_state_dict({**state, "critic.score.else": torch.zeros(1)})


def test_copies_share_no_memory_with_the_teacher_or_each_other():
    parts = (lambda m: m.teacher, lambda m: m.student, lambda m: m.fake, lambda m: m.ema.module)
    trained = method("dmd2")
    places = [{value.data_ptr() for value in part(trained).parameters()} for part in parts]
    assert len(set.union(*places)) == sum(map(len, places))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fake_scores_loss_has_no_gradient_in_the_generator(kind: str):
    """Whoever's turn it is: the generator's samples are data to the fake score."""
    trained = method(kind)
    trained.critic_losses(BATCHES[0])["loss"].backward()
    assert all(parameter.grad is None for parameter in trained.student.parameters())
    assert all(parameter.grad is None for parameter in trained.teacher.parameters())
    assert any(parameter.grad is not None for parameter in trained.fake.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_generators_loss_has_no_gradient_in_the_two_scores(kind: str):
    trained = method(kind, guidance=CFG)
    trained.losses(BATCHES[0])["loss"].backward()
    assert all(parameter.grad is None for parameter in (*trained.fake.parameters(), *trained.teacher.parameters()))
    assert any(parameter.grad is not None for parameter in trained.student.parameters())


def test_a_run_can_be_begun_again_after_one_that_failed():
    class Fails(Callback):
        def on_train_batch_end(self, *others: Any) -> None:
            raise RuntimeError("failed")

    trained = method()
    with pytest.raises(RuntimeError, match="failed"):
        fit(trained, BATCHES, 2, Fails())
    before = {name: value.clone() for name, value in trained.named_parameters()}
    assert fit(trained, BATCHES, 2).global_step == 2
    moved = {name.split(".")[0] for name, value in trained.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"student", "critic", "ema"}
