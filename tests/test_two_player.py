"""Turns of a student and its critic: who is trained when, whose steps are counted, and what is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FixedTimes, Game, Watch, batch_of, fit, game, same, small, two_classes
from pytorch_lightning import Callback
from torch import nn

from distill.lora import LoRA, start_student
from distill.methods.players import Player
from distill.networks.unet2d import UNet2D
from distill.optimization import LearningRate, Optimization, PlayerOptimization

BATCHES = [batch_of(number) for number in range(9)]


def playing(student: Any = None, critic: Any = None, **settings: Any) -> Game:
    """A `Game` whose networks drop out, so that their mode shows."""
    defaults: dict[str, Any] = {"optimization": Optimization(), "critic_optimization": PlayerOptimization()}
    return Game(
        student or small(seed=1, num_classes=2, dropout=0.2),
        two_classes(),
        critic or small(seed=2, num_classes=2, dropout=0.2),
        FixedTimes(),
        **{**defaults, **settings},
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# ------------------------------------------------------------------------------------------------------------ the order

ORDERS = {
    (1, 0): "cscscscsc",
    (2, 0): "ccsccsccs",
    (1, 3): "ccccscscs",
    (3, 2): "cccccsccc",
    (1, 9): "ccccccccc",
}
"""Whose turn it is, by ``(critic_steps, critic_warmup)``: the critic's or the student's."""


@pytest.mark.parametrize(("steps", "warmup"), ORDERS)
def test_the_critic_warms_up_alone_and_then_they_take_turns(steps: int, warmup: int):
    method, order, watch = playing(critic_steps=steps, critic_warmup=warmup), ORDERS[steps, warmup], Watch()
    assert "".join("sc"[method.turn(step)] for step in range(9)) == order
    fit(method, BATCHES, 9, watch)
    parts = {"s": "student", "c": "critic"}
    for player, part in parts.items():
        assert [watch.moved(batch, part) for batch in range(9)] == [turn == player for turn in order], part
    assert [watch.moved(batch, "ema") for batch in range(9)] == [turn == "s" for turn in order]


@pytest.mark.parametrize(("steps", "warmup"), ORDERS)
def test_each_player_counts_its_own_turns(steps: int, warmup: int):
    """``player_step(index, step)`` is the number of that player's turns before ``step``, in the warm-up and after it."""
    method = playing(critic_steps=steps, critic_warmup=warmup)
    turns = [method.turn(step) for step in range(40)]
    for step in range(40):
        assert [method.player_step(index, step) for index in (0, 1)] == [turns[:step].count(index) for index in (0, 1)]


def test_learning_rates_follow_each_players_own_steps():
    """Linear to zero over the run's 9 steps, of which the student has 3 and the critic 6: each starts at its whole rate."""

    class Rates(Callback):
        seen: list[list[float]] = [[], []]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *others: Any) -> None:
            index = pl_module.turn(pl_module.batches_seen - 1)
            self.seen[index].append(trainer.optimizers[index].param_groups[0]["lr"])

    falling = {"optimizer": sgd, "learning_rate": LearningRate(decay="linear")}
    method = playing(
        optimization=Optimization(**falling), critic_optimization=PlayerOptimization(**falling), critic_warmup=3
    )
    fit(method, BATCHES, 9, Rates())
    for index, count in enumerate((3, 6)):
        assert Rates.seen[index] == pytest.approx([0.1 * (1 - step / count) for step in range(count)])


# ----------------------------------------------------------------------------------------------------- what a turn does


def test_only_the_player_whose_turn_it_is_trains():
    """Mode of every module and gradient of every parameter, at the moment of the losses and just before the step."""
    method, modes, gradients = playing(), [], []

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients.append({name.split(".")[0] for name, p in pl_module.named_parameters() if p.grad is not None})

    def spied(losses: Any) -> Any:
        def spy(batch: Any) -> Any:
            parts = {"student": method.student, "critic": method.critic, "ema": method.ema.module, "teacher": method.teacher}
            modes.append(
                {
                    name: (
                        {module.training for module in part.modules()},
                        {parameter.requires_grad for parameter in part.parameters()},
                    )
                    for name, part in parts.items()
                }
            )
            return losses(batch)

        return spy

    method.losses, method.critic_losses = spied(method.losses), spied(method.critic_losses)  # type: ignore[method-assign]
    fit(method, BATCHES, 4, Gradients(), limit_val_batches=1, val_check_interval=1)
    for batch, player in enumerate(["critic", "student", "critic", "student"]):
        found = modes[batch]
        assert gradients[batch] == {player}
        for name in ("student", "critic"):
            assert found[name] == ({name == player}, {name == player}), (batch, name)
        assert found["ema"] == ({False}, {False}) and found["teacher"] == ({False}, set())
    assert all(parameter.grad is None for parameter in method.parameters())
    assert all(part.training and all(p.requires_grad for p in part.parameters()) for part in (method.student, method.critic))


def test_frozen_parameters_of_a_player_stay_frozen_in_its_turns():
    """What was frozen when the run began has no optimiser, no gradient, and is not thawed by a turn."""
    method, watch = playing(), Watch()
    frozen = method.critic.network.first  # type: ignore[union-attr]
    frozen.requires_grad_(False)
    before = [parameter.clone() for parameter in frozen.parameters()]
    ready = fit(method, BATCHES, 4, watch)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.parameters())) and watch.moved(0, "critic")
    held = {id(p) for group in ready.optimizers[1].param_groups for p in group["params"]}
    assert held == {id(p) for p in method.critic.parameters()} - {id(p) for p in frozen.parameters()}
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_gradients_that_are_accumulated_stay_those_of_one_player():
    """Three batches make one turn; the average follows the student's turns alone."""
    settings = {"optimizer": sgd, "gradient_clip_norm": None}
    method, watch = playing(optimization=Optimization(accumulate_batches=3, **settings)), Watch()
    fit(method, BATCHES, 3, watch)
    moved = {part: [watch.moved(batch, part) for batch in range(9)] for part in ("student", "critic")}
    assert moved == {"critic": [False, False, True, False, False, False, False, False, True],
                     "student": [False, False, False, False, False, True, False, False, False]}  # fmt: skip


# -------------------------------------------------------------------------------------------- what is trained is asserted


class Meddling(Game):
    """Before the turn of each player, something has changed what requires gradients."""

    meddle: Any = staticmethod(lambda method: None)

    def critic_losses(self, batch: Any) -> Any:
        losses = super().critic_losses(batch)
        self.meddle(self)
        return losses


def thaw_teacher(method: Any) -> None:
    method.teacher.scale = nn.Parameter(torch.ones(()))


def thaw_average(method: Any) -> None:
    next(method.ema.parameters()).requires_grad_(True)


def add_a_weight(method: Any) -> None:
    method.balance = nn.Parameter(torch.ones(()))


def freeze_student(method: Any) -> None:
    """Past the player, which thaws its own."""
    first = method._players[0]
    first.take_turn = lambda own: None


@pytest.mark.parametrize(
    ("meddle", "words"),
    [
        (thaw_teacher, "in the turn of the student, _teacher.scale requires gradients, and is not its own"),
        (thaw_average, "in the turn of the student, ema.module.network.* requires gradients, and is not its own"),
        (add_a_weight, "in the turn of the student, balance requires gradients, and is not its own"),
        (freeze_student, "in the turn of the student, student.network.* is its own, and requires none"),
    ],
)
def test_a_wrong_set_of_trained_parameters_ends_the_run_at_the_next_turn(meddle: Any, words: str):
    method = Meddling(
        small(seed=1, num_classes=2), two_classes(), small(seed=2, num_classes=2), FixedTimes(),
        optimization=Optimization(), critic_optimization=PlayerOptimization(),
    )  # fmt: skip
    method.meddle = meddle
    with pytest.raises(RuntimeError, match=words):
        fit(method, BATCHES, 4)
    assert method.batches_seen == 1


def test_what_no_player_trains_may_not_require_gradients_in_the_first_turn():
    method = playing()
    method.ema.requires_grad_(True)
    with pytest.raises(RuntimeError, match="in the turn of the critic, ema.module.*: a loss or a callback has changed"):
        fit(method, BATCHES, 1)


# ----------------------------------------------------------------------------------------------------- what is refused


class Fixed(nn.Module):
    """A critic without anything to train."""


def test_a_player_without_trained_parameters_is_refused():
    with pytest.raises(ValueError, match=r"the critic has no parameter that is trained: give one that has \(lora, or a copy\)"):
        fit(playing(critic=Fixed()), BATCHES, 1)
    with pytest.raises(ValueError, match="the student has no parameter that is trained"):
        fit(playing(student=two_classes()), BATCHES, 1)


def test_two_players_with_the_same_parameters_are_refused():
    one = small(num_classes=2)
    with pytest.raises(ValueError, match="the student and the critic train the same parameters: give each its own copy"):
        fit(playing(one, nn.ModuleDict({"of": one})), BATCHES, 1)


def test_two_players_may_stand_on_the_same_frozen_weights():
    """LoRA layers of both on one teacher: what they share is trained by neither."""
    from distill.denoiser import NetworkDenoiser
    from distill.schedules import RectifiedFlow

    base = NetworkDenoiser(UNet2D(1, 4, 2, (8, 8), 1, heads_width=8, groups=4), RectifiedFlow())
    first, second = (start_student(base, LoRA(2)) for _ in range(2))
    players = [Player(name, lambda batch: {}, part, PlayerOptimization()) for name, part in (("a", first), ("b", second))]
    shared = {id(parameter) for parameter in base.parameters()}
    assert all(not shared & {id(parameter) for parameter in player.parameters} for player in players)
    for own in (False, True):
        players[0].take_turn(own), players[1].take_turn(not own)
        assert not any(parameter.requires_grad for parameter in base.parameters())
        assert all(parameter.requires_grad is own for parameter in players[0].parameters)
        assert all(parameter.requires_grad is not own for parameter in players[1].parameters)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"critic_steps": 0}, "critic_steps=0: give at least 1"),
        ({"critic_warmup": -1}, "critic_warmup=-1: give 0 or more"),
        (
            {"optimization": Optimization(gradient_checkpointing=True)},
            "optimization.gradient_checkpointing=true: only networks of diffusers can; set it to false",
        ),
        (
            {"critic_optimization": PlayerOptimization(gradient_checkpointing=True)},
            "critic_optimization.gradient_checkpointing=true: only networks of diffusers can; set it to false",
        ),
    ],
)
def test_bad_settings_are_named(settings: Any, words: str):
    with pytest.raises(ValueError, match=words):
        playing(**settings)


def test_a_second_run_of_the_same_method_trains_both_players():
    """After a run all is as before its first turn."""
    method = game()
    fit(method, BATCHES, 3)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    fit(method, BATCHES, 6)
    after = dict(method.state_dict())
    for part in ("student.", "critic."):
        first, second = ({key: value for key, value in state.items() if key.startswith(part)} for state in (before, after))
        assert not same(first, second)
