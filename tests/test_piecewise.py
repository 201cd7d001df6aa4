"""Piecewise linear flows: windows, the three predictions, and sampling in as many steps as windows."""

from __future__ import annotations

import pytest
import torch
from chords import Chords
from helpers import SHAPE, gaussian, small
from oracle import SCHEDULES

from distill.denoiser import NetworkDenoiser
from distill.export.schedulers import choose_scheduler
from distill.export.table import trace
from distill.grids import UniformGrid
from distill.piecewise import LEAST_LEFT, PiecewiseLinear, PiecewiseSampler
from distill.samplers import OdeSampler
from distill.schedules import RectifiedFlow, VariancePreserving
from distill.solvers import DDIM, Euler

SD = SCHEDULES["vp-scaled"]
NOISES = ("ddim_eps", "diff_eps")
CASES = [(name, "velocity") for name in SCHEDULES]
CASES += [(name, kind) for name in ("vp-linear", "vp-scaled", "ve") for kind in NOISES]


def every(time: float, count: int = 6) -> torch.Tensor:
    return torch.full((count,), time, dtype=torch.float64)


def samples(seed: int, count: int = 6) -> torch.Tensor:
    return torch.randn(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- windows


def test_windows_are_equal_and_a_time_is_above_the_end_of_its_own():
    flow = PiecewiseLinear(4)
    assert flow.edges(RectifiedFlow()).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert flow.edges(SD).tolist() == [999, 749.25, 499.5, 249.75, 0]
    s, e = flow.window(RectifiedFlow(), torch.tensor([1.0, 0.76, 0.75, 0.74, 0.26, 0.25, 1e-6, 0.0]))
    assert s.tolist() == [1, 1, 0.75, 0.75, 0.5, 0.25, 0.25, 0.25]
    assert e.tolist() == [0.75, 0.75, 0.5, 0.5, 0.25, 0, 0, 0]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("windows", [1, 3, 7, 49])
def test_every_edge_in_float32_starts_a_window(schedule, windows):
    flow = PiecewiseLinear(windows)
    edges = flow.edges(schedule).float()
    s, e = flow.window(schedule, edges[:-1])
    assert torch.equal(s, edges[:-1]) and torch.equal(e, edges[1:])
    assert edges[0] == torch.tensor(schedule.t_max) and edges[-1] == torch.tensor(schedule.t_min)


def test_drawn_times_are_uniform_and_strictly_inside_their_windows():
    flow, schedule = PiecewiseLinear(5), SCHEDULES["ve"]
    torch.manual_seed(0)
    c, s, e = flow.draw(100_000, schedule)
    left = (c - e) / (s - e)
    assert bool((c <= s).all()) and float(left.min()) > 0.9 * LEAST_LEFT and float(left.max()) > 0.9999
    assert all(torch.equal(*pair) for pair in zip((s, e), flow.window(schedule, c)))
    shares = torch.histc((c - schedule.t_min) / (schedule.t_max - schedule.t_min), 20, 0, 1) / len(c)
    torch.testing.assert_close(shares, torch.full((20,), 0.05), rtol=0, atol=0.004)  # 5.8 standard errors


# --------------------------------------------------------------------------------------------------------- predictions


def test_coefficients_are_the_papers_on_ddpms_schedule():
    s, e = torch.tensor([999.0, 749.25, 249.75]), torch.tensor([749.25, 499.5, 0.0])
    bar_s, bar_e = (SD.alpha(t.double()) ** 2 for t in (s, e))
    gamma = (bar_s / bar_e).sqrt()
    expected = {
        "ddim_eps": ((bar_e / bar_s).sqrt(), (1 - bar_e).sqrt() - (bar_e * (1 - bar_s) / bar_s).sqrt()),
        "diff_eps": (1 / gamma, -(1 - gamma**2).sqrt() / gamma),
        "velocity": (torch.ones(3).double(), (e - s).double() / 999),
    }
    for kind, values in expected.items():
        torch.testing.assert_close(PiecewiseLinear(4, kind).coefficients(SD, s, e), values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["vp-scaled", "ve"])
def test_noises_are_those_that_ddim_keeps_and_that_noising_adds(name):
    schedule, x_s, noise = SCHEDULES[name], samples(0), samples(1)
    s, e = PiecewiseLinear(4).window(schedule, every(0.6 * schedule.t_max))

    class Kept(NetworkDenoiser):
        def raw(self, x, t, cond, r=None):
            return noise

    x_e = DDIM().step(Kept(torch.nn.Identity(), schedule, "eps"), x_s, s, e, {})
    torch.testing.assert_close(PiecewiseLinear(4, "ddim_eps").target(schedule, x_s, x_e, s, e), noise, rtol=0, atol=1e-9)
    gain = schedule.alpha(s[:1]) / schedule.alpha(e[:1])
    added = (schedule.sigma(s[:1]) ** 2 - (gain * schedule.sigma(e[:1])) ** 2).sqrt()
    x_e = (x_s - added * noise) / gain
    torch.testing.assert_close(PiecewiseLinear(4, "diff_eps").target(schedule, x_s, x_e, s, e), noise, rtol=0, atol=1e-9)


def test_velocity_is_the_chords_in_shares_of_the_schedules_range():
    """On a flow nothing but the chord's velocity, which is what the student's own flow velocity is held to."""
    x_s, x_e, c = samples(0), samples(1), every(0.6)
    flow, schedule = PiecewiseLinear(4), RectifiedFlow()
    torch.testing.assert_close(flow.target(schedule, x_s, x_e, every(0.75), every(0.5)), (x_e - x_s) / -0.25)
    torch.testing.assert_close(flow.prediction(schedule, x_s, x_e, c), (x_s - x_e) / 0.6)
    torch.testing.assert_close(flow.target(SD, x_s, x_e, every(499.5), every(249.75)), (x_e - x_s) / -0.25)
    torch.testing.assert_close(flow.prediction(SD, x_s, x_e, every(300.0)), 999 * SD.velocity(x_s, x_e, every(300.0)))


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("name, kind", CASES)
def test_round_trip_from_any_point_of_a_chord(name, kind, tau):
    """The target at x_c gives x_e back; on all four windows at once."""
    schedule, flow = SCHEDULES[name], PiecewiseLinear(4, kind)
    s, e = flow.edges(schedule)[:-1], flow.edges(schedule)[1:]
    x_s, x_e, c = samples(2, 4), samples(3, 4), s + tau * (e - s)
    x_c = x_s + tau * (x_e - x_s)
    found = flow.window_end(schedule, x_c, flow.target(schedule, x_s, x_e, s, e), c, s, e)
    torch.testing.assert_close(found, x_e, rtol=0, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("steps", [4, 6, 8, 11])
@pytest.mark.parametrize("name, kind", CASES)
def test_exact_student_lands_on_the_end_of_the_teachers_flow(name, kind, steps):
    """In as many steps as windows already, and in more: the chords of Gaussian data do not cross."""
    schedule, sampler = SCHEDULES[name], PiecewiseSampler(4, kind)
    teacher, noise = gaussian(schedule), samples(4)
    found = sampler(Chords(teacher, sampler.flow), noise, {}, steps)
    exact = teacher.flow(schedule.prior_scale * noise, every(schedule.t_max), every(schedule.t_min))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)
    wrong = sampler(Chords(teacher, sampler.flow, 0.9), noise, {}, steps)
    assert (wrong - exact).abs().max() > 1e-3


def test_what_is_at_the_last_index_is_the_sample():
    """As published: the noise of index 0 stays."""
    sampler, noise, teacher = PiecewiseSampler(4, "diff_eps"), samples(5, 500), gaussian(SD)
    found = sampler(Chords(teacher, sampler.flow), noise, {}, 4)
    spread = [(SD.alpha(t) ** 2 * teacher.variance + SD.sigma(t) ** 2).sqrt() for t in (every(999.0)[0], every(0.0)[0])]
    torch.testing.assert_close(found.std(0), noise.std(0) * spread[1] / spread[0])
    assert float((spread[1] / teacher.variance.sqrt()).max()) > 1.005, "there is some"


def test_steps_are_spread_evenly_and_the_noisier_windows_have_one_more():
    sampler, schedule = PiecewiseSampler(4), RectifiedFlow()
    assert sampler.times(schedule, 4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert sampler.times(schedule, 6).tolist() == [1, 0.875, 0.75, 0.625, 0.5, 0.25, 0]
    assert sampler.times(schedule, 8).tolist() == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]


@pytest.mark.parametrize("steps", [4, 7])
def test_a_step_is_one_evaluation_in_float32_too(steps):
    seen = []

    class Counted(Chords):
        def forward(self, x, t, cond, r=None):
            assert x.dtype == t.dtype == torch.float32 and x.shape[1:] == SHAPE
            seen.append(float(t[0]))
            return super().forward(x, t, cond, r)

    sampler, teacher = PiecewiseSampler(3), gaussian(RectifiedFlow())
    noise = samples(6).float()
    found = sampler(Counted(teacher, sampler.flow), noise, {}, steps)
    assert seen == pytest.approx(sampler.times(RectifiedFlow(), steps)[:-1].tolist())
    torch.testing.assert_close(found, teacher.to_data(noise, torch.ones(6)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [4, 8])
def test_of_a_flows_velocity_it_is_eulers_method_on_a_uniform_grid(steps):
    student, noise = small(), samples(7).float()
    found, euler = (sampler(student, noise, {}, steps) for sampler in (PiecewiseSampler(4), OdeSampler(Euler(), UniformGrid())))
    torch.testing.assert_close(found, euler, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "schedule, prediction, kind, scheduler",
    [
        (RectifiedFlow(), "flow", "velocity", "FlowMatchEulerDiscreteScheduler"),
        (SD, "eps", "ddim_eps", "StudentScheduler"),
        (SD, "eps", "diff_eps", "StudentScheduler"),
    ],
)
def test_exports_by_diffusers_where_its_scheduler_does_the_same(schedule, prediction, kind, scheduler):
    student = small(schedule, prediction)
    tables = {steps: trace(student, PiecewiseSampler(4, kind), steps) for steps in (4, 6)}
    found = choose_scheduler(student, tables, ("timesteps", "sigmas"))
    assert type(found.scheduler).__name__ == scheduler
    if scheduler.startswith("Flow"):
        assert found.calls[4]["sigmas"] == pytest.approx([1, 0.75, 0.5, 0.25])
        assert found.calls[6]["sigmas"] == pytest.approx([1, 0.875, 0.75, 0.625, 0.5, 0.25])


# ------------------------------------------------------------------------------------------------------------- bad input


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="windows=0: give at least one"):
        PiecewiseLinear(0)
    with pytest.raises(ValueError, match="steps=3: the flow has 4 windows"):
        PiecewiseSampler(4)(small(), torch.zeros(1, *SHAPE), {}, 3)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("name", ["rf", "rf-shift3", "trig"])
def test_noises_need_signal_at_the_start(name, kind):
    with pytest.raises(ValueError, match=f"parameterisation='{kind}'.*without signal.*velocity"):
        PiecewiseSampler(4, kind)(gaussian(SCHEDULES[name]), samples(0), {}, 4)
    PiecewiseLinear(4, kind).check(VariancePreserving("cosine"))  # alpha is 5e-5 there
