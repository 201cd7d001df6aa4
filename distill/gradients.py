"""What a network call is differentiated in: nothing, its parameters, its input, or both; and no graph for anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from distill.denoiser import Denoiser
from distill.types import Cond, Sample, Time

Gradient = Literal["none", "parameters", "input", "both"]
"""Score identity distillation asks frozen networks for ``input``; the distribution-matching bracket for ``none``; a player's
own loss for ``parameters``; a student that is differentiated through several of its steps for ``both``."""

Call = Callable[[Denoiser, Sample, Time, Cond], Any]
"""What is computed of a denoiser: x0, features of its network, or both."""


def denoise(denoiser: Denoiser, x: Sample, t: Time, cond: Cond) -> Sample:
    """The plain call."""
    return denoiser(x, t, cond)


def evaluate(
    gradient: Gradient,
    denoiser: Denoiser,
    x: Sample,
    t: Time,
    cond: Cond,
    call: Call = denoise,
) -> Any:
    """``call(denoiser, x, t, cond)`` with a graph for ``gradient`` alone.

    Args:
        gradient: what the result is differentiated in.
        denoiser, x, t, cond: see `Denoiser.forward`.
        call: what is computed, x0 by default.
    """
    if gradient == "input":
        with torch.enable_grad(), frozen_parameters(denoiser):
            return call(denoiser, x, t, cond)
    with torch.set_grad_enabled(gradient != "none"):
        return call(denoiser, x if gradient == "both" else x.detach(), t, cond)


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[None]:
    """Within the block no parameter of the module requires gradients.

    In a training step those of the player that waits do not anyway, through the backward pass too, which matters to networks
    that compute activations again in it.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
