"""Kernels and the squared maximum mean discrepancy (MMD) of two sets of features, with gradients, on one process or on several.

    MMD^2(p, q) = E k(x, x') + E k(y, y') - 2 E k(x, y),    x, x' ~ p and y, y' ~ q, all independent

Gretton et al., A kernel two-sample test, 2012, lemma 6. It is not the mean of the MMDs of parts of the sets: what several
processes hold is gathered first (`gather`). Sets are ``(n, d)``; kernels also take groups of sets, ``(*g, n, d)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
import torch.distributed
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Matching = Literal["all", "joint", "class"]

SMALLEST_SQUARE = 1e-8
"""Below it a squared distance counts as it under the root, with no gradient: inductive moment matching's clamp (2503.07565)."""


def squared_distances(a: Float[Tensor, "*g n d"], b: Float[Tensor, "*g m d"]) -> Float64[Tensor, "*g n m"]:
    """``|a_i - b_j|^2``, at least 0, without the ``n m d`` differences: ``|a|^2 + |b|^2 - 2 a.b`` needs float64's digits."""
    a, b = a.double(), b.double()
    return (a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1).unsqueeze(-2) - 2 * a @ b.mT).clamp(min=0)


class Kernel(ABC):
    """A positive definite kernel k of two feature vectors; the same for every process and step, so not a module."""

    @abstractmethod
    def __call__(self, a: Float[Tensor, "*g n d"], b: Float[Tensor, "*g m d"]) -> Float64[Tensor, "*g n m"]:
        """``k(a_i, b_j)`` in float64, differentiable in both."""


class PolynomialKernel(Kernel):
    """``(scale a.b + offset)^degree``; the defaults are KID's cubic (Bińkowski et al. 1801.01401, section 4).

    Args:
        degree: >= 1.
        scale: > 0, or None for ``1 / d`` of d features.
        offset: >= 0.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, degree: int = 3, scale: float | None = None, offset: float = 1.0):
        if degree < 1:
            raise ValueError(f"degree={degree}: give 1 or more (3 is KID's cubic).")
        if scale is not None and scale <= 0:
            raise ValueError(f"scale={scale}: give a positive number, or null for 1 over the number of features.")
        if offset < 0:
            raise ValueError(f"offset={offset}: give 0 or more; below 0 the kernel is not positive definite.")
        self.degree, self.scale, self.offset = degree, scale, offset

    def __call__(self, a: Float[Tensor, "*g n d"], b: Float[Tensor, "*g m d"]) -> Float64[Tensor, "*g n m"]:
        scale = 1 / a.shape[-1] if self.scale is None else self.scale
        return (scale * (a.double() @ b.double().mT) + self.offset) ** self.degree


class LinearKernel(PolynomialKernel):
    """``a.b / d``: the squared MMD is ``|E x - E y|^2 / d`` and sees the means alone."""

    def __init__(self) -> None:
        super().__init__(degree=1, offset=0.0)


class DistanceKernel(Kernel):
    """A kernel of the Euclidean distance ``|a - b|``."""

    def __call__(
        self, a: Float[Tensor, "*g n d"], b: Float[Tensor, "*g m d"], scale: Float[Tensor, "*g"] | None = None
    ) -> Float64[Tensor, "*g n m"]:
        """``k(a_i, b_j)`` in float64; ``scale`` (>= 0) multiplies each group's distances, as a bandwidth divides them."""
        factor = 1.0 if scale is None else scale.double()[..., None, None]
        return self.of_squares(squared_distances(a, b), factor, a.shape[-1])

    @abstractmethod
    def of_squares(self, squares: Tensor, scale: Tensor | float, size: int) -> Tensor:
        """The kernel at ``scale`` times the root of ``squares``, for ``size`` features."""


class RadialKernel(DistanceKernel):
    """Gaussian radial basis functions: the mean over bandwidths h of ``exp(-|a - b|^2 / (2 h^2))``.

    Args:
        bandwidths: each > 0, in the units of the features; None for the one with ``2 h^2 = d``, d features.

    Raises:
        ValueError: no bandwidth, or one that is not positive.
    """

    def __init__(self, bandwidths: list[float] | None = None):
        if bandwidths is not None and (not bandwidths or min(bandwidths) <= 0):
            raise ValueError(f"bandwidths={bandwidths}: give positive numbers, or null for sqrt(d / 2) of d features.")
        self.bandwidths = bandwidths

    def of_squares(self, squares: Tensor, scale: Tensor | float, size: int) -> Tensor:
        bandwidths = [(size / 2) ** 0.5] if self.bandwidths is None else self.bandwidths
        exponents = -(scale**2) * squares / 2
        return sum(((exponents / h**2).exp() for h in bandwidths), torch.zeros_like(squares)) / len(bandwidths)


class LaplaceKernel(DistanceKernel):
    """``exp(-|a - b| / h)``; its gradient is 0 where ``|a - b| <= 1e-4``, so that it is finite where nothing differs.

    At ``scale = w`` the default is inductive moment matching's ``exp(-w |a - b| / D)``, D the number of elements (2503.07565).

    Args:
        bandwidth: h > 0, in the units of the features; None for the number of features.

    Raises:
        ValueError: a bandwidth that is not positive.
    """

    def __init__(self, bandwidth: float | None = None):
        if bandwidth is not None and bandwidth <= 0:
            raise ValueError(f"bandwidth={bandwidth}: give a positive number, or null for the number of features.")
        self.bandwidth = bandwidth

    def of_squares(self, squares: Tensor, scale: Tensor | float, size: int) -> Tensor:
        distances = squares.clamp(min=SMALLEST_SQUARE).sqrt()
        return (-scale * distances / (size if self.bandwidth is None else self.bandwidth)).exp()


def squared_mmd(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    kernel: Kernel,
    unbiased: bool = True,
    x_labels: Int[Tensor, " n"] | None = None,
    y_labels: Int[Tensor, " m"] | None = None,
    matching: Matching = "all",
    chunk: int | None = None,
    paired: bool = False,
) -> Float64[Tensor, ""]:
    """The squared MMD of two sets, whose sizes may differ, in float64 and differentiable in both.

        1/(n (n-1)) sum_{i != j} k(x_i, x_j) + 1/(m (m-1)) sum_{i != j} k(y_i, y_j) - 2/(n m) sum_{ij} k(x_i, y_j)

    (Gretton et al. 2012, equation 3): unbiased, so it may be negative. Else the V-statistic (equation 5), at least 0: the first
    two sums take in ``i = j`` and are divided by ``n^2`` and ``m^2``.

    Args:
        x: one set, of at least 2 (1 where not ``unbiased``).
        y: the other.
        kernel: of two features.
        unbiased: which estimator.
        x_labels: classes of ``x``; not read where ``matching`` is ``all``.
        y_labels: those of ``y``.
        matching: ``all``: the laws of the features. ``joint``: those of features and label together, by the kernel
            ``k(x, x') [c = c']``. ``class``: the mean of the squared MMDs of the features of each class, over the classes of
            which both sets have at least 2 (1), or 0.
        chunk: rows that are compared at a time, and compared again in the backward pass: of the ``n m`` values of the kernel
            only ``chunk m`` ever exist. None: all at once.
        paired: whether ``x_i`` and ``y_i`` are not independent, as a sample made for an image's label and that image, which
            have the same label. The unbiased estimate then leaves ``i = j`` out of the last sum too, divided by ``n (n-1)``;
            counted, these pairs would draw samples of many classes together, whatever their law.

    Raises:
        ValueError: a set too small, sets of two sizes that are paired, labels that ``matching`` lacks, or a chunk below 1.
    """
    if min(len(x), len(y)) < 1 + unbiased:
        raise ValueError(f"an MMD of {len(x)} and {len(y)} samples: give {1 + unbiased} or more of each (a larger batch).")
    if paired and len(x) != len(y):
        raise ValueError(f"paired=True, of {len(x)} and {len(y)} samples: give as many of each, in the same order.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: give the number of rows compared at a time, at least 1, or null for all.")
    x_classes, y_classes = _classes(x, x_labels, matching), _classes(y, y_labels, matching)
    # laws with their labels are compared as one group of all samples, in which pairs of two classes count 0
    x_groups, y_groups = (side if matching == "class" else torch.zeros_like(side) for side in (x_classes, y_classes))
    apart = unbiased and paired
    within_x, within_y, across = _row_weights(x_groups, y_groups, int(unbiased), int(apart))
    x_side, y_side = (x.double(), x_classes), (y.double(), y_classes)
    return (
        _weighted_sum(kernel, x_side, x_side, within_x, unbiased, chunk)
        + _weighted_sum(kernel, y_side, y_side, within_y, unbiased, chunk)
        - 2 * _weighted_sum(kernel, x_side, y_side, across, apart, chunk)
    )


def _classes(samples: Tensor, labels: Tensor | None, matching: Matching) -> Tensor:
    """The samples' classes, all 0 where they play no part."""
    if matching == "all":
        return torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    if labels is None:
        raise ValueError(f"matching={matching!r} compares labels: give those of both sets, or matching='all'.")
    return labels


def _row_weights(x_groups: Tensor, y_groups: Tensor, unbiased: int, apart: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the rows of the sums over (x, x), (y, y) and (x, y) are multiplied with, for the mean over the groups.

    Nothing is read back from the device: each row has the size of its group, and the groups are counted by their rows' shares.
    """
    within_x, across, number = _side_weights(x_groups, y_groups, unbiased, apart)
    within_y, _, _ = _side_weights(y_groups, x_groups, unbiased, apart)
    number = number.round().clamp(min=1)
    return within_x / number, within_y / number, across / number


def _side_weights(own: Tensor, other: Tensor, unbiased: int, apart: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows of one side: 1 over the pairs within their group, 1 over those across; and the number of groups in use."""
    n, m = _group_sizes(own, own), _group_sizes(own, other)
    used = torch.minimum(n, m) >= 1 + unbiased
    return used / (n * (n - unbiased)).clamp(min=1), used / (n * (m - apart)).clamp(min=1), (used / n).sum()


def _group_sizes(own: Tensor, among: Tensor) -> Tensor:
    """How many ``among`` these are of each row's group."""
    ordered = among.sort().values
    return (torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own)).double()


def _weighted_sum(
    kernel: Kernel,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    weights: Tensor,
    without_diagonal: bool,
    chunk: int | None,
) -> Tensor:
    """``sum_i weights_i sum_j k(a_i, b_j) [c_i = c_j]``, perhaps without ``j = i``; a side is its features and classes."""
    total, size = weights.new_zeros(()), chunk or len(weights)
    for first in range(0, len(weights), size):
        at = slice(first, first + size)
        part = (kernel, (a[0][at], a[1][at]), b, weights[at], first if without_diagonal else None)
        # a kernel draws nothing, so that no generator's state need be fetched from the device
        total = total + (checkpoint(_part, *part, use_reentrant=False, preserve_rng_state=False) if chunk else _part(*part))
    return total


def _part(
    kernel: Kernel, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], weights: Tensor, diagonal: int | None
) -> Tensor:
    """The weighted sum of some rows, whose first is paired with itself in column ``diagonal``, which is then left out."""
    values = kernel(rows[0], columns[0]) * (rows[1][:, None] == columns[1])
    sums = values.sum(1) - (0 if diagonal is None else values.diagonal(diagonal))
    return (weights * sums).sum()


class _Gather(torch.autograd.Function):
    """All ranks' rows; back, the sum over the ranks of their gradients in one's own rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.own = slice(first := torch.distributed.get_rank() * len(own), first + len(own))
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, own)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total[ctx.own]


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks in rank order ``(w b, ...)``, carrying gradients to each rank's own; ``x`` if there is one process.

    Every rank must call it, with as many rows. Integers (labels) are gathered likewise, without a gradient.

    Let each of w ranks make ``z_r = z(theta)`` of its own data, gather all, and compute the same ``L(z_1, ..., z_w)``. The
    gradient of rank q in the rows of r is ``dL/dz_r``, the same for all q, and their sum over q comes back to r: ``w dL/dz_r``.
    So rank r's gradient of the parameters is ``w dL/dz_r dz_r/dtheta``, and DDP's mean of these over the ranks is
    ``sum_r dL/dz_r dz_r/dtheta = dL/dtheta``: that of one process that has all the data.
    """
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if alone or torch.distributed.get_world_size() == 1:
        return x
    return _Gather.apply(x.contiguous())
