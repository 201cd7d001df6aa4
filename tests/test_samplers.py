"""Samplers: reproducible noise, what they cost, and the data law from exact teachers."""

from __future__ import annotations

import pytest
import torch
from oracle import MLP, SCHEDULES, Gaussian, GaussianConsistency, Mixture

from distill.boundary import ConsistencyFunction, KarrasBoundary, ScaledBoundary
from distill.denoiser import Denoiser, NetworkDenoiser
from distill.few_step import FewStepSampler
from distill.grids import DiscreteGrid, KarrasGrid, UniformGrid
from distill.noise import SeededNoise
from distill.piecewise import PiecewiseSampler
from distill.samplers import JumpSampler, OdeSampler, RenoiseSampler
from distill.schedules import RectifiedFlow, VarianceExploding, VariancePreserving
from distill.solvers import DDIM, DPMSolver2M, Euler, Heun
from distill.types import label_conditions

MEAN, VARIANCE = torch.tensor([0.5, -0.3, 0.1]), torch.tensor([0.25, 0.6, 0.05])
SAMPLES = 4000


def draw(sampler, denoiser: Denoiser, steps: int, indices=range(SAMPLES), seed: int = 0, shape=(3,)) -> torch.Tensor:
    fresh = SeededNoise(seed, indices, shape)
    return sampler(denoiser, fresh.draw().double(), {}, steps, fresh)


def assert_data_law(samples: torch.Tensor, bias: float = 0.0) -> None:
    """Means within 4 standard errors plus ``bias``; covariances within 0.08 of the standard deviations' products."""
    std = VARIANCE.double().sqrt()
    assert bool(((samples.mean(0) - MEAN).abs() < 4 * std / SAMPLES**0.5 + bias).all())
    torch.testing.assert_close(samples.T.cov() / std / std[:, None], torch.eye(3, dtype=torch.float64), rtol=0, atol=0.08)


# ----------------------------------------------------------------------------------------------------- reproducibility


SAMPLERS = [
    OdeSampler(Heun(), UniformGrid()),
    OdeSampler(DPMSolver2M(), UniformGrid()),
    RenoiseSampler(UniformGrid()),
    JumpSampler(UniformGrid(), 0.5),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["heun", "dpm", "renoise", "jump"])
def test_sample_depends_on_seed_and_number_alone(sampler):
    oracle = Gaussian(RectifiedFlow(), MEAN, VARIANCE)
    whole = draw(sampler, oracle, 4, range(12))
    split = torch.cat([draw(sampler, oracle, 4, part) for part in ([0], range(1, 6), range(6, 12))])
    order = [7, 3, 11, 0, 5]
    assert torch.equal(whole, split) and torch.equal(whole[order], draw(sampler, oracle, 4, order))
    assert not torch.isclose(whole, draw(sampler, oracle, 4, range(12), seed=1)).any()


def test_seeds_numbers_and_draws_are_independent():
    """torch's CPU generator reads 32 bits of a seed: numbers must not be packed above them."""
    sets = [SeededNoise(seed, range(start, start + 500), (40,)) for seed, start in [(0, 0), (1, 0), (0, 500), (2**33, 0)]]
    draws = torch.stack([noise.draw().flatten() for noise in sets] + [sets[0].draw().flatten()])
    assert (draws.corrcoef() - torch.eye(5)).abs().max() < 0.05
    torch.testing.assert_close(draws.std(1), torch.ones(5), rtol=0, atol=0.03)
    assert sets[0](torch.zeros(500, 40).double()).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------- cost


class Counted(Gaussian):
    """Counts its calls and keeps their times."""

    def forward(self, x, t, cond, r=None):
        self.__dict__.setdefault("times", []).append(float(t[0]))
        return super().forward(x, t, cond, r)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("grid", [UniformGrid(), KarrasGrid()], ids=["uniform", "karras"])
@pytest.mark.parametrize(
    ("make", "cost"),
    [
        (lambda grid: OdeSampler(Euler(), grid), lambda n: n),
        (lambda grid: OdeSampler(DDIM(), grid), lambda n: n),
        (lambda grid: OdeSampler(DPMSolver2M(), grid), lambda n: n),
        (lambda grid: OdeSampler(Heun(), grid), lambda n: 2 * n - 1),
        (lambda grid: RenoiseSampler(grid), lambda n: n),
        (lambda grid: JumpSampler(grid, 0.5), lambda n: n),
    ],
    ids=["euler", "ddim", "dpm", "heun", "renoise", "jump"],
)
def test_network_evaluations(make, cost, grid, steps):
    counted = Counted(VarianceExploding(), MEAN, VARIANCE)
    draw(make(grid), counted, steps, range(2))
    assert len(counted.times) == cost(steps) and counted.times[0] == 80.0


def test_renoise_times_may_be_given():
    counted = Counted(VarianceExploding(), MEAN, VARIANCE)
    draw(RenoiseSampler(KarrasGrid(), {2: [80.0, 0.821]}), counted, 2, range(2))
    assert counted.times == [80.0, 0.821]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["heun", "dpm", "renoise", "jump"])
def test_bad_step_counts_are_named(sampler):
    with pytest.raises(ValueError, match="steps=0"):
        draw(sampler, Gaussian(RectifiedFlow(), MEAN, VARIANCE), 0, range(2))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"times\[2\]"):
        RenoiseSampler(UniformGrid(), {2: [0.5, 0.8]})
    with pytest.raises(ValueError, match="gamma=1.5"):
        JumpSampler(UniformGrid(), 1.5)
    with pytest.raises(ValueError, match="seed=-1"):
        SeededNoise(-1, [0], (1,))


@pytest.mark.parametrize(
    "sampler",
    [*SAMPLERS, FewStepSampler([1.0, 0.5]), PiecewiseSampler(2)],
    ids=["heun", "dpm", "renoise", "jump", "few-step", "piecewise"],
)
def test_samplers_ask_for_one_trajectory_with_their_own_source_of_noise(sampler):
    """And call what they are given, not the denoiser itself."""
    followed, asked = Counted(RectifiedFlow(), MEAN, VARIANCE), []

    class Start(Gaussian):
        def trajectory(self, fresh):
            asked.append(fresh)
            return followed

        def forward(self, x, t, cond, r=None):
            raise AssertionError("called itself")

    fresh = SeededNoise(0, range(3), (3,))
    sampler(Start(RectifiedFlow(), MEAN, VARIANCE), fresh.draw().double(), {}, 2, fresh)
    assert asked == [fresh] and len(followed.times) >= 2


# ------------------------------------------------------------------------------------------------------------ data law

GRIDS = {
    "ve": KarrasGrid(),
    "vp-linear": DiscreteGrid(),
    "rf": UniformGrid(),
    "rf-shift3": UniformGrid(),
    "trig": UniformGrid(),
}


@pytest.mark.parametrize("name", GRIDS)
def test_ode_sampler_gives_the_data_law(name):
    """And, sample by sample, what the exact flow map makes of the same noise."""
    oracle = Gaussian(SCHEDULES[name], MEAN, VARIANCE)
    samples = draw(OdeSampler(Heun(), GRIDS[name]), oracle, 60)
    assert_data_law(samples, bias=0.01)
    noise = SeededNoise(0, range(SAMPLES), (3,)).draw().double() * oracle.schedule.prior_scale
    exact = oracle.to_data(noise, torch.full((SAMPLES,), oracle.schedule.t_max, dtype=torch.float64))
    assert (samples - exact).abs().max() < 0.05


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", GRIDS)
def test_renoising_the_exact_consistency_function_gives_the_data_law(name, steps):
    samples = draw(RenoiseSampler(GRIDS[name]), GaussianConsistency(SCHEDULES[name], MEAN, VARIANCE), steps)
    assert_data_law(samples, bias=0.01)


@pytest.mark.parametrize("name", GRIDS)
def test_renoising_with_the_same_noise_visits_the_chord(name):
    """rf++'s update: each input is ``alpha x0 + sigma z`` of the last x0 and the first noise."""
    oracle = Gaussian(SCHEDULES[name], MEAN, VARIANCE)
    schedule, noise = oracle.schedule, SeededNoise(0, range(5), (3,)).draw().double()
    t, s = (float(time) * torch.ones(5, dtype=torch.float64) for time in GRIDS[name].starts(schedule, 2))
    x0 = oracle(schedule.prior_scale * noise, t, {})
    expected = oracle(schedule.add_noise(x0, noise, s), s, {})
    found = RenoiseSampler(GRIDS[name], same_noise=True)(oracle, noise, {}, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", GRIDS)
def test_exact_jumps_give_the_data_law(name, gamma):
    samples = draw(JumpSampler(GRIDS[name], gamma), Gaussian(SCHEDULES[name], MEAN, VARIANCE), 4)
    assert_data_law(samples, bias=0.01)


@pytest.mark.parametrize("name", ["ve", "rf", "vp-linear"])
def test_gamma_jumps_below_the_next_level(name):
    """To sqrt(1 - gamma^2) of the next noise-to-signal ratio; the last jump is to the end itself."""
    schedule, seconds = SCHEDULES[name], []

    class Recorded(Gaussian):
        def forward(self, x, t, cond, r=None):
            seconds.append(float(schedule.nsr(r[0])))
            return super().forward(x, t, cond, r)

    draw(JumpSampler(GRIDS[name], 0.6), Recorded(schedule, MEAN, VARIANCE), 3, range(2))
    nodes = GRIDS[name].nodes(schedule, 4 if name == "ve" else 3)
    assert seconds == pytest.approx([*(0.8 * schedule.nsr(nodes[1:3])).tolist(), float(schedule.nsr(nodes[3]))], rel=1e-9)


def test_gamma_0_jumps_along_the_trajectory_and_gamma_1_forgets_it():
    """All of it fresh: correlation of the final sample with the first noise is that of re-noising, none is 1."""
    oracle = Gaussian(RectifiedFlow(), MEAN, VARIANCE)
    noise = SeededNoise(0, range(SAMPLES), (3,)).draw().double()
    exact = oracle.to_data(noise, torch.ones(SAMPLES, dtype=torch.float64))
    torch.testing.assert_close(draw(JumpSampler(UniformGrid()), oracle, 4), exact, rtol=0, atol=1e-9)
    jumped = draw(JumpSampler(UniformGrid(), 1.0), oracle, 4)
    renoised = draw(RenoiseSampler(UniformGrid()), GaussianConsistency(RectifiedFlow(), MEAN, VARIANCE), 4)
    torch.testing.assert_close(jumped, renoised, rtol=0, atol=1e-9)


def test_ode_sampler_gives_the_mixture_of_its_condition():
    oracle = Mixture(RectifiedFlow(), torch.tensor([[2.0, 0.0], [-2.0, 1.0]]), 0.2)
    noise = torch.randn(2000, 2, dtype=torch.float64)
    sampler = OdeSampler(Heun(), UniformGrid())
    cond, null = label_conditions(torch.arange(2000) % 2, 2)
    samples = sampler(oracle, noise, cond, 40)
    for label in (0, 1):
        part = samples[label::2]
        torch.testing.assert_close(part.mean(0), oracle.means[label], rtol=0, atol=0.03)
        torch.testing.assert_close(part.std(0), torch.full((2,), 0.2, dtype=torch.float64), rtol=0, atol=0.03)
    # Without a class, half of the samples each; none in between.
    free = sampler(oracle, noise, null, 40)
    assert abs(float((free[:, 0] > 0).double().mean()) - 0.5) < 0.05 and free[:, 0].abs().min() > 1.0


# ----------------------------------------------------------------------------------------------------- against diffusers


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def fresh_from(source: torch.Generator):
    return lambda x: torch.randn(x.shape, generator=source)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_renoising_is_diffusers_lcm_scheduler(steps):
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(steps, original_inference_steps=50)
    denoiser = NetworkDenoiser(MLP((1, 2, 2), time_scale=2e-3), VariancePreserving("scaled_linear", 0.00085, 0.012), "v")
    x, source = torch.randn(3, 1, 2, 2), generator()
    sampler = RenoiseSampler(DiscreteGrid(), {steps: [float(t) for t in scheduler.timesteps]})
    ours = sampler(ConsistencyFunction(denoiser, ScaledBoundary()), x, {}, steps, fresh_from(generator()))
    for t in scheduler.timesteps:
        raw = denoiser.network(x, t.float().repeat(3), {})
        x, sample = scheduler.step(raw, t, x, generator=source, return_dict=False)
    torch.testing.assert_close(ours, sample, rtol=0, atol=1e-4)


def test_renoising_is_diffusers_consistency_model_scheduler():
    """Which re-noises to sqrt(tau^2 - sigma_min^2): 3e-6 below our tau."""
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler()
    scheduler.set_timesteps(timesteps=[22, 0])
    denoiser = NetworkDenoiser(MLP((1, 2, 2)), VarianceExploding(), "edm")
    noise, source = torch.randn(3, 1, 2, 2), generator()
    sampler = RenoiseSampler(KarrasGrid(), {2: scheduler.sigmas[:2].tolist()}, clip=1.0)
    ours = sampler(ConsistencyFunction(denoiser, KarrasBoundary()), noise, {}, 2, fresh_from(generator()))
    x = 80 * noise
    for t in scheduler.timesteps:
        raw = denoiser.network(scheduler.scale_model_input(x, t), t.float().repeat(3) / 1000, {})
        x = scheduler.step(raw, t, x, generator=source).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)
