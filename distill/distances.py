"""Distances between samples: each gives one number a sample, ``(b, *shape), (b, *shape) -> (b,)``, differentiable in both."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from distill import hub
from distill.frozen import Frozen
from distill.types import PerSample, Sample


class Distance(nn.Module):
    """A distance between two batches of samples."""

    @abstractmethod
    def forward(self, a: Sample, b: Sample) -> PerSample:
        """Distances ``(b,)``, at least 0."""


class SquaredDistance(Distance):
    """Mean of the squared differences of a sample's elements."""

    def forward(self, a: Sample, b: Sample) -> PerSample:
        return (a - b).square().flatten(1).mean(1)


class PseudoHuber(Distance):
    """``sqrt(|d|^2 + c^2) - c`` of the whole sample (``vector``), or the mean of the same over its elements (``element``).

    The two forms are not interchangeable: c belongs to its form. Improved consistency training uses the vector form with
    ``c = 0.00054 sqrt(D)`` for D elements (2310.14189, section 3.3); latent consistency models the element form with c = 0.001.
    ``mean`` is the vector form over D: rf++'s, with ``c = 0.00054 D`` (2405.20320, its code).

    Args:
        c: > 0 in the units of the sample, or None for ``relative sqrt(D)``; in the ``mean`` form ``relative D``.
        form: ``vector``, ``element`` or ``mean``.
        relative: > 0, read where ``c`` is None.

    Raises:
        ValueError: a number that is not positive.
    """

    def __init__(
        self, c: float | None = None, form: Literal["vector", "element", "mean"] = "vector", relative: float = 0.00054
    ):
        super().__init__()
        if c is not None and c <= 0:
            raise ValueError(f"c={c}: give a positive number (1e-8 for the plain norm), or null for relative * sqrt(D).")
        if relative <= 0:
            raise ValueError(f"relative={relative}: give a positive number, the share of sqrt(D), or of D, that c is.")
        self.c, self.form, self.relative = c, form, relative

    def forward(self, a: Sample, b: Sample) -> PerSample:
        squares = (a - b).square().flatten(1)
        size = squares.shape[1]
        c = self.relative * (size if self.form == "mean" else size**0.5) if self.c is None else self.c
        if self.form == "element":
            return ((squares + c**2).sqrt() - c).mean(1)
        return ((squares.sum(1) + c**2).sqrt() - c) / (size if self.form == "mean" else 1)


def derivative(distance: Distance, y: Sample) -> Sample:
    """d'(y), the gradient of ``distance(y, 0)`` in each sample of ``y``, ``(b, *shape)``.

    It carries gradients to whatever ``y`` depends on and can be differentiated to any order; where ``y`` carries none, or under
    ``torch.no_grad``, neither does it.
    """
    differentiable = y.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        # the graph is walked from the value to y, not into what y was made of; without one, y is its own leaf
        point = y if differentiable else y.detach().requires_grad_()
        value = distance(point, torch.zeros_like(point)).sum()
        return torch.autograd.grad(value, point, create_graph=differentiable)[0]


class LPIPS(Distance):
    """Learned perceptual distance (Zhang et al. 1801.03924) by the lpips package, on images in [-1, 1].

    One-channel images are repeated to three, and images below 224 pixels are enlarged to it bilinearly, as consistency
    models do (2303.01469, appendix C).

    Args:
        weights: file of the torchvision backbone's state dict (``vgg16-397923af.pth`` for ``vgg``); the linear heads come
            with the lpips package. Nothing is downloaded.
        net: ``vgg``, ``alex`` or ``squeeze``; must be the backbone of ``weights``.
        size: images smaller than this are enlarged to it.

    Raises:
        FileNotFoundError: if ``weights`` is not there.
    """

    @staticmethod
    def locate(weights: str, net: str = "vgg") -> Path:
        """The backbone's file. Raises FileNotFoundError if it is not there."""
        if hub.reads_weights() and not Path(weights).is_file():
            raise FileNotFoundError(
                f"distance.weights={weights!r} does not exist: save torchvision's state dict of the {net} backbone there "
                "(torchvision.models names the file and its address)."
            )
        return Path(weights)

    def __init__(self, weights: str, net: Literal["vgg", "alex", "squeeze"] = "vgg", size: int = 224):
        super().__init__()
        self.locate(weights, net)
        import lpips

        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if hub.reads_weights():
            self._load_backbone(model.net, torch.load(weights, map_location="cpu", weights_only=True))
        self.model, self.size = Frozen(model), size

    @staticmethod
    def _load_backbone(backbone: nn.Module, state: dict[str, Tensor]) -> None:
        """torchvision's ``features.N.*`` into the package's slices, which keep torchvision's numbers."""
        features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
        wanted = {key.split(".", 1)[1]: key for key in backbone.state_dict() if key.startswith("slice")}
        missing = sorted(set(wanted) - set(features))
        if missing:
            raise ValueError(f"distance.weights lacks {missing[:3]}: give the state dict of the backbone named by net.")
        backbone.load_state_dict({own: features[name] for name, own in wanted.items()})

    def _prepare(self, x: Sample) -> Tensor:
        """Three channels, at least ``size`` pixels high and wide, float32."""
        x = x.float().repeat(1, 3, 1, 1) if x.shape[1] == 1 else x.float()
        if min(x.shape[-2:]) >= self.size:
            return x
        return torch.nn.functional.interpolate(x, (self.size, self.size), mode="bilinear", antialias=False)

    def forward(self, a: Sample, b: Sample) -> PerSample:
        with torch.autocast(a.device.type, enabled=False):
            return self.model(self._prepare(a), self._prepare(b)).flatten()
