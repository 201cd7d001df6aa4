"""Reflow: its optimum for Gaussian data is the straight map, from every teacher's schedule; rf++; distillation; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import SHAPE, Watch, energy_distance, fit, gaussian, same, small, two_classes
from oracle import SCHEDULES, Gaussian
from straight import StraightGaussian
from torch import Tensor, nn

from distill.couplings import OptimalTransport
from distill.denoiser import Denoiser
from distill.distances import Distance, PseudoHuber, SquaredDistance
from distill.evaluation import Evaluation
from distill.grids import GridTimes, UniformGrid
from distill.methods.rectified_flow import Reflow
from distill.optimization import LearningRate, Optimization
from distill.samplers import OdeSampler
from distill.schedules import NoiseSchedule, RectifiedFlow, VarianceExploding, VariancePreserving
from distill.solvers import Euler, Heun
from distill.times import TimeDistribution, UniformTimes, UShapedTimes
from distill.types import Batch, Cond, DataSpec, Sample, Time, label_conditions
from distill.weights import PowerWeight

MEAN, VARIANCE = torch.tensor([0.4, -0.2]).reshape(SHAPE), torch.tensor([0.25, 0.04]).reshape(SHAPE)
STRAIGHT = StraightGaussian(MEAN, VARIANCE)
PAIRED = DataSpec(SHAPE, paired=True)


class GivenTimes(TimeDistribution):
    """These times."""

    def __init__(self, *times: float):
        self.times = torch.tensor(times)

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        return self.times.repeat(-(-count // len(self.times)))[:count]


class Bent(Denoiser):
    """The straight map's denoiser in any schedule, plus ``bend`` times its input: 0 is exact."""

    def __init__(self, schedule: NoiseSchedule, bend: float = 0.0):
        super().__init__()
        self.schedule, self.shape, self.bend = schedule, SHAPE, nn.Parameter(torch.tensor(bend, dtype=torch.float64))

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        return STRAIGHT.under(self.schedule)(x, t, cond) + self.bend.to(x.dtype) * x


def pairs(count: int, dtype: torch.dtype = torch.float64) -> Batch:
    noise, x0 = STRAIGHT.pairs(count, torch.Generator().manual_seed(3))
    return Batch(x0.to(dtype), {}, {}, noise.to(dtype))


def reflow(teacher: Denoiser, times: TimeDistribution | None = None, **settings: Any) -> Reflow:
    if "sample_distance" not in settings:
        settings.setdefault("velocity_distance", SquaredDistance())
    optimization = settings.pop("optimization", Optimization())
    return Reflow(teacher, times or UniformTimes(), optimization, Evaluation(), **settings)


# ---------------------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_straight_map_is_the_optimum_in_every_schedule(name):
    """Zero there, with zero gradient; positive elsewhere, and for the flow of the diffusion that the pairs came from."""
    times = GivenTimes(0.05, 0.3, 0.6, 0.9)
    exact = reflow(Bent(SCHEDULES[name]), times)
    loss = exact.losses(pairs(400))["loss"]
    (gradient,) = torch.autograd.grad(loss, exact.student.bend)
    # Times pass through float32 views of the schedules.
    assert float(loss) < 1e-9 and abs(float(gradient)) < 1e-4
    bent, before = (float(reflow(d, times).losses(pairs(400))["loss"]) for d in (Bent(SCHEDULES[name], 0.05), teacher(name)))
    assert bent > 1e-3 and before > 1e-2


def teacher(name: str) -> Gaussian:
    return Gaussian(SCHEDULES[name], MEAN, VARIANCE)


def test_one_euler_step_of_the_optimum_is_exact_and_of_the_teacher_is_not():
    batch = pairs(200)
    one = OdeSampler(Euler(), UniformGrid())
    torch.testing.assert_close(one(STRAIGHT, batch.noise, {}, 1), batch.x0, rtol=0, atol=1e-12)
    # The diffusion's flow in one step gives the mean of the data alone.
    assert (one(teacher("rf"), batch.noise, {}, 1) - batch.x0).square().mean() > 0.1


@pytest.mark.parametrize("name", ["rf", "rf-shift3", "ve", "vp-linear"])
def test_loss_is_the_velocitys_error_by_hand(name):
    """u = (x_t - x0) / t of the teacher seen under the plain flow; target z - x."""
    batch, t = pairs(3), torch.tensor([0.2, 0.5, 0.9])
    times = t.double().reshape(3, 1, 1, 1)
    x_t = (1 - times) * batch.x0 + times * batch.noise
    # The Gaussian's x0 in the flow's own terms, whatever schedule it is asked in.
    gain = VARIANCE * (1 - times) / ((1 - times) ** 2 * VARIANCE + times**2)
    x0 = MEAN + gain * (x_t - (1 - times) * MEAN)
    error = (x_t - x0) / times - (batch.noise - batch.x0)
    found = reflow(teacher(name), GivenTimes(*t.tolist())).losses(batch)
    assert float(found["loss"]) == pytest.approx(float(error.square().mean()), rel=1e-5)


def test_terms_and_weights_of_rfpp_by_hand():
    """L = (1 - t) H(u - (z - x)) + d(x_t - t u, x) / t."""
    batch, t = pairs(2), torch.tensor([0.25, 0.8])
    velocity = dict(velocity_distance=PseudoHuber(form="mean"), velocity_weight=PowerWeight(alpha=1.0))
    sample = dict(sample_distance=SquaredDistance(), sample_weight=PowerWeight(sigma=-1.0))
    method = reflow(teacher("rf"), GivenTimes(*t.tolist()), **velocity, **sample)
    found = method.losses(batch)
    times = t.double().reshape(2, 1, 1, 1)
    x_t = (1 - times) * batch.x0 + times * batch.noise
    x0 = teacher("rf")(x_t, t.double(), {})
    d = ((x_t - x0) / times - batch.noise + batch.x0).flatten(1)
    c = 0.00054 * 2
    huber = ((d.square().sum(1) + c**2).sqrt() - c) / 2
    sample = (x0 - batch.x0).square().flatten(1).mean(1)
    assert float(found["velocity"]) == pytest.approx(float(((1 - t) * huber).mean()), rel=1e-5)
    assert float(found["sample"]) == pytest.approx(float((sample / t).mean()), rel=1e-5)
    assert float(found["loss"]) == pytest.approx(float(found["velocity"] + found["sample"]), rel=1e-6)


def test_distillation_into_one_step_sees_the_noise_end_alone():
    """e(z - u(z, 1), x): no velocity term, every time 1."""
    method = reflow(teacher("rf"), GridTimes(1), sample_distance=SquaredDistance())
    batch = pairs(50, torch.float32)
    found = method.losses(batch)
    expected = (MEAN - batch.x0).square().mean()  # a flow's x0 from noise alone is the mean
    assert float(found["loss"]) == pytest.approx(float(expected), rel=1e-5) and set(found) == {"loss", "sample"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_below_a_students_least_noise_are_taken_for_it(name):
    """There its velocity is the teacher's; further down, x0 less noise that is not there would be divided by t."""
    schedule = SCHEDULES[name]
    level = float(schedule.nsr(torch.tensor(schedule.t_min, dtype=torch.float64)))
    least = max(level / (1 + level), 1e-5)
    found, expected = (float(reflow(teacher(name), GivenTimes(t)).losses(pairs(64))["loss"]) for t in (0.0, least))
    assert found == expected < 5


# ----------------------------------------------------------------------------------------------------------- couplings


def test_a_coupling_permutes_the_pairs_noise():
    batch = pairs(64)
    kept, permuted = (reflow(Bent(RectifiedFlow()), GivenTimes(0.5), coupling=c) for c in (None, OptimalTransport()))
    wrong = shuffled(batch)
    assert float(kept.losses(batch)["loss"]) < 1e-9 < 0.1 < float(kept.losses(wrong)["loss"])
    by_hand = OptimalTransport().pair(batch.x0, wrong.noise)
    assert not torch.equal(by_hand, wrong.noise)
    torch.testing.assert_close(permuted.losses(wrong)["loss"], kept.losses(Batch(batch.x0, {}, {}, by_hand))["loss"])


def shuffled(batch: Batch) -> Batch:
    """The same data and noise, paired wrongly."""
    assert batch.noise is not None
    return Batch(batch.x0, {}, {}, batch.noise.roll(1, 0))


# ------------------------------------------------------------------------------------------------------------ training


def of_teacher(name: str, count: int) -> list[Batch]:
    """Pairs of two classes' exact flow, by 64 Heun steps."""
    oracle, sampler = two_classes(SCHEDULES[name]), OdeSampler(Heun(), UniformGrid())
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        labels = torch.randint(2, (256,), generator=generator)
        cond, null = label_conditions(labels, 2)
        noise = torch.randn(256, *SHAPE, generator=generator)
        batches.append(Batch(sampler(oracle, noise, cond, 64), cond, null, noise))
    return batches


def trained(name: str, batches: list[Batch], **settings: Any) -> tuple[Reflow, Any]:
    """Reflow of a small network that flow matching has not trained: it must learn the map from the pairs."""
    torch.manual_seed(0)
    optimization = Optimization(
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3), learning_rate=LearningRate(decay="cosine")
    )
    method = reflow(small(SCHEDULES[name], num_classes=2), optimization=optimization, **settings)
    return method, fit(method, batches, 300)


@pytest.mark.parametrize(
    "settings",
    [
        dict(times=UniformTimes()),
        dict(times=UShapedTimes(), velocity_distance=PseudoHuber(form="mean"), velocity_weight=PowerWeight(alpha=1.0),
             sample_distance=SquaredDistance()),
        dict(times=GridTimes(1), sample_distance=SquaredDistance()),
    ],
    ids=["reflow", "rf++", "distillation"],
)  # fmt: skip
def test_one_step_students_reach_the_data(settings):
    batches = of_teacher("rf", 8)
    method, _ = trained("rf", batches, **settings)
    fresh = of_teacher("rf", 9)[-1]
    before, after = two_classes(SCHEDULES["rf"]), method.ema.module
    with torch.no_grad():
        distances = [
            energy_distance(method.student_sampler(d, fresh.noise, fresh.cond, 1), fresh.x0) for d in (before, after)
        ]
    print(f"energy distance in one step: exact flow {distances[0]:.4f}, student {distances[1]:.4f}")
    assert distances[1] < 0.1 * distances[0]


def test_two_steps_train_k_steps_and_the_teacher_keeps_its_bits():
    method = reflow(small(num_classes=2), GridTimes(2), sample_distance=SquaredDistance())
    before = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    watch = Watch()
    fit(method, of_teacher("rf", 2), 2, watch)
    assert watch.moved(0, "student") and watch.moved(1, "ema")
    assert same(before, method.teacher.state_dict()) and not any("teacher" in key for key in method.state_dict())
    assert not of_teacher_gradients(method)


def of_teacher_gradients(method: Reflow) -> list[Tensor]:
    return [p.grad for p in method.teacher.parameters() if p.grad is not None]


class Counted(nn.Module):
    """Counts calls and rows of a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.rows = small(num_classes=2).network, []
        self.shape, self.num_classes = SHAPE, 2

    def forward(self, x: Tensor, time: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        return self.inner(x, time, cond, r)


def test_a_step_is_one_evaluation_of_the_student_and_none_of_the_teacher():
    from distill.denoiser import NetworkDenoiser

    method = reflow(NetworkDenoiser(Counted(), RectifiedFlow()), sample_distance=SquaredDistance())
    method.losses(of_teacher("rf", 1)[0])
    assert method.student.network.rows == [256] and method.teacher.network.rows == []


def test_conditions_are_dropped_together_with_their_share():
    torch.manual_seed(0)
    method = reflow(small(num_classes=2), null_probability=0.25)
    seen: list[Tensor] = []
    method.student.register_forward_pre_hook(lambda module, args: seen.append(args[2]["labels"]))
    for batch in of_teacher("rf", 4):
        method.losses(batch)
    labels = torch.cat(seen)
    assert abs(float((labels == 2).float().mean()) - 0.25) < 3 * (0.25 * 0.75 / len(labels)) ** 0.5


# ------------------------------------------------------------------------------------------------------- sampling, data


def test_students_are_sampled_by_euler_under_the_flow_whatever_their_schedule():
    method = reflow(teacher("vp-linear"))
    noise = pairs(4, torch.float32).noise
    with torch.no_grad():
        found = method.student_sampler(method.generator(method.student), noise, {}, 4)
        expected = OdeSampler(Euler(), UniformGrid())(teacher("rf"), noise, {}, 4)
    # From t = 1 the VP teacher stands at its own noise end, which is not quite without signal.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("schedule", [VarianceExploding(1e-5, 1e5), VarianceExploding(), VariancePreserving()])
def test_ends_of_the_flow_are_the_ends_of_the_students_schedule(schedule):
    """rf++ opens EDM's schedule, to which t = 1 - 1e-5 is sigma = 1e5; else the ends are taken."""
    student = reflow(Gaussian(schedule, MEAN, VARIANCE)).generator(Gaussian(schedule, MEAN, VARIANCE))
    noise = pairs(4, torch.float32).noise
    x0 = student(noise, torch.ones(4), {})
    assert (x0 - MEAN).abs().max() < {1e5: 1e-4, 80.0: 2e-2}.get(schedule.t_max, 0.1)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (DataSpec(SHAPE), "no noise-sample pairs: make some by tools/make_pairs.py"),
        (DataSpec(SHAPE, paired=True, teacher="f" * 64), "pairs of a teacher with sha256 ffffffffffff, but model.teacher is"),
    ],
)
def test_data_without_pairs_or_of_another_teacher_is_refused(spec, words):
    method = reflow(gaussian(RectifiedFlow()))
    method.check_data(PAIRED)
    with pytest.raises(ValueError, match=words):
        method.check_data(spec)


def test_pairs_of_the_teacher_itself_are_taken():
    own = gaussian(RectifiedFlow())
    own.identity = {"path": "here", "sha256": "a" * 64}
    reflow(own).check_data(DataSpec(SHAPE, paired=True, teacher="a" * 64))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(velocity_distance=None), "velocity_distance and sample_distance are both null"),
        (dict(velocity_distance=SquaredDistance(), null_probability=1.0), "null_probability=1.0: give a share"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Distance | float], words):
    with pytest.raises(ValueError, match=words):
        Reflow(gaussian(RectifiedFlow()), UniformTimes(), Optimization(), Evaluation(), **settings)
