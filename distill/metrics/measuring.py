"""What a set of images is measured by: features of each image, over all processes, and metrics by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.command_line import Refusal
from distill.metrics.bootstrap import frechet_interval
from distill.metrics.features import FeatureExtractor
from distill.metrics.frechet import GaussianStatistics
from distill.metrics.image_sets import ImageSet
from distill.metrics.inception_score import inception_score
from distill.metrics.kernel_distance import kernel_distance
from distill.metrics.neighbours import neighbours
from distill.metrics.processes import Processes

K_PRECISION, K_DENSITY, SPLITS = 3, 5, 10
METRICS = ("frechet", "kid", "precision", "recall", "density", "coverage", "inception_score", "clip_score")
WITHOUT_REFERENCE = {"inception_score", "clip_score"}
"""Metrics of the samples alone, of other features than those that are compared."""
OF_ROWS = set(METRICS) - {"frechet", *WITHOUT_REFERENCE}
"""Metrics that need the features of each image, of both sets."""
NEIGHBOURS = ("precision", "recall", "density", "coverage")


@dataclass
class Measured:
    """What is known of a set's features.

    Attributes:
        statistics: of all images.
        rows: the features of each ``(n, d)``, float32 as networks make them; None where no metric needs them.
    """

    statistics: GaussianStatistics
    rows: Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How batches are read, and the random parts of metrics are drawn.

    Attributes:
        batch_size: images at once; the same batches on any number of processes.
        device: where features are computed.
        kid_subsets, kid_subset_size, kid_convention, seed: see `kernel_distance`; the seed is the Inception score's as well,
            and that of resamples.
        bootstrap: resamples of the Fréchet distance's interval, which is no part of the protocol; 0 for none.
    """

    batch_size: int = 128
    device: str = "cpu"
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    kid_convention: Any = "clean-fid"
    seed: int = 0
    bootstrap: int = 0
    processes: Processes = field(default_factory=Processes)

    def settings(self, metric: str) -> dict[str, Any]:
        """What a figure depends on beside features, reference and number of images."""
        if metric == "kid":
            drawn = {"subsets": self.kid_subsets, "subset_size": self.kid_subset_size, "seed": self.seed}
            return drawn | {"convention": self.kid_convention}
        if metric == "inception_score":
            return {"splits": SPLITS, "seed": self.seed}
        if metric in NEIGHBOURS:
            return {"k": K_PRECISION if metric in ("precision", "recall") else K_DENSITY}
        return {}


def measure_set(images: ImageSet, features: FeatureExtractor, sampling: Sampling, with_rows: bool) -> Measured:
    """Statistics, and features if need be, of the images that count; whole on every process.

    Raises:
        Refusal: features that are not finite.
    """
    from tqdm import tqdm

    if isinstance(features, nn.Module):
        features.to(sampling.device)
    processes, statistics, rows, bad = sampling.processes, GaussianStatistics(), [], ""
    batches = processes.batches(images.count, sampling.batch_size)
    for numbers in tqdm(batches, desc=images.path, unit="batch", disable=True if processes.rank else None):
        found = features(images.read(numbers).to(sampling.device)).cpu()
        finite = torch.isfinite(found).all(1)
        if not bool(finite.all()):
            bad = bad or images.source.name(numbers[int((~finite).nonzero()[0])])
        statistics.update(found)
        if with_rows:
            rows.append(found.float())
    if wrong := [name for name in processes.gather(bad) if name]:
        raise Refusal(f"{images.path}: {features.name} features of {wrong[0]} are not finite; give other images or weights")
    return Measured(processes.merge(statistics), torch.cat(processes.in_order(rows)) if with_rows else None)


def compute(
    metrics: list[str], samples: Measured, reference: Measured, logits: Tensor | None, sampling: Sampling
) -> dict[str, dict[str, Any]]:
    """Each metric's ``value``, its ``std`` over parts where it is a mean of them, ``settings``, and the Fréchet distance's
    ``interval`` if there are to be resamples; on process 0, else nothing.

    Args:
        metrics: of `METRICS`; a CLIP score, which needs prompts, is left to `distill.metrics.clip_score`.
        samples: with rows, if a metric is of `OF_ROWS` or there are to be resamples.
        reference: with rows, if a metric is of `OF_ROWS`.
        logits: of the samples, for the Inception score.
        sampling: how parts are drawn.

    Raises:
        ValueError: fewer images than a metric needs.
    """
    near: dict[str, float] = {}
    if set(metrics) & set(NEIGHBOURS):
        assert samples.rows is not None and reference.rows is not None
        near = neighbours(samples.rows, reference.rows, K_PRECISION, K_DENSITY, processes=sampling.processes)._asdict()
    if sampling.processes.rank:
        return {}
    results: dict[str, dict[str, Any]] = {}
    for metric in [metric for metric in metrics if metric != "clip_score"]:
        results[metric] = {"settings": sampling.settings(metric)}
        if metric == "frechet":
            results[metric]["value"] = samples.statistics.distance(reference.statistics)
            if sampling.bootstrap:
                assert samples.rows is not None
                drawn_from = (samples.rows, reference.statistics)
                results[metric]["interval"] = frechet_interval(*drawn_from, sampling.bootstrap, sampling.seed)._asdict()
        elif metric == "kid":
            assert samples.rows is not None and reference.rows is not None
            drawn = (sampling.kid_subsets, sampling.kid_subset_size, sampling.seed, sampling.kid_convention)
            found = kernel_distance(samples.rows, reference.rows, *drawn)
            results[metric] |= {"value": found.mean, "std": found.std}
            results[metric]["settings"]["subset_size"] = found.subset_size
        elif metric == "inception_score":
            assert logits is not None
            score = inception_score(logits, SPLITS, sampling.seed)
            results[metric] |= {"value": score.mean, "std": score.std}
        else:
            results[metric]["value"] = near[metric]
    return results


def measured_protocol(features: str, reference: str, num: int, metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What must be equal of two results for their figures to be comparable.

    Args:
        features: the protocol of the features.
        reference: the content hash of the reference.
        num: the number of samples.
        metrics: of `compute`.
    """
    settings = {metric: found["settings"] for metric, found in metrics.items()}
    return {"features": features, "reference": reference, "num": num, "metrics": settings}


def unequal(first: dict[str, Any], second: dict[str, Any]) -> str:
    """In what two protocols differ so that no figures compare, in words; empty where they do not.

    Metrics that one of them lacks are no difference, if others are in both.
    """
    names = {"features": "features", "reference": "the reference", "num": "the number of samples"}
    for key, name in names.items():
        if first[key] != second[key]:
            return f"{name}: {first[key]} and {second[key]}"
    common = first["metrics"].keys() & second["metrics"].keys()
    if not common:
        return f"the metrics: {', '.join(first['metrics'])} and {', '.join(second['metrics'])}"
    for metric in sorted(common):
        if first["metrics"][metric] != second["metrics"][metric]:
            return f"the settings of {metric}: {first['metrics'][metric]} and {second['metrics'][metric]}"
    return ""
