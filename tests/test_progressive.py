"""Progressive distillation: its loss at the exact student, calls of the networks, guidance in each round, sampling.

What a boundary between rounds does is in test_progressive_rounds.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import SHAPE, batch_of, energy_distance, fit, gaussian, small, two_classes
from oracle import SCHEDULES, Gaussian
from torch import Tensor, nn

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.ema import EMA, DecayAveraging
from distill.evaluation import Evaluation
from distill.grids import UniformGrid
from distill.guidance import ClassifierFreeGuidance
from distill.methods.progressive import Progressive
from distill.optimization import LearningRate, Optimization
from distill.samplers import OdeSampler
from distill.schedules import NoiseSchedule, RectifiedFlow, VarianceExploding
from distill.solvers import DDIM
from distill.types import Batch, Cond, DataSpec, Sample, Time, label_conditions
from distill.weights import Weight

LR = 1e-2


def progressive(teacher: Denoiser, start: int = 4, end: int = 1, lengths: Any = 5, **settings: Any) -> Progressive:
    """With Adam, a learning rate that falls to 0 in each round, and no average unless one is given."""
    optimization = Optimization(
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=LR),
        learning_rate=LearningRate(decay="linear"),
        averaging=settings.pop("averaging", DecayAveraging(0.0, warmup=False)),
        accumulate_batches=settings.pop("accumulate_batches", 1),
    )
    return Progressive(teacher, start, end, lengths, optimization, Evaluation(), **settings)


def network(**settings: Any) -> NetworkDenoiser:
    return small(num_classes=2, width=8, **settings)


# ---------------------------------------------------------------------------------------------------------- the optimum


class Halving(Denoiser):
    """A Gaussian's exact student of N steps, plus ``bend`` times its input: affine at each time, as two steps of DDIM are."""

    def __init__(self, teacher: Gaussian, steps: int, bend: float = 0.0):
        super().__init__()
        self.schedule, self.shape = teacher.schedule, teacher.shape
        self.bend = nn.Parameter(torch.tensor(bend, dtype=torch.float64))
        nodes = UniformGrid().times(self.schedule, 2 * steps)
        self.times = nodes[::2]
        offsets, gains = [], []
        for index in range(steps):
            zero = torch.zeros(1, *SHAPE, dtype=torch.float64)
            at_0, at_1 = (self.target(teacher, zero + value, nodes[2 * index : 2 * index + 3]) for value in (0, 1))
            offsets.append(at_0)
            gains.append(at_1 - at_0)
        self.offsets, self.gains = torch.cat(offsets), torch.cat(gains)

    def target(self, teacher: Gaussian, x: Sample, nodes: Tensor) -> Sample:
        """The x0 that leads in one step where the solver's two lead: algorithm 2 as printed, in float64."""
        t, middle = nodes[:1], nodes[1:2]
        x_middle = DDIM().step(teacher, x, t, middle, {})
        if len(nodes) == 2:
            return teacher(x_middle, middle, {})
        end = nodes[2:]
        landed = DDIM().step(teacher, x_middle, middle, end, {})
        r = self.schedule.sigma(end) / self.schedule.sigma(t)
        return (landed - r * x) / (self.schedule.alpha(end) - r * self.schedule.alpha(t))

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        index = (t[:, None] - self.times).abs().argmin(1)
        return self.offsets[index] + (self.gains[index] + self.bend) * x


def of_gaussian(count: int) -> Batch:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(count, *SHAPE, dtype=torch.float64, generator=generator)
    return Batch(gaussian(RectifiedFlow()).data(count, generator), {}, {}, noise)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_loss_is_zero_at_the_exact_student_and_not_elsewhere(name):
    teacher = gaussian(SCHEDULES[name])
    method = progressive(teacher, 4, 4)
    values = {}
    for label, student in {
        "exact": Halving(teacher, 4),
        "bent": Halving(teacher, 4, 0.01),
        "teacher": teacher,
        "of other steps": Halving(teacher, 8),
    }.items():
        method.student = student
        torch.manual_seed(0)
        loss = method.losses(of_gaussian(200))["loss"]
        values[label] = float(loss.detach())
        if label == "exact":
            (gradient,) = torch.autograd.grad(loss, student.bend)
            assert abs(float(gradient)) < 1e-7
    exact = values.pop("exact")
    assert exact < 1e-16 and min(values.values()) > 1e-6, (exact, values)


class DoubledTimes(Weight):
    """Tells the two times of a step apart."""

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> Tensor:
        return 2 * t + 100 * u


@pytest.mark.parametrize("name", ["rf", "vp-cosine"])
def test_the_loss_is_the_weighted_error_of_x0_by_hand(name):
    schedule, batch = SCHEDULES[name], batch_of(1, 64)
    method = progressive(two_classes(schedule), 4, 4, weight=DoubledTimes())
    method.student = student = small(schedule, num_classes=2)
    torch.manual_seed(3)
    found = method.losses(batch)
    torch.manual_seed(3)
    steps = method.halved.draw(batch.x0)
    x_t, labels = schedule.add_noise(batch.x0, batch.noise, steps.t), {"labels": batch.cond["labels"]}
    by_two = DDIM().step(two_classes(schedule), x_t, steps.t, steps.middle, labels)
    second = two_classes(schedule)(by_two, steps.middle, labels)
    first = two_classes(schedule)(x_t, steps.t, labels)
    share = steps.share.reshape(-1, 1, 1, 1)
    errors = (student(x_t, steps.t, labels) - share * second - (1 - share) * first).square().mean((1, 2, 3))
    assert float(found["error"]) == pytest.approx(float(errors.mean()), rel=1e-5)
    assert float(found["loss"]) == pytest.approx(float(((2 * steps.t + 100 * steps.end) * errors).mean()), rel=1e-5)
    assert len(set(steps.t.tolist())) == 4 and float(steps.end.min()) == schedule.t_min


def test_students_of_every_round_reach_the_data():
    """Of a small network that nothing has trained before: 4, 2 and 1 steps, against the teacher in as many."""
    torch.manual_seed(0)
    teacher, sampler = two_classes(), OdeSampler(DDIM(), UniformGrid())
    method = progressive(teacher, 4, 1, [250, 100, 100])
    method.student = small(num_classes=2)
    method.ema = EMA(method.student, DecayAveraging(0.0, warmup=False))
    fit(method, [batch_of(number, 128, tied=False) for number in range(8)], 450)
    labels = torch.arange(512) % 2
    cond, noise = label_conditions(labels, 2)[0], torch.randn(512, *SHAPE)
    data = teacher.data(labels).float()
    with torch.no_grad():
        before, after = (energy_distance(sampler(d, noise, cond, 1), data) for d in (teacher, method.ema.module))
    print(f"energy distance in one step: teacher {before:.4f}, student {after:.4f}")
    assert after < 0.1 * before


# ---------------------------------------------------------------------------------------------------------- evaluations


def rows_of(denoiser: Any, log: list[int]) -> None:
    """Has the network write down the rows of each call."""
    denoiser.network.register_forward_pre_hook(lambda module, args: log.append(len(args[0])))


def counted(method: Progressive, batch: Batch) -> dict[str, list[int]]:
    """Rows of the calls of a loss."""
    rows: dict[str, list[int]] = {"teacher": [], "previous": [], "student": []}
    rows_of(method.teacher, rows["teacher"])
    rows_of(method.student, rows["student"])
    if method.previous is not None:
        rows_of(method.previous.module, rows["previous"])
    method.losses(batch)
    return rows


@pytest.mark.parametrize(
    ("settings", "first", "later"),
    [
        ({}, [8, 8], [8, 8]),
        ({"guidance": ClassifierFreeGuidance(2.0)}, [16, 16], [8, 8]),
        ({"guidance_range": (1.0, 3.0)}, [16, 16], [8, 8]),
    ],
    ids=["plain", "guided", "range"],
)
def test_a_step_is_two_calls_of_the_teacher_and_one_of_the_student(settings, first, later):
    """Guidance costs rows in the first round alone."""
    method = progressive(network(), 2, 1, [1, 3], **settings)
    assert counted(method, batch_of(0)) == {"teacher": first, "previous": [], "student": [8]}
    method = progressive(network(), 2, 1, [1, 3], **settings)
    fit(method, [batch_of(0), batch_of(1)], 2)
    assert counted(method, batch_of(0)) == {"teacher": [], "previous": later, "student": [8]}


# ------------------------------------------------------------------------------------------------------------- guidance


def target_of(method: Progressive, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's conditions and, of a method whose student answers 0, the mean square of the target."""
    seen: dict[str, Tensor] = {}

    class Zero(Denoiser):
        def __init__(self, schedule: NoiseSchedule):
            super().__init__()
            self.schedule = schedule

        def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
            seen.update(cond)
            return torch.zeros_like(x)

    method.student = Zero(method.schedule)
    torch.manual_seed(5)
    return method.losses(batch)["error"], seen


def test_a_rule_guides_the_given_teacher_and_no_later_one():
    """Two classes at scale 3: the target is that of the guided teacher by two steps of DDIM."""
    batch, teacher = batch_of(2), network()
    guided_error, cond = target_of(progressive(teacher, 2, 1, guidance=ClassifierFreeGuidance(3.0)), batch)
    assert "guidance" not in cond
    # The guided teacher as one of another kind, and the method without guidance.
    by_hand = progressive(teacher, 2, 1)
    object.__setattr__(by_hand._teacher, "module", ClassifierFreeGuidance(3.0)(teacher, batch.null))
    torch.testing.assert_close(target_of(by_hand, batch)[0], guided_error, rtol=1e-6, atol=0)
    assert (target_of(progressive(teacher, 2, 1), batch)[0] - guided_error).abs() > 1e-4


def test_a_drawn_scale_guides_the_teacher_and_is_what_the_student_reads():
    batch, teacher = batch_of(2), network()
    method = progressive(teacher, 2, 1, guidance_range=(1.0, 5.0))
    error, cond = target_of(method, batch)
    scale = cond["guidance"]
    assert scale.shape == (8,) and 1 <= scale.min() < 2 and 4 < scale.max() <= 5
    by_hand = progressive(teacher, 2, 1)
    object.__setattr__(by_hand._teacher, "module", ClassifierFreeGuidance(scale)(teacher, batch.null))
    torch.testing.assert_close(target_of(by_hand, batch)[0], error, rtol=1e-6, atol=0)


def test_later_teachers_and_teachers_that_read_the_scale_are_given_the_students():
    """Meng's first stage made the teacher: no rule at all."""
    first = network()
    first.network.add_scalar_input("guidance")
    nn.init.normal_(first.network.scalars["guidance"].projection.weight)
    method = progressive(first, 2, 1, [1, 3], guidance_range=(1.0, 5.0))
    fit(method, [batch_of(0)], 2)
    for teacher in (progressive(first, 2, 1, guidance_range=(1.0, 5.0)).teacher, method.previous.module):
        given: list[Tensor] = []
        teacher.register_forward_pre_hook(lambda module, args, given=given: given.append(args[2]["guidance"]))
        of_it = method if teacher is method.previous.module else progressive(teacher, 2, 1, guidance_range=(1.0, 5.0))
        hooked = of_it.round_teacher
        assert hooked is teacher
        _, cond = target_of(of_it, batch_of(2))
        assert len(given) == 2 and all(each.equal(cond["guidance"]) for each in given)


def test_students_are_sampled_at_the_scale_that_they_read():
    """By default the middle of the range, in one evaluation a step; the teacher is guided at the same."""
    method, batch = progressive(network(), 2, 1, guidance_range=(1.0, 5.0)), batch_of(3)
    nn.init.normal_(method.student.network.scalars["guidance"].projection.weight)
    rows: list[int] = []
    rows_of(method.student, rows)
    method.check_data(DataSpec(SHAPE, 2))
    draws = [method.draw(2, range(8), batch.cond, batch.null, source="student", guidance=scale) for scale in (None, 3.0, 1.0)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2]) and rows == [8] * 6
    teachers = [method.draw(2, range(8), batch.cond, batch.null, source="teacher", guidance=scale) for scale in (None, 3.0)]
    assert teachers[0].equal(teachers[1])


def test_conditions_are_dropped_for_both():
    torch.manual_seed(0)
    method, seen = progressive(network(), 2, 1, null_probability=0.25), {"teacher": [], "student": []}
    method.teacher.register_forward_pre_hook(lambda module, args: seen["teacher"].append(args[2]["labels"]))
    method.student.register_forward_pre_hook(lambda module, args: seen["student"].append(args[2]["labels"]))
    method.losses(batch_of(0, 2000))
    (student,) = seen["student"]
    assert all(labels.equal(student) for labels in seen["teacher"]) and len(seen["teacher"]) == 2
    assert abs(float((student == 2).float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize("grid", [None, UniformGrid()])
def test_students_are_sampled_by_ddim_over_their_grid_in_the_methods_schedule(grid):
    method, noise = progressive(gaussian(RectifiedFlow()), 4, 4, grid=grid, schedule=VarianceExploding()), of_gaussian(5).noise
    found = method.student_sampler(method.generator(method.student), noise, {}, 4)
    expected = OdeSampler(DDIM(), UniformGrid())(gaussian(VarianceExploding()), noise, {}, 4)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
