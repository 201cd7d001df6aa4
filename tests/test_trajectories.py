"""Guided trajectories: the points of a sampler's run and how exactly they are kept; what is read, and who refuses it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from helpers import SHAPE, evaluation, small, two_classes
from oracle import Mixture
from torch import Tensor

from datamodules.digits import DigitsDataModule
from datamodules.members import to_npy
from datamodules.pairs import PairsDataModule
from datamodules.shard_writing import save_shard
from datamodules.synthetic import SyntheticDataModule
from datamodules.trajectories import TrajectoriesDataModule
from distill.checkpoints import atomic_writer
from distill.denoiser import Denoiser
from distill.frozen import Frozen
from distill.grids import DiscreteGrid, KarrasGrid, UniformGrid
from distill.guidance import AdaptiveProjectedGuidance, CfgPlusPlus, ClassifierFreeGuidance
from distill.methods.denoising import DenoisingTraining
from distill.noise import SeededNoise
from distill.optimization import Optimization
from distill.samplers import OdeSampler
from distill.schedules import RectifiedFlow, VarianceExploding, VariancePreserving, per_sample
from distill.solvers import DDIM, DPMSolver2M, Euler, Heun
from distill.times import UniformTimes
from distill.trajectories import EvaluationRecord, GuidedTrajectories, RecordedDenoiser, count_evaluations
from distill.types import Batch, DataSpec, label_conditions

NUMBERS = torch.arange(6)
COND, NULL = label_conditions(NUMBERS % 2, 2)
ASKED = Batch(None, COND, NULL)
GRIDS = [(RectifiedFlow(), UniformGrid()), (VariancePreserving(), DiscreteGrid()), (VarianceExploding(), KarrasGrid())]


def euler(steps: int = 4, teacher: Denoiser | None = None, **settings) -> GuidedTrajectories:
    return GuidedTrajectories(teacher or two_classes(), OdeSampler(Euler(), UniformGrid()), steps, **settings)


# ----------------------------------------------------------------------------------------------------------- the points


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_points_are_the_evaluations_of_the_guided_run_written_out(solver):
    """On ``x_t = (1 - t) x0 + t eps``, whose velocity is ``(x - x0) / t``; Heun's inner evaluations count."""
    steps, teacher = 4, two_classes()
    sampler = OdeSampler({"euler": Euler, "heun": Heun}[solver](), UniformGrid())
    draws = GuidedTrajectories(teacher, sampler, steps, guidance_range=(1.0, 5.0))
    batch, scales = draws.draw(NUMBERS, ASKED, SHAPE), draws.scales(NUMBERS)
    expected: list[tuple[Tensor, float, Tensor]] = []

    def velocity(x: Tensor, time: float) -> Tensor:
        t = torch.full((len(x),), time)
        null, own = teacher(x, t, NULL), teacher(x, t, COND)
        x0 = null + per_sample(scales, x) * (own - null)
        expected.append((x, time, x0))
        return (x - x0) / time

    x = SeededNoise(0, NUMBERS.tolist(), SHAPE).draw()
    for time, after in [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25)]:
        slope = velocity(x, time)
        guess = x + (after - time) * slope
        x = guess if solver == "euler" else x + (after - time) * (slope + velocity(guess, after)) / 2
    velocity(x, 0.25)
    points = len(expected)
    assert points == draws.each == draws.evaluations == {"euler": 4, "heun": 7}[solver]
    for point, (x, time, x0) in enumerate(expected):
        mine = slice(point, None, points)
        assert batch.time[mine].tolist() == [time] * 6
        torch.testing.assert_close(batch.x0[mine], x0, rtol=0, atol=1e-5)
        torch.testing.assert_close(batch.noise[mine], (x - (1 - time) * x0) / time, rtol=0, atol=1e-5)
        assert torch.equal(batch.cond["guidance"][mine], scales) and torch.equal(batch.cond["labels"][mine], COND["labels"])
        assert torch.equal(batch.null["labels"][mine], NULL["labels"])


@pytest.mark.parametrize(
    ("rule", "solver"),
    [(ClassifierFreeGuidance(3.0), DPMSolver2M()), (AdaptiveProjectedGuidance(3.0, momentum=-0.5), Euler())],
    ids=["2M", "momentum"],
)
def test_to_be_recorded_changes_nothing_of_a_run(rule, solver):
    """Its last evaluation is what the sampler gives, also of rules that remember steps before."""
    draws = GuidedTrajectories(two_classes(), OdeSampler(solver, UniformGrid()), 5, guidance=rule, seed=2)
    noise = SeededNoise(2, NUMBERS.tolist(), SHAPE).draw()
    expected = draws.sampler(rule(two_classes(), NULL), noise, COND, 5)
    batch = draws.draw(NUMBERS, ASKED, SHAPE)
    assert torch.equal(batch.x0[4::5], expected) and "guidance" not in batch.cond
    with pytest.raises(ValueError, match="GuidedTrajectories: CfgPlusPlus goes on with a noise of its own"):
        GuidedTrajectories(two_classes(), OdeSampler(DDIM(), UniformGrid()), 5, guidance=CfgPlusPlus(0.6))


def test_a_trajectory_depends_on_its_number_and_conditions_alone():
    draws = euler(guidance_range=(1.0, 5.0), points=2, seed=7)
    whole = draws.draw(NUMBERS, ASKED, SHAPE)
    alone = draws.draw(NUMBERS[3:4], Batch(None, *({"labels": side["labels"][3:4]} for side in (COND, NULL))), SHAPE)
    for name in ("x0", "noise", "time"):
        torch.testing.assert_close(getattr(alone, name), getattr(whole, name)[6:8], rtol=0, atol=1e-6)
    other = euler(guidance_range=(1.0, 5.0), points=2, seed=8).draw(NUMBERS, ASKED, SHAPE)
    assert not torch.equal(other.cond["guidance"], whole.cond["guidance"]) and not torch.equal(other.noise, whole.noise)


class Reader(Mixture):
    """A teacher that reads its scale and is moved by it."""

    scalar_inputs = ("guidance",)

    def forward(self, x, t, cond, r=None):
        return super().forward(x, t, {"labels": cond["labels"]}) + per_sample(cond["guidance"], x)


def test_a_teacher_that_reads_the_scale_is_given_it():
    oracle = two_classes()
    reader = Reader(oracle.schedule, oracle.means, oracle.std)
    batch = euler(2, reader, guidance_range=(1.0, 5.0)).draw(NUMBERS, ASKED, SHAPE)
    x = SeededNoise(0, NUMBERS.tolist(), SHAPE).draw()
    expected = oracle(x, torch.ones(6), COND) + per_sample(batch.cond["guidance"][::2], x)
    torch.testing.assert_close(batch.x0[::2], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("schedule", "grid"), GRIDS, ids=["flow", "VP", "VE"])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2.0**-24), (torch.float16, 2.0**-11)], ids=["32", "16"])
def test_points_are_made_again_to_the_precision_that_is_stated(schedule, grid, dtype, unit):
    """``u (alpha |x0| + sigma |eps|)`` and a few roundings in float32, from noise-to-signal ratio 80 to 0.002."""
    record = EvaluationRecord(torch.arange(20).repeat(6, 1))
    denoiser = RecordedDenoiser(ClassifierFreeGuidance(4.0)(two_classes(schedule), NULL), record)
    OdeSampler(DDIM(), grid)(denoiser, SeededNoise(0, NUMBERS.tolist(), SHAPE).draw(), COND, 20)
    x, t, x0 = record.points()
    eps = schedule.eps(x, x0, t)
    again = schedule.add_noise(x0.to(dtype).float(), eps.to(dtype).float(), t)
    alpha, sigma = per_sample(schedule.alpha(t), x), per_sample(schedule.sigma(t), x)
    least = 2.0**-14 if dtype == torch.float16 else 0.0  # below, float16 has steps of one size
    size = alpha * x0.abs().clamp(min=least) + sigma * eps.abs().clamp(min=least)
    error = float(((again - x).abs() / size).max())
    assert 0.5 * unit < error < (unit if dtype == torch.float16 else 0.0) + 8 * 2.0**-24


# -------------------------------------------------------------------------------------------------------- which of them


def test_fewer_points_are_spread_evenly_and_all_evaluations_are_kept_equally_often():
    """7 evaluations, 3 points: neighbours are 2 or 3 apart, and each is kept by 3 trajectories of 7."""
    draws = GuidedTrajectories(two_classes(), OdeSampler(Heun(), UniformGrid()), 4, points=3)
    chosen = draws.chosen(torch.arange(7000))
    assert chosen.shape == (7000, 3) and set(chosen.diff(dim=1).unique().tolist()) == {2, 3}
    counts = Counter(chosen.flatten().tolist())
    assert sorted(counts) == list(range(7)) and all(abs(count - 3000) < 4 * (3000 * 4 / 7) ** 0.5 for count in counts.values())
    assert torch.equal(chosen[40:43], draws.chosen(torch.tensor([40, 41, 42])))
    every = GuidedTrajectories(two_classes(), OdeSampler(Heun(), UniformGrid()), 4)
    assert every.chosen(torch.arange(50)).unique(dim=0).tolist() == [list(range(7))]


def test_points_that_are_kept_are_those_of_the_whole_run():
    whole, some = (euler(4, points=points).draw(NUMBERS, ASKED, SHAPE) for points in (None, 2))
    chosen = (torch.arange(6)[:, None] * 4 + euler(4, points=2).chosen(NUMBERS)).flatten()
    for name in ("x0", "noise", "time"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[chosen])
    assert len(some.time.unique()) > 2


@pytest.mark.parametrize(("solver", "evaluations"), [(Euler(), 6), (Heun(), 11), (DPMSolver2M(), 6)])
def test_evaluations_are_counted(solver, evaluations):
    for schedule, grid in GRIDS:
        assert count_evaluations(OdeSampler(solver, grid), schedule, 6) == evaluations


# --------------------------------------------------------------------------------------------------------------- reading

HEADER = {
    "kind": "trajectories",
    "format": 1,
    "teacher": {"path": "somewhere", "sha256": "a" * 64},
    "codec": None,
    "conditioner": None,
    "guidance": None,
    "guidance_range": [1.0, 5.0],
    "shape": [1, 8, 8],
    "num_classes": 10,
    "widths": {},
    "own_null": ["guidance"],
    "prompts": False,
    "points": 2,
    "computed_by": {"torch": "1"},
}


def value(number: int) -> numpy.ndarray:
    return numpy.random.RandomState(number).randn(1, 8, 8).astype(numpy.float16)


def point(number: int) -> dict[str, bytes]:
    record = {"time": [1.0, 0.5][number % 2], "labels": number // 2 % 10, "guidance": 1 + number // 2 / 7}
    return {"x0.npy": to_npy(value(number)), "noise.npy": to_npy(value(100 + number)), "json": json.dumps(record).encode()}


def write(folder: Path, total: int = 12, of: int = 3, **header) -> str:
    for shard in range(of):
        numbers = range(shard * total // of, (shard + 1) * total // of)
        own = HEADER | {"of": of, "total": total, "shard": shard} | header
        save_shard(folder, atomic_writer, own, {"labels": torch.tensor([10])}, numbers[0], map(point, numbers))
    return str(folder)


@pytest.fixture
def folder(tmp_path) -> str:
    return write(tmp_path / "twelve")


def test_points_are_delivered_with_their_times_and_scales(folder, tmp_path):
    module = TrajectoriesDataModule(folder, batch_size=6, batches_per_epoch=2)
    assert module.spec == DataSpec((1, 8, 8), 10, teacher="a" * 64, guidance_range=(1.0, 5.0), trajectories=True)
    items = torch.tensor([7, 0, 10])
    batch = module.data[items]
    assert torch.equal(batch.x0, torch.from_numpy(numpy.stack([value(item) for item in items.tolist()])).float())
    assert torch.equal(batch.noise, torch.from_numpy(numpy.stack([value(100 + item) for item in items.tolist()])).float())
    assert batch.time.tolist() == [0.5, 1.0, 1.0] and batch.time.dtype == torch.float32
    assert set(batch.cond) == set(batch.null) == {"labels", "guidance"}
    assert torch.equal(batch.cond["guidance"], torch.tensor([1 + 3 / 7, 1.0, 1 + 5 / 7]))
    assert batch.cond["labels"].tolist() == [3, 0, 5] and batch.null["labels"].tolist() == [10] * 3
    parts = list(module.train_dataloader())
    seen = [pair for part in parts for pair in zip(part.cond["labels"].tolist(), part.time.tolist())]
    assert sorted(seen) == sorted((label, time) for label in range(6) for time in (1.0, 0.5)) and seen != sorted(seen)
    both = TrajectoriesDataModule([folder, write(tmp_path / "more", 4, 1)])
    mixed = both.data[torch.tensor([13, 7])]
    assert mixed.time.tolist() == [0.5, 0.5] and torch.equal(mixed.x0, both.data[torch.tensor([1, 7])].x0)


def test_validation_is_of_real_data_or_of_conditions_alone(folder):
    real = DigitsDataModule(eval_batch_size=600)
    for batch in (next(iter(TrajectoriesDataModule(folder, real).val_dataloader())), next(iter(real.val_dataloader()))):
        assert batch.time is None and batch.noise is None and batch.x0.shape == (599, 1, 8, 8)
    alone = TrajectoriesDataModule(folder, eval_samples=6, eval_batch_size=4)
    for loader in (alone.val_dataloader(), alone.test_dataloader(), alone.predict_dataloader()):
        batches = list(loader)
        assert all(batch.x0 is None and batch.noise is None and batch.time is None for batch in batches)
        assert torch.cat([batch.cond["labels"] for batch in batches]).tolist() == list(range(6))
    assert alone.examples(3).x0 is None and alone.examples(3).cond["labels"].tolist() == [0, 2, 4]
    assert all(batch.time is not None for batch in alone.train_dataloader())


def test_folders_of_other_kinds_teachers_and_guidance_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="made by tools/make_trajectories.py; give one that tools/make_pairs.py made"):
        PairsDataModule(folder)
    write(tmp_path / "pairs", kind="pairs")
    with pytest.raises(ValueError, match="made by tools/make_pairs.py; give one that tools/make_trajectories.py made"):
        TrajectoriesDataModule(str(tmp_path / "pairs"))
    for key, other in (("teacher", {"path": "b", "sha256": "b" * 64}), ("guidance_range", [1.0, 2.0])):
        with pytest.raises(ValueError, match=f"its trajectories have {key}=.*make it again by tools/make_trajectories.py"):
            TrajectoriesDataModule([folder, write(tmp_path / key, **{key: other})])
    with pytest.raises(ValueError, match="real delivers num_classes=9, the trajectories num_classes=10"):
        TrajectoriesDataModule(folder, SyntheticDataModule((1, 8, 8), 9))
    with pytest.raises(ValueError, match=r"folder=\[\]: give at least one"):
        TrajectoriesDataModule([])


def test_a_damaged_member_is_named_with_its_shard_and_key(folder):
    file = Path(folder) / "00002-of-00003.tar"
    shard = TrajectoriesDataModule(folder).shards[2]
    begin, size, _ = shard.places[1, shard.names.index("noise.npy")].tolist()
    content = bytearray(file.read_bytes())
    content[begin + size - 2] ^= 1
    file.write_bytes(content)
    module = TrajectoriesDataModule(folder)
    expected = "00002-of-00003.tar: sample 000000009 is damaged .noise.npy: .*; delete it and make it again by tools/make_traj"
    with pytest.raises(ValueError, match=expected):
        module.data[torch.tensor([8, 9])]


# -------------------------------------------------------------------------------------------------------- who reads them


class Reading(DenoisingTraining):
    """A method that says that it reads points."""

    reads_trajectories = True


def build(method: type[DenoisingTraining]) -> DenoisingTraining:
    return method(small(num_classes=2), UniformTimes(), Optimization(), evaluation())


def test_methods_that_do_not_read_points_refuse_them():
    spec = DataSpec(SHAPE, 2, trajectories=True)
    with pytest.raises(ValueError, match="points of a teacher's trajectories, which DenoisingTraining would take for data"):
        build(DenoisingTraining).check_data(spec)
    build(Reading).check_data(spec)
    build(DenoisingTraining).check_data(DataSpec(SHAPE, 2))


def test_trajectories_of_another_teacher_are_refused():
    method, own = build(Reading), two_classes()
    own.identity = {"path": "here", "sha256": "a" * 64}
    method._teacher = Frozen(own)
    method.check_data(DataSpec(SHAPE, 2, trajectories=True, teacher="a" * 64))
    with pytest.raises(ValueError, match="trajectories of a teacher with sha256 ffffffffffff.*tools/make_trajectories.py"):
        method.check_data(DataSpec(SHAPE, 2, trajectories=True, teacher="f" * 64))
