"""Tiny models of each family with everything attached that the family takes, for the tests of adapters and of their files."""

from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES
from torch import Tensor, nn

from distill.adapters import Adapter, AttentionGuidance, GuideNetwork, NegativePrompt
from distill.denoiser import NetworkDenoiser
from distill.lora import LoRA, adapted_copy, read_guidance
from distill.networks.families import FAMILIES as NETWORKS
from distill.schedules import RectifiedFlow

PROMPTED = ("sd15", "sd2", "sdxl", "pixart-alpha", "pixart-sigma")
"""Families that `NegativePrompt` knows."""


def base(family: str, seed: int = 0, **changes: Any) -> NetworkDenoiser:
    """A denoiser around the family's tiny model; another seed is a fine-tuned sibling."""
    tiny = FAMILIES[family]
    network = NETWORKS[tiny.model_class].of(tiny.model(**changes))
    if seed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in network.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    # As a teacher is; some kernels round otherwise where weights require gradients, even without a graph.
    return NetworkDenoiser(network, RectifiedFlow(), "flow").requires_grad_(False).eval()


def adapters(family: str) -> list[Adapter]:
    """One of each kind that the family takes."""
    negative: list[Adapter] = [NegativePrompt()] if family in PROMPTED else []
    return [AttentionGuidance(width=8), GuideNetwork(width=8), *negative]


def student(teacher: NetworkDenoiser, family: str) -> NetworkDenoiser:
    """On the teacher's own weights: LoRA layers, a scalar input, and every adapter."""
    made = adapted_copy(teacher, LoRA(2), None)
    read_guidance(made, "guidance_range=(1, 8)")
    for settings in adapters(family):
        made.network.add_adapter(settings)  # type: ignore[operator, union-attr]
    return made.eval()


def call(denoiser: Any, family: str, scales: tuple[float, float] = (2.0, 5.0), graph: bool = False) -> Tensor:
    """x0 of two samples."""
    tiny, generator = FAMILIES[family], torch.Generator().manual_seed(3)
    cond, null = tiny.cond(2)
    negatives = {f"negative_{key}": null[key] for key in ("prompt_embeds", "prompt_mask") if key in null}
    x = torch.randn(2, tiny.channels, tiny.size, tiny.size, generator=generator)
    with torch.set_grad_enabled(graph):
        return denoiser(x, torch.tensor([0.2, 0.8]), {**cond, **negatives, "guidance": torch.tensor(scales)})


def train(denoiser: NetworkDenoiser, family: str, steps: int = 3) -> list[nn.Parameter]:
    """A few steps away from the samples that it gives; returns what the optimiser was given."""
    trained = [weight for weight in denoiser.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-call(denoiser, family, graph=True).square().mean()).backward()
        optimizer.step()
    return trained
