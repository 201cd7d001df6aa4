"""The sampler of students that are trained at given times."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import SHAPE, gaussian
from oracle import SCHEDULES
from torch import Tensor

from distill.denoiser import Denoiser
from distill.few_step import FewStepSampler
from distill.grids import UniformGrid
from distill.noise import SeededNoise
from distill.samplers import RenoiseSampler
from distill.schedules import RectifiedFlow, VariancePreserving


class Recorder(Denoiser):
    """Keeps what it is called with."""

    def __init__(self, base: Denoiser):
        super().__init__()
        self.base = base
        self.describe_as(base)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Any, t: Any, cond: Any, r: Any = None) -> Any:
        self.seen.append((x, t))
        return self.base(x, t, cond)


def noise(count: int = 4) -> tuple[Tensor, SeededNoise]:
    fresh = SeededNoise(3, range(count), SHAPE)
    return fresh.draw(), fresh


@pytest.mark.parametrize("name", SCHEDULES)
def test_sigma_init_is_the_same_noise_level_in_any_schedule(name: str):
    """The first input is what remains of ``x_t`` without data at ``sigma / alpha = 2.5``: ``sigma(t) z``."""
    schedule = SCHEDULES[name]
    recorder, (unit, fresh) = Recorder(gaussian(schedule)), noise()
    FewStepSampler(sigmas=[2.5])(recorder, unit, {}, 1, fresh)
    (x, t), *rest = recorder.seen
    assert not rest
    assert torch.allclose(schedule.nsr(t.double()), torch.tensor(2.5, dtype=torch.float64), rtol=1e-5)
    assert torch.allclose(x, schedule.sigma(t)[:, None, None, None] * unit, rtol=1e-6)


def test_published_starts():
    """SiD-LSG: index 625 with standard deviation sqrt(1 - 0.138); DMD2's SDXL: index 399 with unit noise; EDM: 2.5 z."""
    sd = VariancePreserving("scaled_linear", 0.00085, 0.012)
    unit = torch.ones(1, *SHAPE)
    for sampler, schedule, time, scale in [
        (FewStepSampler(times=[625.0]), sd, 625.0, math.sqrt(1 - 0.138)),
        (FewStepSampler(times=[399.0], start="prior"), sd, 399.0, 1.0),
        (FewStepSampler(times=[999.0], start="prior"), sd, 999.0, 1.0),
        (FewStepSampler(sigmas=[2.5]), SCHEDULES["ve"], 2.5, 2.5),
        (FewStepSampler(sigmas=[80.0], start="prior"), SCHEDULES["ve"], 80.0, 80.0),
    ]:
        x, t = sampler.simulate(gaussian(schedule), unit, {}, 0)
        assert float(t) == pytest.approx(time, rel=1e-6) and float(x.mean()) == pytest.approx(scale, abs=2e-4)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_are_the_first_times_and_the_sampler_of_consistency_models(steps: int):
    schedule, times = RectifiedFlow(), [1.0, 0.75, 0.5]
    sampler, recorder = FewStepSampler(times=times), Recorder(gaussian(schedule))
    x0 = sampler(recorder, *_pair(noise()), steps)
    assert [float(t[0]) for _, t in recorder.seen] == times[:steps]
    plain = RenoiseSampler(UniformGrid(), {steps: times[:steps]})
    assert torch.allclose(x0, plain(gaussian(schedule), *_pair(noise()), steps), rtol=0, atol=1e-7)


def _pair(drawn: tuple[Tensor, SeededNoise]) -> Any:
    """Arguments of a sampler up to ``steps``; the noises in between are the global generator's."""
    torch.manual_seed(5)
    return drawn[0], {}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_simulation_is_all_of_sampling_but_the_last_call(index: int):
    sampler, denoiser = FewStepSampler(times=[0.9, 0.6, 0.3]), gaussian(RectifiedFlow())
    unit, fresh = noise()
    x, t = sampler.simulate(denoiser, unit, {}, index, fresh)
    unit, fresh = noise()
    sampled = sampler(denoiser, unit, {}, index + 1, fresh)
    assert torch.equal(denoiser(x, t, {}), sampled) and float(t[0]) == pytest.approx([0.9, 0.6, 0.3][index])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "times=None and sigmas=None: give one"),
        ({"times": [1.0], "sigmas": [2.5]}, "give one of the two"),
        ({"times": []}, "times=.*: give at least one"),
        ({"sigmas": [1.0, 1.0]}, "sigmas=.*each lower than the one before"),
    ],
)
def test_settings_that_contradict_are_named(settings: Any, words: str):
    with pytest.raises(ValueError, match=words):
        FewStepSampler(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"times": [1.5]}, "sampler.times=.*up to 1.0"),
        ({"times": [0.5, 0.0]}, "sampler.times=.*above 0.0"),
        ({"sigmas": [2.5, 0.0]}, "above 0.0"),
    ],
)
def test_times_outside_of_the_schedule_are_named(settings: Any, words: str):
    with pytest.raises(ValueError, match=words):
        FewStepSampler(**settings).times_in(RectifiedFlow())
    with pytest.raises(ValueError, match="give some that it has"):
        FewStepSampler(sigmas=[100.0]).times_in(SCHEDULES["ve"])


def test_more_steps_than_trained_times_are_refused():
    with pytest.raises(ValueError, match="steps=3: this student was trained for 2 of them at most; give no more"):
        FewStepSampler(times=[0.9, 0.5])(gaussian(RectifiedFlow()), noise()[0], {}, 3)
