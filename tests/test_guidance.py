"""Classifier-free guidance: the formula, the interval, scales of each sample, and what it costs."""

from __future__ import annotations

import pytest
import torch
from helpers import small
from oracle import SCHEDULES, Mixture

from distill.denoiser import Denoiser
from distill.guidance import ClassifierFreeGuidance
from distill.schedules import NoiseSchedule, RectifiedFlow, VarianceExploding, per_sample
from distill.types import label_conditions

MEANS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]])


class Counted(Mixture):
    """The mixture's oracle; keeps the rows of each call and the last conditions."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__(schedule, MEANS, 0.4)
        self.rows: list[int] = []

    def forward(self, x, t, cond, r=None):
        self.rows.append(len(x))
        self.cond = cond
        return super().forward(x, t, cond)


def setting(schedule: NoiseSchedule = RectifiedFlow()):
    """A counted denoiser, a batch at four noise levels, its conditions and its null conditions."""
    t = schedule.time_of_nsr(torch.tensor([0.25, 0.7, 1.5, 4.0], dtype=torch.float64))
    x = torch.randn(4, 2, dtype=torch.float64) * schedule.scale(t)[:, None]
    return Counted(schedule), x, t, *label_conditions(torch.tensor([0, 1, 2, 0]), 3)


def test_classes_without_a_null_class_are_not_guided():
    """Class 2 of two would be read from beyond the table of embeddings."""
    denoiser = small(num_classes=2)
    denoiser.null_class = False
    cond, null = label_conditions(torch.arange(2), 2)
    ClassifierFreeGuidance(1.0)(denoiser, null)
    with pytest.raises(ValueError, match="guidance.scale=2.0.*no null class"):
        ClassifierFreeGuidance(2.0)(denoiser, null)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), RectifiedFlow(3.0), VarianceExploding()], ids=repr)
def test_formula_by_two_separate_evaluations_in_one_forward(schedule):
    denoiser, x, t, cond, null = setting(schedule)
    guided = ClassifierFreeGuidance(3.5)(denoiser, null)(x, t, cond)
    assert denoiser.rows == [8]
    with_class, without = denoiser(x, t, cond), denoiser(x, t, null)
    torch.testing.assert_close(guided, without + 3.5 * (with_class - without), rtol=0, atol=1e-12)
    assert (with_class - without).abs().max() > 0.1


def test_each_sample_may_have_its_scale():
    denoiser, x, t, cond, null = setting()
    scale = torch.tensor([0.0, 1.0, 2.0, 7.5])
    guided = ClassifierFreeGuidance(scale)(denoiser, null)(x, t, cond)
    assert denoiser.rows == [8]
    with_class, without = denoiser(x, t, cond), denoiser(x, t, null)
    torch.testing.assert_close(guided, without + scale[:, None] * (with_class - without), rtol=0, atol=1e-12)


def test_scale_1_is_the_denoiser_itself():
    denoiser, x, t, cond, null = setting()
    unguided = ClassifierFreeGuidance(1.0)(denoiser, null)
    assert unguided is denoiser and ClassifierFreeGuidance(1.0)(denoiser, {}) is denoiser
    unguided(x, t, cond)
    assert denoiser.rows == [4]


@pytest.mark.parametrize(
    ("low", "high", "guided"),
    [
        (None, None, [True, True, True, True]),
        (1.0, None, [False, False, True, True]),
        (None, 1.0, [True, True, False, False]),
        (0.25, 1.0, [False, True, False, False]),
        (0.2, 2.5, [True, True, True, False]),
    ],
)
def test_interval_is_open_below_and_closed_above(low, high, guided):
    rule = ClassifierFreeGuidance(3.0, low, high)
    levels = torch.tensor([0.25, 1.0, 1.5, 4.0], dtype=torch.float64)
    assert rule.scale_at(levels).tolist() == [3.0 if inside else 1.0 for inside in guided]


@pytest.mark.parametrize("name", SCHEDULES)
def test_interval_is_in_noise_to_signal_ratio_on_every_schedule(name):
    schedule = SCHEDULES[name]
    oracle = Mixture(schedule, MEANS, 0.4)
    t = schedule.time_of_nsr(torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=torch.float64))
    x = torch.randn(4, 2, dtype=torch.float64) * schedule.scale(t)[:, None]
    cond, null = label_conditions(torch.tensor([0, 1, 2, 0]), 3)
    guided = ClassifierFreeGuidance(2.0, 0.3, 5.0)(oracle, null)(x, t, cond)
    scale = per_sample(torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=torch.float64), x)
    with_class, without = oracle(x, t, cond), oracle(x, t, null)
    torch.testing.assert_close(guided, without + scale * (with_class - without), rtol=0, atol=1e-12)


def test_pure_noise_lies_above_every_interval():
    denoiser, x, _, cond, null = setting()
    t = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(ClassifierFreeGuidance(3.0, None, 80.0)(denoiser, null)(x, t, cond), denoiser(x, t, cond))


def test_conditions_without_a_null_are_shared():
    denoiser, x, t, cond, null = setting()
    strength = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ClassifierFreeGuidance(2.0)(denoiser, null)(x, t, {**cond, "strength": strength})
    assert denoiser.cond["strength"].tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert denoiser.cond["labels"].tolist() == [0, 1, 2, 0, 3, 3, 3, 3]


def test_second_time_is_given_to_both_halves():
    class Second(Denoiser):
        schedule = RectifiedFlow()

        def forward(self, x, t, cond, r=None):
            return x * r[:, None]

    x, r = torch.ones(2, 1), torch.tensor([0.1, 0.2])
    cond, null = label_conditions(torch.tensor([0, 1]), 3)
    guided = ClassifierFreeGuidance(2.0)(Second(), null)(x, torch.tensor([0.5, 0.6]), cond, r)
    torch.testing.assert_close(guided, r[:, None])


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="sigma_low=2.0"):
        ClassifierFreeGuidance(2.0, 2.0, 1.0)
    with pytest.raises(ValueError, match="guidance.scale=2.0"):
        ClassifierFreeGuidance(2.0)(Mixture(RectifiedFlow(), MEANS, 0.4), {})
