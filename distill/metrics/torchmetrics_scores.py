"""torchmetrics' Inception metrics for ``evaluation.metrics``, every option that changes a figure stated.

They are of the legacy protocol, torch-fidelity's network and resize (`LegacyFeatures`), and compare with figures of that one.
What torchmetrics would do by itself differs: it resizes with antialiasing, and cuts values off where bytes are rounded here. So
the network is given to it whole; of these three classes only the first takes a file of weights. ``FrechetDistance`` of the same
features gives the same figure as `TorchmetricsFID`, in less time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from distill.image_features import ImageFeatures
from distill.metrics.extractors import make_extractor
from distill.metrics.features import FeatureExtractor, NetworkFeatures
from distill.types import Cond

Images = Float[Tensor, "b c h w"]
Real = Float[Tensor, "n c h w"]
Features = FeatureExtractor | ImageFeatures | None
WIDTH = 2048
"""Features of the Inception network."""


class GivenFeatures(nn.Module):
    """An extractor as torchmetrics takes networks: of images in [-1, 1], in full precision whatever the trainer's is.

    Args:
        features: None for the FID's Inception network in ``weights/``.
        logits: whether that one is to give its logits.
        width: number of features, which torchmetrics asks for.

    Raises:
        FileNotFoundError, ValueError: see `LegacyFeatures`; says what to fetch, and where to put it.
    """

    def __init__(self, features: Features, logits: bool = False, width: int = WIDTH):
        super().__init__()
        if features is None:
            self.extractor = make_extractor("legacy", logits)
        else:
            self.extractor = NetworkFeatures(features) if isinstance(features, ImageFeatures) else features
        self.num_features = width

    def describe(self, metric: str) -> str:
        """The protocol of a metric of these features."""
        return f"{metric} of torchmetrics {version('torchmetrics')}; of {self.extractor.protocol}"

    def forward(self, images: Images) -> Float64[Tensor, "b d"]:
        with torch.autocast(images.device.type, enabled=False):
            return self.extractor(images.float())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torchmetrics draws parts from the global generator of the CPU: within, from a seed, and nothing of it is left."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class TorchmetricsFID(FrechetInceptionDistance):
    """The Fréchet inception distance of torchmetrics: sums and roots in float64, real images counted anew each time.

    Args:
        features: what is compared; None for the 2,048 of the FID's Inception network, by the legacy protocol.
        width: number of features, of others than these.

    Attributes:
        name: ``fid_<name of the features>``.
        protocol: what the figure is.

    Raises:
        FileNotFoundError, ValueError: see `GivenFeatures`.
    """

    def __init__(self, features: Features = None, width: int = WIDTH):
        given = GivenFeatures(features, width=width)
        # normalize and antialias are for torchmetrics' own network; real features that were kept would be added to each time
        super().__init__(feature=given, reset_real_features=True, normalize=False)
        self.features = given.extractor
        self.name, self.protocol = f"fid_{self.features.name}", given.describe("FrechetInceptionDistance")

    def update(self, samples: Images, real: Real, cond: Cond) -> None:  # type: ignore[override]
        """Adds generated and real images, both in [-1, 1]; conditions play no part."""
        super().update(samples, real=False)
        super().update(real, real=True)


class TorchmetricsKID(KernelInceptionDistance):
    """The kernel inception distance of torchmetrics, the mean over random parts, under the kernel ``(x.y / d + 1)^3``.

    Args:
        features: what is compared; None for the 2,048 of the FID's Inception network, by the legacy protocol.
        subsets: number of parts.
        subset_size: images of each set in one; all of them where there are fewer.
        seed: of the parts, the same in each validation.

    Attributes:
        name: ``kid_<name of the features>``.
        protocol: what the figure is.

    Raises:
        FileNotFoundError, ValueError: see `GivenFeatures`; no parts, or parts of fewer than 2 images.
    """

    def __init__(self, features: Features = None, subsets: int = 100, subset_size: int = 1000, seed: int = 0):
        if subsets < 1 or subset_size < 2:
            raise ValueError(f"subsets={subsets}, subset_size={subset_size}: give at least 1 of at least 2 images.")
        given = GivenFeatures(features)
        super().__init__(given, subsets, subset_size, 3, None, 1.0, reset_real_features=True, normalize=False)
        self.features, self.seed = given.extractor, seed
        settings = f"{subsets} subsets of {subset_size}, or of all, drawn by seed {seed}, kernel (x.y / d + 1)^3"
        self.name = f"kid_{self.features.name}"
        self.protocol = given.describe(f"KernelInceptionDistance ({settings})")

    def update(self, samples: Images, real: Real, cond: Cond) -> None:  # type: ignore[override]
        """Adds generated and real images, both in [-1, 1]; conditions play no part."""
        super().update(samples, real=False)
        super().update(real, real=True)

    def compute(self) -> Float64[Tensor, ""]:  # type: ignore[override]
        """The mean. Raises ValueError with fewer than 2 images of either kind."""
        counts = [sum(map(len, rows)) for rows in (self.fake_features, self.real_features)]
        if min(counts) < 2:
            raise ValueError(f"{self.name}: {min(counts)} images: a kernel distance takes at least 2 of each set.")
        asked, self.subset_size = self.subset_size, min(self.subset_size, *counts)
        with seeded(self.seed):
            mean, _ = super().compute()
        self.subset_size = asked
        return mean


class TorchmetricsInceptionScore(InceptionScore):
    """The Inception score of torchmetrics, the mean over parts. There is no reference in it.

    Args:
        features: logits; None for those of the FID's Inception network without its last bias, by the legacy protocol.
        splits: number of parts.
        seed: of the order in which samples are split, the same in each validation.

    Attributes:
        name: ``inception_score_<name of the features>``.
        protocol: what the figure is.

    Raises:
        FileNotFoundError, ValueError: see `GivenFeatures`; no parts.
    """

    def __init__(self, features: Features = None, splits: int = 10, seed: int = 0):
        if splits < 1:
            raise ValueError(f"splits={splits}: give at least 1.")
        given = GivenFeatures(features, logits=True)
        super().__init__(feature=given, splits=splits, normalize=False)
        self.seed, self.name = seed, f"inception_score_{given.extractor.name}"
        self.protocol = given.describe(f"InceptionScore ({splits} splits of an order drawn by seed {seed})")

    def update(self, samples: Images, real: Real, cond: Cond) -> None:  # type: ignore[override]
        """Adds generated images in [-1, 1]; real ones and conditions play no part."""
        super().update(samples)

    def compute(self) -> Float64[Tensor, ""]:  # type: ignore[override]
        """The mean."""
        with seeded(self.seed):
            mean, _ = super().compute()
        return mean
