"""diffusers' ``FluxTransformer2DModel``: FLUX.1, with embedded guidance (dev) and without (schnell)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.networks.base import DiffusersNetwork
from distill.networks.bottleneck import Bottleneck, Layer, transformer_bottleneck
from distill.types import Cond, Sample, Time

PATCH = 2
NATIVE_SIZE = 128
"""Latents of 1024 pixels, the default of ``FluxPipeline``; the model's config names no size."""

GUIDANCE = 3.5
"""The embedded guidance of a batch that names none: the default of ``FluxPipeline``."""


class Flux(DiffusersNetwork):
    """Reads ``prompt_embeds`` ``(b, n, d)`` and ``pooled_prompt_embeds`` ``(b, d)``; dev also ``guidance`` ``(b,)``.

    Guidance is the very number that the pipeline calls ``guidance_scale``, `GUIDANCE` where it is missing. Samples are latents
    ``(b, c, h, w)`` of any even size: patches of 2x2 become tokens of ``4 c`` channels, whose rotary positions are counted
    from 0.
    """

    model_class, component = "FluxTransformer2DModel", "transformer"

    def read_config(self, config: Any) -> None:
        channels = config.in_channels // PATCH**2
        self.refuse_unknown(config, {"patch_size": 1})
        self.shape, self.native_shape = (channels, None, None), (channels, NATIVE_SIZE, NATIVE_SIZE)
        self.widths = {
            "prompt_embeds": config.joint_attention_dim,
            "pooled_prompt_embeds": config.pooled_projection_dim,
        }
        if config.guidance_embeds:
            self.own_scalars = ("guidance",)

    def time_embedding(self) -> tuple[nn.Module, int]:
        embedder = self.model.time_text_embed.timestep_embedder
        return embedder, embedder.linear_1.in_features

    def bottleneck(self, layer: Layer = "middle") -> Bottleneck:
        blocks = [*self.model.transformer_blocks, *self.model.single_transformer_blocks]
        return transformer_bottleneck(blocks, self.model.config, self.native_shape, PATCH, output=1)

    def predict(self, x: Sample, time: Time, cond: Cond) -> Tensor:
        self.check_size(x, PATCH)
        height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        prompt = self.cast(cond["prompt_embeds"])
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = cond.get("guidance", time.new_full(time.shape, GUIDANCE))
        tokens = self.model(
            F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2),
            encoder_hidden_states=prompt,
            pooled_projections=self.cast(cond["pooled_prompt_embeds"]),
            timestep=time / 1000,  # the model multiplies by 1000 itself, guidance too
            img_ids=positions(height, width, x.device),
            txt_ids=torch.zeros(prompt.shape[1], 3, device=x.device),
            guidance=guidance,
        ).sample
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), PATCH)


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """``(0, row, column)`` of each token, ``(height * width, 3)``, row by row."""
    rows, columns = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
