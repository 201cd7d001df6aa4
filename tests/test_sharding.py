"""Networks sharded by FSDP2 over processes that are forked from this one and meet over gloo.

A run on two ranks is compared with one process on the joined batches, in which every rank's draws are made for its rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import score_methods
import torch
from helpers import closest, evaluation, everything, fit, joined, of_part, same
from pytorch_lightning import Callback, Trainer
from score_methods import SHAPE, adam, teacher
from sharded_ranks import DrawsOfRanks, fork_ranks, found, run_alone
from torch.distributed.tensor import DTensor

import distill.strategies  # noqa: F401  names the strategy
from distill.checkpoints import AtomicCheckpointIO, read_checkpoint
from distill.distances import SquaredDistance
from distill.ema import DecayAveraging
from distill.grids import ConstantPoints, UniformGrid
from distill.methods.consistency import Consistency
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.sharding import gathered
from distill.solvers import Heun
from distill.types import Batch

ROWS = 8
UNUSED = "ddp_find_unused_parameters_true"


def consistency(**settings: Any) -> Consistency:
    pairs, optimization = GridPairs(UniformGrid(), ConstantPoints(8)), Optimization(adam, averaging=DecayAveraging(0.9))
    parts = {"teacher": teacher(dropout=0.0), "solver": Heun(), "target": DecayAveraging(0.9), **settings}
    return Consistency(pairs, SquaredDistance(), optimization, evaluation(), **parts)


METHODS: dict[str, Callable[[], Any]] = {
    "cd": consistency,
    "sid": lambda: score_methods.method("sid", teacher=teacher(dropout=0.0)),
    "dmd2": lambda: score_methods.method("dmd2", teacher=teacher(dropout=0.0), fake={"steps": 2}),
}


def rows(number: int, rank: int = 0, count: int = 1) -> Batch:
    """A rank's share of the eight rows of batch ``number``, in float64."""
    whole, share = joined(score_methods.batch(2 * number), score_methods.batch(2 * number + 1)), ROWS // count
    own = slice(rank * share, (rank + 1) * share)
    cond, null = ({key: value[own] for key, value in side.items()} for side in (whole.cond, whole.null))
    return Batch(whole.x0[own].double(), cond, null, whole.noise[own].double())


class SaveAt(Callback):
    """Saves after ``step`` steps."""

    def __init__(self, step: int, path: Path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *others: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)


def trained(kind: str, rank: int, count: int, steps: int, *callbacks: Callback, **settings: Any) -> Trainer:
    """A run in 64 bits on this rank's rows of six batches, again and again, with this package's checkpoint files."""
    batches = [rows(number, rank, count) for number in range(6)]
    settings = {"devices": count, "precision": "64-true", "plugins": [AtomicCheckpointIO()], **settings}
    return fit(METHODS[kind](), batches, steps, *callbacks, **settings)


def whole_state(trainer: Trainer) -> dict[str, Any]:
    return gathered(everything(trainer, trainer.lightning_module), True)


def alone(kind: str, ranks: int, steps: int, *callbacks: Callback, **settings: Any) -> dict[str, Any]:
    """The state that one process comes to on the joined batches with the draws of ``ranks``."""
    method = METHODS[kind]()
    with DrawsOfRanks(ranks, ROWS // ranks) as draws:
        batches = [rows(number) for number in range(6)]
        settings = {"precision": "64-true", "plugins": [AtomicCheckpointIO()], **settings}
        return everything(fit(draws.watch(method), batches, steps, *callbacks, **settings), method)


# --------------------------------------------------------------------- scenarios, each run by all ranks: rank -> findings


def on_two(rank: int, folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for kind in METHODS:
        ready = trained(kind, rank, 2, 20, SaveAt(10, folder / f"{kind}.ckpt"), strategy="fsdp2")
        seen[f"{kind}/fsdp2"] = whole_state(ready)
        ready = trained(kind, rank, 2, 20, strategy="ddp" if kind == "cd" else UNUSED)
        seen[f"{kind}/ddp"] = everything(ready, ready.lightning_module)
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where every rank of two, then of four, leaves what it found, and two ranks their checkpoints of step 10."""
    folder = tmp_path_factory.mktemp("sharded")
    run_alone(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    """What each of the two ranks found."""
    return found(folder, 2)


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    """The states of one process after twenty steps."""
    return {kind: alone(kind, 2, 20) for kind in METHODS}


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize("kind", METHODS)
def test_two_ranks_equal_one_process_on_the_joined_batches(ranks, references, kind, strategy):
    """In all that is saved: the student, the critic, averages, optimisers."""
    first, second = (found[f"{kind}/{strategy}"] for found in ranks)
    assert same(first, second)
    assert closest(first, references[kind]) < 1e-9
    untrained = {key: value.double() for key, value in METHODS[kind]().state_dict().items()}
    for part in ("student", "ema") + (() if kind == "cd" else ("critic",)):
        assert closest(of_part(first, part), of_part(untrained, part)) > 1e-3


if __name__ == "__main__":
    results = Path(sys.argv[1])
    fork_ranks(partial(on_two, folder=results), 2, results)
