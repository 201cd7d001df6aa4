"""The interval of the Fréchet distance holds the expected distance as often as it says, where that is known."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy
import pytest
import torch
from forked import on_processes
from script import load_script
from torch import Tensor

from distill.metrics import GaussianStatistics
from distill.metrics.bootstrap import FEWEST, frechet_interval
from distill.metrics.frechet import weighted_statistics

fid = load_script("fid")


def draw(generator: torch.Generator, count: int, width: int, scale: float, shift: float) -> Tensor:
    return shift + scale * torch.randn(count, width, generator=generator, dtype=torch.float64)


def unit(width: int) -> GaussianStatistics:
    return GaussianStatistics.of_moments(torch.zeros(width), torch.eye(width))


def expected_distance(count: int, scale: float, shift: float) -> float:
    """Of ``count`` samples of N(shift, scale^2) on a line from N(0, 1): the standard deviation's mean is ``scale c4``."""
    c4 = math.sqrt(2 / (count - 1)) * math.exp(math.lgamma(count / 2) - math.lgamma((count - 1) / 2))
    return shift**2 + scale**2 / count + scale**2 + 1 - 2 * scale * c4


def distances(count: int, width: int, scale: float, shift: float, repetitions: int) -> Tensor:
    generator, ones = torch.Generator().manual_seed(7), torch.ones(count)
    sets = (draw(generator, count, width, scale, shift) for _ in range(repetitions))
    return torch.tensor([weighted_statistics(rows, ones).distance(unit(width)) for rows in sets])


def misses(count: int, width: int, scale: float, shift: float, expected: float) -> tuple[int, int]:
    """In how many of 100 sets the interval lies above the expected distance, and below."""
    generator, above, below = torch.Generator().manual_seed(1), 0, 0
    for seed in range(100):
        found = frechet_interval(draw(generator, count, width, scale, shift), unit(width), 60, seed)
        above, below = above + (found.low > expected), below + (found.high < expected)
    return above, below


def test_the_interval_holds_the_expected_distance_on_a_line() -> None:
    """Of 100 draws at a rate of 0.05, 11 or more come once in a hundred; 8 or more on one side likewise."""
    expected = expected_distance(50, 1.3, 0.4)
    assert expected == pytest.approx(float(distances(50, 1, 1.3, 0.4, 1000).mean()), rel=0.05)
    above, below = misses(50, 1, 1.3, 0.4, expected)
    assert above + below <= 11 and above <= 8 and below <= 8


def test_the_interval_holds_the_expected_distance_of_several_features() -> None:
    simulated = distances(100, 6, 1.3, 0.3, 1000)
    above, below = misses(100, 6, 1.3, 0.3, float(simulated.mean()))
    assert 1 <= above + below <= 11 and above <= 8 and below <= 8


def test_many_features_do_not_move_the_interval_off_its_value() -> None:
    """With d = 40 and n = 300 every resample lies above the value; its spread is still about the set's own."""
    rows, reference = draw(torch.Generator().manual_seed(3), 300, 40, 1.1, 0.2), unit(40)
    value = weighted_statistics(rows, torch.ones(300)).distance(reference)
    found, wide = frechet_interval(rows, reference, 200), 3.92 * float(distances(300, 40, 1.1, 0.2, 200).std())
    assert found.low < value < found.high and (found.low + found.high) / 2 == pytest.approx(value, rel=0.05)
    assert 0.8 * wide < found.high - found.low < 1.8 * wide


def test_a_set_with_repetitions_has_the_statistics_of_its_rows() -> None:
    rows, counts = torch.randn(6, 3, dtype=torch.float64), torch.tensor([2, 0, 1, 0, 0, 3])
    found, repeated = weighted_statistics(rows, counts), rows.repeat_interleave(counts, 0)
    torch.testing.assert_close(found.mean, repeated.mean(0))
    torch.testing.assert_close(found.covariance, repeated.T.cov())


def test_few_resamples_have_no_ends() -> None:
    with pytest.raises(ValueError, match=f"{FEWEST - 1} resamples: give at least {FEWEST}"):
        frechet_interval(torch.zeros(5, 1), unit(1), FEWEST - 1)


# --------------------------------------------------------------------------------------------------------------- tool


@pytest.fixture
def measure(tmp_path: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = numpy.random.default_rng(0).integers(0, 256, (60, 2, 2, 1), dtype=numpy.uint8)
    numpy.savez(tmp_path / "a.npz", images)
    numpy.savez(tmp_path / "b.npz", images[30:] // 2)

    def call(*arguments: object) -> dict[str, Any]:
        sets = ["--samples", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b.npz")]
        fid.main([*sets, *map(str, arguments)])
        out = capsys.readouterr().out
        return json.loads(out) if out else {}

    return call


def test_the_tool_adds_the_interval_and_leaves_the_protocol(measure: Any, tmp_path: Any) -> None:
    plain, found = measure(), measure("--bootstrap", 60, "--seed", 5)
    interval = found["metrics"]["frechet"]["interval"]
    assert interval.keys() == {"low", "high", "level", "resamples", "seed"}
    assert interval["low"] < found["distance"] == plain["distance"] < interval["high"]
    assert (interval["level"], interval["resamples"], interval["seed"]) == (0.95, 60, 5)
    assert found["protocol"] == plain["protocol"] and "interval" not in plain["metrics"]["frechet"]
    assert measure("--bootstrap", 60, "--seed", 5)["metrics"] == found["metrics"]
    assert measure("--bootstrap", 60, "--seed", 6)["metrics"]["frechet"]["interval"]["low"] != interval["low"]

    def words() -> str:
        measure("--bootstrap", 60, "--seed", 5, "--out", tmp_path / "out.json")
        return (tmp_path / "out.json").read_text() if os.environ["RANK"] == "0" else ""

    assert json.loads(on_processes(2, tmp_path / "ranks", words)[0])["metrics"]["frechet"]["interval"] == interval


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("--bootstrap", -1), "--bootstrap -1: give at least 0"),
        (("--bootstrap", 39), "--bootstrap 39: give at least 40 resamples, better 1000, or 0 for no interval"),
        (("--bootstrap", 40, "--metrics", "kid"), "--bootstrap 40: is the interval of frechet; name it in --metrics"),
    ],
)
def test_bootstraps_that_cannot_be_had_are_refused(
    measure: Any, capsys: pytest.CaptureFixture, words: Any, remedy: str
) -> None:
    with pytest.raises(SystemExit):
        measure(*words)
    assert remedy in capsys.readouterr().err
