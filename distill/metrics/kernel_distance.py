"""The kernel distance of two sets of features (KID), the mean of squared MMDs of random parts of them.

Bińkowski et al., Demystifying MMD GANs, 1801.01401, section 4: the unbiased estimate under the kernel ``(x.y / d + 1)^3``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from distill.kernels import PolynomialKernel, squared_mmd

Convention = Literal["clean-fid", "torch-fidelity"]


class KernelDistance(NamedTuple):
    """Mean and standard deviation (over n) of the parts' squared MMDs, which may be negative, and the size of the parts."""

    mean: float
    std: float
    subset_size: int


def kernel_distance(
    samples: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    convention: Convention = "clean-fid",
) -> KernelDistance:
    """The distance in float64; with one seed, the same parts as the package's.

    Args:
        samples: features of generated images.
        reference: of real ones.
        subsets: how many parts.
        subset_size: images of each set in a part, drawn without replacement.
        seed: of NumPy's ``RandomState``; clean-fid takes the global one, torch-fidelity 2020.
        convention: clean-fid's parts are smaller where a set is, and of the reference first; torch-fidelity refuses
            small sets, and draws of the samples first. The estimator is the same.

    Raises:
        ValueError: fewer than 2 images, fewer than ``subset_size`` under torch-fidelity's convention, or no subsets.
    """
    smaller = min(len(samples), len(reference))
    if smaller < 2 or subset_size < 2 or subsets < 1:
        raise ValueError(f"{subsets} subsets of {subset_size} of {smaller} images: give at least 1 of at least 2 images.")
    if convention == "torch-fidelity" and smaller < subset_size:
        raise ValueError(f"subset_size={subset_size}: there are {smaller} images; give more images, or at most that number.")
    size, random = min(smaller, subset_size), numpy.random.RandomState(seed)

    def part(rows: Tensor) -> Tensor:
        return rows[torch.from_numpy(random.choice(len(rows), size, replace=False))]

    values = []
    for _ in range(subsets):
        if convention == "clean-fid":
            real = part(reference)
            fake = part(samples)
        else:
            fake = part(samples)
            real = part(reference)
        values.append(float(squared_mmd(fake, real, PolynomialKernel())))
    return KernelDistance(float(numpy.mean(values)), float(numpy.std(values)), size)
