"""A 95 % interval of the Fréchet distance, by resampling the generated set: the percentile interval, less its bias.

Efron and Tibshirani, An introduction to the bootstrap, 1993, chapters 10 (bias) and 13 (percentiles).

A resample holds only about 63 % of the samples, some several times, so its distance lies above that of the set by about as
much as that of the set, of n samples, lies above that of endless ones: ``b = mean of the resamples - value``, of order
``d / n``. The percentiles of the resamples would therefore often lie above the value itself. They are moved down by ``b``,
which leaves the spread of the resamples as it is, about the value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distill.metrics.frechet import GaussianStatistics, weighted_statistics

LEVEL = 0.95
FEWEST = 40
"""Resamples from which the interval's ends, each of which leaves out 2.5 %, are among those found."""


class Interval(NamedTuple):
    """Both ends, at least 0, and how they were found."""

    low: float
    high: float
    level: float
    resamples: int
    seed: int


def frechet_interval(
    rows: Float[Tensor, "n d"], reference: GaussianStatistics, resamples: int = 1000, seed: int = 0
) -> Interval:
    """The interval of the expected distance of n samples of this generator from the reference.

    It says what another n samples of the same network would give, and so which differences of two networks, measured by equal
    numbers of samples against one reference, are no accident of the samples that were drawn. It leaves out all else that
    differs between two trainings: their seeds above all. The reference counts as given. It is no interval of the distance of
    endless samples, which lies lower, for every network about as much. Where a generator is as good as exact, the interval is
    too wide; with fewer samples than features it is not to be trusted.

    A resample costs about as much as mean, covariance and distance of the set: with d = 64, a millisecond or two; with
    d = 2,048 and n = 50,000, 2e11 multiplications and some seconds of eigenvalues, on the CPU. Memory is that of a copy of the
    rows in float64.

    Args:
        rows: features of the samples.
        reference: what they are compared with.
        resamples: how many.
        seed: of the draws.

    Raises:
        ValueError: fewer than `FEWEST` resamples, or fewer than 2 rows.
    """
    from tqdm import tqdm

    if resamples < FEWEST:
        raise ValueError(f"{resamples} resamples: give at least {FEWEST}; 1,000 are usual.")
    rows, generator, count = rows.double(), torch.Generator().manual_seed(seed), len(rows)
    value = weighted_statistics(rows, torch.ones(count)).distance(reference)
    found = torch.empty(resamples, dtype=torch.float64)
    for number in tqdm(range(resamples), desc="resamples", disable=None):
        drawn = torch.randint(count, (count,), generator=generator)
        found[number] = weighted_statistics(rows, torch.bincount(drawn, minlength=count)).distance(reference)
    tail = (1 - LEVEL) / 2
    ends = found.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)) - (found.mean() - value)
    low, high = ends.clamp(min=0).tolist()
    return Interval(low, high, LEVEL, resamples, seed)
