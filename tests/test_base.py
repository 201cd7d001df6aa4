"""The training loop that methods share: who moves, what a step is, draws, checkpoints and samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    SHAPE,
    Data,
    Watch,
    batch_of,
    energy_distance,
    evaluation,
    everything,
    fit,
    game,
    of_part,
    same,
    small,
    trainer,
    two_classes,
)
from pytorch_lightning import Callback, Trainer
from torch import Tensor
from torchmetrics import Metric

from distill.boundary import ScaledBoundary
from distill.denoiser import Denoiser
from distill.distances import SquaredDistance
from distill.ema import DecayAveraging
from distill.evaluation import Evaluation
from distill.frozen import trainable_copy
from distill.grids import ConstantPoints, UniformGrid
from distill.guidance import Autoguidance, ClassifierFreeGuidance, GuidanceRule
from distill.methods.base import Method
from distill.methods.consistency import Consistency
from distill.noise import SeededNoise
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.solvers import DDIM
from distill.times import UniformTimes
from distill.types import Cond, DataSpec, label_conditions


def distillation(
    teacher: Denoiser | None = None, guidance: GuidanceRule | None = None, **settings: Any
) -> Consistency:
    """Consistency distillation with every part that has a state: a teacher with weights, dropout, a target average."""
    return Consistency(
        GridPairs(UniformGrid(), ConstantPoints(8)),
        SquaredDistance(),
        Optimization(averaging=DecayAveraging(0.9), **settings),
        evaluation(steps=[1, 2]),
        student=small(num_classes=2, dropout=0.2),
        teacher=teacher or small(seed=7, num_classes=2),
        solver=DDIM(),
        target=DecayAveraging(0.5),
        guidance=guidance or ClassifierFreeGuidance(1.5),
    )


def loose(numbers: int = 5) -> list[Any]:
    """Batches whose noise the method draws."""
    return [batch_of(number, tied=False) for number in range(numbers)]


def conditions(count: int) -> tuple[Cond, Cond]:
    return label_conditions(torch.arange(count) % 2, 2)


# ------------------------------------------------------------------------------------------------------------ who moves


def test_teacher_never_moves_and_is_nowhere_to_be_seen():
    method, watch = distillation(), Watch()
    weights = dict(method.teacher.named_parameters())
    before = {key: value.detach().clone() for key, value in weights.items()}
    ready = fit(method, loose(), 5, watch)
    assert same(before, {key: value.detach() for key, value in method.teacher.named_parameters()})
    hidden = {id(value) for value in weights.values()}
    held = [p for optimizer in ready.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert held and not hidden & {id(p) for p in [*method.parameters(), *held]}
    assert not any("teacher" in key for key in method.state_dict())
    assert not any(p.requires_grad for p in weights.values()) and not method.teacher.training
    for part in ("student", "ema", "target", "optimizer"):
        assert all(watch.moved(batch, part) for batch in range(5)), part


@pytest.mark.parametrize("critic_steps", [1, 3])
def test_players_move_in_their_own_turns_alone(critic_steps):
    watch, batches = Watch(), 2 * critic_steps + 2
    ready = fit(game(critic_steps), [batch_of(number) for number in range(batches)], batches, watch)
    student = [turn % (critic_steps + 1) == critic_steps for turn in range(batches)]
    for part in ("student", "ema", "optimizer.0"):
        assert [watch.moved(batch, part) for batch in range(batches)] == student, part
    for part in ("critic", "optimizer.1"):
        assert [watch.moved(batch, part) for batch in range(batches)] == [not turn for turn in student], part
    assert ready.global_step == batches


def test_only_the_player_whose_turn_it_is_requires_gradients():
    class Asks(Callback):
        seen: list[tuple[bool, bool]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *others: Any) -> None:
            self.seen.append(tuple(next(player.parameters()).requires_grad for player in (pl_module.student, pl_module.critic)))

    fit(game(2), [batch_of(0)], 4, Asks())
    assert Asks.seen == [(False, True), (False, True), (True, False), (False, True)]


def test_the_average_of_two_players_counts_the_students_steps():
    """With the student's k-th step the warm-up decay is ``(1 + k) / (10 + k)``, whatever turns the critic had between."""
    watch = Watch()
    fit(game(2), [batch_of(0)], 6, watch)
    for step, turn in enumerate((2, 5)):
        before, after = watch.states[turn], watch.states[turn + 1]
        for key in of_part(before, "ema"):
            student = after[key.replace("ema.module", "student")]
            expected = student + (1 + step) / (10 + step) * (before[key] - student)
            assert torch.allclose(after[key], expected, rtol=0, atol=1e-6)


def test_two_players_reach_the_data_law():
    """The generator's samples come to the data: the alternation plays an honest game."""
    settings = {"optimizer": lambda p: torch.optim.Adam(p, lr=5e-3, fused=True), "averaging": DecayAveraging(0.95)}
    method, data = game(2, UniformTimes(0.02, 0.98), **settings), two_classes().data(torch.arange(2000) % 2).float()
    cond, null = conditions(2000)
    before = energy_distance(method.draw(1, range(2000), cond, null, source="student"), data)
    fit(method, [batch_of(number, 128) for number in range(100)], 400)
    after = energy_distance(method.draw(1, range(2000), cond, null), data)
    print(f"two players: energy distance {before:.4f} -> {after:.4f}")
    assert after < before / 8


# --------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("build", [distillation, game], ids=["one player", "two players"])
def test_global_step_counts_batches(build, accumulate):
    """12 batches in one epoch; and ``max_steps`` stops at exactly that step."""
    method = build(accumulate_batches=accumulate)
    ready = trainer(-1, max_epochs=1)
    ready.fit(method, datamodule=Data([batch_of(number) for number in range(12)]))
    assert ready.global_step == 12 // accumulate and method.batches_seen == 12
    shorter = build(accumulate_batches=accumulate)
    assert fit(shorter, loose(4) if build is distillation else [batch_of(0)], 3).global_step == 3
    assert shorter.batches_seen == 3 * accumulate


def test_critic_steps_are_checked():
    with pytest.raises(ValueError, match="critic_steps=0"):
        game(0)


# --------------------------------------------------------------------------------------------------------------- draws


def draws(method: Method, stream: str = "") -> list[float]:
    method.seed_draws(stream)
    return torch.randn(3).tolist()


def test_draws_depend_on_seed_batch_rank_and_stream(monkeypatch):
    method = distillation()
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    first = draws(method)
    torch.manual_seed(99)
    assert draws(method) == first
    others = [draws(method, "network")]
    monkeypatch.setattr(Method, "global_rank", 1)
    others.append(draws(method))
    monkeypatch.setattr(Method, "global_rank", 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    others.append(draws(method))
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    method.batches_seen = 1
    others.append(draws(method))
    method.batches_seen = 0
    assert draws(method) == first and len({tuple(each) for each in [first, *others]}) == 5


def test_a_batch_can_be_replayed_alone():
    """The weights before a batch and its number give its loss: times, noise, dropout and guidance come out the same."""

    class Losses(Callback):
        values: list[Tensor] = []
        states: list[dict[str, Tensor]] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Method, batch: Any, batch_idx: int) -> None:
            self.states.append({key: value.clone() for key, value in pl_module.state_dict().items()})

        def on_train_batch_end(self, trainer: Any, pl_module: Method, *others: Any) -> None:
            self.values.append(trainer.callback_metrics["train/student/loss"].clone())

    fit(distillation(), loose(), 5, Losses())
    alone = distillation()
    alone.load_state_dict(Losses.states[3])
    for number in (3, 2):
        alone.batches_seen = number
        alone.seed_draws()
        assert torch.equal(alone.losses(loose()[3])["loss"].detach(), Losses.values[3]) is (number == 3)


def test_runs_of_one_seed_are_equal_and_of_another_are_not(monkeypatch):
    ends = []
    for seed in ("0", "0", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        method = distillation()
        torch.manual_seed(len(ends))
        fit(method, loose(), 4)
        ends.append(dict(method.state_dict()))
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


# -------------------------------------------------------------------------------------------------------------- resume


class SaveAfter(Callback):
    """Saves a checkpoint after so many batches."""

    def __init__(self, batches: int, path: Any):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Any, pl_module: Method, *others: Any) -> None:
        if pl_module.batches_seen == self.batches:
            trainer.save_checkpoint(self.path)


def spoilt(batches: list[Any]) -> list[Any]:
    """The same with a NaN in the second."""
    batches[1].x0[0] = float("nan")
    if batches[1].noise is not None:
        batches[1].noise[0] = float("nan")
    return batches


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RAdam])
@pytest.mark.parametrize(
    "build, batches, cut",
    [(distillation, loose(7), 4), (game, [batch_of(i) for i in range(7)], 3), (game, [batch_of(i) for i in range(7)], 4)],
    ids=["one player", "two players, after the critic", "two players, after the student"],
)
def test_resumed_run_ends_in_the_same_bits(tmp_path, build, batches, cut, optimizer):
    """The first epoch of 7 batches is cut; one batch before the cut is bad, so that the count of skipped steps is not zero."""
    settings = {"optimizer": lambda p: optimizer(p, lr=1e-2, fused=True) if optimizer is torch.optim.Adam else optimizer(p)}
    path, whole = tmp_path / "cut.ckpt", build(**settings)
    ended = everything(fit(whole, spoilt(batches), 10, SaveAfter(cut, path)), whole)
    resumed = build(**settings)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1.0)
    again = fit(resumed, batches, 10, ckpt_path=path)
    assert same(ended, everything(again, resumed))
    assert again.global_step == 10 and resumed.batches_seen == whole.batches_seen == 10
    assert int(ended["skipped.total"]) == 2, "one in each of the two epochs"
    assert not same(of_part(ended, "ema"), of_part(dict(build().state_dict()), "ema"))


def identified(digest: str) -> Denoiser:
    teacher = small(seed=7, num_classes=2)
    teacher.identity = {"path": "somewhere", "sha256": digest}
    return teacher


def test_checkpoint_of_another_teacher_is_refused(tmp_path):
    path = tmp_path / "cut.ckpt"
    fit(distillation(identified("aa")), loose(), 2, SaveAfter(2, path))
    kept = torch.load(path, weights_only=True)
    assert kept["distill"] == {
        "batches_seen": 2,
        "teacher": {"path": "somewhere", "sha256": "aa"},
        "space": {"codec": None, "conditioner": None},
        "guidance": {},
    }
    for other in (identified("bb"), small(num_classes=2)):
        with pytest.raises(ValueError, match=r"trained with the teacher .*'aa'.*model.teacher"):
            fit(distillation(other), loose(), 4, ckpt_path=path)
    assert fit(distillation(identified("aa")), loose(), 4, ckpt_path=path).global_step == 4


def test_checkpoint_of_another_guide_is_refused(tmp_path):
    """A rule's further network is kept by path and hash as the teacher is; without a rule that has one nothing is."""
    path, old = tmp_path / "cut.ckpt", tmp_path / "old.ckpt"

    def guided_by(digest: str) -> Consistency:
        return distillation(identified("aa"), Autoguidance(identified(digest), 2.0))

    fit(guided_by("cc"), loose(), 2, SaveAfter(2, path))
    assert torch.load(path, weights_only=True)["distill"]["guidance"] == {"guide": {"path": "somewhere", "sha256": "cc"}}
    for other in (guided_by("dd"), distillation(identified("aa"))):
        with pytest.raises(ValueError, match=r"trained with the guidance.guide .*'cc'.*but model.guidance.guide is"):
            fit(other, loose(), 4, ckpt_path=path)
    assert fit(guided_by("cc"), loose(), 4, ckpt_path=path).global_step == 4
    # As they were written before rules had networks.
    fit(distillation(identified("aa")), loose(), 2, SaveAfter(2, old))
    kept = torch.load(old, weights_only=True)
    del kept["distill"]["guidance"]
    torch.save(kept, old)
    assert fit(distillation(identified("aa")), loose(), 4, ckpt_path=old).global_step == 4
    with pytest.raises(ValueError, match=r"trained with the guidance.guide None, but model.guidance.guide is .*'cc'"):
        fit(guided_by("cc"), loose(), 4, ckpt_path=old)


@pytest.mark.parametrize("part", ["ema", "target", "skipped", "student"])
def test_checkpoint_without_a_part_is_refused(tmp_path, part):
    path = tmp_path / "cut.ckpt"
    fit(distillation(), loose(), 2, SaveAfter(2, path))
    kept = torch.load(path, weights_only=True)
    kept["state_dict"] = {key: value for key, value in kept["state_dict"].items() if not key.startswith(part + ".")}
    torch.save(kept, path)
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\).*\"{part}\."):
        fit(distillation(), loose(), 4, ckpt_path=path)


# ------------------------------------------------------------------------------------------------------------- samples


def different() -> Consistency:
    """A method whose student, average and teacher all differ."""
    method = distillation()
    with torch.no_grad():
        for parameter in method.ema.module.parameters():
            parameter.mul_(0.9)
    return method


@pytest.mark.parametrize("source", ["ema", "student", "teacher"])
@pytest.mark.parametrize("steps", [1, 3])
def test_samples_do_not_depend_on_the_batch(source, steps):
    method = different()
    cond, null = conditions(6)
    whole = method.draw(steps, range(6), cond, null, seed=5, source=source)
    for rows in ([0, 1], [4, 2, 3]):
        part = [{key: value[rows] for key, value in each.items()} for each in (cond, null)]
        assert torch.allclose(whole[rows], method.draw(steps, rows, *part, seed=5, source=source), rtol=0, atol=1e-6)
    assert not torch.allclose(whole, method.draw(steps, range(6), cond, null, seed=6, source=source), atol=1e-2)


def test_sources_are_the_networks_that_they_name():
    method = different()
    cond, null = conditions(4)
    noise = SeededNoise(0, range(4), SHAPE).draw()
    end = torch.ones(4)
    assert torch.equal(method.draw(1, range(4), cond, null), method.ema.module(noise, end, cond))
    assert torch.equal(method.draw(1, range(4), cond, null, source="student"), method.student.eval()(noise, end, cond))
    guided = ClassifierFreeGuidance(1.5)(method.teacher, null)
    assert torch.equal(method.draw(1, range(4), cond, null, source="teacher"), guided(noise, end, cond))
    assert method.draw(1, range(4), cond, null).requires_grad is False


@pytest.mark.parametrize("source", ["ema", "student", "teacher"])
def test_guidance_of_samples_can_be_set(source):
    method = different()
    cond, null = conditions(4)
    noise, end = SeededNoise(0, range(4), SHAPE).draw(), torch.ones(4)
    base = {"ema": method.ema.module, "student": method.student, "teacher": method.teacher}[source]
    for scale in (1.0, 3.0):
        with torch.no_grad():
            base.eval()
            expected = base(noise, end, null) + scale * (base(noise, end, cond) - base(noise, end, null))
        assert torch.allclose(method.draw(1, range(4), cond, null, source=source, guidance=scale), expected, atol=1e-5)


def test_the_boundary_is_part_of_what_is_sampled():
    plain, bounded = distillation(), distillation()
    bounded.boundary = ScaledBoundary(0.5, 1.0)
    cond, null = conditions(4)
    network, bound = (method.draw(1, range(4), cond, null) for method in (plain, bounded))
    noise = SeededNoise(0, range(4), SHAPE).draw()
    assert torch.allclose(bound, 0.25 / 1.25 * noise + 1.25**-0.5 * network, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_drawing_leaves_no_trace(training):
    method = distillation()
    method.student.train(training)
    modes = [module.training for module in method.modules()]
    torch.manual_seed(1)
    expected = torch.randn(1)
    torch.manual_seed(1)
    for source in ("student", "ema", "teacher"):
        method.draw(2, range(4), *conditions(4), source=source)
    assert torch.equal(torch.randn(1), expected), "the run's own draws go on undisturbed"
    assert [module.training for module in method.modules()] == modes


def test_what_cannot_be_drawn_is_said():
    pairs = GridPairs(UniformGrid(), ConstantPoints(8))
    alone = Consistency(pairs, SquaredDistance(), Optimization(), evaluation(), small(num_classes=2))
    with pytest.raises(ValueError, match="model.teacher"):
        alone.draw(1, range(2), *conditions(2), source="teacher")
    with pytest.raises(ValueError, match="source='techer'"):
        alone.draw(1, range(2), *conditions(2), source="techer")
    with pytest.raises(ValueError, match="steps=0"):
        alone.draw(0, range(2), *conditions(2))
    assert not alone.has_teacher and distillation().has_teacher
    alone.student.shape = None
    with pytest.raises(ValueError, match="check_data"):
        alone.draw(1, range(2), *conditions(2))


class Mean(Metric):
    """Mean of the samples, and of the data."""

    name = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.add_state("parts", [], dist_reduce_fx="cat")

    def update(self, samples: Tensor, real: Tensor, cond: Cond) -> None:
        self.parts.append(samples.mean() + real.mean())

    def compute(self) -> Tensor:
        return torch.stack(self.parts).mean()


def test_default_evaluation_works_in_plain_python():
    plain, method = Evaluation(), distillation()
    cond, null = conditions(4)
    expected = method.draw(2, range(4), cond, null)
    method.evaluation.sampler, method.evaluation.teacher_sampler = plain.sampler, plain.teacher_sampler
    assert torch.equal(method.draw(2, range(4), cond, null), expected)
    assert method.draw(2, range(4), cond, null, source="teacher").shape == expected.shape
    with pytest.raises(ValueError, match=r"steps=\[0\]"):
        Evaluation(steps=[0])


def test_validation_measures_numbered_samples_of_the_average():
    method, batches = different(), [batch_of(number) for number in range(3)]
    method.metrics = Consistency(
        GridPairs(UniformGrid(), ConstantPoints(8)), SquaredDistance(), Optimization(),
        evaluation(steps=[1, 2], metrics=[Mean()], seed=4), student=small(num_classes=2),
    ).metrics  # fmt: skip
    method.evaluation.seed = 4
    measured = trainer(1, limit_val_batches=1.0).validate(method, datamodule=Data(batches), verbose=False)[0]
    for steps in (1, 2):
        cond = {"labels": torch.cat([batch.cond["labels"] for batch in batches])}
        samples = method.draw(steps, range(24), cond, {"labels": torch.full((24,), 2)}, seed=4)
        expected = samples.mean() + torch.cat([batch.x0 for batch in batches]).mean()
        assert measured[f"val/mean/{steps}"] == pytest.approx(float(expected), abs=1e-5)
    assert measured["val/mean/1"] != pytest.approx(measured["val/mean/2"], abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ contracts


@pytest.mark.parametrize(
    "spec, words",
    [
        (DataSpec((3, 8, 8), 2), r"model.teacher works on samples of shape \(2, 1, 1\).*\(3, 8, 8\)"),
        (DataSpec(SHAPE, 5), "model.teacher has 2 classes, but data has 5"),
        (DataSpec(SHAPE, None), "model.teacher has 2 classes, but data has None"),
    ],
)
def test_data_that_does_not_fit_is_refused(spec, words):
    with pytest.raises(ValueError, match=words):
        distillation().check_data(spec)


def test_a_teacher_that_does_not_fit_is_refused():
    method = distillation(small(seed=7, num_classes=3))
    with pytest.raises(ValueError, match="model.teacher has 3 classes, but data has 2"):
        method.check_data(DataSpec(SHAPE, 2))
    distillation().check_data(DataSpec(SHAPE, 2))


def test_student_starts_as_a_trained_copy_of_its_teacher():
    teacher = small(seed=7, num_classes=2)
    teacher.requires_grad_(False).eval()
    copied = trainable_copy(teacher)
    assert copied.training and all(p.requires_grad for p in copied.parameters())
    assert same(dict(copied.state_dict()), dict(teacher.state_dict()))
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in teacher.parameters()}


def test_a_checkpoint_within_an_accumulated_step_is_refused(tmp_path):
    class Save(Callback):
        outcomes: list[str] = []

        def on_train_batch_end(self, trainer: Trainer, *others: Any) -> None:
            try:
                trainer.save_checkpoint(tmp_path / "any.ckpt")
                self.outcomes.append("saved")
            except RuntimeError as error:
                self.outcomes.append(str(error))

    fit(distillation(accumulate_batches=2), loose(4), 2, Save())
    assert [outcome == "saved" for outcome in Save.outcomes] == [False, True, False, True]
    assert "accumulate_batches" in Save.outcomes[0]
