"""Whether a measure says something of samples that were trained to match features: only if it reads other features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchmetrics import Metric

from distill.image_features.base import ImageFeatures


def is_independent(metric: Metric, features: Sequence[ImageFeatures]) -> bool:
    """Whether ``metric`` is a distance in features other than all of ``features``.

    Features are the same if their kind (`ImageFeatures.name`) or the weights (``sha256``) are: the same network in another
    file, or with another resize, says nothing new. A metric that reads no features, such as a share of samples that are
    recognised, is no distance, and is not independent.
    """
    read: Any = getattr(metric, "features", None)
    if not hasattr(read, "name"):  # torchmetrics' InceptionScore has logits of that name
        return False
    weights = (getattr(read, "identity", None) or {}).get("sha256")
    return all(read.name != own.name and weights != own.identity["sha256"] for own in features)


def check_independent(metrics: Sequence[Metric], features: Sequence[ImageFeatures]) -> None:
    """Refuses to report samples by the features they were trained on alone.

    Args:
        metrics: of an evaluation.
        features: those that the loss reads.

    Raises:
        ValueError: no metric is a distance in other features.
    """
    if not any(is_independent(metric, features) for metric in metrics):
        read = [str(getattr(metric, "name", type(metric).__name__)) for metric in metrics]
        raise ValueError(
            f"evaluation.metrics={read}: none is a distance in other features than those of the training, "
            f"{[own.name for own in features]}, which training lowers whatever becomes of the samples; add one that is, "
            "such as FrechetDistance in pixels or in the features of another network."
        )
