"""Two processes that train together over gloo. Both are started once, run every scenario below and leave what they saw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    FixedTimes,
    Trapped,
    Watch,
    batch_of,
    closest,
    evaluation,
    everything,
    fit,
    game,
    joined,
    of_part,
    same,
    small,
    two_classes,
)
from pytorch_lightning import Callback
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from two_ranks import found_by_two_ranks

import distill.strategies  # noqa: F401  the names of strategies
from distill.distances import SquaredDistance
from distill.divergences import FDivergence
from distill.ema import DecayAveraging
from distill.evaluation import Evaluation
from distill.few_step import FewStepSampler
from distill.grids import ConstantPoints, UniformGrid
from distill.image_features import ImageFeatures
from distill.kernels import RadialKernel
from distill.methods.base import Method
from distill.methods.consistency import Consistency
from distill.methods.denoising import DenoisingTraining
from distill.methods.fake_score import FakeScore
from distill.methods.mmd import MMDFinetuning
from distill.methods.score_identity import ScoreIdentity
from distill.optimization import Optimization, PlayerOptimization
from distill.pairs import GridPairs
from distill.samplers import OdeSampler
from distill.solvers import Euler, Heun
from distill.types import Batch, Sample
from distill.weights import ConstantWeight

UNUSED = "ddp_find_unused_parameters_true"
"""Lightning's own, of one exchange for both players."""

TOLERANCES = {"32-true": 1e-6, "64-true": 1e-10}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def denoising(accumulate: int = 1, optimizer: Any = sgd, **settings: Any) -> DenoisingTraining:
    settings = {"accumulate_batches": accumulate, "gradient_clip_norm": 0.3, **settings}
    return DenoisingTraining(small(), FixedTimes(), Optimization(optimizer, **settings), evaluation())


def two_players(accumulate: int = 1, **settings: Any) -> Method:
    return game(2, optimizer=sgd, accumulate_batches=accumulate, gradient_clip_norm=0.3, **settings)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, fused=True)


class Flat(ImageFeatures):
    """The pixels, as vectors."""

    protocol, name = "the pixels, flat", "flat"
    identity = {"path": "flat", "sha256": "flat"}

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class FromPairs(MMDFinetuning):
    """Starts from the batch's noise."""

    def unit_noise(self, batch: Batch) -> Sample:
        assert batch.noise is not None
        return batch.noise


def mmd(accumulate: int = 1) -> Method:
    chain = dict(sampler=OdeSampler(Euler(), UniformGrid()), kernel=RadialKernel([0.5]))
    optimization = Optimization(sgd, accumulate_batches=accumulate, gradient_clip_norm=0.3)
    return FromPairs([Flat()], optimization, Evaluation(steps=[2]), student=small(num_classes=2), **chain)


class Draws(Callback):
    """The first numbers that a rank draws in each batch."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Method, batch: Any, batch_idx: int) -> None:
        pl_module.seed_draws()
        self.seen.append(torch.randn(4))


def parted(number: int, rank: int, precision: str = "32-true") -> Any:
    """A rank's rows of batch ``number``."""
    batch = batch_of(100 * number + rank)
    if precision == "64-true":
        batch.x0, batch.noise = batch.x0.double(), batch.noise.double()  # type: ignore[union-attr]
        batch.cond["again"] = batch.null["again"] = batch.cond["again"].double()
    return batch


# --------------------------------------------------------------------- scenarios, each run by both ranks: rank -> findings


def trained_together(rank: int, build: Any, strategy: str, accumulate: int, precision: str = "32-true") -> dict[str, Tensor]:
    method = build(accumulate)
    batches = [parted(number, rank, precision) for number in range(6 * accumulate)]
    ready = fit(method, batches, 6, strategy=strategy, devices=2, precision=precision)
    return everything(ready, method) | {"global_step": torch.tensor(ready.global_step)}


def bad_on_one_rank(rank: int, build: Any, strategy: str, bad_rank: int, batch: int = 2) -> dict[str, Any]:
    """NaN data on one rank in one batch."""
    batches = [parted(number, rank) for number in range(4)]
    if rank == bad_rank:
        batches[batch].x0.fill_(float("nan")), batches[batch].noise.fill_(float("nan"))
    watch = Watch()
    fit(build(), batches, 4, watch, strategy=strategy, devices=2)
    parts = [part for part in ("student", "ema", "critic") if of_part(watch.states[0], part)]
    moved = {part: [watch.moved(batch, part) for batch in range(4)] for part in parts}
    return {"moved": moved, "end": watch.states[-1]}


def bad_loss_with_a_good_gradient(rank: int) -> dict[str, Any]:
    """The gradients that the ranks exchange say nothing of it: only the flag does."""
    batches = [parted(number, rank) for number in range(3)]
    for number, batch in enumerate(batches):
        batch.cond["trap"] = batch.null["trap"] = torch.full((len(batch),), int(number == 1 and rank == 1))
    watch = Watch()
    fit(Trapped(small(), FixedTimes(), Optimization(adam), evaluation()), batches, 3, watch, strategy="ddp", devices=2)
    return {"moved": [watch.moved(batch, "student") for batch in range(3)], "end": watch.states[-1]}


def bad_for_ever_on_one_rank(rank: int) -> str:
    batches = [parted(number, rank) for number in range(5)]
    if rank == 1:
        for batch in batches[1:]:
            batch.x0.fill_(float("nan"))
    try:
        fit(denoising(max_skipped=2), batches, 5, strategy="ddp", devices=2)
    except FloatingPointError as error:
        return str(error)
    return "no error"


def drawn(rank: int) -> list[Tensor]:
    draws = Draws()
    fit(denoising(), [batch_of(0)], 3, draws, strategy="ddp", devices=2)
    return draws.seen


def distilled(rank: int) -> dict[str, Tensor]:
    """Draws of each rank's own: the ranks must still agree on every weight."""
    method = Consistency(
        GridPairs(UniformGrid(), ConstantPoints(8)), SquaredDistance(), Optimization(adam), evaluation(), small(dropout=0.2),
        two_classes(), Heun(), target=DecayAveraging(0.9),
    )  # fmt: skip
    batches = [batch_of(10 * number + rank, tied=False) for number in range(3)]
    return everything(fit(method, batches, 5, strategy="ddp", devices=2), method)


def score_distilled(rank: int) -> dict[str, Any]:
    """A generator of two steps: ranks draw samples of their own, at the same one of its times."""
    method = ScoreIdentity(
        small(seed=3, num_classes=2), FewStepSampler(times=[1.0, 0.5]), FixedTimes(),
        FakeScore(FixedTimes(), ConstantWeight(), PlayerOptimization(adam)), Optimization(adam), Evaluation(steps=[1]),
    )  # fmt: skip
    seen, generate = [], method.generate_from

    def watched(noise: Tensor, *others: Any) -> Tensor:
        seen.append((method.exit_index(), float(noise.flatten()[0])))
        return generate(noise, *others)

    method.generate_from = watched  # type: ignore[method-assign]
    batches = [batch_of(10 * number + rank, tied=False) for number in range(6)]
    return {"end": everything(fit(method, batches, 8, strategy="ddp", devices=2), method), "seen": seen}


def exchanged(rank: int) -> list[int]:
    """How many gradients the ranks exchange in each of four turns."""
    seen: list[int] = []

    def count(state, bucket):
        seen[-1] += bucket.buffer().numel()
        return allreduce_hook(state, bucket)

    class Counts(Callback):
        def on_train_start(self, trainer: Any, pl_module: Method) -> None:
            for exchange in trainer.strategy.exchanges:
                exchange.register_comm_hook(None, count)

        def on_train_batch_start(self, trainer: Any, pl_module: Method, batch: Any, batch_idx: int) -> None:
            seen.append(0)

    fit(two_players(), [parted(number, rank) for number in range(4)], 4, Counts(), strategy="ddp", devices=2)
    return seen


def running_means(rank: int, ranks: int = 2) -> Tensor:
    """Of density ratios in three bins over two batches, the rows of this rank (or of ``ranks`` as one)."""
    divergence, generator = FDivergence("forward_kl", bins=3, decay=0.5), torch.Generator().manual_seed(0)
    for _ in range(2):
        ratio, position = torch.rand(2, 16, generator=generator).chunk(ranks, 1)[rank]
        divergence(ratio + 0.1, position)
    return divergence.mean_ratios


def all_scenarios(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for accumulate in (1, 2):
        found[f"one player/{accumulate}"] = trained_together(rank, denoising, "ddp", accumulate)
        found[f"two players/{accumulate}"] = trained_together(rank, two_players, "ddp", accumulate)
    for precision in TOLERANCES:
        found[f"mmd/{precision}"] = trained_together(rank, mmd, "ddp", 1, precision)
    found["one player/64-true"] = trained_together(rank, denoising, "ddp", 2, "64-true")
    found["two players/64-true"] = trained_together(rank, two_players, "ddp", 2, "64-true")
    found["two players/unused"] = trained_together(rank, two_players, UNUSED, 2, "64-true")
    found["bad/fused"] = bad_on_one_rank(rank, lambda: denoising(optimizer=adam), "ddp", bad_rank=1)
    found["bad/plain"] = bad_on_one_rank(rank, lambda: denoising(optimizer=torch.optim.RAdam), "ddp", bad_rank=0)
    found["bad/two players"] = bad_on_one_rank(rank, two_players, "ddp", bad_rank=1)
    found["bad loss"] = bad_loss_with_a_good_gradient(rank)
    found["bad for ever"] = bad_for_ever_on_one_rank(rank)
    found["drawn"] = drawn(rank)
    found["distilled"] = distilled(rank)
    found["score distilled"] = score_distilled(rank)
    found["exchanged"] = exchanged(rank)
    found["running means"] = running_means(rank)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks found."""
    return found_by_two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize(
    "name, build, accumulate, precision",
    [
        ("one player/1", denoising, 1, "32-true"),
        ("one player/2", denoising, 2, "32-true"),
        ("one player/64-true", denoising, 2, "64-true"),
        ("two players/1", two_players, 1, "32-true"),
        ("two players/2", two_players, 2, "32-true"),
        ("two players/64-true", two_players, 2, "64-true"),
        ("two players/unused", two_players, 2, "64-true"),
        ("mmd/32-true", mmd, 1, "32-true"),
        ("mmd/64-true", mmd, 1, "64-true"),
    ],
)
def test_two_ranks_equal_one_process_on_the_joined_batches(ranks, name, build, accumulate, precision):
    """In all that is saved, the average of the student among it; with accumulation, in which ranks meet in the last batch of a
    step alone, as well. (MMD is no mean over samples, so that accumulation is something else there.)
    """
    first, second = (found[name] for found in ranks)
    assert same(first, second)
    alone, size = build(), 2 * accumulate
    parts = [parted(number, rank, precision) for number in range(6 * accumulate) for rank in (0, 1)]
    ready = fit(alone, [joined(*parts[at : at + size]) for at in range(0, len(parts), size)], 6, precision=precision)
    expected = everything(ready, alone) | {"global_step": torch.tensor(6)}
    assert closest(first, expected) < TOLERANCES[precision]
    untrained = {key: value.to(first[key].dtype) for key, value in dict(build().state_dict()).items() if key in first}
    for part in ("student", "ema"):
        assert closest(of_part(first, part), of_part(untrained, part)) > 1e-3


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_bad_batch_of_one_rank_is_skipped_by_all(ranks, kind):
    for found in ranks:
        assert found[f"bad/{kind}"]["moved"] == {"student": [True, True, False, True], "ema": [True, True, False, True]}
        assert int(found[f"bad/{kind}"]["end"]["skipped.total"]) == 1
    assert same(*[found[f"bad/{kind}"]["end"] for found in ranks])


def test_a_bad_loss_of_one_rank_is_skipped_by_all_though_no_gradient_shows_it(ranks):
    assert all(found["bad loss"]["moved"] == [True, False, True] for found in ranks)
    assert same(*[found["bad loss"]["end"] for found in ranks])


def test_a_bad_batch_of_one_rank_is_skipped_in_a_players_turn(ranks):
    """Critic, critic, student (bad), critic: the critic's last turn is untouched by it."""
    expected = {"student": [False] * 4, "ema": [False] * 4, "critic": [True, True, False, True]}
    assert all(found["bad/two players"]["moved"] == expected for found in ranks)
    assert same(*[found["bad/two players"]["end"] for found in ranks])


def test_all_ranks_end_together_after_too_many_bad_steps(ranks):
    assert all("2 steps in a row" in found["bad for ever"] for found in ranks)


def test_ranks_draw_different_numbers(ranks):
    first, second = (found["drawn"] for found in ranks)
    assert len({tuple(draw.tolist()) for draw in [*first, *second]}) == 6


def test_ranks_agree_on_every_weight_though_their_draws_differ(ranks):
    first, second = (found["distilled"] for found in ranks)
    assert same(first, second) and of_part(first, "target")
    untrained = {f"student.{key}": value for key, value in small(dropout=0.2).state_dict().items()}
    assert closest(of_part(first, "student"), untrained) > 1e-3


def test_ranks_leave_a_few_step_generator_at_the_same_time(ranks):
    """Score distillation: another number of evaluations on one rank would have the others wait, or train other weights."""
    first, second = (found["score distilled"] for found in ranks)
    assert same(first["end"], second["end"])
    (exits_1, noise_1), (exits_2, noise_2) = (zip(*found["seen"], strict=True) for found in (first, second))
    assert exits_1 == exits_2 and set(exits_1) == {0, 1} and not set(noise_1) & set(noise_2)
    untrained = {f"student.{key}": value for key, value in small(seed=3, num_classes=2).state_dict().items()}
    assert closest(of_part(first["end"], "student"), untrained) > 1e-3


def test_in_a_turn_the_gradients_of_its_player_alone_are_exchanged(ranks):
    """Critic, critic, student, critic."""
    method: Any = two_players()
    student, critic = (sum(p.numel() for p in part.parameters()) for part in (method.student, method.critic))
    assert all(found["exchanged"] == [critic, critic, student, critic] for found in ranks)


def test_running_means_of_density_ratios_are_over_all_ranks(ranks):
    expected = running_means(0, ranks=1)
    assert len(set(expected.tolist())) == 3
    for found in ranks:
        torch.testing.assert_close(found["running means"], expected)


if __name__ == "__main__":
    own_rank, results = int(sys.argv[1]), all_scenarios(int(sys.argv[1]))
    torch.save(results, Path(sys.argv[2]) / f"{own_rank}.pt")
