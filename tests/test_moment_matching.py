"""Inductive moment matching: its loss by hand, where it vanishes, its limit at one particle, and students that learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import (
    SHAPE,
    FixedPairs,
    Watch,
    batch_of,
    closest,
    energy_distance,
    evaluation,
    fit,
    gaussian,
    same,
    small,
    two_classes,
)
from oracle import SCHEDULES, Gaussian
from torch import nn

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.distances import Distance, PseudoHuber, SquaredDistance
from distill.evaluation import Evaluation
from distill.frozen import Frozen
from distill.grids import UniformGrid
from distill.jump_times import Decrement, JumpMap, JumpTimes, LogNormalJumps, UniformJumps
from distill.jumps import jump, jump_coefficients
from distill.kernels import LaplaceKernel, RadialKernel
from distill.lora import LoRA
from distill.methods.consistency import Consistency
from distill.methods.moment_matching import MomentMatching
from distill.networks.families import FAMILIES as WRAPPERS
from distill.networks.unet2d import UNet2D
from distill.optimization import LearningRate, Optimization
from distill.samplers import OdeSampler, RenoiseSampler, Sampler
from distill.schedules import NoiseSchedule, RectifiedFlow
from distill.solvers import DDIM, Euler
from distill.types import Batch, Cond, DataSpec, Sample, Time
from distill.weights import ConstantWeight


class FixedJumps(JumpTimes):
    """The given jumps."""

    def __init__(self, t: list[float], s: list[float]):
        super().__init__(high=0.994)
        self.t, self.s = torch.tensor(t), torch.tensor(s)

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> tuple[Time, Time]:
        return self.t[:count], self.s[:count]

    def ends(self, schedule: NoiseSchedule) -> tuple[float, float]:
        return schedule.t_min, schedule.t_max

    def between(self, low: Time, high: Time, schedule: NoiseSchedule) -> Time:
        raise AssertionError("these jumps are given")


class FixedMap(JumpMap):
    """The given times between; None for t itself."""

    def __init__(self, r: list[float] | None = None):
        self.r = None if r is None else torch.tensor(r)

    def __call__(self, t: Time, s: Time, ends: tuple[float, float], schedule: NoiseSchedule) -> Time:
        return t.clone() if self.r is None else self.r[: len(t)]


def matching(times: JumpTimes, mapping: JumpMap, student: Denoiser | None = None, **settings: Any) -> MomentMatching:
    settings = {"particles": 2, "null_probability": 0.0, "weight": ConstantWeight(), **settings}
    optimization = settings.pop("optimization", Optimization())
    if student is None and "teacher" not in settings:
        student = small(num_classes=2, second_time=True)
    return MomentMatching(times, optimization, evaluation(), student, mapping=mapping, **settings)


# --------------------------------------------------------------------------------------------------- the loss, by its parts


def test_loss_and_gradient_are_the_formula():
    """Two groups of two, every pair by itself; gradient through A alone."""
    t, r, s = [0.9, 0.5], [0.7, 0.4], [0.3, 0.1]
    batch = batch_of(0, 4)
    found = matching(FixedJumps(t, s), FixedMap(r), weight=None).losses(batch)["loss"]
    student = small(num_classes=2, second_time=True)
    twice = [torch.tensor(times).repeat_interleave(2) for times in (t, r, s)]
    wide = [times.reshape(4, 1, 1, 1) for times in twice]
    x_t, x_r = ((1 - time) * batch.x0 + time * batch.noise for time in wide[:2])
    a = x_t - (wide[0] - wide[2]) * student.raw(x_t, twice[0], batch.cond, twice[2])
    with torch.no_grad():
        b = x_r - (wide[1] - wide[2]) * student.raw(x_r, twice[1], batch.cond, twice[2])
    losses = []
    for g in range(2):
        rate, both = 1 / (t[g] - s[g]) / 2, [[side[2 * g + j].flatten().double() for j in range(2)] for side in (a, b)]

        def k(x: torch.Tensor, y: torch.Tensor, rate: float = rate) -> torch.Tensor:
            return (-rate * (x - y).square().sum().clamp(min=1e-8).sqrt()).exp()

        pairs = [(i, j) for i in range(2) for j in range(2)]
        kernels = [k(both[0][i], both[0][j]) + k(both[1][i], both[1][j]) - 2 * k(both[0][i], both[1][j]) for i, j in pairs]
        log_snr = torch.tensor(2 * ((1 - t[g]) / t[g])).log() + torch.tensor((1 - t[g]) / t[g] / 2).log()
        weight = torch.sigmoid(4 - log_snr) / (t[g] * (1 - t[g])) * (1 - t[g]) ** 2 / ((1 - t[g]) ** 2 + t[g] ** 2)
        losses.append(weight * sum(kernels) / 4)
    expected = (losses[0] + losses[1]) / 2
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    method = matching(FixedJumps(t, s), FixedMap(r), weight=None)
    method.losses(batch)["loss"].backward()
    expected.backward()
    for own, by_hand in zip(method.student.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(own.grad, by_hand.grad, rtol=1e-3, atol=1e-6)


def test_r_at_t_costs_nothing_with_dropout_and_dropped_conditions():
    """A and B are then the same: the same noise, times, dropout masks and conditions."""
    student = small(num_classes=2, second_time=True, dropout=0.5)
    loss = matching(FixedJumps([0.9, 0.5], [0.3, 0.1]), FixedMap(), student, null_probability=0.5).losses(batch_of(0, 4))
    assert float(loss["loss"]) == pytest.approx(0, abs=1e-12)


def test_a_jump_to_its_own_time_has_a_finite_gradient():
    method = matching(FixedJumps([0.5, 0.3], [0.5, 0.1]), FixedMap([0.5, 0.1]))
    method.losses(batch_of(0, 4))["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in method.student.parameters())


def test_the_targets_are_computed_in_float32_under_autocast():
    method, seen = matching(FixedJumps([0.9, 0.5], [0.3, 0.1]), FixedMap([0.8, 0.4])), []
    method.student.network.first.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.losses(batch_of(0, 4))["loss"]
    loss.backward()
    assert seen == [torch.float32, torch.bfloat16]
    assert all(parameter.grad is not None for parameter in method.student.parameters())


def test_dropped_conditions_are_dropped_on_both_sides():
    torch.manual_seed(0)
    method, seen = matching(FixedJumps([0.9] * 64, [0.3] * 64), FixedMap([0.8] * 64), null_probability=0.25), []
    method.student.network.register_forward_pre_hook(lambda module, args: seen.append(args[2]["labels"]))
    method.losses(batch_of(0, 128))
    assert seen[0].equal(seen[1]) and 16 < int((seen[0] == 2).sum()) < 48


# --------------------------------------------------------------------------------------------------- one particle


class PlainNorm(Distance):
    """``|a - b|``."""

    def forward(self, a: Sample, b: Sample) -> torch.Tensor:
        return PseudoHuber(1e-12)(a.double(), b.double())


class SummedSquares(Distance):
    """``|a - b|^2``."""

    def forward(self, a: Sample, b: Sample) -> torch.Tensor:
        return 2 * SquaredDistance()(a.double(), b.double())


WIDTH = 1e4


@pytest.mark.parametrize(
    ("kernel", "distance", "factor"),
    [
        (LaplaceKernel(WIDTH), PlainNorm(), lambda scale: 2 * scale / WIDTH),
        (RadialKernel([WIDTH]), SummedSquares(), lambda scale: scale**2 / WIDTH**2),
    ],
    ids=["laplace", "radial"],
)
@pytest.mark.parametrize("prediction", ["flow", "edm", "v"])
def test_one_particle_and_a_wide_kernel_are_consistency_training(kernel, distance, factor, prediction):
    """k = 1 - rate |d| + ..., so that 2 - 2 k has the gradient of 2 rate |d|; for the Gaussian of rate^2 |d|^2."""
    t, r, size = 0.9, 0.7, 16
    batch = batch_of(0, size)
    student, other = (small(RectifiedFlow(), prediction, num_classes=2, second_time=True) for _ in range(2))
    one = matching(FixedJumps([t] * size, [0.0] * size), FixedMap([r] * size), student, particles=1, kernel=kernel)
    pairs = FixedPairs([t] * size, [r] * size)
    consistency = Consistency(pairs, distance, Optimization(), evaluation(), student=other)
    one.losses(batch)["loss"].backward()
    consistency.losses(batch)["loss"].backward()
    c_out = jump_coefficients(student, torch.tensor([t]), torch.tensor([0.0]))[1].abs().item()
    for own, theirs in zip(student.parameters(), other.parameters(), strict=True):
        expected = factor(1 / c_out) * theirs.grad
        torch.testing.assert_close(own.grad, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))


# ----------------------------------------------------------------------------------------------------- the fixed point


class Bent(Denoiser):
    """The exact jumps of Gaussian data, whose x0 is off by ``bend`` times its input."""

    def __init__(self, exact: Gaussian, bend: float = 0.0):
        super().__init__()
        self.schedule, self.shape, self.exact = exact.schedule, exact.shape, Frozen(exact)
        self.bend = nn.Parameter(torch.tensor(bend, dtype=torch.float64))

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        return self.exact(x, t, cond, r) + self.bend.to(x.dtype) * x


def discrepancy(name: str, bend: float, particles: int, groups: int, spread: float = 1.0, gap: float = 0.4) -> torch.Tensor:
    """Loss of a bent flow map on Gaussian data of ``spread`` times its variance, r ``gap`` of the way from t to s."""
    schedule = SCHEDULES[name]
    exact = gaussian(schedule)
    exact.variance *= spread
    student = Bent(exact, bend)
    torch.manual_seed(1)
    batch = Batch(exact.data(particles * groups), {}, {})
    # Angles, so that t, r and s are apart on every schedule.
    t, r, s = (schedule.time_of_angle(torch.tensor(angle).double()).item() for angle in (1.2, 1.2 - gap, 0.3))
    times, mapping = FixedJumps([t] * groups, [s] * groups), FixedMap([r] * groups)
    method = matching(times, mapping, student, particles=particles)
    loss = method.losses(batch)["loss"]
    loss.backward()
    return torch.stack([loss.detach(), student.bend.grad])


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_flow_map_of_a_point_is_exact_particle_by_particle(name):
    """Data without variance: x_r of the same noise lies on x_t's trajectory."""
    (loss, _), (wrong, _) = (discrepancy(name, bend, 4, 8, spread=0.0) for bend in (0.0, 0.1))
    assert abs(float(loss)) < 1e-6 and float(wrong) > 1e-4


@pytest.mark.parametrize("name", ["ve", "rf", "vp-cosine", "trig"])
def test_the_flow_map_lands_in_the_same_law_from_t_and_from_r(name):
    """x_r is not on x_t's trajectory, the laws agree all the same: of the biased estimate 1 / M is left."""
    few, many, wrong = (float(discrepancy(name, bend, size, 1)[0]) for bend, size in ((0, 250), (0, 1000), (0.6, 1000)))
    print(f"{name}: {few:.2e} of 250 particles, {many:.2e} of 1000, {wrong:.2e} of 1000 at a wrong map")
    assert many < 0.4 * few and wrong > 5 * many


@pytest.mark.parametrize("particles", [4, 16])
@pytest.mark.parametrize("name", ["ve", "rf"])
def test_the_gradient_vanishes_at_the_flow_map_alone_as_r_nears_t(name, particles):
    here, below, above = (float(discrepancy(name, bend, particles, 4000, gap=0.02)[1]) for bend in (0.0, -0.3, 0.3))
    print(f"{name}, M = {particles}: gradient {here:.2e} at the exact map, {below:.2e} and {above:.2e} beside it")
    assert below < 0 < above and abs(here) < 0.15 * min(-below, above)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("prediction", "times"),
    [("flow", UniformJumps(high=0.994)), ("edm", LogNormalJumps(-0.4, 1.6, high=0.994))],
    ids=["euler-fm", "simple-edm"],
)
def test_students_from_scratch_reach_the_data_in_one_and_two_steps(prediction, times):
    """By pushforward and by restart sampling; closer than the exact flow's own Euler steps."""
    torch.manual_seed(0)
    batches = [batch_of(number, 256, tied=False) for number in range(16)]
    optimization = Optimization(
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3), learning_rate=LearningRate(decay="cosine")
    )
    student = small(RectifiedFlow(), prediction, num_classes=2, second_time=True)
    method = matching(times, Decrement(4, "time"), student, particles=8, weight=None, optimization=optimization)
    method.evaluation = Evaluation()
    samplers = [method.student_sampler, RenoiseSampler(method.student_sampler.grid)]
    flow = drawn(OdeSampler(Euler(), UniformGrid()), two_classes())
    before = [drawn(sampler, method.ema.module) for sampler in samplers]
    fit(method, batches, 300)
    after = [drawn(sampler, method.ema.module) for sampler in samplers]
    print(f"energy distance in one and two steps: {before} before, {after} after, {flow} of the exact flow")
    for first, last in zip(before, after, strict=True):
        assert last[0] < min(0.35 * first[0], 0.85 * flow[0]) and last[1] < min(0.1 * first[1], 0.5 * flow[1])


@torch.no_grad()
def drawn(sampler: Sampler, denoiser: Denoiser) -> list[float]:
    """Energy distances to the data of 2,000 samples in one and two steps."""
    fresh = batch_of(99, 2000)
    torch.manual_seed(7)
    data = two_classes().data(fresh.cond["labels"]).float()
    return [energy_distance(sampler(denoiser, fresh.noise, fresh.cond, steps), data) for steps in (1, 2)]


def digits_teacher() -> NetworkDenoiser:
    torch.manual_seed(0)
    network = UNet2D(in_channels=2, sample_size=2, num_classes=2, channels=(8, 16), layers_per_block=1)
    return NetworkDenoiser(network, RectifiedFlow())


def pictures(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    batch = batch_of(number, 8)
    return Batch(torch.randn(8, 2, 2, 2, generator=generator), batch.cond, batch.null)


def test_students_start_as_their_teacher_and_it_keeps_its_bits():
    teacher = digits_teacher()
    method = matching(UniformJumps(high=0.994), Decrement(4, "time"), teacher=teacher, stride=True)
    x, t, s, cond = torch.randn(4, 2, 2, 2), torch.full((4,), 0.9), torch.full((4,), 0.2), {"labels": torch.arange(4) % 3}
    method.student.eval()
    expected = DDIM().step(method.teacher, x, t, s, cond)
    torch.testing.assert_close(jump(method.student, x, t, s, cond), expected, rtol=0, atol=1e-5)
    before = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    watch = Watch()
    fit(method, [pictures(0), pictures(1)], 2, watch)
    assert watch.moved(0, "student") and watch.moved(1, "ema") and watch.moved(0, "student.network.scalars.r.projection")
    assert same(before, method.teacher.state_dict()) and not any("teacher" in key for key in method.state_dict())
    assert "student.network.scalars.r.combination" in method.state_dict()


def test_lora_students_train_their_layers_and_the_second_time():
    method = matching(UniformJumps(high=0.994), Decrement(4, "time"), teacher=digits_teacher(), lora=LoRA(rank=2))
    trained = {name for name, parameter in method.student.named_parameters() if parameter.requires_grad}
    assert trained and all("lora" in name or "scalars.r" in name for name in trained)
    assert any("scalars.r" in name for name in trained)
    method.losses(pictures(0))["loss"].backward()
    assert method.student.network.scalars["r"].projection.weight.grad.abs().max() > 0


def test_checkpointed_activations_are_computed_again_at_the_stride_of_a():
    """DiT embeds times in every block: what is computed again reads what the network was last told."""
    gradients = []
    for checkpointing in (False, True):
        network = WRAPPERS["DiTTransformer2DModel"].of(FAMILIES["dit"].model())
        student = NetworkDenoiser(network, RectifiedFlow())
        student.add_second_time(stride=True)
        torch.manual_seed(0)
        nn.init.normal_(network.scalars["r"].projection.weight, std=0.3)
        optimization = Optimization(gradient_checkpointing=checkpointing)
        method = matching(FixedJumps([0.9], [0.3]), FixedMap([0.5]), student, stride=True, optimization=optimization)
        labels = torch.tensor([1, 2])
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        method.losses(Batch(noise.flip(0), {"labels": labels}, {"labels": labels}, noise))["loss"].backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert closest(*gradients) < 1e-6 < max(float(gradient.abs().max()) for gradient in gradients[0].values())


# ------------------------------------------------------------------------------------------------------------ settings


def test_the_sampler_starts_where_training_does_unless_another_is_given():
    student = small(num_classes=2, second_time=True)
    method = MomentMatching(UniformJumps(high=0.994), Optimization(), Evaluation(), student)
    assert method.student_sampler.grid.starts(RectifiedFlow(), 2).tolist() == [0.994, 0.497]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(particles=0), "particles=0: give 1"),
        (dict(student=None), "student and model.teacher are both missing"),
        (dict(lora=LoRA()), "model.student and model.lora=.* are both set"),
        (dict(null_probability=1.0), "null_probability=1.0: give a share"),
        (dict(times=UniformJumps(high=0.9)), "high=0.9: sampling starts from noise of deviation 1, that of .* is 0.9"),
        (dict(evaluation=Evaluation(OdeSampler(Euler(), UniformGrid()))), "OdeSampler takes jumps to the end for a velocity"),
        (dict(times=UniformJumps()), "high=1.0 of RectifiedFlow.*noise without signal"),
        (dict(student=small(num_classes=2)), "SmallNetwork cannot be given a second time"),
    ],
)
def test_bad_settings_are_named(settings, words):
    parts = {"times": UniformJumps(high=0.994), "student": small(num_classes=2, second_time=True), **settings}
    with pytest.raises(ValueError, match=words):
        MomentMatching(**{"optimization": Optimization(), "evaluation": Evaluation(), **parts})


def test_batches_that_are_not_made_of_groups_are_named():
    with pytest.raises(ValueError, match="a batch of 6 is not made of groups of model.particles=4: set data.batch_size"):
        matching(UniformJumps(high=0.9), Decrement(), particles=4).losses(batch_of(0, 6))


def test_data_that_comes_with_noise_is_refused_for_a_coupling():
    from distill.couplings import OptimalTransport

    method = matching(UniformJumps(high=0.9), Decrement(), coupling=OptimalTransport())
    with pytest.raises(ValueError, match="model.coupling=OptimalTransport"):
        method.check_data(DataSpec(SHAPE, 2, paired=True))
