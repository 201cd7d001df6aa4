"""Averages: their recursion in closed form, decays, and what is and is not copied."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from distill.ema import EMA, CurriculumAveraging, DecayAveraging, HalfLifeAveraging, PowerFunctionAveraging
from distill.grids import SquareRootPoints


def layer(value: float) -> nn.Linear:
    module = nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module.double()


def averaged(averaging, values: list[float], images: int = 10) -> float:
    """What the average of a weight is after its values in turn, the first the initial one."""
    module = layer(values[0])
    ema = EMA(module, averaging)
    for step, value in enumerate(values[1:]):
        ema.update(layer(value), step, images)
    weights = ema.module.weight
    assert bool((weights == weights[0, 0]).all()) and bool((ema.module.bias == weights[0, 0]).all())
    return float(weights[0, 0])


def test_fixed_decay_is_a_geometric_sum():
    values = [5.0, 1.0, -2.0, 4.0, 0.5]
    exact = 0.9**4 * 5.0 + sum(0.1 * 0.9 ** (3 - step) * value for step, value in enumerate(values[1:]))
    assert averaged(DecayAveraging(0.9, warmup=False), values) == pytest.approx(exact, rel=1e-12)


def test_warmup_averages_over_fewer_at_first():
    decay = DecayAveraging(0.999).decay
    assert [decay(step, 10) for step in (0, 1, 8)] == [0.1, 2 / 11, 0.5]
    assert decay(8989, 10) < 0.999 and decay(8990, 10) == decay(10**6, 10) == 0.999
    assert averaged(DecayAveraging(0.999), [1.0, 0.0, 0.0]) == pytest.approx(0.1 * 2 / 11)


def test_half_life_halves():
    """Eight updates of 10 images are one half-life of 80: the first value's share is a half."""
    assert averaged(HalfLifeAveraging(80.0, None), [1.0, *[0.0] * 8]) == pytest.approx(0.5)
    assert averaged(HalfLifeAveraging(80.0, None), [1.0, *[0.0] * 4], images=20) == pytest.approx(0.5)


def test_half_life_ramps_with_the_images_seen():
    """EDM: half-life 0.05 times the images seen before this step; at the first there are none and nothing is kept."""
    decay = HalfLifeAveraging(500.0, 0.05).decay
    assert decay(0, 100) == 0.0
    assert decay(20, 100) == pytest.approx(0.5) and decay(40, 100) == pytest.approx(0.5**0.5)
    assert decay(100, 100) == decay(10**5, 100) == pytest.approx(0.5**0.2)


def test_curriculum_decay_of_consistency_training():
    """mu(k) = exp(s0 ln mu0 / (N(k) - 1)): N is 2 at the beginning and 151 at the end."""
    averaging = CurriculumAveraging(SquareRootPoints(800, 2, 150), 2, 0.9)
    assert averaging.decay(0, 1) == pytest.approx(math.exp(2 * math.log(0.9) / 1))
    assert averaging.decay(800, 1) == pytest.approx(0.9 ** (2 / 150))


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_power_function_has_the_papers_exponents(sigma_rel, gamma):
    """2312.02696, section 3.1; and by the law of ``p(t) = (gamma + 1) t^gamma`` on [0, 1], whose deviation is sigma_rel."""
    own = PowerFunctionAveraging(sigma_rel).gamma
    assert own == pytest.approx(gamma, abs=0.005)
    first, second = (own + 1) / (own + 2), (own + 1) / (own + 3)
    assert math.sqrt(second - first**2) == pytest.approx(sigma_rel, rel=1e-9)


def test_power_function_weighs_steps_by_a_power():
    """The share of the steps up to t among n: the product of the later decays telescopes to ``(t / n)^(gamma + 1)``."""
    averaging = PowerFunctionAveraging(0.1)
    power = averaging.gamma + 1
    shares = [(t / 6) ** power - ((t - 1) / 6) ** power for t in range(1, 7)]
    values = [3.0, -1.0, 4.0, 1.5, -9.0, 2.5]
    exact = sum(share * value for share, value in zip(shares, values, strict=True))
    assert averaged(averaging, [1e3, *values]) == pytest.approx(exact, rel=1e-12)
    assert averaged(PowerFunctionAveraging(0.28867), [1e3, *values]) == pytest.approx(sum(values) / 6, rel=1e-3)


def test_power_function_profile_has_its_width_at_every_length():
    for steps in (200, 5000):
        decays = [PowerFunctionAveraging(0.1).decay(step, 1) for step in range(steps)]
        share, mean, square = 1.0, 0.0, 0.0
        for step in reversed(range(steps)):
            weight, place = share * (1 - decays[step]), (step + 1) / steps
            share, mean, square = share * decays[step], mean + weight * place, square + weight * place**2
        assert share == 0 and math.sqrt(square - mean**2) == pytest.approx(0.1, rel=0.02)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.trained = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
        self.normalisation = nn.BatchNorm1d(4)


def test_frozen_parameters_are_shared_and_trained_ones_copied():
    student = Student()
    ema = EMA(student, DecayAveraging(0.5, warmup=False))
    assert ema.module.frozen.weight is student.frozen.weight
    assert ema.module.trained.weight is not student.trained.weight and not ema.module.trained.weight.requires_grad
    assert student.trained.weight.requires_grad
    before = student.trained.weight.detach().clone(), student.frozen.weight.clone()
    with torch.no_grad():
        student.trained.weight.add_(1.0)
        student.normalisation.running_mean.fill_(7.0)
    ema.update(student, 0, 1)
    torch.testing.assert_close(ema.module.trained.weight, before[0] + 0.5)
    assert torch.equal(student.frozen.weight, before[1]) and bool((ema.module.normalisation.running_mean == 7.0).all())


@pytest.mark.parametrize("keep", [True, False])
def test_kept_average_keeps_its_bits(keep):
    student = Student()
    ema = EMA(student, DecayAveraging(0.7, warmup=False))
    other, before, plain = Student(), copy.deepcopy(ema.state_dict()), copy.deepcopy(ema)
    ema.update(other, 0, 1, torch.tensor(keep))
    plain.update(other, 0, 1)
    same = torch.equal(ema.module.trained.weight, before["module.trained.weight"])
    assert same is keep
    if not keep:
        torch.testing.assert_close(ema.state_dict(), plain.state_dict())


def test_average_is_always_in_evaluation():
    ema = nn.ModuleDict({"ema": EMA(Student(), DecayAveraging())}).train()["ema"]
    assert not ema.module.training and not ema.module.normalisation.training


def test_missing_average_is_loud():
    ema = EMA(Student(), DecayAveraging())
    state = ema.state_dict()
    ema.load_state_dict(state)
    del state["module.trained.weight"]
    with pytest.raises(RuntimeError, match="module.trained.weight"):
        ema.load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: DecayAveraging(1.0), "value=1.0"),
        (lambda: HalfLifeAveraging(0.0), "half_life=0.0"),
        (lambda: HalfLifeAveraging(10.0, -1.0), "ramp=-1.0"),
        (lambda: CurriculumAveraging(SquareRootPoints(10), 0), "start=0"),
        (lambda: PowerFunctionAveraging(0.0), "sigma_rel=0.0"),
        (lambda: PowerFunctionAveraging(0.3), "sigma_rel=0.3"),
    ],
)
def test_bad_settings_are_named(make, key):
    with pytest.raises(ValueError, match=key):
        make()
