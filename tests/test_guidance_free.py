"""Guidance-free training and model guidance: their minima are exact classifier-free guidance, in one evaluation a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FixedTimes, batch_of, evaluation, fit, small, two_classes
from torch import Tensor, nn

from distill.denoiser import NetworkDenoiser
from distill.ema import DecayAveraging
from distill.methods.guidance_free import GuidanceFreeTraining, ModelGuidance
from distill.optimization import Optimization
from distill.schedules import RectifiedFlow
from distill.times import UniformTimes
from distill.types import Batch, Cond, DataSpec, label_conditions

TIME = 0.6


class GuidedNetwork(nn.Module):
    """The exact guided velocity of the two classes at `TIME`, and three ways to be wrong that are zero at first.

    Attributes:
        excess: share by which the scale's distance from 1 is too large; of the null class it changes nothing.
        offset, null_offset: added to the predictions of classes and of the null class.
    """

    def __init__(self, scale: float | None = None):
        super().__init__()
        self.oracle, self.scale, self.scalars = two_classes(), scale, nn.ModuleDict()
        self.shape, self.num_classes = self.oracle.shape, 2
        self.excess, self.offset, self.null_offset = (nn.Parameter(torch.zeros(())) for _ in range(3))

    def add_scalar_input(self, name: str) -> None:
        self.scalars[name] = nn.Identity()

    def forward(self, x: Tensor, time: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        scale = torch.full((len(x),), self.scale) if self.scale is not None else cond["guidance"]
        t = torch.full((len(x),), TIME)
        null = self.oracle(x, t, {"labels": torch.full_like(cond["labels"], 2)})
        off = (1 + (1 + self.excess) * (scale - 1)).reshape(-1, 1, 1, 1) * (self.oracle(x, t, cond) - null)
        offset = torch.where(cond["labels"] == 2, self.null_offset, self.offset)
        return (x - null - off) / TIME + offset.reshape(-1, 1, 1, 1)


def training(kind: type, network: nn.Module | None = None, null_probability: float = 0.0, **settings: Any) -> Any:
    """A method at `TIME`, of the exact network or another."""
    student = NetworkDenoiser(network or GuidedNetwork(), RectifiedFlow())
    parts = (FixedTimes(TIME), Optimization(), evaluation())
    return kind(student, *parts, null_probability=null_probability, **settings)


def data(count: int) -> Batch:
    """Points of the two classes; the noise is drawn anew by each loss."""
    labels = torch.arange(count) % 2
    return Batch(two_classes().data(labels, torch.Generator().manual_seed(3)).float(), *label_conditions(labels, 2))


def gradient(method: Any, batch: Batch, average: bool = True, **errors: float) -> Tensor:
    """Of the loss by excess, offset and null_offset, where the network and its average have these errors."""
    for network in (method.student.network, method.ema.module.network)[: 1 + average]:
        for name in ("excess", "offset", "null_offset"):
            getattr(network, name).data.fill_(errors.get(name, 0.0))
    network = method.student.network
    method.seed_draws()
    values = [network.excess, network.offset, network.null_offset]
    return torch.stack(torch.autograd.grad(method.losses(batch)["loss"], values))


KINDS: dict[str, tuple[type, float | None, dict[str, Any]]] = {
    "gft": (GuidanceFreeTraining, None, {"max_scale": 5.0}),
    "mg": (ModelGuidance, 2.5, {"guidance_scale": 2.5}),
    "mg present weights": (ModelGuidance, 2.5, {"guidance_scale": 2.5, "average": False}),
    "mg range": (ModelGuidance, None, {"guidance_range": (1.0, 1.8)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_minimum_is_exact_guidance(kind):
    """With half of the samples dropped: all gradients vanish (up to a finite batch), and point back from either side."""
    method_class, scale, settings = KINDS[kind]
    method, batch = training(method_class, GuidedNetwork(scale), 0.5, **settings), data(40_000)
    here = gradient(method, batch)
    for index, name in enumerate(("excess", "offset", "null_offset")):
        for error in (0.3, -0.3):
            there = gradient(method, batch, **{name: error})
            assert there[index] * error > 0, name
            assert here[index].abs() < 0.05 * there[index].abs(), name


@pytest.mark.parametrize("scale", [1.6, 1.0, 3.5])
def test_a_fixed_scale_is_not_one_plus_w(scale):
    """Target scale 2.5: w = 0.6, and a network guided at 1 + w = 1.6 is pushed on."""
    method = training(ModelGuidance, GuidedNetwork(scale), guidance_scale=2.5)
    pushed = gradient(method, data(4_000))[0] * (scale - 1) if scale != 1 else -torch.ones(())
    assert (pushed < 0) == (scale < 2.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_null_prediction_in_the_target_gets_no_gradient(kind):
    """Also where it is wrong and so changes the loss."""
    method_class, scale, settings = KINDS[kind]
    method, batch = training(method_class, GuidedNetwork(scale), **settings), data(64)
    found = gradient(method, batch, excess=0.2, offset=0.1, null_offset=0.5)
    assert found[2] == 0 and found[1] != 0 and found[0] != 0
    assert not torch.equal(found, gradient(method, batch, excess=0.2, offset=0.1))


def test_only_what_is_embedded_of_a_dropped_sample_changes():
    """Its b is 1 to the network and its own in the mixture: the null error's gradient is the mean of b, not 1."""
    method, batch = training(GuidanceFreeTraining, null_probability=0.9, max_scale=4.0), data(40_000)
    seen: list[tuple] = []
    method.student.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs))
    found = gradient(method, batch, null_offset=0.5) - gradient(method, batch)
    (_, _, null, _), (_, _, cond, _) = seen[:2]
    dropped = cond["labels"] == 2
    assert float(dropped.float().mean()) == pytest.approx(0.9, abs=0.01)
    assert (cond["guidance"][dropped] == 1).all() and (null["guidance"] == 1).all() and (null["labels"] == 2).all()
    b = 1 / cond["guidance"][~dropped]
    assert b.min() == pytest.approx(0.25, abs=0.01) and b.max() == pytest.approx(1, abs=0.01)
    assert float(b.mean()) == pytest.approx(0.625, abs=0.01)
    # d/do of the mean of (b (o - error) + (1 - b) (0.5 - error))^2 at o = 0.5 is 2 E[b] 0.5 for the dropped.
    assert float(found[2]) == pytest.approx(2 * 0.625 * 0.5 * float(dropped.float().mean()), rel=0.02)


class Calls:
    """Rows, mode, gradient and guidance of each call of a network."""

    def __init__(self, *networks: nn.Module):
        self.seen: list[tuple[int, bool, bool]] = []
        self.guidance: list[Tensor | None] = []
        for network in networks:
            network.register_forward_pre_hook(self.note)

    def note(self, network: nn.Module, inputs: tuple) -> None:
        self.seen.append((len(inputs[0]), network.training, torch.is_grad_enabled()))
        self.guidance.append(inputs[2].get("guidance"))


@pytest.mark.parametrize(
    "method_class, settings, expected",
    [
        (GuidanceFreeTraining, {}, [(8, False, False), (8, True, True)]),
        (ModelGuidance, {"guidance_scale": 2.0}, [(16, False, False), (8, True, True)]),
        (ModelGuidance, {"guidance_range": (1.0, 3.0), "average": False}, [(16, False, False), (8, True, True)]),
    ],
)
def test_evaluations_of_a_step_and_of_a_sample(method_class, settings, expected):
    """Two for each sample in guidance-free training, three in model guidance, of which one has gradients; one in sampling."""
    method = training(method_class, small(num_classes=2, dropout=0.5).network, 0.1, **settings)
    calls = Calls(method.student.network, method.ema.module.network)
    batch = batch_of(0)
    method.losses(batch)["loss"].backward()
    assert calls.seen == expected and method.student.training
    calls.seen.clear(), calls.guidance.clear()
    method.draw(3, range(8), batch.cond, batch.null)
    assert [rows for rows, *_ in calls.seen] == [8, 8, 8]
    if "guidance_scale" not in settings:
        assert all((scale == 2).all() for scale in calls.guidance)
        calls.guidance.clear()
        method.draw(1, range(8), batch.cond, batch.null, guidance=1.5)
        assert (calls.guidance[0] == 1.5).all() and len(calls.guidance[0]) == 8
    else:
        assert calls.guidance == [None, None, None]


@pytest.mark.parametrize("prediction", ["eps", "flow", "edm"])
@pytest.mark.parametrize("average", [True, False])
def test_losses_are_the_papers(prediction, average):
    """Against the equations written out, with an average that differs from the student."""
    batch, w, t = batch_of(0), 0.6, torch.full((8,), TIME)
    student, other = (small(num_classes=2, prediction=prediction, seed=seed) for seed in (1, 2))
    parts = (student, FixedTimes(TIME), Optimization(), evaluation())
    method = ModelGuidance(*parts, guidance_scale=2.5, average=average, null_probability=0.0)
    method.ema.module.load_state_dict(other.state_dict())
    x_t = (1 - TIME) * batch.x0 + TIME * batch.noise
    target, follower = student.raw_target(batch.x0, batch.noise, t), other if average else student
    moved = target + w * (follower.raw(x_t, t, batch.cond) - follower.raw(x_t, t, batch.null))
    expected = (student.raw(x_t, t, batch.cond) - moved).square().mean()
    torch.testing.assert_close(method.losses(batch)["loss"], expected)

    method = GuidanceFreeTraining(*parts, null_probability=0.0)
    calls = Calls(student.network)
    loss = method.losses(batch)["loss"]
    scale = calls.guidance[1]
    mixing = (1 / scale).reshape(-1, 1, 1, 1)
    guided = student.raw(x_t, t, {**batch.cond, "guidance": scale})
    unguided = student.raw(x_t, t, {**batch.null, "guidance": torch.ones(8)})
    torch.testing.assert_close(loss, (mixing * guided + (1 - mixing) * unguided - target).square().mean())


@pytest.mark.parametrize("kind", ["gft", "mg range"])
def test_a_trained_network_is_guided_in_one_evaluation(kind):
    """Its predictions at scale 2.5 against exact classifier-free guidance: the unguided ones are 1 off in this measure."""
    method_class, _, settings = KINDS[kind]
    torch.manual_seed(0)
    settings = {"guidance_range": (1.0, 3.0)} if kind == "mg range" else settings
    optimization = Optimization(lambda p: torch.optim.Adam(p, lr=5e-3, fused=True), averaging=DecayAveraging(0.98))
    times = UniformTimes(0.3, 0.9)
    method = method_class(small(num_classes=2), times, optimization, evaluation(), null_probability=0.2, **settings)
    fit(method, [batch_of(number, 128, tied=False) for number in range(100)], 400)
    batch, oracle = batch_of(1000, 2000), two_classes()
    t = UniformTimes(0.4, 0.8).sample(2000, oracle.schedule)
    x = oracle.schedule.add_noise(batch.x0, batch.noise, t)
    plain, null = oracle(x, t, batch.cond), oracle(x, t, batch.null)
    exact = null + 2.5 * (plain - null)
    with torch.no_grad():
        found = method.ema.module(x, t, {**batch.cond, "guidance": torch.full((2000,), 2.5)})
    error = float((found - exact).norm() / (plain - exact).norm())
    print(f"{kind}: error relative to the change by guidance {error:.3f}")
    assert error < 0.5


@pytest.mark.parametrize(
    "method_class, settings, words",
    [
        (GuidanceFreeTraining, {"max_scale": 1.0, "sample_scale": 1.0}, "max_scale=1.0"),
        (GuidanceFreeTraining, {"max_scale": 3.0, "sample_scale": 4.0}, "sample_scale=4.0"),
        (GuidanceFreeTraining, {"null_probability": 1.0}, "null_probability=1.0"),
        (GuidanceFreeTraining, {"network": nn.Identity()}, "model.class_path=GuidanceFreeTraining: .* extra scalar input"),
        (ModelGuidance, {}, "guidance_scale=None and guidance_range=None: set one"),
        (ModelGuidance, {"guidance_scale": 2.0, "guidance_range": (1.0, 2.0)}, "set one of the two"),
        (ModelGuidance, {"guidance_scale": 0.5}, "guidance_scale=0.5"),
        (ModelGuidance, {"guidance_scale": 2.0, "sample_scale": 2.0}, "no sample_scale"),
        (ModelGuidance, {"guidance_range": (1.5, 3.0)}, "low <= 1 < high"),
    ],
)
def test_bad_settings_are_named(method_class, settings, words):
    with pytest.raises(ValueError, match=words):
        training(method_class, **settings)


def test_data_without_conditions_is_refused():
    method = training(GuidanceFreeTraining)
    method.check_data(DataSpec(tuple(method.student.shape), 2))
    method.student.num_classes = None
    with pytest.raises(ValueError, match="GuidanceFreeTraining guides towards conditions, .* give data with labels"):
        method.check_data(DataSpec(tuple(method.student.shape)))
