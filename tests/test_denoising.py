"""Teacher training: the loss is least at the exact denoiser in every prediction type, and a trained network gets there."""

from __future__ import annotations

import pytest
import torch
from helpers import SHAPE, batch_of, energy_distance, evaluation, fit, gaussian, joined, small, two_classes
from oracle import SCHEDULES, Gaussian
from torch import Tensor, nn

from distill.couplings import OptimalTransport
from distill.denoiser import NetworkDenoiser
from distill.ema import DecayAveraging
from distill.grids import KarrasGrid, UniformGrid
from distill.methods.denoising import DenoisingTraining
from distill.optimization import Optimization
from distill.samplers import OdeSampler
from distill.schedules import NoiseSchedule, RectifiedFlow, VarianceExploding, VariancePreserving
from distill.solvers import Heun
from distill.times import LogNormalTimes, TimeDistribution, UniformTimes
from distill.types import Batch, Cond, DataSpec, PerSample, Time
from distill.weights import KarrasWeight, Weight

PREDICTIONS = ["x0", "eps", "v", "flow", "edm"]


class ExactNetwork(nn.Module):
    """What a network of a prediction type must predict for Gaussian data, times ``gain``, plus ``offset``."""

    def __init__(self, teacher: Gaussian, prediction: str):
        super().__init__()
        self.teacher, self.prediction, self.shape = teacher, prediction, SHAPE
        self.gain, self.offset = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        t = cond["true_time"]
        alpha, sigma, *_ = self.teacher.scales(x, t)
        data = 0.5
        noisy = x.double() * torch.sqrt(sigma**2 + (alpha * data) ** 2) if self.prediction == "edm" else x.double()
        x0 = self.teacher(noisy, t, {})
        eps = (noisy - alpha * x0) / sigma
        level = sigma / alpha
        exact = {
            "x0": x0,
            "eps": eps,
            "v": alpha * eps - sigma * x0,
            "flow": eps - x0,
            # Karras et al. 2206.00364, eq. 7 and table 1, in EDM's own variables: F = (D - c_skip y) / c_out at y = x / alpha.
            "edm": (x0 - data**2 / (level**2 + data**2) * noisy / alpha) * (level**2 + data**2).sqrt() / (level * data),
        }[self.prediction]
        return (self.gain * exact + self.offset).to(x.dtype)


class KnownTimes(TimeDistribution):
    """Given times."""

    def __init__(self, times: Tensor):
        self.times = times

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        return self.times


def exact_training(name: str, prediction: str, count: int, weight: Weight | None = None) -> tuple[DenoisingTraining, Batch]:
    """Training at the exact network on a large batch of its data at uniform times, with the batch."""
    schedule = SCHEDULES[name]
    teacher = gaussian(schedule)
    law = LogNormalTimes(-0.5, 0.7) if name == "ve" else UniformTimes(0.05, 0.95)
    times = law.sample(count, schedule)
    student = NetworkDenoiser(ExactNetwork(teacher, prediction), schedule, prediction)  # type: ignore[arg-type]
    method = DenoisingTraining(student, KnownTimes(times), Optimization(), evaluation(), weight, null_probability=0.0)
    return method, Batch(teacher.data(count).float(), {"true_time": times}, {"true_time": times})


def gradient(method: DenoisingTraining, batch: Batch, gain: float, offset: float) -> tuple[float, Tensor]:
    """Loss and its gradient by the exact network's gain and offset."""
    network = method.student.network
    network.gain.data.fill_(gain), network.offset.data.fill_(offset)
    method.seed_draws()
    loss = method.losses(batch)["loss"]
    return float(loss), torch.stack(torch.autograd.grad(loss, [network.gain, network.offset]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["vp-cosine", "ve", "rf-shift3", "trig"])
def test_the_exact_denoiser_is_the_minimum(name, prediction):
    """The gradient vanishes there (up to the noise of a finite batch) and points back to it from either side."""
    method, batch = exact_training(name, prediction, 40_000)
    least, here = gradient(method, batch, 1.0, 0.0)
    for gain, offset in ((1.3, 0.0), (0.7, 0.0), (1.0, 0.3), (1.0, -0.3)):
        loss, there = gradient(method, batch, gain, offset)
        moved = 0 if gain != 1 else 1
        assert loss > least
        assert there[moved] * (gain - 1 + offset) > 0, "the gradient points away from the exact denoiser"
        assert here[moved].abs() < 0.05 * there[moved].abs()


@pytest.mark.parametrize("name", ["ve", "rf", "vp-linear", "trig"])
def test_edms_raw_loss_is_its_weighted_loss(name):
    """``|F - F*|^2 = lambda(s) |D - x0|^2``, ``lambda = (s^2 + sd^2) / (s sd)^2``, sample by sample."""
    student = small(SCHEDULES[name], "edm")
    for time in UniformTimes(0.05, 0.95).sample(4, student.schedule).tolist():
        batch = batch_of(1, 64)
        times = torch.full((64,), time)
        method = DenoisingTraining(student, KnownTimes(times), Optimization(), evaluation(), null_probability=0.0)
        x_t = student.schedule.add_noise(batch.x0, batch.noise, times)
        level = float(student.schedule.nsr(times[:1].double()))
        weighted = (level**2 + 0.25) / (level * 0.5) ** 2 * (student(x_t, times, {}) - batch.x0).square().mean()
        assert float(method.losses(batch)["loss"]) == pytest.approx(float(weighted), rel=2e-3)


def test_the_weight_multiplies_each_samples_error():
    class Count(Weight):
        def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
            assert (u == schedule.t_min).all()
            return torch.arange(len(t)).float()

    single = []
    for index in range(3):
        batch = batch_of(index, 1)
        times = KnownTimes(torch.tensor([0.2 * (index + 1)]))
        plain = DenoisingTraining(small(), times, Optimization(), evaluation(), null_probability=0.0)
        single.append(float(plain.losses(batch)["loss"]))
    whole = DenoisingTraining(
        small(), KnownTimes(torch.tensor([0.2, 0.4, 0.6])), Optimization(), evaluation(), Count(), null_probability=0.0
    )
    together = float(whole.losses(joined(*[batch_of(index, 1) for index in range(3)]))["loss"])
    assert together == pytest.approx((single[1] + 2 * single[2]) / 3, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_the_samples_loses_its_conditions(share):
    """The network is trained on the conditions that `drop_conditions` leaves."""
    method = DenoisingTraining(small(num_classes=2), UniformTimes(), Optimization(), evaluation(), null_probability=share)
    batch, seen = batch_of(0, 4000), []
    method.student.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[2]))
    method.losses(batch)
    (dropped,) = seen
    null = dropped["labels"] == 2
    assert float(null.float().mean()) == pytest.approx(share, abs=0.03)
    assert torch.equal(dropped["labels"][~null], batch.cond["labels"][~null])
    assert not (batch.cond["labels"] == 2).any(), "the batch itself is left as it was"
    with pytest.raises(ValueError, match="null_probability=1.0"):
        DenoisingTraining(small(), UniformTimes(), Optimization(), evaluation(), null_probability=1.0)


def coupled_training(null_probability: float = 0.0) -> DenoisingTraining:
    student, times = small(num_classes=2), KnownTimes(torch.full((24,), 0.5))
    settings = {"null_probability": null_probability, "coupling": OptimalTransport()}
    return DenoisingTraining(student, times, Optimization(), evaluation(), **settings)


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_coupling_pairs_the_noise_within_the_true_classes(share):
    """Also where most samples are trained without their labels. What the network sees is at half time: ``(x0 + eps) / 2``."""
    method, batch, seen = coupled_training(share), batch_of(0, 24, tied=False), []
    method.student.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
    method.seed_draws()
    method.losses(batch)
    method.seed_draws()
    free = torch.randn_like(batch.x0)
    paired = OptimalTransport().pair(batch.x0, free, batch.cond["labels"])
    assert not torch.equal(paired, OptimalTransport().pair(batch.x0, free)) and not torch.equal(paired, free)
    torch.testing.assert_close(seen[0], (batch.x0 + paired) / 2)


def test_a_coupling_of_data_that_carries_its_noise_is_refused():
    method = coupled_training()
    method.check_data(DataSpec(SHAPE, 2))
    with pytest.raises(ValueError, match="model.coupling=OptimalTransport .* set model.coupling to null"):
        method.check_data(DataSpec(SHAPE, 2, paired=True))
    DenoisingTraining(small(), UniformTimes(), Optimization(), evaluation()).check_data(DataSpec(SHAPE, 2, paired=True))


@pytest.mark.parametrize(
    "schedule, prediction, times, weight",
    [
        (RectifiedFlow(), "flow", UniformTimes(), None),
        (VariancePreserving("cosine"), "v", UniformTimes(), None),
        (VarianceExploding(), "edm", LogNormalTimes(-0.6, 1.6), None),
        (VarianceExploding(0.01, 20.0), "x0", LogNormalTimes(-0.6, 1.6), KarrasWeight(0.5)),
    ],
    ids=["flow", "v", "edm", "x0"],
)
def test_a_trained_network_samples_the_data_law(schedule, prediction, times, weight):
    """Samples of one class and of the null class by 16 Heun steps, against those of the untrained network."""
    torch.manual_seed(0)
    settings = Optimization(lambda p: torch.optim.Adam(p, lr=5e-3, fused=True), averaging=DecayAveraging(0.98))
    method = DenoisingTraining(small(schedule, prediction, num_classes=2), times, settings, evaluation(), weight, 0.2)
    grid = KarrasGrid() if isinstance(schedule, VarianceExploding) else UniformGrid()
    method.evaluation.sampler = OdeSampler(Heun(), grid)
    labels = torch.arange(1000) % 2
    data, null = two_classes().data(labels).float(), {"labels": torch.full((1000,), 2)}

    def distances() -> list[float]:
        conditional, all_classes = (method.draw(16, range(1000), cond, null) for cond in ({"labels": labels}, null))
        return [energy_distance(conditional[labels == 0], data[labels == 0]), energy_distance(all_classes, data)]

    before = distances()
    fit(method, [batch_of(number, 256, tied=False) for number in range(100)], 400)
    after = distances()
    print(f"{type(schedule).__name__} {prediction}: energy distance of a class and of all {before} -> {after}")
    assert after[0] < before[0] / 20 and after[1] < before[1] / 3
