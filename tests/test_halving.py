"""The target of progressive distillation against two steps of DDIM, short ones too; grids and rounds that halve."""

from __future__ import annotations

import pytest
import torch
from helpers import SHAPE, gaussian, two_classes
from oracle import SCHEDULES
from torch import Tensor

from distill.denoiser import Denoiser
from distill.grids import DiscreteGrid, Grid, KarrasGrid, UniformGrid
from distill.guidance import CfgPlusPlus, ClassifierFreeGuidance
from distill.halving import Halved, HalvedGrid, Rounds, two_step_target
from distill.samplers import OdeSampler
from distill.schedules import NoiseSchedule, VariancePreserving, per_sample
from distill.solvers import DDIM
from distill.types import Cond, Sample, Time

LABELS = {"labels": torch.tensor([0, 1, 2, 0, 1, 2, 1, 0])}


def noisy(schedule: NoiseSchedule, steps: Halved) -> Sample:
    """Eight float64 samples of two classes under noise, one for each step."""
    generator = torch.Generator().manual_seed(1)
    x0 = two_classes().data(LABELS["labels"] % 2, generator)
    return schedule.add_noise(x0, torch.randn(8, *SHAPE, dtype=torch.float64, generator=generator), steps.t)


def steps_of(name: str, count: int, index: Tensor, dtype: torch.dtype = torch.float64) -> Halved:
    return HalvedGrid(UniformGrid(), SCHEDULES[name], count).at(index, torch.zeros(8, *SHAPE, dtype=dtype))


def two_steps(teacher: Denoiser, x: Sample, steps: Halved, cond: Cond) -> Sample:
    """By the solver itself."""
    middle = DDIM().step(teacher, x, steps.t, steps.middle, cond)
    return DDIM().step(teacher, middle, steps.middle, steps.end, cond)


def one_step(schedule: NoiseSchedule, x: Sample, x0: Sample, steps: Halved) -> Sample:
    return schedule.add_noise(x0, schedule.eps(x, x0, steps.t), steps.end)


def by_the_paper(schedule: NoiseSchedule, x: Sample, landed: Sample, steps: Halved) -> Sample:
    """``(x'' - r x) / (alpha'' - r alpha)``: algorithm 2 as it is printed."""
    r = schedule.sigma(steps.end) / schedule.sigma(steps.t)
    below = schedule.alpha(steps.end) - r * schedule.alpha(steps.t)
    return (landed - per_sample(r, x) * x) / per_sample(below, x)


@pytest.mark.parametrize("teacher", [gaussian, two_classes])
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_with_the_target_lands_where_two_steps_of_the_teacher_do(name, teacher):
    schedule = SCHEDULES[name]
    steps = steps_of(name, 9, torch.arange(8))
    x, exact = noisy(schedule, steps), teacher(schedule)
    landed, target = two_steps(exact, x, steps, LABELS), two_step_target(exact, x, steps, LABELS)
    torch.testing.assert_close(one_step(schedule, x, target, steps), landed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by_the_paper(schedule, x, landed, steps), target, rtol=1e-9, atol=1e-9)
    # Neither estimate alone does, nor their mean.
    first = exact(x, steps.t, LABELS)
    second = exact(DDIM().step(exact, x, steps.t, steps.middle, LABELS), steps.middle, LABELS)
    for wrong in (first, second, (first + second) / 2):
        assert (one_step(schedule, x, wrong, steps) - landed).abs().max() > 1e-5


@pytest.mark.parametrize("name", SCHEDULES)
def test_last_target_is_the_teachers_sample(name):
    """The sampler's last call is the denoiser itself: 1 and 2 steps of the teacher end where the student's do."""
    schedule, noise = SCHEDULES[name], torch.randn(8, *SHAPE, dtype=torch.float64)
    steps = steps_of(name, 1, torch.zeros(8, dtype=torch.long))
    target = two_step_target(two_classes(schedule), schedule.prior_scale * noise, steps, LABELS)
    sample = OdeSampler(DDIM(), UniformGrid())(two_classes(schedule), noise, LABELS, 2)
    torch.testing.assert_close(target, sample, rtol=1e-12, atol=1e-12)
    assert steps.share.tolist() == [1.0] * 8 and steps.per_noise.tolist() == [0.0] * 8


@pytest.mark.parametrize("name", SCHEDULES)
def test_short_steps_lose_no_digits_in_single_precision(name):
    """The paper's form does, on the 1024-step grid with which its ImageNet runs begin."""
    schedule, index = SCHEDULES[name], torch.tensor([0, 100, 300, 500, 700, 900, 1000, 1020])
    steps, rough = steps_of(name, 1024, index), steps_of(name, 1024, index, torch.float32)
    x, teacher = noisy(schedule, steps), two_classes(schedule)
    exact = two_step_target(teacher, x, steps, LABELS)
    found = two_step_target(teacher, x.float(), rough, LABELS)
    printed = by_the_paper(schedule, x.float(), two_steps(teacher, x.float(), rough, LABELS), rough)
    ours, papers = (float((value - exact).abs().max()) for value in (found, printed))
    print(f"{name}: error in float32 {ours:.1e}, of the paper's form {papers:.1e}")
    assert ours < 1e-6 and papers > 100 * ours


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_noise_of_its_own_is_followed(name):
    """CFG++ goes on with the null prediction's noise."""
    schedule, steps = SCHEDULES[name], steps_of(name, 9, torch.arange(8))
    null = {"labels": torch.full((8,), 2)}
    x, teacher = noisy(schedule, steps), CfgPlusPlus(0.6)(two_classes(schedule), null)
    target, landed = two_step_target(teacher, x, steps, LABELS), two_steps(teacher, x, steps, LABELS)
    torch.testing.assert_close(one_step(schedule, x, target, steps), landed, rtol=1e-10, atol=1e-10)
    of_x0_alone = two_steps(ClassifierFreeGuidance(0.6)(two_classes(schedule), null), x, steps, LABELS)
    assert (landed - of_x0_alone).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------- grids and rounds


@pytest.mark.parametrize("grid", [UniformGrid(), DiscreteGrid()])
def test_students_times_are_every_other_of_the_teachers(grid):
    schedule = VariancePreserving()
    for count in (1, 3, 8, 25):
        halved, x = HalvedGrid(grid, schedule, count), torch.zeros(count, *SHAPE, dtype=torch.float64)
        steps = halved.at(torch.arange(count), x)
        both = torch.stack([steps.t, steps.middle], 1).flatten()
        torch.testing.assert_close(both, grid.times(schedule, 2 * count), rtol=0, atol=0)
        assert steps.end[:-1].equal(steps.t[1:]) and steps.end[-1] == schedule.t_min


def test_steps_are_drawn_evenly():
    torch.manual_seed(0)
    halved = HalvedGrid(UniformGrid(), VariancePreserving(), 4)
    drawn = halved.draw(torch.zeros(8000, 1)).t
    counts = torch.stack([(drawn == t).sum() for t in UniformGrid().times(VariancePreserving(), 4).float()])
    assert int(counts.sum()) == 8000 and (counts - 2000).abs().max() < 4 * (8000 * 3 / 16) ** 0.5


class OneShort(Grid):
    """A grid that has fewer times than it is asked for."""

    def times(self, schedule: NoiseSchedule, count: int) -> Time:
        return UniformGrid().times(schedule, count - 1)


@pytest.mark.parametrize("grid", [KarrasGrid(sigma_min=0.002, sigma_max=80.0), OneShort()])
def test_a_grid_that_does_not_halve_is_named(grid):
    with pytest.raises(ValueError, match=f"grid={type(grid).__name__}: its 4 times on VariancePre.* every other of its 8"):
        HalvedGrid(grid, VariancePreserving(), 4)


def test_rounds_halve_and_each_has_its_length():
    rounds = Rounds(16, 2, [3, 2, 4, 1])
    assert rounds.steps == [16, 8, 4, 2] and rounds.total == 10
    assert [rounds.index(step) for step in range(12)] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert Rounds(4, 1, 7).lengths == [7, 7, 7] and Rounds(3, 3, 7).steps == [3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((12, 4, 5), "start_steps=12 and end_steps=4: give end_steps >= 1 and start_steps = 1, 2, 4, 8"),
        ((2, 4, 5), "start_steps=2 and end_steps=4"),
        ((9, 4, 5), "start_steps=9 and end_steps=4"),
        ((4, 0, 5), "start_steps=4 and end_steps=0"),
        ((4, 1, [5, 5]), r"round_steps=\[5, 5\]: give one positive number, or one for each of the 3 rounds"),
        ((4, 1, 0), "round_steps=0"),
        ((4, 1, [5, 0, 5]), r"round_steps=\[5, 0, 5\]"),
    ],
)
def test_rounds_that_are_none_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Rounds(*settings)
