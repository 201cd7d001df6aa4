"""Noise of numbered samples: a function of (seed, number) alone, on the CPU, whatever the batch or the process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distill.types import Sample


class SeededNoise:
    """Unit noise for numbered samples: the k-th draw of sample i depends on (seed, i, k) and on nothing else.

    Args:
        seed: seed of the whole set, 0 or more.
        indices: numbers of the samples, one a row.
        shape: shape of one sample.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int]):
        if seed < 0:
            raise ValueError(f"seed={seed}: give 0 or a positive number.")
        self.shape = tuple(shape)
        # Philox takes both numbers whole as its key; torch's CPU generator reads only the low 32 bits of a seed.
        self.generators = [np.random.Generator(np.random.Philox(key=(seed << 64) + int(index))) for index in indices]

    def draw(self, device: torch.device | None = None) -> Sample:
        """The next draw of every sample, ``(len(indices), *shape)`` float32."""
        draws = [torch.from_numpy(g.standard_normal(self.shape, dtype=np.float32)) for g in self.generators]
        return torch.stack(draws).to(device)

    def __call__(self, like: Sample) -> Sample:
        return self.draw(like.device).to(like.dtype)
