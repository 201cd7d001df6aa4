"""Laws of jumps, the maps to the time between, and the weight of inductive moment matching."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import SCHEDULES

from distill.jump_times import Decrement, JumpTimes, LogNormalJumps, UniformJumps
from distill.schedules import NoiseSchedule, RectifiedFlow, VarianceExploding
from distill.weights import SigmoidWeight

COUNT = 40_000


def high(schedule: NoiseSchedule) -> float:
    """A time near the noise end, with signal left."""
    return schedule.t_min + 0.994 * (schedule.t_max - schedule.t_min)


@pytest.mark.parametrize("law", [UniformJumps, LogNormalJumps])
@pytest.mark.parametrize("name", SCHEDULES)
def test_jumps_go_down_within_their_ends(law, name):
    schedule = SCHEDULES[name]
    t, s = law(high=high(schedule)).sample(2000, schedule)
    assert bool((s <= t).all()) and float(s.min()) >= schedule.t_min and float(t.max()) <= high(schedule)
    assert t.dtype == s.dtype == torch.float32 and float((t - s).mean()) > 0.05 * float((t - schedule.t_min).mean())


def test_uniform_jumps_are_uniform_to_t_and_from_there_to_s():
    torch.manual_seed(0)
    t, s = UniformJumps(0.1, 0.9).sample(COUNT, RectifiedFlow())
    for share in ((t - 0.1) / 0.8, (s - 0.1) / (t - 0.1)):
        ranks = share.sort().values
        assert (ranks - torch.linspace(0, 1, COUNT)).abs().max() < 1.63 / COUNT**0.5  # Kolmogorov-Smirnov, 1 percent


def test_log_normal_jumps_are_truncated_at_both_ends_and_at_t():
    torch.manual_seed(0)
    schedule = RectifiedFlow()
    t, s = LogNormalJumps(-1.1, 2.0, 0.05, 0.9).sample(COUNT, schedule)

    def mass(time: torch.Tensor) -> torch.Tensor:
        return torch.special.ndtr((schedule.nsr(time.double()).log() + 1.1) / 2.0)

    bottom, top = (float(mass(torch.tensor(end))) for end in (0.05, 0.9))
    for share in ((mass(t) - bottom) / (top - bottom), (mass(s) - bottom) / (mass(t) - bottom)):
        assert (share.sort().values - torch.linspace(0, 1, COUNT)).abs().max() < 1.63 / COUNT**0.5


@pytest.mark.parametrize(
    ("law", "schedule", "words"),
    [
        (UniformJumps(), RectifiedFlow(), "high=1.0 of RectifiedFlow.*noise without signal; give less"),
        (UniformJumps(0.5, 0.2), RectifiedFlow(), "low=0.5, high=0.2: give times of RectifiedFlow"),
        (UniformJumps(0.0, 0.9), VarianceExploding(), "low=0.0, high=0.9: give times of VarianceExploding"),
    ],
)
def test_ends_that_are_no_ends_are_named(law: JumpTimes, schedule, words):
    with pytest.raises(ValueError, match=words):
        law.sample(3, schedule)


# ------------------------------------------------------------------------------------------------------------- r(t, s)


def test_the_ratio_falls_by_a_constant_down_to_s():
    """The paper's: eta_r = eta_t - (eta_max - eta_min) / 2^k, eta = t / (1 - t)."""
    t, s = torch.tensor([0.994, 0.9, 0.5, 0.5, 0.02]), torch.tensor([0.1, 0.1, 0.1, 0.49999, 0.0])
    ends = (0.0, 0.994)
    step = 0.994 / 0.006 / 2**12
    eta = (t / (1 - t)).double() - step
    expected = (eta / (1 + eta)).float().maximum(s)
    found = Decrement(12)(t, s, ends, RectifiedFlow())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found[3] == s[3] and found[4] == s[4] and bool((found[:3] > s[:3]).all()) and bool((found < t).all())


def test_in_time_steps_are_equal():
    t, s = torch.tensor([0.8, 0.5, 0.11]), torch.tensor([0.1, 0.49, 0.1])
    found = Decrement(3, "time")(t, s, (0.0, 0.8), RectifiedFlow())
    torch.testing.assert_close(found, torch.tensor([0.7, 0.49, 0.1]))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("unit", ["nsr", "time"])
def test_r_lies_between_on_every_schedule(name, unit):
    torch.manual_seed(0)
    schedule, law = SCHEDULES[name], UniformJumps(high=high(SCHEDULES[name]))
    t, s = law.sample(1000, schedule)
    for k in (0, 4, 40):
        r = Decrement(k, unit)(t, s, law.ends(schedule), schedule)
        assert bool((s <= r).all()) and bool((r <= t).all())
    assert Decrement(0, unit)(t, s, law.ends(schedule), schedule).equal(s)  # all the way at once


def test_a_negative_k_is_refused():
    with pytest.raises(ValueError, match="k=-1: give 0 or more"):
        Decrement(-1)


# -------------------------------------------------------------------------------------------------------------- weight


@pytest.mark.parametrize(("a", "b"), [(2.0, 4.0), (1.0, 5.0)])
def test_the_weight_is_the_papers_on_its_flow(a, b):
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    log_snr = 2 * ((1 - t) / t).log()
    expected = 0.5 * torch.sigmoid(b - log_snr) * 2 / (t * (1 - t)) * (1 - t) ** a / ((1 - t) ** 2 + t**2)
    torch.testing.assert_close(SigmoidWeight(a, b)(RectifiedFlow(), t, t), expected)
    ends = SigmoidWeight(a, b)(RectifiedFlow(), torch.tensor([0.0, 1.0]), torch.zeros(2))
    assert ends[0] == 0 and ends.isfinite().all()


@pytest.mark.parametrize(("a", "b"), [(2.0, 4.0), (1.0, 5.0)])
def test_the_weight_is_the_same_on_a_flow_of_equal_ratios(a, b):
    """With noise of deviation 0.5, the paper's x_t is that of the flow of shift 0.5 up to a scale."""
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    torch.testing.assert_close(SigmoidWeight(a, b, 0.5)(RectifiedFlow(0.5), t, t), SigmoidWeight(a, b)(RectifiedFlow(), t, t))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_weight_on_every_schedule_by_differences_of_the_ratio(name):
    """sigma multiplies noise of deviation sigma_data: 0.5 has twice the paper's sigma."""
    schedule = SCHEDULES[name]
    t = torch.linspace(schedule.t_min, schedule.t_max, 12, dtype=torch.float64)[1:-1]
    small = 1e-6 * (schedule.t_max - schedule.t_min)

    def log_snr(time: torch.Tensor) -> torch.Tensor:
        return -2 * (schedule.nsr(time) / 0.5).log()

    alpha, sigma = schedule.alpha(t), schedule.sigma(t) / 0.5
    slope = (log_snr(t - small) - log_snr(t + small)) / (2 * small)
    expected = 0.5 * torch.sigmoid(4 - log_snr(t)) * slope * alpha**2 / (alpha**2 + sigma**2)
    torch.testing.assert_close(SigmoidWeight(sigma_data=0.5)(schedule, t, t), expected, rtol=1e-5, atol=0)
    assert math.isfinite(float(expected.sum()))
