"""Straightness and transport cost: the closed form of a Gaussian's flow, straight maps, and the callback that logs both."""

from __future__ import annotations

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import SHAPE, Data, batch_of, evaluation, small, trainer, two_classes
from oracle import SCHEDULES, Gaussian
from pytorch_lightning import LightningModule, Trainer
from straight import StraightGaussian
from torch import Tensor

from distill.callbacks.flow_measures import FlowMeasures
from distill.callbacks.loggers import ContinuedCSVLogger
from distill.denoiser import Denoiser
from distill.distances import SquaredDistance
from distill.grids import ConstantPoints, UniformGrid
from distill.guidance import ClassifierFreeGuidance, GuidanceRule
from distill.methods.consistency import Consistency
from distill.noise import SeededNoise
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.schedules import RectifiedFlow, VarianceExploding
from distill.solvers import DDIM, DPMSolver2M, Euler, Heun
from distill.straightness import follow
from distill.types import Batch, Cond, label_conditions

MEAN, VARIANCE = torch.tensor([0.5, -0.3, 0.1]), torch.tensor([0.25, 0.6, 0.05])
STD = VARIANCE.double().sqrt()


def unit(count: int = 6) -> Tensor:
    return SeededNoise(0, range(count), (3,)).draw().double()


def exact(z: Tensor) -> tuple[Tensor, Tensor]:
    """Straightness and cost of the flow from ``z`` to ``N(mean, variance)``, each element alone.

    The flow is ``x_t = (1 - t) m + k z``, ``k^2 = (1 - t)^2 v + t^2``, so ``S = z^2 (int k'^2 dt - (k(1) - k(0))^2)``. With
    ``w = (1 + v) t - v``, ``k k' = w`` and ``(1 + v) k^2 = w^2 + v``: the integral is that of ``w^2 / (w^2 + v)`` from -v
    to 1 in w, ``1 + v - v^1/2 pi / 2``. What is left is ``S = z^2 (2 - pi / 2) v^1/2``.
    """
    return (z**2 * (2 - math.pi / 2) * STD).sum(1), ((1 - STD) * z - MEAN).square().sum(1)


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("name", ["rf", "rf-shift3", "trig", "ve"])
def test_gaussian_flow_has_the_closed_form_whatever_its_schedule(name: str) -> None:
    """Euler's error is of first order, c / steps: below 5 percent at 128, and in ``2 f(128) - f(64)`` below 0.2 percent."""
    z, oracle = unit(), Gaussian(SCHEDULES[name], MEAN, VARIANCE)
    coarse, fine = (follow(oracle, z, {}, steps) for steps in (64, 128))
    for value, half, whole in zip(exact(z), (coarse.straightness, coarse.cost), (fine.straightness, fine.cost), strict=True):
        torch.testing.assert_close(whole, value, rtol=0.05, atol=0)
        torch.testing.assert_close(2 * whole - half, value, rtol=0.002, atol=0)


@pytest.mark.parametrize("solver", [Heun(), DPMSolver2M()], ids=["heun", "dpm"])
def test_another_solver_measures_the_same_flow(solver) -> None:
    z = unit()
    paths = follow(Gaussian(RectifiedFlow(), MEAN, VARIANCE), z, {}, 128, solver)
    torch.testing.assert_close(paths.straightness, exact(z)[0], rtol=0.02, atol=0)
    torch.testing.assert_close(paths.cost, exact(z)[1], rtol=0.005, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_measures_of_a_path_are_the_integrals_along_it(steps: int) -> None:
    """Against the definition, with a path of its own making and its velocities kept; DDIM is Euler here."""
    z, oracle, gap = unit(), Gaussian(RectifiedFlow(), MEAN, VARIANCE), 1 / steps
    x, slopes = z, []
    for k in range(steps):
        t = torch.full((len(z),), 1 - k * gap, dtype=torch.float64)
        slopes.append((x - oracle(x, t, {})) / t[:, None])
        x = x - gap * slopes[-1]
    straightness = sum(gap * ((z - x) - slope).square().sum(1) for slope in slopes)
    for solver in (None, Euler(), DDIM()):
        paths = follow(oracle, z, {}, steps, solver)
        torch.testing.assert_close(paths.samples, x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(paths.straightness, straightness, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(paths.cost, (z - x).square().sum(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(paths.relative, paths.straightness / paths.cost, rtol=1e-12, atol=0)


def test_straight_map_is_straight_and_one_step_is_exact() -> None:
    z, line = unit(), StraightGaussian(MEAN, VARIANCE)
    assert follow(Gaussian(RectifiedFlow(), MEAN, VARIANCE), z, {}, 16).relative.min() > 0.01
    for steps in (1, 2, 16):
        paths = follow(line, z, {}, steps)
        assert paths.straightness.max() < 1e-10
        torch.testing.assert_close(paths.samples, MEAN + STD * z, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(paths.cost, exact(z)[1], rtol=1e-12, atol=1e-12)


def test_in_float32_a_straight_flow_is_still_straight() -> None:
    """A difference of two sums of squares would leave 1e-7 of the cost."""
    paths = follow(StraightGaussian(MEAN, VARIANCE), unit().float(), {}, 16)
    assert paths.straightness.dtype == torch.float32 and paths.relative.max() < 1e-10


def test_straight_map_is_the_optimum_of_reflow() -> None:
    """It returns each pair's own sample from every point of the pair's line, under other schedules too."""
    line = StraightGaussian(MEAN, VARIANCE)
    z, x = line.pairs(5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, MEAN + STD * z)
    for time in (0.0, 0.3, 1.0):
        t = torch.full((5,), time, dtype=torch.float64)
        torch.testing.assert_close(line((1 - time) * x + time * z, t, {}), x, rtol=1e-12, atol=1e-12)
    t = torch.full((5,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(line.under(VarianceExploding())(x + 2 * z, t, {}), x, rtol=1e-12, atol=1e-12)


def test_one_evaluation_a_step() -> None:
    class Counted(Gaussian):
        calls = 0

        def forward(self, x, t, cond, r=None):
            self.calls += 1
            return super().forward(x, t, cond, r)

    counted = Counted(VarianceExploding(), MEAN, VARIANCE)
    follow(counted, unit(), {}, 5)
    assert counted.calls == 5


def test_bad_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="steps=0: give at least one step"):
        follow(StraightGaussian(MEAN, VARIANCE), unit(), {}, 0)
    with pytest.raises(ValueError, match="num=0: give at least 1"):
        FlowMeasures(num=0)
    with pytest.raises(ValueError, match="steps=1: give at least 2"):
        FlowMeasures(steps=1)


# ------------------------------------------------------------------------------------------------------- the callback


class Examples(Data):
    """Two fixed batches; examples are the two classes in turn."""

    def __init__(self) -> None:
        super().__init__([batch_of(0), batch_of(1)])
        self.eval_batch_size = 3

    def examples(self, count: int) -> Batch:
        return Batch(None, *label_conditions(torch.arange(count) % 2, 2))


class Rank:
    """A trainer, to whoever asks, seen from one rank; what it would sum over the ranks is kept, and given back as it is."""

    __class__ = Trainer  # type: ignore[assignment]
    sanity_checking = False

    def __init__(self, rank: int = 0, world_size: int = 1):
        self.global_rank, self.world_size, self.datamodule = rank, world_size, Examples()
        self.strategy = SimpleNamespace(reduce=self.reduce)

    def reduce(self, sums: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        self.sums = sums
        return sums


def method_with(guidance: GuidanceRule | None = None) -> Consistency:
    """A small student whose average is another network, and the exact teacher."""
    parts = {"teacher": two_classes(), "solver": Euler(), "guidance": guidance}
    pairs = GridPairs(UniformGrid(), ConstantPoints(4))
    method = Consistency(pairs, SquaredDistance(), Optimization(), evaluation(), student=small(num_classes=2), **parts)
    method.ema.module.load_state_dict(small(seed=1, num_classes=2).state_dict())
    return method


def expected(denoiser: Denoiser, count: int, cond: Cond) -> tuple[Tensor, Tensor]:
    paths = follow(denoiser, SeededNoise(0, range(count), SHAPE).draw(), cond, 4)
    return paths.straightness.mean(), paths.cost.mean()


def test_each_sample_of_the_average_is_measured_once_whatever_the_ranks() -> None:
    method, callback, batch = method_with(), FlowMeasures(num=10, steps=4), Examples().examples(10)
    measured = callback.measure(Rank(), method, "")
    straightness, cost = expected(small(seed=1, num_classes=2), 10, batch.cond)
    torch.testing.assert_close(measured, {"straightness": straightness, "transport_cost": cost})
    for world_size in (2, 3, 12):
        ranks = [Rank(rank, world_size) for rank in range(world_size)]
        for rank in ranks:
            callback.measure(rank, method, "")
        sums = torch.stack([rank.sums for rank in ranks])
        torch.testing.assert_close(sums.sum(0), 10 * torch.stack([straightness, cost, torch.ones(())]))
        assert sums[:, 2].max() - sums[:, 2].min() <= 1


def test_the_teacher_is_guided_as_the_method_guides_it() -> None:
    batch, rule = Examples().examples(6), ClassifierFreeGuidance(2.0)
    measured = FlowMeasures(num=6, steps=4).measure(Rank(), method_with(rule), "teacher_")
    straightness, cost = expected(rule(two_classes(), batch.null), 6, batch.cond)
    torch.testing.assert_close(measured, {"teacher_straightness": straightness, "teacher_transport_cost": cost})
    assert not torch.isclose(straightness, expected(two_classes(), 6, batch.cond)[0])


def test_a_run_logs_both_at_each_validation_and_the_teachers_once(tmp_path) -> None:
    settings = {"limit_val_batches": 1, "val_check_interval": 1, "logger": ContinuedCSVLogger(tmp_path)}
    run = trainer(2, FlowMeasures(num=8, steps=4), **settings)
    method = method_with()
    run.fit(method, datamodule=Examples())
    rows = [row for row in csv.DictReader((tmp_path / "csv" / "metrics.csv").open()) if row["val/straightness"]]
    assert len(rows) == 2 and all(float(row["val/transport_cost"]) > 0 for row in rows)
    straightness, _ = expected(method.ema.module, 8, Examples().examples(8).cond)
    assert float(rows[1]["val/straightness"]) == pytest.approx(float(straightness), rel=1e-5)
    assert [bool(row["val/teacher_straightness"]) for row in rows] == [True, False]


def test_what_cannot_be_sampled_is_left_alone() -> None:
    """A module that is no method would fail for the lack of everything; Lightning's sanity check measures nothing either."""
    FlowMeasures().on_validation_epoch_end(Rank(), LightningModule())
    rank, callback = Rank(), FlowMeasures()
    rank.sanity_checking = True
    callback.on_validation_epoch_end(rank, method_with())
    assert not hasattr(rank, "sums") and not callback.teacher_measured
