"""Denoisers: prediction types, views under another schedule, precision, and frozen networks."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from oracle import MLP, SCHEDULES, Gaussian
from test_schedules import times
from torch import nn

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.frozen import Frozen, trainable_copy
from distill.schedules import RectifiedFlow, TrigFlow, VarianceExploding, VariancePreserving, per_sample

PREDICTIONS = ["x0", "eps", "v", "flow", "edm"]
PAIRS = list(itertools.permutations(SCHEDULES, 2))
MEAN, VARIANCE = torch.tensor([0.3, -0.7]), torch.tensor([0.2, 1.5])


class Recorder(nn.Module):
    """Returns a fixed answer and keeps what it was asked."""

    def __init__(self, answer: torch.Tensor | None = None):
        super().__init__()
        self.answer = answer

    def forward(self, x, time, cond, r=None):
        self.asked = (x, time, cond, r)
        return x if self.answer is None else self.answer


def noisy(name: str, count: int = 64, inside: float = 0.02) -> tuple[torch.Tensor, ...]:
    t = times(name, count, inside)
    x0, eps = torch.randn(2, count, 3, dtype=torch.float64)
    return SCHEDULES[name].add_noise(x0, eps, t), x0, eps, t


def by_hand(prediction: str, x0, eps, alpha, sigma, sigma_data: float = 0.5):
    """What each type predicts, from the papers' definitions."""
    if prediction == "edm":  # c_skip, c_out of Karras et al. 2206.00364, table 1, at the EDM sample x0 + s eps
        s = sigma / alpha
        c_skip, c_out = sigma_data**2 / (s**2 + sigma_data**2), s * sigma_data / (s**2 + sigma_data**2).sqrt()
        return (x0 - c_skip * (x0 + s * eps)) / c_out
    return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_invert(prediction, name):
    """A network that answers with the target gives back the data, and the target is the papers'."""
    x, x0, eps, t = noisy(name)
    denoiser = NetworkDenoiser(Recorder(), SCHEDULES[name], prediction)
    target = denoiser.raw_target(x0, eps, t)
    denoiser.network.answer = target
    torch.testing.assert_close(denoiser(x, t, {}), x0, rtol=0, atol=1e-10)
    alpha, sigma = (per_sample(scale(t), x) for scale in (SCHEDULES[name].alpha, SCHEDULES[name].sigma))
    torch.testing.assert_close(target, by_hand(prediction, x0, eps, alpha, sigma), rtol=0, atol=1e-10)
    torch.testing.assert_close(denoiser.raw(x, t, {}), target)


@pytest.mark.parametrize(("schedule", "prediction"), [(RectifiedFlow(), "flow"), (TrigFlow(), "v"), (RectifiedFlow(), "x0")])
def test_targets_are_finite_at_the_ends(schedule, prediction):
    """A law over times may draw either end exactly."""
    x0, eps = torch.randn(2, 2, 3)
    ends = torch.tensor([schedule.t_min, schedule.t_max])
    target = NetworkDenoiser(Recorder(), schedule, prediction).raw_target(x0, eps, ends)
    alpha, sigma = (torch.tensor(ends)[:, None] for ends in ([1.0, 0.0], [0.0, schedule.prior_scale]))
    torch.testing.assert_close(target, by_hand(prediction, x0, eps, alpha, sigma), rtol=0, atol=1e-6)


def test_edm_network_reads_what_edm_feeds_it():
    x, _, _, t = noisy("ve")
    denoiser = NetworkDenoiser(Recorder(), VarianceExploding(), "edm")
    denoiser(x, t, {})
    torch.testing.assert_close(denoiser.network.asked[0], x / per_sample((t**2 + 0.25).sqrt(), x))
    torch.testing.assert_close(denoiser.network.asked[1], t.log() / 4)


def test_conditions_and_second_time_reach_the_network():
    denoiser, labels = NetworkDenoiser(Recorder(), RectifiedFlow(3.0), "flow"), torch.tensor([1, 2])
    t, r = torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.5])
    denoiser(torch.zeros(2, 3), t, {"labels": labels}, r)
    _, time, cond, second = denoiser.network.asked
    assert cond["labels"] is labels
    torch.testing.assert_close(time, torch.tensor([750.0, 1000.0]))
    torch.testing.assert_close(second, torch.tensor([500.0, 750.0]))


# ------------------------------------------------------------------------------------------------------------- views


def shared_levels(*names: str) -> torch.Tensor:
    """Noise angles inside all of these schedules; with the noise end where each of them reaches it."""
    ends = [SCHEDULES[name].angle(torch.tensor([SCHEDULES[name].t_min, SCHEDULES[name].t_max])) for name in names]
    low, high = max(float(end[0]) for end in ends) + 1e-6, min(float(end[1]) for end in ends)
    return torch.linspace(low, high, 40, dtype=torch.float64)


@pytest.mark.parametrize(("own", "other"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_views_agree_with_the_oracle_of_their_schedule(own, other):
    """Between flows and TrigFlow at t = 1 too, where the signal is gone."""
    schedule = SCHEDULES[other]
    t = schedule.time_of_angle(shared_levels(own, other))
    x = torch.randn(40, 2, dtype=torch.float64) * schedule.scale(t)[:, None]
    view = Gaussian(SCHEDULES[own], MEAN, VARIANCE).under(schedule)
    torch.testing.assert_close(view(x, t, {}), Gaussian(schedule, MEAN, VARIANCE)(x, t, {}), rtol=0, atol=1e-8)


@pytest.mark.parametrize("own", ["vp-linear", "vp-cosine", "ve"])
def test_view_at_pure_noise_asks_for_the_end_at_its_own_scale(own):
    """At a flow's t = 1 a network that never saw pure noise is asked at its t_max, with the input's scale of there."""
    schedule, noise = SCHEDULES[own], torch.randn(5, 3, dtype=torch.float64)
    base = NetworkDenoiser(Recorder(), schedule, "x0")
    base.under(RectifiedFlow())(noise, torch.ones(5, dtype=torch.float64), {})
    x, time, _, _ = base.network.asked
    torch.testing.assert_close(time, schedule.network_time(torch.full((5,), schedule.t_max, dtype=torch.float64)))
    torch.testing.assert_close(x, noise * schedule.scale(torch.tensor(schedule.t_max, dtype=torch.float64)), rtol=1e-12, atol=0)


def test_views_do_not_pile_up_and_map_the_second_time():
    base = NetworkDenoiser(Recorder(), VarianceExploding(), "x0")
    twice = base.under(RectifiedFlow()).under(TrigFlow())
    assert twice.base is base and twice.under(base.schedule) is base
    base.under(RectifiedFlow())(torch.zeros(1, 3).double(), torch.tensor([0.8]).double(), {}, torch.tensor([0.5]).double())
    torch.testing.assert_close(base.network.asked[1], (torch.tensor([4.0]).log() / 4).double())
    torch.testing.assert_close(base.network.asked[3], torch.zeros(1).double())


@pytest.mark.parametrize(("own", "other"), [("vp-cosine", "trig"), ("ve", "rf"), ("rf-shift3", "vp-linear")])
def test_forward_mode_goes_through_a_view(own, other):
    schedule, t = SCHEDULES[other], times(other, 20, inside=0.1)
    view = Gaussian(SCHEDULES[own], MEAN, VARIANCE).under(schedule)
    exact = Gaussian(schedule, MEAN, VARIANCE)
    x = torch.randn(20, 2, dtype=torch.float64)
    tangents = torch.randn_like(x), torch.ones_like(t)
    ours = torch.func.jvp(lambda x, t: view(x, t, {}), (x, t), tangents)[1]
    theirs = torch.func.jvp(lambda x, t: exact(x, t, {}), (x, t), tangents)[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_forward_mode_through_a_view_is_finite_at_the_ends():
    view = NetworkDenoiser(MLP((2,), time_scale=1e-3), VariancePreserving(), "x0").under(RectifiedFlow())
    primals = torch.randn(2, 2), torch.tensor([0.0, 1.0])
    value, slope = torch.func.jvp(lambda x, t: view(x, t, {}), primals, (torch.zeros(2, 2), torch.ones(2)))
    assert bool(value.isfinite().all()) and bool(slope.isfinite().all())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float32_out_whatever_autocast_does_inside(prediction):
    denoiser = NetworkDenoiser(MLP((3,), time_scale=1e-3), RectifiedFlow(), prediction)
    x, t = torch.randn(64, 3), torch.linspace(0.05, 0.95, 64)
    full = denoiser(x, t, {})
    with torch.autocast("cpu", torch.bfloat16):
        assert denoiser.network(x, t, {}).dtype == torch.bfloat16
        mixed = denoiser(x, t, {})
        viewed = denoiser.under(VarianceExploding())(x, torch.ones(64), {})
    assert mixed.dtype == viewed.dtype == full.dtype == torch.float32
    # The skip connection is not rounded: the difference is that of the network alone.
    _, _, out = denoiser.coefficients(t)
    assert ((mixed - full).abs() / per_sample(out.abs().float(), x)).max() < 0.02


# ------------------------------------------------------------------------------------------------------------ frozen


class Owner(nn.Module):
    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.student, self.teacher = nn.Linear(2, 2), Frozen(teacher)


def test_frozen_is_not_seen():
    owner = Owner(nn.Linear(3, 3))
    assert {name for name, _ in owner.named_parameters()} == {"student.weight", "student.bias"} == set(owner.state_dict())
    assert len(list(owner.buffers())) == 0 and not any(p.requires_grad for p in owner.teacher.module.parameters())


def test_frozen_is_shared_by_deep_copies():
    owner = Owner(nn.Linear(3, 3))
    twin = copy.deepcopy(owner)
    assert twin.teacher.module is owner.teacher.module and twin.student is not owner.student


def test_frozen_moves_with_its_owner():
    owner = Owner(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert owner.double().teacher.module[0].weight.dtype == torch.float64
    assert owner.to(torch.float32).teacher.module[1].running_mean.dtype == torch.float32
    assert owner.to("meta").teacher.module[0].weight.device.type == "meta"


def test_frozen_stays_in_evaluation():
    owner = Owner(nn.Dropout(0.9)).train()
    assert owner.student.training and not owner.teacher.module.training
    torch.testing.assert_close(owner.teacher(torch.ones(100)), torch.ones(100))


def test_strict_load_still_reports_a_missing_student_key():
    owner, state = Owner(nn.Linear(3, 3)), Owner(nn.Linear(3, 3)).state_dict()
    owner.load_state_dict(state)
    del state["student.bias"]
    with pytest.raises(RuntimeError, match="student.bias"):
        owner.load_state_dict(state)


def test_trainable_copy_is_the_students_own():
    teacher: Denoiser = NetworkDenoiser(MLP((2,)), RectifiedFlow()).requires_grad_(False).eval()
    student = trainable_copy(teacher)
    assert student.training and not teacher.training
    for own, other in zip(student.parameters(), teacher.parameters(), strict=True):
        assert own.requires_grad and not other.requires_grad
        assert own.data_ptr() != other.data_ptr() and torch.equal(own, other)
