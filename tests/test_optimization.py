"""Clipping, accumulation, learning-rate factors and what a loss or gradient that is not finite does, in real training loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    Data,
    FixedTimes,
    Trapped,
    Watch,
    batch_of,
    closest,
    evaluation,
    everything,
    fit,
    game,
    joined,
    of_part,
    same,
    small,
    trainer,
)
from pytorch_lightning import Callback
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from distill.methods.base import Method
from distill.methods.denoising import DenoisingTraining
from distill.optimization import LearningRate, Optimization, SkippedSteps
from distill.types import Batch


class Spy(torch.optim.SGD):
    """Plain gradient descent that writes down its learning rate and the norm of the gradient it is given."""

    def __init__(self, parameters: Any, seen: list[tuple[float, float]], lr: float = 0.1):
        super().__init__(parameters, lr=lr)
        self.seen = seen

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.cat(gradients).norm()) if gradients else 0.0
        self.seen.append((self.param_groups[0]["lr"], norm))
        return super().step(closure)


def denoising(**settings: Any) -> DenoisingTraining:
    """Flow matching at one time: with batches that carry their noise it draws nothing."""
    return DenoisingTraining(small(), FixedTimes(), Optimization(**settings), evaluation(), null_probability=0.0)


def builders() -> Any:
    return pytest.mark.parametrize("build", [denoising, game], ids=["one player", "two players"])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# ------------------------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    "settings, values",
    [
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 100: 1.0}),
        ({"decay": "linear", "total_steps": 10}, {0: 1.0, 5: 0.5, 9: 0.1, 10: 0.0, 20: 0.0}),
        ({"decay": "linear", "total_steps": 12, "warmup_steps": 2, "end": 0.2}, {0: 0.5, 2: 1.0, 7: 0.6, 12: 0.2}),
        ({"decay": "cosine", "total_steps": 8}, {0: 1.0, 2: 0.8535533905932737, 4: 0.5, 6: 0.14644660940672624, 8: 0.0}),
        ({"decay": "inverse_sqrt", "reference_steps": 4}, {0: 1.0, 4: 1.0, 16: 0.5, 36: 1 / 3}),
    ],
)
def test_learning_rate_factor(settings, values):
    rate = LearningRate(**settings)
    assert {step: rate.factor(step) for step in values} == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"decay": "linear", "total_steps": 5, "warmup_steps": 5}, "total_steps=5"),
    ],
)
def test_learning_rate_refuses_nonsense(settings, words):
    with pytest.raises(ValueError, match=words):
        LearningRate(**settings)


@pytest.mark.parametrize("settings", [{"accumulate_batches": 0}, {"gradient_clip_norm": 0.0}, {"max_skipped": 0}])
def test_optimization_refuses_nonsense(settings):
    with pytest.raises(ValueError, match="=".join(str(word) for word in next(iter(settings.items())))):
        Optimization(**settings)


def test_learning_rate_reaches_the_optimiser_at_each_step():
    seen: list[tuple[float, float]] = []
    rate = LearningRate(warmup_steps=2, decay="linear", total_steps=6)
    fit(denoising(optimizer=lambda p: Spy(p, seen), learning_rate=rate), [batch_of(0)], 6)
    assert [lr for lr, _ in seen] == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])


def test_learning_rate_of_each_player_follows_its_own_steps():
    seen: list[tuple[float, float]] = []
    fit(game(optimizer=lambda p: Spy(p, seen), learning_rate=LearningRate(warmup_steps=4)), [batch_of(0)], 6)
    assert [lr for lr, _ in seen] == pytest.approx([0.025, 0.025, 0.05, 0.05, 0.075, 0.075])


# ----------------------------------------------------------------------------------------------- clipping, accumulation


@builders()
def test_optimiser_sees_a_clipped_gradient(build):
    """The first step of each player is from the same weights, so clipping must scale it and leave its direction."""
    free: list[tuple[float, float]] = []
    clipped: list[tuple[float, float]] = []
    steps = 1 if build is denoising else 2
    fit(build(optimizer=lambda p: Spy(p, free, lr=1e-9), gradient_clip_norm=None), [batch_of(0)], steps)
    bound = 0.5 * min(norm for _, norm in free)
    fit(build(optimizer=lambda p: Spy(p, clipped, lr=1e-9), gradient_clip_norm=bound), [batch_of(0)], steps)
    assert len(free) == len(clipped) == steps and bound > 0
    assert all(norm == pytest.approx(bound, rel=1e-4) for _, norm in clipped)


def test_a_small_gradient_is_not_clipped():
    norms = []
    for bound in (None, 1e6):
        seen: list[tuple[float, float]] = []
        fit(denoising(optimizer=lambda p: Spy(p, seen), gradient_clip_norm=bound), [batch_of(0)], 3)
        norms.append([norm for _, norm in seen])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@builders()
def test_two_accumulated_batches_equal_one_of_both(build):
    """Both players have turns; clipping acts on the whole gradient."""
    halves = [batch_of(number) for number in range(8)]
    wholes = [joined(first, second) for first, second in zip(halves[::2], halves[1::2])]
    settings = {"optimizer": sgd, "gradient_clip_norm": 0.3}
    parts, whole = build(accumulate_batches=2, **settings), build(**settings)
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    assert fit(parts, halves, 4).global_step == fit(whole, wholes, 4).global_step == 4
    assert closest(parts.state_dict(), whole.state_dict()) < 1e-6
    assert closest(before, whole.state_dict()) > 1e-2


def test_accumulation_averages_by_images_of_the_whole_step():
    """A half-life average counts the images of all parts of a step."""
    counted = []

    class Counting(DenoisingTraining):
        def after_student_step(self, step: int, images: int, skipped: Tensor) -> None:
            counted.append((step, images))
            super().after_student_step(step, images, skipped)

    method = Counting(small(), FixedTimes(), Optimization(accumulate_batches=3), evaluation())
    fit(method, [batch_of(0)], 2)
    assert counted == [(0, 24), (1, 24)]


@pytest.mark.parametrize("flag", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_the_trainers_own_flags_are_refused(flag):
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        trainer(1, **flag).fit(denoising(), datamodule=Data([batch_of(0)]))


# ---------------------------------------------------------------------------------------------------------- not finite


def traps(*kinds: int) -> list[Batch]:
    batches = [batch_of(number) for number in range(len(kinds))]
    for batch, kind in zip(batches, kinds):
        batch.cond["trap"] = batch.null["trap"] = torch.full((len(batch),), kind)
    return batches


def trapped(**settings: Any) -> Trapped:
    return Trapped(small(), FixedTimes(), Optimization(**settings), evaluation())


def fused_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)


def plain_radam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.RAdam(parameters, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("kind", [1, 2], ids=["loss", "gradient"])
@pytest.mark.parametrize("optimizer", [fused_adam, plain_radam])
def test_a_bad_step_changes_nothing_but_the_count(optimizer, kind, clip):
    watch = Watch()
    ready = fit(trapped(optimizer=optimizer, gradient_clip_norm=clip), traps(0, 0, kind, 0), 4, watch)
    for part in ("student", "ema", "optimizer"):
        assert [watch.moved(batch, part) for batch in range(4)] == [True, True, False, True], part
    assert [int(state["skipped.total"]) for state in watch.states] == [0, 0, 0, 1, 1]
    assert ready.global_step == 4
    assert all(value.isfinite().all() for value in watch.states[-1].values())


@pytest.mark.parametrize("optimizer", [fused_adam, plain_radam])
def test_a_skipped_step_leaves_no_trace_in_the_next(optimizer):
    """A run with a bad batch ends in the bits of a run that never saw it (the average has no warm-up that counts steps)."""
    runs = []
    for kinds in ((0, 1, 0), (0, 0)):
        batches = traps(*kinds)
        batches[-1] = traps(0, 0, 0)[2]
        method = trapped(optimizer=optimizer)
        ready = fit(method, batches, len(kinds))
        runs.append(everything(ready, method))
    for part in ("student", "optimizer"):
        assert same(of_part(runs[0], part), of_part(runs[1], part))


@pytest.mark.parametrize("place", [0, 1])
def test_one_bad_part_spoils_an_accumulated_step(place):
    watch = Watch()
    kinds = [0, 0, 0, 0, 0, 0]
    kinds[2 + place] = 1
    fit(trapped(optimizer=fused_adam, accumulate_batches=2), traps(*kinds), 3, watch)
    assert [watch.moved(batch, "student") for batch in range(6)] == [False, True, False, False, False, True]
    assert int(watch.states[-1]["skipped.total"]) == 1


def test_the_run_ends_after_so_many_bad_steps_in_a_row():
    watch = Watch()
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .*max_skipped=3"):
        fit(trapped(max_skipped=3), traps(0, 1, 1, 0, 1, 1, 2, 0), 8, watch)
    assert len(watch.states) == 7, "the seventh batch is the third bad one in a row"


def test_a_good_step_starts_the_count_anew():
    method = trapped(max_skipped=2)
    ready = fit(method, traps(1, 0, 1, 0, 2, 0), 6)
    assert ready.global_step == 6 and int(method.skipped.total) == 3 and int(method.skipped.in_a_row) == 0


def test_a_bad_step_of_one_player_is_not_the_others():
    class TrappedGame(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Method, batch: Batch, batch_idx: int) -> None:
            batch.noise = batch.noise * (float("nan") if batch_idx == 2 else 1.0)  # type: ignore[operator]

    watch = Watch()
    fit(game(optimizer=fused_adam), [batch_of(number) for number in range(4)], 4, watch, TrappedGame())
    assert [watch.moved(batch, "critic") for batch in range(4)] == [True, False, False, False]
    assert [watch.moved(batch, "student") for batch in range(4)] == [False, True, False, True]
    assert [watch.moved(batch, "ema") for batch in range(4)] == [False, True, False, True]


def test_skipped_steps_counts():
    skipped = SkippedSteps(3)
    for bad in (True, True, False, True):
        skipped.count(torch.tensor(bad))
    assert int(skipped.total) == 3 and int(skipped.in_a_row) == 1


def test_a_decay_without_an_end_of_its_own_ends_with_the_run():
    rate = LearningRate(warmup_steps=2, decay="linear")
    assert [rate.factor(step, 12) for step in (0, 1, 2, 7, 12)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert rate.factor(7, 22) == 0.75
    with pytest.raises(ValueError, match="total_steps=null.*trainer.max_steps"):
        rate.factor(7, -1)
