"""Anchored guidance: nearer to the unguided trajectory than plain guidance, sample by sample, and exact where it must be."""

from __future__ import annotations

import pytest
import torch
from oracle import SCHEDULES, Gaussian, Mixture
from torch import Tensor, nn

from distill.anchored import AnchoredGuidance
from distill.denoiser import Denoiser
from distill.grids import KarrasGrid, UniformGrid
from distill.guidance import ClassifierFreeGuidance
from distill.noise import SeededNoise
from distill.samplers import OdeSampler
from distill.schedules import NoiseSchedule, RectifiedFlow
from distill.solvers import DDIM, DPMSolver2M, Euler, Heun
from distill.types import Cond

SAMPLERS = {
    "euler": (OdeSampler(Euler(), UniformGrid()), "rf"),
    "heun": (OdeSampler(Heun(), KarrasGrid()), "ve"),
    "dpm": (OdeSampler(DPMSolver2M(), KarrasGrid()), "ve"),
    "ddim": (OdeSampler(DDIM(), UniformGrid()), "trig"),
}
STEPS = 4


class Prompted(Denoiser):
    """The exact denoiser of a Gaussian whose mean is a smooth function of the first of two tokens of ``prompt_embeds``."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.schedule, self.shape, self.calls = schedule, (2,), 0
        self.oracle = Gaussian(schedule, torch.zeros(2), torch.tensor([0.3, 0.1]))
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.4], [-0.3, 0.8]]))

    def forward(self, x: Tensor, t: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        self.calls += 1
        mean = torch.tanh(cond["prompt_embeds"][:, 0] @ self.weight)
        centred = x - self.schedule.alpha(t)[:, None] * mean
        return mean + self.oracle(centred, t, {}).to(x.dtype)


def setting(count: int = 5, name: str = "euler"):
    """A denoiser, null conditions, sampler, noise and conditions; a size is the same in both."""
    sampler, schedule = SAMPLERS[name]
    draws = SeededNoise(3, range(count), (2, 2))
    cond = {"prompt_embeds": draws.draw(), "size": torch.full((count, 1), 8.0), "labels": torch.arange(count)}
    null = {"prompt_embeds": torch.zeros(count, 2, 2), "size": torch.full((count, 1), 8.0), "labels": torch.arange(count)}
    return Prompted(SCHEDULES[schedule]), null, sampler, SeededNoise(0, range(count), (2,)).draw(), cond


def plain(scale: float, denoiser, null, sampler, noise, cond) -> Tensor:
    with torch.no_grad():
        return sampler(ClassifierFreeGuidance(scale)(denoiser, null), noise, cond, STEPS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_iterations_it_is_plain_guidance_and_at_scale_1_none(name: str) -> None:
    parts = setting(name=name)
    assert torch.equal(AnchoredGuidance(3.0, iterations=0).sample(*parts, STEPS), plain(3.0, *parts))
    assert torch.equal(AnchoredGuidance(1.0).sample(*parts, STEPS), plain(1.0, *parts))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_lie_nearer_to_the_unguided_ones_the_longer_it_searches(name: str) -> None:
    """Every sample, and with a search that is long enough the unguided one itself, from which scale 3 is far."""
    parts = setting(name=name)
    pivot, off = plain(1.0, *parts), []
    for iterations in (0, 10, 150):
        settings = AnchoredGuidance(3.0, iterations, learning_rate=0.05, tolerance=1e-10)
        off.append((settings.sample(*parts, STEPS) - pivot).norm(dim=1))
    assert off[0].min() > 0.1 and bool((off[1] < off[0]).all()) and off[2].max() < 1e-3


def test_each_step_descends_to_the_point_of_the_unguided_trajectory() -> None:
    """One Euler step of one iteration by hand: Adam's first step is the learning rate times the gradient's sign."""
    denoiser, null, sampler, noise, cond = setting()
    mean = torch.tanh(cond["prompt_embeds"][:, 0] @ denoiser.weight).detach()
    leaf = null["prompt_embeds"].clone().requires_grad_()
    guided = ClassifierFreeGuidance(3.0)(denoiser, null | {"prompt_embeds": leaf})
    end = torch.ones(len(noise))
    assert torch.allclose(denoiser(noise, end, cond), mean)
    (guided(noise, end, cond) - mean).square().sum().backward()
    found = null | {"prompt_embeds": null["prompt_embeds"] - 0.1 * leaf.grad.sign()}
    expected = ClassifierFreeGuidance(3.0)(denoiser, found)(noise, end, cond)
    got = AnchoredGuidance(3.0, iterations=1, learning_rate=0.1).sample(denoiser, null, sampler, noise, cond, 1)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)


def test_nothing_that_was_given_is_changed() -> None:
    denoiser, null, sampler, noise, cond = setting()
    kept = {key: value.clone() for key, value in null.items()}, {key: value.clone() for key, value in cond.items()}
    samples = AnchoredGuidance(3.0).sample(denoiser, null, sampler, noise, cond, STEPS)
    assert all(torch.equal(kept[0][key], null[key]) and torch.equal(kept[1][key], cond[key]) for key in cond)
    assert denoiser.weight.grad is None and not samples.requires_grad
    one = {key: value[:1] for key, value in null.items() if key != "labels"}
    shared = AnchoredGuidance(3.0).sample(denoiser, one, sampler, noise, cond, STEPS)  # one row for all
    assert torch.equal(shared, samples)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """With a tolerance at which some stop early; the third is given no prompt, so that its conditions do not differ."""
    denoiser, null, sampler, noise, cond = setting(6)
    cond["prompt_embeds"][2] = 0
    settings = AnchoredGuidance(3.0, iterations=30, learning_rate=0.05, tolerance=1e-3)
    whole = settings.sample(denoiser, null, sampler, noise, cond, STEPS)
    for rows in ([0], [1, 2], [5, 4, 3]):
        part = [{key: value[rows] for key, value in side.items()} for side in (null, cond)]
        alone = settings.sample(denoiser, part[0], sampler, noise[rows], part[1], STEPS)
        torch.testing.assert_close(alone, whole[rows], rtol=1e-5, atol=1e-5)


def test_a_sample_stops_where_it_is_near_enough_while_others_go_on() -> None:
    """The tolerance lies between the errors of two samples before any search: one is plainly guided, the other is not."""
    parts = setting()
    denoiser, null, sampler, noise, cond = parts
    errors = (sampler(ClassifierFreeGuidance(3.0)(denoiser, null), noise, cond, 1) - sampler(denoiser, noise, cond, 1)).detach()
    errors = errors.square().mean(1)
    near = errors < errors.median()
    settings = AnchoredGuidance(3.0, iterations=5, learning_rate=0.05, tolerance=float(errors.median()) * 0.999)
    got = settings.sample(*parts, 1)
    with torch.no_grad():
        guided = sampler(ClassifierFreeGuidance(3.0)(denoiser, null), noise, cond, 1)
    assert near.any() and torch.equal(got[near], guided[near])
    assert bool((got[~near] != guided[~near]).any(1).all())
    denoiser.calls = 0
    AnchoredGuidance(3.0, iterations=50, tolerance=1e9).sample(*parts, STEPS)
    assert denoiser.calls == 3 * STEPS  # the pivot, one look, and the step


def test_what_is_the_same_in_both_stays() -> None:
    """A denoiser that reads the size too, and would gain by another."""

    class Sized(Prompted):
        seen: list[Tensor] = []

        def forward(self, x, t, cond, r=None):
            self.seen.append(cond["size"].detach().clone())
            return super().forward(x, t, cond) * cond["size"] / 8

    _, null, sampler, noise, cond = setting()
    AnchoredGuidance(3.0).sample(Sized(RectifiedFlow()), null, sampler, noise, cond, STEPS)
    assert len(Sized.seen) > STEPS and all(bool((size == 8).all()) for size in Sized.seen)


def test_low_precision_conditions_are_searched_in_float32() -> None:
    """Steps of 1e-3 from 1 are lost in bfloat16, one by one; together they are not."""
    denoiser, null, sampler, noise, cond = setting()
    null["prompt_embeds"] = torch.ones(5, 2, 2, dtype=torch.bfloat16)
    cond["prompt_embeds"] = cond["prompt_embeds"].bfloat16()

    class Cast(Prompted):
        def forward(self, x, t, cond, r=None):
            return super().forward(x, t, cond | {"prompt_embeds": cond["prompt_embeds"].float()})

    parts = (Cast(RectifiedFlow()), null, sampler, noise, cond)
    pivot = plain(1.0, *parts)
    plainly, anchored = (AnchoredGuidance(3.0, n, 1e-3).sample(*parts, STEPS) for n in (0, 40))
    assert bool(((anchored - pivot).norm(dim=1) < (plainly - pivot).norm(dim=1)).all())


def test_conditions_that_cannot_be_searched_are_refused() -> None:
    mixture = Mixture(RectifiedFlow(), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 0.3)
    sampler, noise, labels = SAMPLERS["euler"][0], torch.zeros(2, 2), torch.tensor([0, 1])
    sizes = torch.full((2, 1), 8.0)
    for more in ({}, {"size": sizes}):
        cond, null = {"labels": labels, **more}, {"labels": labels.new_full((2,), 2), **more}
        with pytest.raises(ValueError, match="floating null condition .*use plain guidance for labels"):
            AnchoredGuidance(2.0).sample(mixture, null, sampler, noise, cond, STEPS)
    assert AnchoredGuidance(1.0).sample(mixture, null, sampler, noise, cond, STEPS).shape == (2, 2)  # nothing to search
    with pytest.raises(ValueError, match="floating null condition"):
        AnchoredGuidance(2.0).sample(mixture, {}, sampler, noise, {}, STEPS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1.0}, "scale=-1.0: give 0 or"),
        ({"scale": 2.0, "iterations": -1}, "iterations=-1: give 0 or"),
        ({"scale": 2.0, "tolerance": -1e-5}, "tolerance=-1e-05: give 0 or"),
        ({"scale": 2.0, "learning_rate": 0.0}, "learning_rate=0.0: give a positive"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnchoredGuidance(**settings)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_bad_step_counts_are_named(scale: float) -> None:
    with pytest.raises(ValueError, match="steps=0: give at least one step"):
        AnchoredGuidance(scale).sample(*setting(), 0)
