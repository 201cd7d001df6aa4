"""The figures of speed, exact on a clock that only data and training steps move; and that taking them changes nothing."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Data, FixedTimes, Stream, batch_of, evaluation, everything, game, same, small, trainer
from pytorch_lightning import Callback
from tiny_run import write_recipe
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from two_ranks import found_by_two_ranks

from distill import cli
from distill.callbacks import throughput
from distill.callbacks.throughput import UNTIMED_TURNS, Throughput
from distill.methods.denoising import DenoisingTraining
from distill.methods.trained import TrainedModule
from distill.operations import OperationCounter
from distill.optimization import Optimization
from distill.types import Batch

FORWARD = 2 * (12 * 64 + 64 * 64 + 64 * 2)
"""Operations of the small network's three matrices on one sample."""

TRAINED = FORWARD + FORWARD + 2 * (64 * 64 + 64 * 2)
"""With the backward pass: to all weights, and to the inputs of all but the first."""


class Clock:
    """Seconds that pass only where somebody says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class SlowData(Data):
    """Batches for each of which the loader takes ``wait`` seconds."""

    def __init__(self, batches: list[Batch], clock: Clock, wait: float):
        super().__init__(batches)
        self.clock, self.wait = clock, wait

    def train_dataloader(self) -> Stream:
        data = self

        class SlowStream(Stream):
            def __iter__(self) -> Iterator[Batch]:
                for batch in super().__iter__():
                    data.clock.seconds += data.wait
                    yield batch

        return SlowStream(self.batches)


class Seen(Callback):
    """The figures of each batch, as the loggers would be given them."""

    def __init__(self, clock: Clock, validation: float = 0.0):
        self.clock, self.validation, self.rows = clock, validation, []

    def on_train_batch_end(self, trainer: Any, *others: Any) -> None:
        self.rows.append({key: float(value) for key, value in trainer.callback_metrics.items() if "throughput" in key})

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.clock.seconds += self.validation


def slowed(method: TrainedModule, clock: Clock, seconds: float) -> TrainedModule:
    """The method, each of whose batches takes so long."""
    seed = method.seed_draws

    def slow(*arguments: Any) -> None:
        clock.seconds += seconds
        seed(*arguments)

    method.seed_draws = slow  # type: ignore[method-assign]
    return method


def denoising(**settings: Any) -> DenoisingTraining:
    return DenoisingTraining(small(dropout=0.2), FixedTimes(), Optimization(**settings), evaluation())


def figures(
    method: TrainedModule,
    steps: int,
    peak: float | None = None,
    wait: float = 0.25,
    step: float = 0.75,
    validation: float = 0.0,
    **settings: Any,
) -> list[dict[str, float]]:
    """What is logged by each batch of 8 images of a run in which data and steps take so many seconds."""
    clock = Clock()
    seen = Seen(clock, validation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "now", clock)
        ready = trainer(steps, Throughput(peak), seen, **settings)
        data = SlowData([batch_of(number) for number in range(4)], clock, wait)
        ready.fit(slowed(method, clock, step), datamodule=data)
    return seen.rows


def test_figures_are_those_of_the_steps_since_the_log_before():
    """Batches of 8 images, of 0.25 seconds of waiting and 0.75 of work each; the first two are not timed."""
    rows = figures(denoising(), 9, log_every_n_steps=3)
    assert rows[:2] == [{}, {}]
    for row in (rows[2], rows[5], rows[8]):
        memory = row.pop("throughput/peak_memory_mib")
        assert row == {
            "throughput/images_per_second": 8,
            "throughput/step_ms": pytest.approx(1000),
            "throughput/data_wait": 0.25,
        }
        assert 50 < memory < 50_000


def test_a_change_of_speed_shows_in_the_next_log_alone():
    clock, seen = Clock(), []
    method = slowed(denoising(), clock, 1.0)

    class Slower(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *others: Any) -> None:
            seen.append(float(trainer.callback_metrics.get("throughput/step_ms", 0)))
            if len(seen) == 4:
                clock.seconds += 3.0  # after the log of the fourth batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "now", clock)
        trainer(8, Throughput(), Slower(), log_every_n_steps=2).fit(method, datamodule=Data([batch_of(0)]))
    assert [seen[index] for index in (3, 5, 7)] == [1000, 2500, 1000]


def test_a_step_is_one_of_the_optimiser():
    row = figures(denoising(accumulate_batches=2), 3, log_every_n_steps=2)[-1]
    assert row["throughput/step_ms"] == pytest.approx(2000) and row["throughput/images_per_second"] == 8


def test_the_time_of_validations_is_left_out():
    settings = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    rows = figures(denoising(), 8, validation=100.0, log_every_n_steps=4, **settings)
    assert [rows[index]["throughput/images_per_second"] for index in (3, 7)] == [8, 8]


def test_operations_are_those_of_the_networks_matrices():
    rows = figures(denoising(), 3, peak=1e-9, log_every_n_steps=1)
    assert rows[-1]["throughput/utilisation"] == pytest.approx(8 * TRAINED / 1e3)


def test_operations_are_counted_for_each_player():
    """In its turn the student is trained and the critic is read, and the other way round; the teacher is read in one."""
    method = game(2)
    x, t, cond = torch.zeros(8, 2, 1, 1), torch.full((8,), 0.5), batch_of(0).cond
    with FlopCounterMode(display=False) as teacher:
        method.teacher(x, t, cond)
    student, critic = 8 * (TRAINED + FORWARD) + teacher.get_total_flops(), 8 * (TRAINED + FORWARD)
    rows = figures(method, 9, peak=1e-9, log_every_n_steps=1)
    found = [row.get("throughput/utilisation", 0.0) for row in rows]
    assert found[6:] == pytest.approx([critic / 1e3, critic / 1e3, student / 1e3])
    of_rounds = figures(game(2), 12, peak=1e-9, log_every_n_steps=6)[-1]["throughput/utilisation"]
    assert of_rounds == pytest.approx((2 * student + 4 * critic) / 6e3)


def test_operations_of_attentions_convolutions_and_what_is_repeated():
    queries, keys = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with OperationCounter() as attention:
        scaled_dot_product_attention(queries, keys, keys)
    assert attention.total == 2 * 2 * (2 * 3 * 5 * 7 * 8), "queries by keys, weights by values"
    layer, images = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.SiLU()), torch.randn(2, 3, 6, 6)
    once, repeated, alone = OperationCounter(), OperationCounter(), 2 * (2 * 6 * 6) * (3 * 3 * 3 * 4)
    with once:
        layer(images).sum().backward()
    with repeated:
        checkpoint(layer, images, use_reentrant=False).sum().backward()
    assert (once.total, repeated.total) == (2 * alone, 3 * alone)


@pytest.mark.parametrize("build", [denoising, lambda: game(2)], ids=["one player", "two players"])
def test_counting_changes_no_bit(build):
    ends = []
    for callbacks in ([], [Throughput(1.0)]):
        method = build()
        ready = trainer(5, *callbacks, log_every_n_steps=2)
        ready.fit(method, datamodule=Data([batch_of(number) for number in range(4)]))
        ends.append(everything(ready, method))
    assert same(*ends)


def test_a_step_that_fails_leaves_no_counter_behind():
    method = denoising()

    def failing(batch: Batch) -> Any:
        assert _get_current_dispatch_mode() is not None, "the first step is counted"
        raise RuntimeError("as it happens")

    method.losses = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="as it happens"):
        trainer(3, Throughput(1.0)).fit(method, datamodule=Data([batch_of(0)]))
    assert _get_current_dispatch_mode() is None


@pytest.mark.parametrize("peak", [0.0, -1.0, float("nan")])
def test_a_peak_that_is_none_is_refused(peak):
    with pytest.raises(ValueError, match=f"peak_tflops={peak}: give a positive number"):
        Throughput(peak)


def test_every_fit_logs_its_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill"])
    monkeypatch.chdir(tmp_path)
    words = ["--trainer.default_root_dir=run", "--trainer.val_check_interval=50", "--throughput.peak_tflops=1e-6"]
    cli.main(["fit", "--config", str(write_recipe(tmp_path)), *words])
    rows = list(csv.DictReader(Path("run/csv/metrics.csv").open()))
    names = ("images_per_second", "step_ms", "data_wait", "peak_memory_mib", "utilisation")
    figures = [[float(row[f"throughput/{name}"] or "nan") for name in names] for row in rows]
    assert all(value != value for row in figures[:UNTIMED_TURNS] for value in row)
    for rate, milliseconds, waited, memory, used in figures[UNTIMED_TURNS:]:
        assert rate * milliseconds == pytest.approx(4000, rel=1e-4) and 0 <= waited <= 1 and memory > 50
        assert used == pytest.approx(2 * 2 * 9 * 64 * rate / 1e6, rel=1e-4), "a convolution of 3x3 at 64 places, twice"


# ------------------------------------------------------------------------------------------------------------- two ranks


def on_two(rank: int) -> list[dict[str, float]]:
    """Rank 1 waits longer for its data, rank 0 works longer."""
    wait, step = ((0.25, 1.0), (0.5, 0.5))[rank]
    return figures(denoising(), 4, 1e-9, wait, step, log_every_n_steps=2, strategy="ddp", devices=2)


def test_ranks_are_added_up_and_the_slowest_counts(tmp_path):
    first, second = (rows[-1] for rows in found_by_two_ranks(__file__, tmp_path))
    assert first == second
    assert first["throughput/images_per_second"] == pytest.approx(16 / 1.25)
    assert first["throughput/step_ms"] == pytest.approx(1250)
    assert first["throughput/data_wait"] == pytest.approx(0.5), "of rank 1, of its own second"
    assert first["throughput/utilisation"] == pytest.approx(8 * TRAINED / 1.25e3)


if __name__ == "__main__":
    torch.save(on_two(int(sys.argv[1])), Path(sys.argv[2]) / f"{sys.argv[1]}.pt")
