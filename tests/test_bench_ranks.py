"""``tools/bench.py --ranks``: in which batches two ranks exchange gradients, on a clock that only turns and exchanges move."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Data, batch_of, game, small
from script import TOOLS, load_script
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from two_ranks import found_by_two_ranks

from distill.methods.base import Method

bench_ranks = load_script("bench_ranks")

ROUNDS, TURNS = 4, 3
"""After one round of warm-up; two turns of the critic and one of the student."""

TRAINED = 4 * sum(value.numel() for value in small(num_classes=2).parameters())
"""Bytes of each player's gradients."""


class Seconds:
    """A clock that a turn of the critic moves by 1, one of the student by 2, and an exchange of gradients by 0.25."""

    def __init__(self) -> None:
        self.passed = 0.0
        self.exchanges: list[int] = []
        self.bytes: list[int] = []

    def turn(self, method: Method) -> None:
        self.passed += (2, 1)[method.turn(method.batches_seen)]
        self.exchanges.append(0)

    def exchange(self, group: Any, bucket: Any) -> Any:
        self.passed += 0.25
        self.exchanges[-1] += 1
        self.bytes.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)


def on_two(rank: int) -> dict[str, Any]:
    """What a rank sees of five rounds, on data of its own."""
    seconds, method = Seconds(), game(TURNS - 1)
    seed = method.seed_draws
    method.seed_draws = lambda *names: (seconds.turn(method), seed(*names))[1]  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_ranks, "now", lambda: seconds.passed)
        patch.setattr(bench_ranks, "DigitsDataModule", lambda size: Data([batch_of(10 + rank, size)]))
        patch.setattr(bench_ranks, "allreduce_hook", seconds.exchange)
        times = bench_ranks.timed(method, 2, ROUNDS, 1, 8)
    rounds = {exchanged: times.round(exchanged) for exchanged in (True, False)}
    found = {"exchanges": seconds.exchanges, "bytes": seconds.bytes, "rounds": rounds}
    return found | {"seconds": dict(times.seconds), "count": times.count}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> list[dict[str, Any]]:
    return found_by_two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


def test_gradients_are_exchanged_in_every_other_round_alone(found):
    for seen in found:
        assert seen["exchanges"] == 3 * [1] + 3 * [0] + 3 * [1] + 3 * [0] + 3 * [1]
        assert seen["bytes"] == 9 * [TRAINED], "of the player whose turn it is, in one bucket"


def test_times_are_sorted_by_turn_and_exchange(found):
    for seen in found:
        assert seen["seconds"] == {
            **{(True, turn): 2 * [own + 0.25] for turn, own in enumerate((1, 1, 2))},
            **{(False, turn): 2 * [own] for turn, own in enumerate((1, 1, 2))},
        }
        assert seen["rounds"] == {True: 4.75, False: 4.0} and seen["count"] == ROUNDS * TURNS


def times_of(exchanged: list[float], others: list[float]) -> Any:
    times = bench_ranks.RoundTimes(3, 1)
    for turn in range(3):
        times.seconds |= {(True, turn): [exchanged[turn]] * 2, (False, turn): [others[turn]] * 2}
    return times


@pytest.mark.parametrize("child", [False, True], ids=["the first rank", "another rank"])
def test_efficiency_and_share_of_communication(monkeypatch, child):
    """16 images a rank in each of three turns: one rank makes 48 in 4 seconds, two 96 in 5, of which they exchange for one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if child:
        monkeypatch.setenv("LOCAL_RANK", "1")
    calls = []

    def timed(method: Method, ranks: int, *numbers: int) -> Any:
        calls.append((ranks, *numbers))
        return times_of([1, 1, 3], [1, 1, 2]) if ranks == 2 else times_of([1, 1, 2.5], [1, 1, 1.5])

    monkeypatch.setattr(bench_ranks, "timed", timed)
    figures = bench_ranks.scaling(lambda: game(2), 2, steps=14, warmup=4, batch_size=16)
    assert calls[-1] == (2, 4, 2, 16) and len(calls) == (1 if child else 2)
    assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    if child:
        assert figures == {}
        return
    assert figures == {
        "steps": 12,
        "images_per_second_one_rank": 12.0,
        "images_per_second": 19.2,
        "scaling_efficiency": 0.8,
        "communication_share": 0.2,
        "gradient_mib_a_round": round(3 * TRAINED / 2**20, 2),
    }


def test_the_tool_starts_its_ranks_and_prints_one_line():
    words = "--method consistency --ranks 2 --steps 4 --warmup 1 --batch-size 8 --threads 1".split()
    environment = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TOOLS.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(TOOLS / "bench.py"), *words], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = done.stdout.strip().splitlines()
    figures = json.loads(line)
    assert (figures["ranks"], figures["batch_size"], figures["threads"], figures["steps"]) == (2, 8, 1, 4)
    one, both = figures["images_per_second_one_rank"], figures["images_per_second"]
    assert figures["scaling_efficiency"] == pytest.approx(both / (2 * one), rel=1e-2)
    assert figures["gradient_mib_a_round"] == pytest.approx(0.70e6 * 4 / 2**20, rel=0.01) and figures["communication_share"] < 1


if __name__ == "__main__":
    torch.save(on_two(int(sys.argv[1])), Path(sys.argv[2]) / f"{sys.argv[1]}.pt")
