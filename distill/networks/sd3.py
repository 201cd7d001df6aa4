"""diffusers' ``SD3Transformer2DModel``: Stable Diffusion 3 and 3.5 (Esser et al. 2403.03206)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.networks.base import DiffusersNetwork
from distill.networks.bottleneck import Bottleneck, Layer, transformer_bottleneck
from distill.types import Cond, Sample, Time


class SD3(DiffusersNetwork):
    """Reads ``prompt_embeds`` ``(b, n, d)`` and ``pooled_prompt_embeds`` ``(b, d)``; its pipeline masks no token.

    Positions are cut from the middle of a table of ``pos_embed_max_size`` patches: any size up to that, in multiples of the
    patch.
    """

    model_class, component = "SD3Transformer2DModel", "transformer"

    def read_config(self, config: Any) -> None:
        self.shape = (config.in_channels, None, None)
        self.native_shape = (config.in_channels, *self.sample_size(config))
        self.widths = {
            "prompt_embeds": config.joint_attention_dim,
            "pooled_prompt_embeds": config.pooled_projection_dim,
        }

    def time_embedding(self) -> tuple[nn.Module, int]:
        embedder = self.model.time_text_embed.timestep_embedder
        return embedder, embedder.linear_1.in_features

    def bottleneck(self, layer: Layer = "middle") -> Bottleneck:
        return transformer_bottleneck(
            self.model.transformer_blocks, self.model.config, self.native_shape, self.model.config.patch_size, output=1
        )

    def predict(self, x: Sample, time: Time, cond: Cond) -> Tensor:
        self.check_size(x, self.model.config.patch_size)
        return self.model(
            x,
            encoder_hidden_states=self.cast(cond["prompt_embeds"]),
            pooled_projections=self.cast(cond["pooled_prompt_embeds"]),
            timestep=time,
        ).sample
