"""diffusers' ``UNet2DConditionModel``: Stable Diffusion 1.x, 2.x and XL, and latent consistency models of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.adapters import required, sinusoid
from distill.networks.base import SCALAR_ORIGINS, DiffusersNetwork
from distill.networks.bottleneck import Bottleneck, Layer, unet_bottleneck
from distill.types import Cond, Sample, Time

TIME_IDS = 6
"""SDXL's sizes: original height and width, crop's top and left, target height and width (Podell et al. 2307.01952)."""


class UNet2DCondition(DiffusersNetwork):
    """Reads ``prompt_embeds`` ``(b, n, d)``; SDXL also ``pooled_prompt_embeds`` ``(b, d)`` and ``time_ids`` ``(b, 6)``.

    A latent consistency model (``time_cond_proj_dim``) also reads ``guidance`` ``(b,)``, 1 for none: its pipeline embeds
    ``guidance - 1`` (Luo et al. 2310.04378). The pipelines give these models no mask of the prompt's tokens.
    """

    model_class, component = "UNet2DConditionModel", "unet"
    guidance_targets = ("attn2",)

    def read_config(self, config: Any) -> None:
        self.refuse_unknown(
            config,
            {
                "class_embed_type": None,
                "num_class_embeds": None,
                "encoder_hid_dim_type": None,
                "time_embedding_type": "positional",
                "attention_type": "default",
            },
        )
        if not isinstance(width := config.cross_attention_dim, int):
            raise ValueError(f"{self.model_class} with cross_attention_dim={width!r}: only one width for all blocks is known.")
        self.shape = (config.in_channels, None, None)
        self.native_shape = (config.in_channels, *self.sample_size(config))
        self.widths = {"prompt_embeds": width}
        self.sized = config.addition_embed_type is not None
        if self.sized:
            self.refuse_unknown(config, {"addition_embed_type": "text_time"})
            pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
            self.widths |= {"pooled_prompt_embeds": pooled, "time_ids": TIME_IDS}
        if config.time_cond_proj_dim is not None:
            self.own_scalars = ("guidance",)

    def time_embedding(self) -> tuple[nn.Module, int]:
        return self.model.time_embedding, self.model.time_embedding.linear_1.in_features

    def embed_guidance(self, cond: Cond) -> Tensor | None:
        """What a latent consistency model adds to its embedded time, ``(b, time_cond_proj_dim)``; None for others."""
        if "guidance" not in self.own_scalars:
            return None
        scale = required(cond, "guidance") - SCALAR_ORIGINS["guidance"]
        return self.cast(sinusoid(1000 * scale, self.model.config.time_cond_proj_dim))

    def bottleneck(self, layer: Layer = "middle") -> Bottleneck:
        return unet_bottleneck(self.model, self.native_shape, layer)

    def predict(self, x: Sample, time: Time, cond: Cond) -> Tensor:
        added = None
        if self.sized:
            # Sizes stay as they are: above 256 not every whole number is one of bfloat16.
            added = {"text_embeds": self.cast(cond["pooled_prompt_embeds"]), "time_ids": cond["time_ids"]}
        prompt, guidance = self.cast(cond["prompt_embeds"]), self.embed_guidance(cond)
        return self.model(x, time, encoder_hidden_states=prompt, timestep_cond=guidance, added_cond_kwargs=added).sample
