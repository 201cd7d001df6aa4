"""The Inception score: how sure a classifier is of each sample, and how many classes it sees in all.

    exp E_x KL(p(y|x) || p(y)),   the mean over parts of the samples

Salimans et al., Improved techniques for training GANs, 1606.03498, section 4. There is no reference in it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from jaxtyping import Float
from torch import Tensor


class InceptionScore(NamedTuple):
    """Mean and standard deviation (over n) of the parts' scores, from 1 to the number of classes."""

    mean: float
    std: float


def inception_score(logits: Float[Tensor, "n classes"], splits: int = 10, seed: int = 2020) -> InceptionScore:
    """The score in float64, of parts as torch-fidelity makes them: permuted by the seed, then cut.

    Args:
        logits: of the samples; the field's are those of the FID's Inception network without its last bias.
        splits: number of parts; with few samples a part, the score is too low.
        seed: of NumPy's ``RandomState``.

    Raises:
        ValueError: fewer samples than parts.
    """
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(f"splits={splits} of {count} samples: give from 1 to {count} parts.")
    logs = logits.double().log_softmax(1)[torch.from_numpy(numpy.random.RandomState(seed).permutation(count))]
    scores = []
    for part in range(splits):
        rows = logs[part * count // splits : (part + 1) * count // splits]
        mean = torch.logsumexp(rows, 0) - numpy.log(len(rows))
        scores.append(float((rows.exp() * (rows - mean)).sum(1).mean().exp()))
    return InceptionScore(float(numpy.mean(scores)), float(numpy.std(scores)))
