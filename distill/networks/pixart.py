"""diffusers' ``PixArtTransformer2DModel``: PixArt-alpha (2310.00426) and PixArt-Sigma (2403.04692)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.networks.base import DiffusersNetwork
from distill.networks.bottleneck import Bottleneck, Layer, transformer_bottleneck
from distill.types import Cond, Sample, Time


class PixArt(DiffusersNetwork):
    """Reads ``prompt_embeds`` ``(b, n, d)`` and ``prompt_mask`` ``(b, n)``; alpha at 1024 pixels also its sizes.

    These are ``resolution`` ``(b, 2)``, height and width in pixels, and ``aspect_ratio`` ``(b, 1)``, height / width. Positions
    are interpolated to any size in multiples of the patch.
    """

    model_class, component = "PixArtTransformer2DModel", "transformer"

    def read_config(self, config: Any) -> None:
        self.shape = (config.in_channels, None, None)
        self.native_shape = (config.in_channels, *self.sample_size(config))
        self.widths = {"prompt_embeds": config.caption_channels or config.cross_attention_dim}
        if self.model.use_additional_conditions:
            self.widths |= {"resolution": 2, "aspect_ratio": 1}

    def time_embedding(self) -> tuple[nn.Module, int]:
        embedder = self.model.adaln_single.emb.timestep_embedder
        return embedder, embedder.linear_1.in_features

    def bottleneck(self, layer: Layer = "middle") -> Bottleneck:
        return transformer_bottleneck(
            self.model.transformer_blocks, self.model.config, self.native_shape, self.model.config.patch_size
        )

    def predict(self, x: Sample, time: Time, cond: Cond) -> Tensor:
        self.check_size(x, self.model.config.patch_size)
        sizes: Cond | dict[str, None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            sizes = {"resolution": cond["resolution"], "aspect_ratio": cond["aspect_ratio"]}
        return self.model(
            x,
            encoder_hidden_states=self.cast(cond["prompt_embeds"]),
            encoder_attention_mask=cond["prompt_mask"],
            timestep=time,
            added_cond_kwargs=sizes,
        ).sample
