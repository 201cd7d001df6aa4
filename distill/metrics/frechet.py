"""The Fréchet distance of two sets of features, as between the Gaussian laws of their means and covariances.

Dowson and Landau, The Fréchet distance between multivariate normal distributions, 1982, equation 4; as a measure of generators
Heusel et al., GANs trained by a two time-scale update rule, 2017, equation 6.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torchmetrics import Metric

from distill.image_features import ImageFeatures
from distill.metrics.features import FeatureExtractor, NetworkFeatures, PixelFeatures
from distill.types import Cond

Mean = Float[Tensor, " d"]
Covariance = Float[Tensor, "d d"]

LARGE = 512
"""Numbers of features from which the time of the distance is felt."""
TOLERATED = 1e-9
"""Rounding of the distance, as a share of both covariances' traces, that is taken for speed where there are so many."""


def frechet_distance(mean1: Mean, cov1: Covariance, mean2: Mean, cov2: Covariance) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)``, the squared 2-Wasserstein distance, in float64.

    No root of a matrix that is not symmetric is taken. See `_overlap` for the last trace.

    Returns:
        the distance, at least 0; NaN if an argument is not finite.
    """
    mean1, cov1, mean2, cov2 = (tensor.double() for tensor in (mean1, cov1, mean2, cov2))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (mean1, cov1, mean2, cov2)):
        return float("nan")
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * _overlap(cov1, cov2)
    return max(float(distance), 0.0)


def _overlap(cov1: Float64[Tensor, "d d"], cov2: Float64[Tensor, "d d"]) -> Float64[Tensor, ""]:
    """``tr (S1^1/2 S2 S1^1/2)^1/2``, the sum of the singular values of ``S1^1/2 S2^1/2``.

    Their squares are the eigenvalues of the symmetric form, also of ``L^T S2 L`` for the Cholesky factor ``S1 = L L^T``, which
    are had in a fraction of the time, but keep fewer digits: one that should be 0 and is 1e-17 by rounding adds 3e-9. So they
    are taken of large matrices only, and where the roots are exact to `TOLERATED`; singular covariances have exact roots first.
    """
    if len(cov1) >= LARGE:
        factor, failed = torch.linalg.cholesky_ex(cov1)
        if not failed:
            form = factor.T @ cov2 @ factor
            values = torch.linalg.eigvalsh((form + form.T) / 2)
            rounding = values[-1] * len(values) ** 0.5 * torch.finfo(values.dtype).eps
            if values[0] > rounding and (rounding / (2 * values.sqrt())).sum() <= TOLERATED * (cov1.trace() + cov2.trace()):
                return values.sqrt().sum()
    return torch.linalg.svdvals(_root(cov1) @ _root(cov2)).sum()


def _root(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """The symmetric root of a symmetric matrix without negative eigenvalues; those within rounding of 0 count as 0."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    rounding = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return (vectors * torch.where(values > rounding, values, 0).sqrt()) @ vectors.T


def _gram(features: Float64[Tensor, "b d"]) -> Float64[Tensor, "d d"]:
    """``X^T X``. On the CPU by NumPy, which computes one half of it: the other is the same."""
    if features.device.type != "cpu":
        return features.T @ features
    array = features.detach().numpy()
    return torch.from_numpy(array.T @ array)


class GaussianStatistics:
    """Mean and covariance of features that come in batches: sums in float64, from which parts may be merged.

    Attributes:
        count: number of features, scalar.
        total: their sum ``(d,)``; a scalar 0 before the first.
        outer: the sum of their outer products ``(d, d)``; a scalar 0 before the first.
    """

    def __init__(self, count: Tensor | None = None, total: Tensor | None = None, outer: Tensor | None = None):
        self.count = torch.zeros((), dtype=torch.int64) if count is None else count
        self.total = torch.zeros((), dtype=torch.float64) if total is None else total
        self.outer = torch.zeros((), dtype=torch.float64) if outer is None else outer

    @classmethod
    def of_moments(cls, mean: Mean, covariance: Covariance, count: int = 2) -> GaussianStatistics:
        """Those of a mean and an unbiased covariance, with the number of features, which plays no part in a distance."""
        mean, number = mean.double(), torch.tensor(count)
        outer = covariance.double() * (count - 1) + count * torch.outer(mean, mean)
        return cls(number, mean * count, outer)

    def update(self, features: Float[Tensor, "b d"]) -> None:
        """Adds a batch."""
        features = features.double()
        self.count = self.count + len(features)
        self.total = self.total + features.sum(0)
        self.outer = self.outer + _gram(features)

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        """The statistics of both sets together."""
        return GaussianStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Float64[Tensor, " d"]:
        """The mean of the features. Raises ValueError with fewer than 2."""
        self._check()
        return self.total / self.count

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance (over n - 1). Raises ValueError with fewer than 2."""
        mean = self.mean
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def _check(self) -> None:
        if self.count < 2:
            raise ValueError(f"{int(self.count)} images have no covariance: a Fréchet distance takes at least 2 of each set.")

    def distance(self, other: GaussianStatistics) -> float:
        """The Fréchet distance to other statistics. Raises ValueError with fewer than 2 features in one."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def weighted_statistics(features: Float64[Tensor, "n d"], counts: Tensor) -> GaussianStatistics:
    """Those of a set that holds each feature ``counts`` times ``(n,)``; features that it does not hold cost nothing."""
    held = counts > 0
    features, weights = features[held], counts[held].to(features.dtype)
    return GaussianStatistics(counts.sum(), weights @ features, _gram(features * weights.sqrt()[:, None]))


class FrechetDistance(Metric):
    """The Fréchet distance between generated and real images, streamed and summed over ranks.

    Args:
        features: what is compared; pixels by default. Features of a network are taken of bytes (`NetworkFeatures`).

    Attributes:
        name: ``frechet_<name of the features>``.
        protocol: of the features.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, features: FeatureExtractor | ImageFeatures | None = None):
        super().__init__()
        wrapped = NetworkFeatures(features) if isinstance(features, ImageFeatures) else features
        self.features = PixelFeatures() if wrapped is None else wrapped
        self.name, self.protocol = f"frechet_{self.features.name}", self.features.protocol
        for side in ("fake", "real"):
            empty = GaussianStatistics()
            self.add_state(f"{side}_count", empty.count, dist_reduce_fx="sum")
            self.add_state(f"{side}_total", empty.total, dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", empty.outer, dist_reduce_fx="sum")

    def _statistics(self, side: str) -> GaussianStatistics:
        return GaussianStatistics(*(getattr(self, f"{side}_{part}") for part in ("count", "total", "outer")))

    def update(self, samples: Float[Tensor, "b c h w"], real: Float[Tensor, "n c h w"], cond: Cond) -> None:
        """Adds generated and real images, both in [-1, 1]; conditions play no part."""
        for side, images in (("fake", samples), ("real", real)):
            statistics = self._statistics(side)
            statistics.update(self.features(images))
            for part in ("count", "total", "outer"):
                setattr(self, f"{side}_{part}", getattr(statistics, part))

    def compute(self) -> Float64[Tensor, ""]:
        """The distance. Raises ValueError with fewer than 2 images of either kind; NaN if a sample was not finite."""
        distance = self._statistics("fake").distance(self._statistics("real"))
        return torch.tensor(distance, dtype=torch.float64, device=self.device)
