"""torchmetrics' Inception metrics in evaluation: their figures are ours, on any number of ranks, whatever the seed."""

from __future__ import annotations

import copy
import warnings

import pytest
import tiny_features
import torch
from forked import on_processes
from torch import Tensor
from torchmetrics import Metric

from distill.image_features import ClassifierFeatures, is_independent
from distill.metrics import (
    FeatureExtractor,
    FrechetDistance,
    PixelFeatures,
    TorchmetricsFID,
    TorchmetricsInceptionScore,
    TorchmetricsKID,
    inception_score,
    joined,
    kernel_distance,
)

WIDTH = 12
SAMPLES, REAL = (tiny_features.images(40, 3, 2, 2, seed=seed) for seed in (0, 1))


@pytest.fixture(autouse=True)
def quiet():
    """torchmetrics warns that features are kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def metrics() -> dict[str, Metric]:
    pixels = PixelFeatures()
    return {
        "fid": TorchmetricsFID(pixels, WIDTH),
        "kid": TorchmetricsKID(pixels, subsets=5, subset_size=20, seed=3),
        "score": TorchmetricsInceptionScore(pixels, splits=1),
    }


def updated(metric: Metric, samples: Tensor = SAMPLES, real: Tensor = REAL, batch: int = 10) -> Metric:
    for fake, other in zip(samples.split(batch), real.split(batch)):
        metric.update(fake, other, {})
    return metric


def test_figures_are_those_of_our_own_metrics():
    """Parts of the whole are drawn alike by both: KID of all images, and the score of one split."""
    samples, real = PixelFeatures()(SAMPLES), PixelFeatures()(REAL)
    fid, score = updated(metrics()["fid"]).compute(), updated(metrics()["score"]).compute()
    assert float(fid) == pytest.approx(float(updated(FrechetDistance()).compute()), rel=1e-6) and fid > 0.1
    kid = updated(TorchmetricsKID(PixelFeatures(), subsets=2, subset_size=40)).compute()
    assert float(kid) == pytest.approx(kernel_distance(samples, real, 1, 40).mean, rel=1e-9) and abs(kid) > 1e-4
    assert float(score) == pytest.approx(inception_score(samples, 1).mean, rel=1e-12) and score > 1.001
    assert fid.dtype == kid.dtype == score.dtype == torch.float64


def test_kid_of_fewer_images_than_a_part_has_is_that_of_all():
    metric = TorchmetricsKID(PixelFeatures(), subsets=2)
    expected = kernel_distance(PixelFeatures()(SAMPLES[:9]), PixelFeatures()(REAL[:9]), 1, 9).mean
    for _ in range(2):
        assert float(updated(metric, SAMPLES[:9], REAL[:9]).compute()) == pytest.approx(expected, rel=1e-9)
        metric.reset()
    with pytest.raises(ValueError, match="kid_pixels: 1 images: .* at least 2"):
        updated(metric, SAMPLES[:1]).compute()


def test_parts_are_drawn_by_the_seed_and_the_global_generator_is_left_alone():
    metric = updated(metrics()["kid"])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = metric.compute()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = updated(metrics()["kid"]), updated(TorchmetricsKID(PixelFeatures(), 5, 20, seed=4))
    assert first == again.compute() != other.compute()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    scores = [updated(TorchmetricsInceptionScore(PixelFeatures(), 4, seed)).compute() for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2] and torch.equal(before, torch.get_rng_state())


def test_nothing_of_a_validation_is_left_in_the_next():
    for metric in metrics().values():
        first = updated(metric).compute()
        metric.reset()
        assert updated(metric).compute() == first


def shares() -> dict[str, float]:
    with joined() as processes:
        share = slice(processes.rank * 20, processes.rank * 20 + 20)
        return {name: float(updated(metric, SAMPLES[share], REAL[share]).compute()) for name, metric in metrics().items()}


def test_two_ranks_give_what_one_does(tmp_path):
    """The parts of the kernel distance depend on the order of images: the first batches of both ranks, then their second."""
    first, second = on_processes(2, tmp_path, shares)
    assert first == second
    for name in ("fid", "score"):
        assert first[name] == pytest.approx(float(updated(metrics()[name]).compute()), rel=1e-9)
    gathered = [torch.cat([images[start : start + 10] for start in (0, 20, 10, 30)]) for images in (SAMPLES, REAL)]
    assert first["kid"] == pytest.approx(float(updated(metrics()["kid"], *gathered).compute()), rel=1e-9)


def test_protocols_say_what_figures_depend_on():
    fid, kid, score = metrics().values()
    for metric in (fid, kid, score):
        assert PixelFeatures.protocol in str(metric.protocol) and "of torchmetrics 1." in str(metric.protocol)
    assert "5 subsets of 20" in str(kid.protocol) and "seed 3" in str(kid.protocol) and "1 splits" in str(score.protocol)
    assert [metric.name for metric in (fid, kid, score)] == ["fid_pixels", "kid_pixels", "inception_score_pixels"]


class Linear(torch.nn.Linear, FeatureExtractor):
    """Features that leave autocast to whoever calls them."""

    name = protocol = "linear"

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.Linear.forward(self, images.flatten(1)).double()


def test_full_precision_within_autocast():
    torch.manual_seed(0)
    metric = TorchmetricsFID(features := Linear(WIDTH, 3), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        updated(metric)
    assert torch.allclose(metric.fake_features_sum, features(SAMPLES).sum(0), rtol=1e-5)


def test_copies_share_weights_and_scores_are_no_distances(tmp_path):
    features = ClassifierFeatures(str(tiny_features.classifier(tmp_path)))
    metric = TorchmetricsFID(features, 12)
    copied = copy.deepcopy(metric)
    assert not list(metric.parameters())
    assert copied.features.features.network.module is features.network.module
    assert is_independent(metric, []) and not is_independent(metric, [features])
    assert not is_independent(TorchmetricsInceptionScore(features), [])


def test_inception_weights_that_are_not_there_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = r"path='weights/.*pth': there is no such file; save https://github.com/toshas"
    for make in (TorchmetricsFID, TorchmetricsKID, TorchmetricsInceptionScore):
        with pytest.raises(FileNotFoundError, match=said):
            make()
    for wrong in ({"subsets": 0}, {"subset_size": 1}):
        with pytest.raises(ValueError, match="give at least 1 of at least 2 images"):
            TorchmetricsKID(PixelFeatures(), **wrong)
    with pytest.raises(ValueError, match="splits=0: give at least 1"):
        TorchmetricsInceptionScore(PixelFeatures(), splits=0)
