"""How much of one set of features lies among the other: precision and recall, density and coverage.

Around each feature of a set stands a ball up to its k-th nearest neighbour in the set. Precision is the share of samples in a
real image's ball, recall the share of real images in a sample's (Kynkäänniemi et al. 1904.06991, equations 1 and 2, k = 3).
Density is the mean number of real images' balls that a sample lies in, over k; coverage the share of real images with a sample
in their ball (Naeem et al. 2002.09797, equations 6 and 7, k = 5).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from distill.kernels import squared_distances
from distill.metrics.processes import ALONE, Processes

Rows = Float[Tensor, "n d"]


class Neighbours(NamedTuple):
    """The shares, 0..1, but for the density, which has no bound: its mean is 1 where the sets are of one law."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(
    samples: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    k_precision: int = 3,
    k_density: int = 5,
    block: int = 2048,
    processes: Processes = ALONE,
) -> Neighbours:
    """All four, in float64, by blocks of ``block x block`` distances: memory grows with ``n + m``, time with their square.

    A feature at exactly the radius is in the ball. Processes share the work; each must be given both sets whole.

    Raises:
        ValueError: as many neighbours as there are images, or more.
    """
    most, smaller = max(k_precision, k_density), min(len(samples), len(reference))
    if min(k_precision, k_density) < 1 or most >= smaller:
        raise ValueError(f"{most} nearest neighbours of {smaller} images: give more images, or from 1 neighbour on.")
    radii = _squared_radii(reference, [k_precision, k_density], block, processes)
    sample_radius = _squared_radii(samples, [k_precision], block, processes)[:, 0]
    inside, balls = torch.zeros(len(samples), dtype=torch.bool), torch.zeros((), dtype=torch.int64)
    recalled, covered = (torch.zeros(len(reference), dtype=torch.bool) for _ in range(2))
    for rows in _blocks(len(samples), block, processes):
        for columns in _blocks(len(reference), block):
            squares = squared_distances(samples[rows], reference[columns]).cpu()
            inside[rows] |= (squares <= radii[columns, 0]).any(1)
            recalled[columns] |= (squares <= sample_radius[rows][:, None]).any(0)
            within = squares <= radii[columns, 1]
            covered[columns] |= within.any(0)
            balls += within.sum()
    inside, recalled, covered = (_share(processes, mask) for mask in (inside, recalled, covered))
    density = float(processes.sum(balls)) / (k_density * len(samples))
    precision, recall, coverage = (float(mask.double().mean()) for mask in (inside, recalled, covered))
    return Neighbours(precision, recall, density, coverage)


def _squared_radii(features: Rows, ks: list[int], block: int, processes: Processes) -> Float64[Tensor, "n k"]:
    """Squared distances to the k-th nearest others, for each k; the nearest of all is the feature itself."""
    found = torch.zeros(len(features), len(ks), dtype=torch.float64)
    for rows in _blocks(len(features), block, processes):
        nearest = torch.empty(len(features[rows]), 0, dtype=torch.float64)
        for columns in _blocks(len(features), block):
            squares = squared_distances(features[rows], features[columns]).cpu()
            candidates = torch.cat([nearest, squares], dim=1)
            nearest = candidates.topk(min(max(ks) + 1, candidates.shape[1]), dim=1, largest=False).values
        found[rows] = nearest[:, ks]
    return processes.sum(found)


def _share(processes: Processes, mask: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Where any process has True."""
    return processes.sum(mask.long()) > 0


def _blocks(count: int, block: int, processes: Processes = ALONE) -> list[slice]:
    """Rows in blocks, of which each process has every so many-th."""
    return [slice(first, min(first + block, count)) for first in range(0, count, block)][processes.rank :: processes.size]
