"""The consistency family: fixed points, what each part does to the loss, and students that learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    SHAPE,
    FixedPairs,
    PowerMap,
    Watch,
    batch_of,
    closest,
    energy_distance,
    evaluation,
    fit,
    gaussian,
    of_part,
    small,
    two_classes,
)
from oracle import SCHEDULES

from distill.boundary import KarrasBoundary, ScaledBoundary
from distill.couplings import OptimalTransport
from distill.denoiser import Denoiser
from distill.distances import Distance, PseudoHuber, SquaredDistance
from distill.ema import DecayAveraging
from distill.grids import ConstantPoints, DiscreteGrid, Grid, KarrasGrid, UniformGrid
from distill.guidance import ClassifierFreeGuidance
from distill.methods.consistency import Consistency
from distill.optimization import LearningRate, Optimization
from distill.pairs import GridPairs, RatioPairs, TimePairs
from distill.schedules import RectifiedFlow, TrigFlow, VarianceExploding, VariancePreserving
from distill.solvers import DDIM, Heun, Solver
from distill.times import LogNormalTimes, UniformTimes
from distill.types import Batch, DataSpec, label_conditions
from distill.weights import InverseGapWeight, KarrasWeight

GRIDS: dict[str, Grid] = {"ve": KarrasGrid(), "rf": UniformGrid(), "rf-shift3": UniformGrid(), "trig": UniformGrid()}


def consistency(pairs: TimePairs, distance: Distance | None = None, **settings: Any) -> Consistency:
    return Consistency(pairs, distance or SquaredDistance(), Optimization(), evaluation(), **settings)


# --------------------------------------------------------------------------------------------------------- fixed points


def distillation_loss(name: str, solver: Solver, points: int, power: float) -> float:
    """CD's loss on Gaussian data of a student that is the flow map to a power."""
    teacher = gaussian(SCHEDULES[name])
    torch.manual_seed(1)
    batch = Batch(teacher.data(4000).float(), {}, {})
    pairs = GridPairs(GRIDS[name], ConstantPoints(points))
    return float(consistency(pairs, student=PowerMap(teacher, power), teacher=teacher, solver=solver).losses(batch)["loss"])


@pytest.mark.parametrize("name", GRIDS)
def test_distillation_is_zero_at_the_exact_student_alone(name):
    exact, *wrong = [distillation_loss(name, Heun(), 200, power) for power in (1.0, 0.8, 1.2)]
    print(f"CD {name}: loss {exact:.2e} at the exact student, {wrong} at wrong ones")
    assert exact < 1e-2 * min(wrong)


@pytest.mark.parametrize("name, solver, power", [("ve", DDIM(), 4), ("ve", Heun(), 6), ("rf", DDIM(), 4), ("rf", Heun(), 5)])
def test_distillation_loss_at_the_exact_student_falls_with_the_solvers_order(name, solver, power):
    """A step's error is ``h^(order + 1)`` and the loss its square.

    On a flow Heun's last step is Euler's, in one pair of 1 / h.
    """
    coarse, fine = (distillation_loss(name, solver, points, 1.0) for points in (40, 80))
    assert 0.6 * 2**power < coarse / fine < 1.6 * 2**power


def power_gradient(name: str, pairs: TimePairs, power: float) -> float:
    """Mean gradient, by the power, of consistency training's loss on Gaussian data."""
    teacher = gaussian(SCHEDULES[name])
    torch.manual_seed(1)
    batch = Batch(teacher.data(100_000).float(), {}, {})
    method = consistency(pairs, student=PowerMap(teacher, power))
    return float(torch.autograd.grad(method.losses(batch)["loss"], method.student.power)[0])


TRAINING_PAIRS = {
    "CT": lambda name: GridPairs(GRIDS[name], ConstantPoints(80)),
    "iCT": lambda name: GridPairs(KarrasGrid(7.0, 0.002, 80.0), ConstantPoints(80), log_normal=(-1.1, 2.0)),
    "ECT": lambda name: RatioPairs(LogNormalTimes(-0.8, 1.6), 1, q=200.0),
}


@pytest.mark.parametrize("kind", TRAINING_PAIRS)
@pytest.mark.parametrize("name", ["ve", "rf"])
def test_training_without_a_teacher_is_still_at_the_exact_student_alone(kind, name):
    """Its loss is not zero there, but its mean gradient is, as the pairs close up; and it points to it from either side."""
    here, below, above = (power_gradient(name, TRAINING_PAIRS[kind](name), power) for power in (1.0, 0.7, 1.3))
    print(f"{kind} {name}: gradient {here:.2e} at the exact student, {below:.2e} and {above:.2e} beside it")
    assert below < 0 < above
    assert abs(here) < 0.1 * min(-below, above)


def test_pairs_that_end_at_the_data_are_denoising():
    """ECT's first stage: at ``q -> 1`` every u is the data, and the exact denoiser, not the flow map, is the minimum."""
    teacher = gaussian(RectifiedFlow())
    batch = Batch(teacher.data(50_000).float(), {}, {})
    pairs = RatioPairs(LogNormalTimes(-0.8, 1.6), 1, q=1.0001)

    def loss(student: Denoiser) -> float:
        torch.manual_seed(2)
        return float(consistency(pairs, student=student).losses(batch)["loss"])

    class Shrunk(PowerMap):
        def forward(self, x, t, cond, r=None):  # type: ignore[no-untyped-def]
            return self.power * self.teacher(x, t, cond)

    exact = loss(Shrunk(teacher, 1.0))
    assert exact < 0.97 * loss(PowerMap(teacher, 1.0))
    assert exact < loss(Shrunk(teacher, 0.9)) and exact < loss(Shrunk(teacher, 1.1))


# ------------------------------------------------------------------------------------------------- the loss, by its parts


def at(schedule: Any, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return schedule.alpha(t).reshape(-1, 1, 1, 1) * x0 + schedule.sigma(t).reshape(-1, 1, 1, 1) * eps


def test_training_loss_is_the_formula():
    """Improved CT's: ``mean of 1 / (s_t - s_u) (sqrt(|d|^2 + c^2) - c)``, the target x_u itself where u is the end."""
    schedule, t, u = VarianceExploding(), torch.tensor([2.0, 0.5, 30.0]), torch.tensor([1.5, 0.002, 29.0])
    batch, student = batch_of(0, 3), small(schedule, "edm")
    f = [student(at(schedule, batch.x0, batch.noise, time), time, {}) for time in (t, u)]
    target = torch.stack([f[1][0], at(schedule, batch.x0, batch.noise, u)[1], f[1][2]])
    huber = ((f[0] - target).square().sum((1, 2, 3)) + 0.03**2).sqrt() - 0.03
    method = consistency(FixedPairs(t, u), PseudoHuber(0.03), student=student, weight=InverseGapWeight())
    losses = method.losses(batch)
    assert float(losses["loss"]) == pytest.approx(float((huber / (t - u)).mean()), rel=1e-4)
    assert float(losses["distance"]) == pytest.approx(float(huber.mean()), rel=1e-5)


def test_distillation_loss_is_the_formula_in_another_schedule_with_guidance_and_boundary():
    """A flow teacher and student at work in EDM's schedule: the target is f at the guided DDIM step."""
    teacher, student = two_classes(RectifiedFlow()), small(num_classes=2)
    schedule, t, u, batch = VarianceExploding(), torch.tensor([2.0, 0.5]), torch.tensor([1.5, 0.4]), batch_of(0, 2)
    x_t = at(schedule, batch.x0, batch.noise, t)

    def in_flow(denoiser: Denoiser, x: torch.Tensor, level: torch.Tensor, cond: Any) -> torch.Tensor:
        return denoiser(x / (1 + level).reshape(-1, 1, 1, 1), level / (1 + level), cond)

    guided = in_flow(teacher, x_t, t, batch.null) * (1 - 2.5) + 2.5 * in_flow(teacher, x_t, t, batch.cond)
    x_u = guided + (u / t).reshape(-1, 1, 1, 1) * (x_t - guided)

    def f(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        scaled = 3 * (level - 0.002).reshape(-1, 1, 1, 1)
        total = scaled**2 + 0.25
        return 0.25 / total * x + scaled / total.sqrt() * in_flow(student, x, level, batch.cond)

    method = consistency(
        FixedPairs(t, u), student=student, teacher=teacher, solver=DDIM(), schedule=schedule, weight=KarrasWeight(),
        boundary=ScaledBoundary(0.5, 3.0), guidance=ClassifierFreeGuidance(2.5),
    )  # fmt: skip
    weight = (t**2 + 0.25) / (t * 0.5) ** 2
    expected = (weight * (f(x_t, t) - f(x_u, u)).square().mean((1, 2, 3))).mean()
    assert float(method.losses(batch)["loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_no_gradient_flows_through_the_target():
    batch, student = batch_of(0, 4), small()
    t, u = torch.full((4,), 0.5), torch.full((4,), 0.3)
    method = consistency(FixedPairs(t, u), student=student)
    target = student(at(student.schedule, batch.x0, batch.noise, u), u, {}).detach()
    wanted = (student(at(student.schedule, batch.x0, batch.noise, t), t, {}) - target).square().mean()
    found, expected = (torch.autograd.grad(loss, list(student.parameters())) for loss in (method.losses(batch)["loss"], wanted))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected))


@pytest.mark.parametrize("solver", [None, Heun()], ids=["training", "distillation"])
def test_a_coupling_changes_the_noise_alone(solver):
    """The loss is that of the batch with the coupled noise in it; at both times of consistency training."""
    t, u = torch.full((16,), 0.6), torch.full((16,), 0.4)
    parts = {"student": small(num_classes=2), "teacher": two_classes(), "solver": solver}
    free, method = (consistency(FixedPairs(t, u), **parts, coupling=each) for each in (None, OptimalTransport()))
    batch = batch_of(0, 16, tied=False)
    method.seed_draws()
    noise = OptimalTransport().draw(batch.x0, batch.cond["labels"])
    method.seed_draws()
    loss = float(method.losses(batch)["loss"])
    assert loss == float(free.losses(Batch(batch.x0, batch.cond, batch.null, noise))["loss"])
    free.seed_draws()
    assert loss != pytest.approx(float(free.losses(batch)["loss"]), rel=1e-3)
    method.check_data(DataSpec(SHAPE, 2))
    with pytest.raises(ValueError, match="model.coupling=OptimalTransport .* set model.coupling to null"):
        method.check_data(DataSpec(SHAPE, 2, paired=True))


@pytest.mark.parametrize("target", [None, DecayAveraging(0.9)], ids=["own weights", "average"])
def test_student_and_target_drop_the_same_units(target):
    """At t = u nearly, equal masks make equal outputs; two seeds of draws make different ones."""
    batch = batch_of(0, 64)
    t = torch.full((64,), 0.5)
    method = consistency(FixedPairs(t, t - 1e-6), student=small(dropout=0.5), target=target)
    assert float(method.losses(batch)["loss"]) < 1e-8
    method.eval()
    steady = method.student(batch.x0, t, {})
    method.train()
    assert not torch.allclose(steady, method.student(batch.x0, t, {}), atol=1e-2), "dropout is at work in training"


def test_masks_differ_between_batches():
    batch, t = batch_of(0, 64), torch.full((64,), 0.5)
    method = consistency(FixedPairs(t, t - 0.2), student=small(dropout=0.5))
    first = float(method.losses(batch)["loss"])
    method.batches_seen = 1
    assert float(method.losses(batch)["loss"]) != pytest.approx(first, rel=1e-3)


def test_target_follows_the_student_after_each_step():
    watch = Watch()
    pairs = GridPairs(UniformGrid(), ConstantPoints(8))
    method = consistency(pairs, student=small(), target=DecayAveraging(0.5, warmup=False))
    fit(method, [batch_of(0)], 3, watch)
    for before, after in zip(watch.states, watch.states[1:]):
        for key, value in of_part(before, "target").items():
            student = after[key.replace("target.module", "student")]
            assert torch.allclose(after[key], 0.5 * value + 0.5 * student, rtol=0, atol=1e-6)
    assert closest(of_part(watch.states[0], "target"), of_part(watch.states[-1], "target")) > 1e-5


def test_loss_reads_the_target_network():
    batch, pairs = batch_of(0, 4), FixedPairs(torch.full((4,), 0.5), torch.full((4,), 0.3))
    method = consistency(pairs, student=small(), target=DecayAveraging(0.5))
    assert method.target is not None and method.target.module.training
    before = float(method.losses(batch)["loss"])
    with torch.no_grad():
        method.target.module.network.first.weight.mul_(2)
    assert float(method.losses(batch)["loss"]) != pytest.approx(before, rel=1e-2)


def test_pairs_follow_the_optimisers_steps():
    """Under accumulation a curriculum counts steps, not batches."""
    seen = []

    class Listening(GridPairs):
        def sample(self, count, step, *others):  # type: ignore[no-untyped-def]
            seen.append(step)
            return super().sample(count, step, *others)

    pairs = Listening(UniformGrid(), ConstantPoints(8))
    method = Consistency(pairs, SquaredDistance(), Optimization(accumulate_batches=2), evaluation(), small())
    fit(method, [batch_of(0)], 3)
    assert seen == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("schedule", [VarianceExploding(), VariancePreserving(), RectifiedFlow()])
def test_easy_consistency_tuning_has_finite_losses(schedule):
    """Its inverse-gap weight, where the drawn time is at the schedule's end, too."""
    pairs = RatioPairs(LogNormalTimes(-1.1, 2.0), 1)
    method = consistency(pairs, PseudoHuber(1e-8), student=small(schedule, "edm"), weight=InverseGapWeight())
    assert method.losses(batch_of(0, 4000))["loss"].isfinite()


# ----------------------------------------------------------------------------------------------------- drawn guidance


def latent_style(**settings: Any) -> Consistency:
    defaults: dict[str, Any] = {"student": small(num_classes=2), "teacher": two_classes(), "solver": DDIM()}
    return consistency(GridPairs(UniformGrid(), ConstantPoints(20)), **{**defaults, "guidance_range": (1.0, 4.0), **settings})


def test_guidance_is_drawn_for_each_sample_and_reaches_student_and_teacher():
    method, batch = latent_style(guidance_range=(2.0, 5.0)), batch_of(0, 4000)
    cond, teacher_cond, rule = method.draw_guidance(batch.cond)
    assert "guidance" not in teacher_cond
    assert isinstance(rule, ClassifierFreeGuidance) and torch.equal(cond["guidance"], rule.scale)
    assert float(rule.scale.min()) == pytest.approx(2.0, abs=0.01) and float(rule.scale.max()) == pytest.approx(5.0, abs=0.01)
    assert float(rule.scale.mean()) == pytest.approx(3.5, abs=0.05) and "guidance" not in batch.cond


def test_a_student_that_embeds_no_guidance_is_given_none():
    method = latent_style(embed_guidance=False)
    cond, _, rule = method.draw_guidance(batch_of(0).cond)
    assert isinstance(rule, ClassifierFreeGuidance) and "guidance" not in cond and not method.student.network.scalars
    fit(method, [batch_of(0, 32)], 2)
    method.draw(1, range(6), *label_conditions(torch.arange(6) % 2, 2))


def test_a_teacher_that_embeds_guidance_is_given_the_scale_and_no_rule_besides():
    teacher = small(num_classes=2)
    teacher.network.add_scalar_input("guidance")
    method = latent_style(teacher=teacher, embed_guidance=False)
    cond, teacher_cond, rule = method.draw_guidance(batch_of(0).cond)
    assert rule is None and "guidance" not in cond and teacher_cond["guidance"].min() >= 1
    assert teacher.under(VarianceExploding()).scalar_inputs == ("guidance",)
    fit(method, [batch_of(0, 32)], 2)
    cond, null = label_conditions(torch.arange(6) % 2, 2)
    assert torch.equal(*(method.draw(2, range(6), cond, null, source="teacher", guidance=g) for g in (None, 2.5)))


def test_the_teacher_is_compared_at_the_middle_of_the_drawn_scales():
    method, (cond, null) = latent_style(), label_conditions(torch.arange(6) % 2, 2)
    default, middle, none = (method.draw(2, range(6), cond, null, source="teacher", guidance=g) for g in (None, 2.5, 1.0))
    assert torch.equal(default, middle) and not torch.allclose(default, none, atol=1e-3)


def test_a_student_that_embeds_guidance_by_itself_is_given_it():
    student = small(num_classes=2)
    student.network.add_scalar_input("guidance")
    with pytest.raises(ValueError, match="embed_guidance=false"):
        latent_style(student=student, embed_guidance=False)


def test_student_starts_without_reading_its_guidance_and_then_does():
    method = latent_style()
    cond, null = label_conditions(torch.arange(6) % 2, 2)
    low, high = (method.draw(1, range(6), cond, null, guidance=scale) for scale in (1.0, 4.0))
    assert torch.equal(low, high)
    fit(method, [batch_of(0, 32)], 10)
    low, middle, high = (method.draw(1, range(6), cond, null, source="student", guidance=scale) for scale in (1.0, 2.5, 4.0))
    assert not torch.allclose(low, high, atol=1e-4)
    assert torch.equal(middle, method.draw(1, range(6), cond, null, source="student")), "the default is the range's middle"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"guidance_range": (3.0, 2.0)}, r"guidance_range=\(3.0, 2.0\)"),
        ({"guidance": ClassifierFreeGuidance(2.0)}, "guidance and guidance_range are both set"),
        ({"solver": None}, "solver is null"),
        ({"student": two_classes()}, "cannot take an extra scalar input"),
        ({"teacher": None}, "model.teacher is missing"),
        ({"teacher": None, "student": None, "solver": None}, "model.teacher is missing"),
    ],
)
def test_contradictions_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        latent_style(**settings)


# ------------------------------------------------------------------------------------------------------------ learning


def adam(steps: int, end: float = 0.1) -> Optimization:
    rates = LearningRate(decay="linear", total_steps=steps, end=end)
    return Optimization(lambda p: torch.optim.Adam(p, lr=5e-3, fused=True), rates, averaging=DecayAveraging(0.97))


BATCHES = [batch_of(number, 256, tied=False) for number in range(100)]


def learned(method: Consistency, steps: int, drawn: int = 1) -> tuple[float, float]:
    """Energy distances of one-step samples to the data of their class, before and after training."""
    labels = torch.arange(2000) % 2
    data, (cond, null) = two_classes().data(labels).float(), label_conditions(labels, 2)

    def distance() -> float:
        samples = method.draw(drawn, range(2000), cond, null)
        return sum(energy_distance(samples[labels == k], data[labels == k]) for k in (0, 1))

    before = distance()
    fit(method, BATCHES, steps)
    return before, distance()


def test_distilled_student_reaches_the_data_law_in_one_step():
    """CD without labels: one network must split the noise between the two classes as the teacher's flow does."""
    teacher, data = two_classes(TrigFlow()), two_classes().data(torch.arange(2000) % 2).float()
    pairs = GridPairs(UniformGrid(), ConstantPoints(8))
    method = Consistency(pairs, PseudoHuber(0.1), adam(400, end=1.0), evaluation(), small(TrigFlow()), teacher, Heun())
    before = energy_distance(method.draw(1, range(2000), {}, {}), data)
    fit(method, [Batch(batch.x0, {}, {}) for batch in BATCHES], 400)
    samples, teachers = (method.draw(n, range(2000), {}, {}, source=source) for n, source in ((1, "ema"), (32, "teacher")))
    after, gap = energy_distance(samples, data), float((samples - teachers).square().mean().sqrt())
    print(f"CD: energy distance {before:.4f} -> {after:.4f}; root mean square from the teacher's samples {gap:.3f}")
    assert after < before / 8
    assert gap < 0.3 * float(teachers.std())


def test_consistency_training_reaches_the_data_law_in_one_step():
    """Improved CT's parts, from scratch, on EDM's schedule."""
    pairs = GridPairs(KarrasGrid(), ConstantPoints(20), log_normal=(-1.1, 2.0))
    method = Consistency(
        pairs, PseudoHuber(0.03), adam(350), evaluation(), small(VarianceExploding(), "edm", num_classes=2),
        boundary=KarrasBoundary(), weight=InverseGapWeight(),
    )  # fmt: skip
    before, after = learned(method, 350)
    print(f"iCT: energy distance {before:.4f} -> {after:.4f}")
    assert after < before / 8


def test_easy_consistency_tuning_reaches_the_data_law_in_one_step():
    """From denoising to consistency in stages; the last stages do what the first, which is denoising, cannot."""
    pairs = RatioPairs(UniformTimes(0.01, 1.0), stage_steps=90, q=4.0)
    method = Consistency(pairs, PseudoHuber(1e-3), adam(350), evaluation(), small(num_classes=2))
    before, after = learned(method, 350)
    print(f"ECT: energy distance {before:.4f} -> {after:.4f}")
    assert after < before / 8


def test_student_that_reads_guidance_follows_the_guided_teacher():
    """Latent-consistency style on DDPM's schedule: skipped steps, drawn scale, scaled boundary, average as target."""
    schedule = VariancePreserving("cosine")
    teacher = two_classes(schedule)
    teacher.std, teacher.means = 0.5, teacher.means / 2
    method = Consistency(
        GridPairs(DiscreteGrid(), ConstantPoints(50), skip=5), PseudoHuber(0.001, "element"), adam(400), evaluation(),
        small(schedule, "v", num_classes=2), teacher, DDIM(), boundary=ScaledBoundary(), guidance_range=(1.0, 4.0),
        target=DecayAveraging(0.9),
    )  # fmt: skip
    labels = torch.arange(1000) % 2
    cond, null = label_conditions(labels, 2)
    batches = [Batch(teacher.data(batch.cond["labels"]).float(), batch.cond, batch.null) for batch in BATCHES]
    fit(method, batches, 400)
    gaps = {}
    for scale in (1.0, 4.0):
        student = method.draw(1, range(1000), cond, null, guidance=scale)
        for guide in (1.0, 4.0):
            teachers = method.draw(32, range(1000), cond, null, source="teacher", guidance=guide)
            gaps[scale, guide] = float((student - teachers).square().mean().sqrt())
    print(f"latent style: root mean square (student's scale, teacher's): {gaps}")
    for own, other in ((1.0, 4.0), (4.0, 1.0)):
        assert gaps[own, own] < 0.4 * gaps[own, other]


def test_drawn_guidance_needs_conditions():
    with pytest.raises(ValueError, match="guidance_range.*no condition"):
        latent_style().draw_guidance({})
