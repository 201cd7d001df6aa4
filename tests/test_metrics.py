"""The Fréchet distance against closed forms and other implementations, its streaming, and the reader of digits."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy
import pytest
import torch
from torch import Tensor

from distill.metrics import DigitsAccuracy, FrechetDistance, GaussianStatistics, PixelFeatures, frechet_distance, to_uint8
from distill.metrics.digits import read_digits, real_digits
from distill.metrics.features import from_uint8

WIDTH = 6


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed: int, rank: int = WIDTH) -> Tensor:
    root = draw(seed, WIDTH, rank)
    return root @ root.T


def statistics_of(features: Tensor) -> GaussianStatistics:
    statistics = GaussianStatistics()
    statistics.update(features)
    return statistics


def digits() -> tuple[Tensor, Tensor]:
    """The real digits, ``v / 8 - 1``, computed here from the package's values."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images / 8 - 1).float().unsqueeze(1), torch.from_numpy(load_digits().target)


# ------------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("rank", [WIDTH, 3, 1, 0])
def test_equal_laws_are_at_distance_zero(rank):
    mean, cov = draw(0, WIDTH), covariance(1, rank)
    assert frechet_distance(mean, cov, mean, cov) < 1e-12


@pytest.mark.parametrize("rank", [WIDTH, 3, 0])
def test_shifted_laws_are_at_the_square_of_the_shift(rank):
    a, b, cov = draw(0, WIDTH), draw(1, WIDTH), covariance(2, rank)
    assert frechet_distance(a, cov, b, cov) == pytest.approx(float((a - b).square().sum()), rel=1e-12)


@pytest.mark.parametrize("zeros", [0, 2, 5])
def test_diagonal_covariances_compare_by_their_roots(zeros):
    s, t = draw(0, WIDTH).square(), draw(1, WIDTH).square()
    s[:zeros] = 0
    zero = torch.zeros(WIDTH, dtype=torch.float64)
    expected = float((s.sqrt() - t.sqrt()).square().sum())
    assert frechet_distance(zero, torch.diag(s), zero, torch.diag(t)) == pytest.approx(expected, rel=1e-12)


def test_disjoint_supports_share_nothing():
    """Covariances on orthogonal subspaces: the distance is the sum of the traces, with no rounding of a root of zero."""
    zero = torch.zeros(WIDTH, dtype=torch.float64)
    basis, _ = torch.linalg.qr(draw(0, WIDTH, WIDTH))
    first, second = 1e6 * basis[:, :3] @ basis[:, :3].T, basis[:, 3:] @ basis[:, 3:].T
    assert frechet_distance(zero, first, zero, second) == pytest.approx(3e6 + 3, rel=1e-14)


def test_commuting_covariances_rotated():
    """In one eigenbasis the roots commute: the closed form of the diagonal case, whatever the basis."""
    basis, _ = torch.linalg.qr(draw(0, WIDTH, WIDTH))
    s, t, zero = draw(1, WIDTH).square(), draw(2, WIDTH).square(), torch.zeros(WIDTH, dtype=torch.float64)
    found = frechet_distance(zero, basis * s @ basis.T, zero, basis * t @ basis.T)
    assert found == pytest.approx(float((s.sqrt() - t.sqrt()).square().sum()), rel=1e-12)


def test_what_is_not_finite_has_no_distance():
    mean, cov = draw(0, WIDTH), covariance(1)
    assert numpy.isnan(frechet_distance(mean, cov, mean.where(mean > mean.min(), torch.nan), cov))
    assert numpy.isnan(frechet_distance(mean, cov * torch.inf, mean, cov))


# ------------------------------------------------------------------------------------------------------- agreement


def test_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    for seed in range(5):
        a, b, s, t = draw(seed, WIDTH), draw(seed + 10, WIDTH), covariance(seed + 20), covariance(seed + 30)
        root = linalg.sqrtm((s @ t).numpy()).real
        expected = float((a - b).square().sum() + s.trace() + t.trace() - 2 * root.trace())
        assert frechet_distance(a, s, b, t) == pytest.approx(expected, rel=1e-9)


def test_agrees_with_torchmetrics_on_halves_of_the_digits():
    from torchmetrics.image.fid import _compute_fid

    features = PixelFeatures()(digits()[0])
    first, second = statistics_of(features[::2]), statistics_of(features[1::2])
    expected = float(_compute_fid(first.mean, first.covariance, second.mean, second.covariance))
    assert first.distance(second) == pytest.approx(expected, rel=1e-6) and expected > 0.01


# ------------------------------------------------------------------------------------------------------- statistics


def test_streamed_statistics_are_those_of_the_whole():
    features = draw(0, 50, WIDTH) + 3
    whole, first, second = GaussianStatistics(), GaussianStatistics(), GaussianStatistics()
    for part in features.split(7):
        whole.update(part)
    for part in features[:20].split(6):
        first.update(part)
    second.update(features[20:])
    for statistics in (whole, first.merge(second), GaussianStatistics().merge(whole)):
        assert int(statistics.count) == 50
        assert torch.allclose(statistics.mean, features.mean(0), rtol=1e-13)
        assert torch.allclose(statistics.covariance, torch.cov(features.T), rtol=1e-11, atol=1e-13)


def test_sums_are_kept_in_float64():
    features = draw(0, 4000, WIDTH) + 100
    statistics = GaussianStatistics()
    for part in features.float().split(100):
        statistics.update(part)
    assert torch.allclose(statistics.covariance, torch.cov(features.float().double().T), rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count):
    metric = FrechetDistance()
    metric.update(digits()[0][:count], digits()[0], {})
    with pytest.raises(ValueError, match=f"{count} images .* at least 2"):
        metric.compute()


# ------------------------------------------------------------------------------------------------------------ metric


def test_metric_streams_and_sums_over_ranks():
    """Two ranks' states summed, as torchmetrics does it by dist_reduce_fx, give what one rank finds on everything."""
    fake, real = digits()[0][:300] * 0.9, digits()[0][300:900]
    whole, ranks = FrechetDistance(), [FrechetDistance(), FrechetDistance()]
    whole.update(fake, real, {})
    for metric, fakes, reals in zip(ranks, fake.split(100)[1:], real.split(350), strict=True):
        metric.update(fakes, reals, {})
    ranks[0].update(fake[:100], real[:0], {})
    assert (int(whole.fake_count), int(whole.real_count)) == (300, 600)
    ranks[0].merge_state(ranks[1])
    assert float(ranks[0].compute()) == pytest.approx(float(whole.compute()), rel=1e-9)


def test_metric_is_the_distance_of_sample_statistics():
    fake, real = digits()[0][:300], digits()[0][300:900]
    metric = FrechetDistance()
    for fakes, reals in zip(fake.split(100), real.split(200), strict=True):
        metric.update(fakes, reals, {})
    pixels = [to_uint8(images).double().flatten(1) / 255 for images in (fake, real)]
    expected = frechet_distance(pixels[0].mean(0), torch.cov(pixels[0].T), pixels[1].mean(0), torch.cov(pixels[1].T))
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-9) and metric.name == "frechet_pixels"


def test_metric_starts_again_after_reset_and_clones_are_apart():
    real = digits()[0][:50]
    metric = FrechetDistance()
    clone = metric.clone()
    metric.update(-real, real, {})
    assert metric.compute() > 1 and int(clone.fake_count) == 0
    metric.reset()
    metric.update(real, real, {})
    assert metric.compute() < 1e-12 and copy.deepcopy(metric).compute() < 1e-12


def test_a_sample_that_is_not_finite_makes_the_distance_nan():
    real = digits()[0][:50]
    metric = FrechetDistance()
    metric.update(torch.full_like(real, torch.nan), real, {})
    assert metric.compute().isnan()


# ------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_span_the_range_and_are_rounded_and_clamped():
    values = torch.tensor([-1.0, 1.0, 0.0, -1.2, 7.0, -1 + 1.4 / 127.5, -1 + 1.6 / 127.5])
    assert to_uint8(values).tolist() == [0, 255, 128, 0, 255, 1, 2]
    with pytest.raises(ValueError, match="1 of 2 values .* not finite"):
        to_uint8(torch.tensor([0.0, torch.nan]))


def test_bytes_return_through_the_range():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)


def test_digits_as_bytes_are_one_thing_from_values_or_range():
    assert numpy.array_equal(to_uint8(digits()[0]).permute(0, 2, 3, 1).numpy(), real_digits()[0])


def test_pixel_features_are_those_of_the_bytes():
    images = torch.tanh(draw(0, 20, 3, 4, 4)).float() * 1.2
    saved = from_uint8(to_uint8(images))
    features = PixelFeatures()(images)
    assert torch.equal(features, PixelFeatures()(saved)) and features.shape == (20, 48)
    assert torch.equal(features, to_uint8(images).flatten(1).double() / 255)


# ---------------------------------------------------------------------------------------------------------- accuracy


def accuracy_of(images: Tensor, labels: Tensor) -> float:
    metric = DigitsAccuracy()
    for samples, intended in zip(images.split(500), labels.split(500), strict=True):
        metric.update(samples, samples[:0], {"labels": intended})
    return float(metric.compute())


def test_real_digits_are_read_and_shuffled_labels_are_not():
    images, labels = digits()
    assert accuracy_of(images, labels) >= 0.99
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert abs(accuracy_of(images, shuffled) - 0.1) < 0.03


def test_saved_and_unsaved_samples_read_alike():
    noisy = digits()[0] + 0.6 * draw(0, 1797, 1, 8, 8).float()
    assert torch.equal(read_digits(noisy), read_digits(from_uint8(to_uint8(noisy))))
    assert 0.2 < accuracy_of(noisy, digits()[1]) < 0.98


def test_a_sample_that_is_not_finite_is_no_digit():
    images, labels = digits()
    broken = images[:4].clone()
    broken[0, 0, 0, 0], broken[1, 0, 2, 2] = torch.nan, torch.inf
    assert read_digits(broken).tolist() == [-1, -1, *labels[2:4].tolist()]
    assert accuracy_of(broken, labels[:4]) == 0.5


def test_accuracy_needs_labels_and_digits():
    images, labels = digits()
    with pytest.raises(ValueError, match="no labels.*data.labels=true"):
        DigitsAccuracy().update(images, images, {})
    with pytest.raises(ValueError, match=r"not \(3, 4, 4\)"):
        DigitsAccuracy().update(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), {"labels": labels[:2]})


def test_heavy_libraries_are_not_imported_before_they_are_used():
    """Lightning imports torchmetrics, and that SciPy, anyway; scikit-learn is ours to put off."""
    code = "import sys, datamodules.digits, distill.metrics; print('sklearn' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
