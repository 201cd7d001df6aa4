"""Samples that were trained to match features are not measured by these alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.image_features import ImageFeatures, check_independent, is_independent
from distill.metrics import DigitsAccuracy, FrechetDistance, NetworkFeatures


class Named(ImageFeatures):
    """Features of a given name and weights: the images themselves."""

    protocol = "the images themselves"

    def __init__(self, name: str, weights: str):
        super().__init__()
        self.name, self.identity = name, {"path": f"/{weights}", "sha256": weights}

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


INCEPTION, CLIP = Named("inception", "a"), Named("clip", "b")


@pytest.mark.parametrize(
    ("metric", "trained", "independent"),
    [
        (FrechetDistance(), [INCEPTION], True),  # pixels
        (FrechetDistance(CLIP), [INCEPTION], True),
        (FrechetDistance(INCEPTION), [INCEPTION], False),
        (FrechetDistance(NetworkFeatures(INCEPTION)), [INCEPTION], False),
        (FrechetDistance(Named("inception", "c")), [INCEPTION], False),  # its other file
        (FrechetDistance(Named("mine", "a")), [INCEPTION], False),  # the same weights, read otherwise
        (FrechetDistance(CLIP), [INCEPTION, CLIP], False),
        (FrechetDistance(), [INCEPTION, Named("pixels", "d")], False),
        (DigitsAccuracy(), [INCEPTION], False),  # no distance
    ],
)
def test_only_distances_in_other_features_are_independent(metric, trained, independent) -> None:
    assert is_independent(metric, trained) is independent
    assert is_independent(metric.clone(), trained) is independent


def test_one_independent_metric_is_enough() -> None:
    check_independent([FrechetDistance(INCEPTION), FrechetDistance()], [INCEPTION])
    check_independent([DigitsAccuracy(), FrechetDistance(CLIP)], [INCEPTION])


@pytest.mark.parametrize("metrics", [[], [DigitsAccuracy()], [FrechetDistance(INCEPTION), DigitsAccuracy()]])
def test_the_features_of_the_training_alone_are_refused(metrics) -> None:
    names = ", ".join(f"'{metric.name}'" for metric in metrics)
    words = rf"evaluation.metrics=\[{names}\]: none is a distance in other features .*\['inception'\].*add one"
    with pytest.raises(ValueError, match=words):
        check_independent(metrics, [INCEPTION])


def test_the_same_distance_whatever_way_features_are_given() -> None:
    samples, real = torch.rand(20, 1, 2, 2), torch.rand(30, 1, 2, 2)
    values = []
    for features in (INCEPTION, NetworkFeatures(INCEPTION)):
        metric = FrechetDistance(features)
        metric.update(samples, real, {})
        values.append(float(metric.compute()))
    pixels = FrechetDistance()
    pixels.update(samples, real, {})
    # pixels in [0, 1] instead of [-1, 1]: a quarter of the squared distance
    assert values[0] == values[1] == pytest.approx(4 * float(pixels.compute()), rel=1e-5)
