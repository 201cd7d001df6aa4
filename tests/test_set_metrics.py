"""Distances of sets against closed forms, by brute force and against other packages, on one process and on several."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from forked import on_processes, srun, torchrun
from torch import Tensor

from distill.metrics import (
    GaussianStatistics,
    Processes,
    frechet_distance,
    inception_score,
    joined,
    kernel_distance,
    neighbours,
)

WIDTH = 24
module = sys.modules["distill.metrics.frechet"]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(features: Tensor) -> GaussianStatistics:
    statistics = GaussianStatistics()
    statistics.update(features)
    return statistics


def two_sets(count: int = 300, others: int = 260) -> tuple[Tensor, Tensor]:
    """Correlated features of two laws."""
    mix = draw(0, WIDTH, WIDTH) / WIDTH**0.5
    return draw(1, count, WIDTH) @ mix, 1.2 * draw(2, others, WIDTH) @ mix + 0.1


# ---------------------------------------------------------------------------------------------------------- Fréchet


def spectrum(power: float, count: int = 64) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``i^-power`` and an eigenbasis."""
    basis, _ = torch.linalg.qr(draw(5, count, count))
    return torch.arange(1, count + 1, dtype=torch.float64) ** -power, basis


@pytest.mark.parametrize(("power", "zeros", "exact"), [(0.5, 0, False), (1.0, 0, False), (4.0, 0, True), (1.0, 20, True)])
def test_large_covariances_compare_by_their_roots_however_they_are_taken(
    power: float, zeros: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed form for commuting covariances; the factor's eigenvalues where they are exact enough, else singular values."""
    monkeypatch.setattr(module, "LARGE", 64)
    (s, basis), calls = spectrum(power), []
    t = s * (1 + torch.arange(len(s)) % 3)
    s = s.where(torch.arange(len(s)) < len(s) - zeros, 0)
    first, second, zero = basis * s @ basis.T, basis * t @ basis.T, torch.zeros(len(s), dtype=torch.float64)
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: calls.append(1) or svdvals(matrix))
    expected = float((s.sqrt() - t.sqrt()).square().sum())
    assert frechet_distance(zero, first, zero, second) == pytest.approx(expected, rel=1e-9, abs=1e-9 * float(s.sum() + t.sum()))
    assert bool(calls) == exact


def test_frechet_agrees_with_torchmetrics_torch_fidelity_and_clean_fid() -> None:
    """On the same features. clean-fid's own step fails where SciPy's root has lost `disp` (1.18)."""
    from cleanfid.fid import frechet_distance as clean
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    first, second = two_sets()
    own = statistics_of(first), statistics_of(second)
    found = own[0].distance(own[1])
    theirs = [fid_features_to_statistics(features) for features in (first, second)]
    assert found > 0.5
    assert fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"] == pytest.approx(found, rel=1e-8)
    metric = _compute_fid(own[0].mean, own[0].covariance, own[1].mean, own[1].covariance)
    assert float(metric) == pytest.approx(found, rel=1e-8)
    arrays = [part for side in theirs for part in (side["mu"], side["sigma"])]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert clean(*arrays) == pytest.approx(found, rel=1e-8)
    except TypeError as error:
        assert "disp" in str(error)


# --------------------------------------------------------------------------------------------------------------- KID


def test_kernel_distance_of_whole_sets_is_its_closed_form() -> None:
    """One subset of everything, one feature each: the sums of ``(x y + 1)^3`` by hand, the diagonal left out."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [-1.0]])
    # k(x,x') = 1, k(y,y') = (-1)^3, k(x,y): (0+1)^3, 1, (2+1)^3, (-1+1)^3
    expected = 1 + -1 - 2 * (1 + 1 + 27 + 0) / 4
    found = kernel_distance(x, y, subsets=3, subset_size=9)
    assert found == (pytest.approx(expected), pytest.approx(0), 2)


@pytest.mark.parametrize("seed", [0, 7])
def test_kernel_distance_is_clean_fids(seed: int) -> None:
    from cleanfid.fid import kernel_distance as clean

    first, second = two_sets()
    state = numpy.random.get_state()
    numpy.random.seed(seed)
    expected = clean(first.numpy(), second.numpy(), num_subsets=5, max_subset_size=100)
    numpy.random.seed(seed)
    of_small = clean(first[:90].numpy(), second.numpy(), num_subsets=2)
    numpy.random.set_state(state)
    found = kernel_distance(first, second, subsets=5, subset_size=100, seed=seed)
    assert found.mean == pytest.approx(expected, rel=1e-9) and found.subset_size == 100
    smaller = kernel_distance(first[:90], second, subsets=2, seed=seed)
    assert smaller.mean == pytest.approx(of_small, rel=1e-9) and smaller.subset_size == 90


@pytest.mark.parametrize("seed", [2020, 3])
def test_kernel_distance_is_torch_fidelitys_and_torchmetrics(seed: int) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import poly_mmd

    first, second = two_sets()
    settings: dict[str, Any] = {"kid_subsets": 5, "kid_subset_size": 100, "rng_seed": seed, "verbose": False}
    expected = kid_features_to_metric(first, second, **settings)
    found = kernel_distance(first, second, 5, 100, seed, "torch-fidelity")
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)
    whole = kernel_distance(first[:260], second, 1, 260)
    assert whole.mean == pytest.approx(float(poly_mmd(second, first[:260])), rel=1e-9)


def test_kernel_distance_refuses_what_it_cannot_draw() -> None:
    first, second = two_sets(50, 40)
    with pytest.raises(ValueError, match="subset_size=41: there are 40 images; give more images"):
        kernel_distance(first, second, subset_size=41, convention="torch-fidelity")
    for count, subsets in ((1, 5), (30, 0)):
        with pytest.raises(ValueError, match="give at least 1 of at least 2 images"):
            kernel_distance(first[:count], second, subsets=subsets)


# -------------------------------------------------------------------------------------------------------- neighbours


def test_neighbours_on_a_line_by_hand() -> None:
    """Real at 0, 1, 3, 7 have radii 1, 1, 2, 4 (k = 1); samples at 0.5, 4, 20, 21 have 3.5, 3.5, 1, 1."""
    real, fake = (torch.tensor(values).reshape(-1, 1) for values in ([0.0, 1.0, 3.0, 7.0], [0.5, 4.0, 20.0, 21.0]))
    found = neighbours(fake, real, 1, 1)
    # 0.5 lies in the balls of 0 and 1; 4 in those of 3 and 7; 7 is within 3.5 of 4
    assert found == (2 / 4, 4 / 4, 4 / 4, 4 / 4)
    assert neighbours(fake[2:].repeat(2, 1), real, 1, 1) == (0, 0, 0, 0)


def test_at_the_radius_is_inside() -> None:
    """Real at 0, 1 have radius 1, samples at 2, 3, 90 have 1, 1, 87: 2 and the real 1 lie on each other's balls."""
    real, fake = (torch.tensor(values).reshape(-1, 1) for values in ([0.0, 1.0], [2.0, 3.0, 90.0]))
    assert neighbours(fake, real, 1, 1) == (1 / 3, 1 / 2, 1 / 3, 1 / 2)


def brute(samples: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which samples lie in which reference's ball, ``(n, m)``, by all differences."""
    apart = (reference[:, None] - reference).norm(dim=-1).sort(dim=1).values[:, k]
    return (samples[:, None] - reference).norm(dim=-1) <= apart, apart


@pytest.mark.parametrize("block", [7, 64, 5000])
def test_neighbours_by_blocks_are_those_of_all_distances(block: int) -> None:
    samples, reference = two_sets(150, 130)
    near, dense = brute(samples, reference, 3)[0], brute(samples, reference, 5)[0]
    back = brute(reference, samples, 3)[0]
    found = neighbours(samples, reference, block=block)
    assert found.precision == pytest.approx(float(near.any(1).double().mean()))
    assert found.recall == pytest.approx(float(back.any(1).double().mean()))
    assert found.density == pytest.approx(float(dense.sum()) / (5 * 150))
    assert found.coverage == pytest.approx(float(dense.any(0).double().mean()))
    assert 0.2 < found.precision < 1 and 0.2 < found.recall <= 1 and found.precision != found.recall


def test_precision_and_recall_are_torch_fidelitys() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    samples, reference = two_sets(200, 220)
    expected = prc_features_to_metric(samples, reference, prc_neighborhood=3, verbose=False)
    found = neighbours(samples, reference)
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


def test_neighbours_hold_no_matrix_of_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    part = sys.modules["distill.metrics.neighbours"]  # the package's attribute of this name is the function
    largest, original = [], part.squared_distances
    monkeypatch.setattr(part, "squared_distances", lambda a, b: largest.append(len(a) * len(b)) or original(a, b))
    neighbours(*two_sets(100, 90), block=16)
    assert max(largest) == 16 * 16 and len(largest) > 50


def test_neighbours_refuse_sets_that_are_too_small() -> None:
    samples, reference = two_sets(6, 5)
    with pytest.raises(ValueError, match="5 nearest neighbours of 5 images: give more images"):
        neighbours(samples, reference)


# ---------------------------------------------------------------------------------------------------- Inception score


def test_inception_score_of_sure_and_of_unsure_classifiers() -> None:
    sure = 1e4 * torch.eye(5).repeat(20, 1)
    assert inception_score(sure, splits=1) == (pytest.approx(5), pytest.approx(0))
    assert inception_score(torch.zeros(100, 5)).mean == pytest.approx(1)
    assert inception_score(sure[:1].repeat(50, 1)).mean == pytest.approx(1)


@pytest.mark.parametrize("seed", [2020, 1])
def test_inception_score_is_torch_fidelitys(seed: int) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * draw(0, 205, 7)
    expected = isc_features_to_metric(logits, 10, True, seed)
    found = inception_score(logits, 10, seed)
    assert found == pytest.approx((expected["inception_score_mean"], expected["inception_score_std"]), rel=1e-12)
    with pytest.raises(ValueError, match="splits=10 of 9 samples: give from 1 to 9"):
        inception_score(logits[:9])


# ---------------------------------------------------------------------------------------------------------- processes


def measured() -> dict[str, Any]:
    """What each process finds that has seen its batches alone."""
    samples, reference = two_sets()
    with joined() as processes:
        statistics, rows = GaussianStatistics(), []
        for batch in processes.batches(len(samples), 64):
            statistics.update(samples[batch.start : batch.stop])
            rows.append(samples[batch.start : batch.stop])
        merged = processes.merge(statistics)
        return {
            "size": processes.size,
            "statistics": (int(merged.count), merged.mean, merged.covariance),
            "rows": torch.cat(processes.in_order(rows)),
            "neighbours": neighbours(samples, reference, block=32, processes=processes),
        }


@pytest.mark.parametrize("count", [2, 3, 6])
def test_several_processes_find_what_one_finds(count: int, tmp_path: Path) -> None:
    """To 1e-10 and better, under torchrun and srun; of six processes, one has no batch at all."""
    alone = measured()
    assert alone["size"] == 1
    for found in on_processes(count, tmp_path, measured, srun if count == 2 else torchrun):
        assert found["size"] == count and found["statistics"][0] == 300
        for mine, theirs in zip(found["statistics"][1:], alone["statistics"][1:]):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
        assert torch.equal(found["rows"], two_sets()[0]) and found["neighbours"] == alone["neighbours"]


def test_batches_are_the_same_on_any_number_of_processes() -> None:
    whole = Processes().batches(10, 4)
    assert whole == [range(0, 4), range(4, 8), range(8, 10)]
    for size in (2, 3, 5):
        shares = [Processes(rank, size).batches(10, 4) for rank in range(size)]
        assert sorted((batch for share in shares for batch in share), key=lambda batch: batch.start) == whole
