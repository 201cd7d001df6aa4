"""diffusers' ``SanaTransformer2DModel``: Sana (Xie et al. 2410.10629), Sana 1.5 and Sana-Sprint (Chen et al. 2503.09641)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.networks.base import DiffusersNetwork
from distill.networks.bottleneck import Bottleneck, Layer, transformer_bottleneck
from distill.types import Cond, Sample, Time

GUIDANCE = 4.5
"""The embedded guidance of a batch that names none: the default of ``SanaSprintPipeline``."""


class Sana(DiffusersNetwork):
    """Reads ``prompt_embeds`` ``(b, n, d)`` and ``prompt_mask`` ``(b, n)``; Sana-Sprint also ``guidance`` ``(b,)``.

    Guidance is the number that the pipeline calls ``guidance_scale``, `GUIDANCE` where it is missing. Sana-Sprint's network is
    a rectified flow's as well: its pipeline, whose scheduler runs in TrigFlow's time, turns samples and time into a flow's and
    the output back. There is no position embedding, or one for any size in multiples of the patch.
    """

    model_class, component = "SanaTransformer2DModel", "transformer"

    def read_config(self, config: Any) -> None:
        self.shape = (config.in_channels, None, None)
        self.native_shape = (config.in_channels, *self.sample_size(config))
        self.widths = {"prompt_embeds": config.caption_channels}
        if config.guidance_embeds:
            self.own_scalars = ("guidance",)

    def time_embedding(self) -> tuple[nn.Module, int]:
        embed = self.model.time_embed
        embedder = (embed if self.model.config.guidance_embeds else embed.emb).timestep_embedder
        return embedder, embedder.linear_1.in_features

    def bottleneck(self, layer: Layer = "middle") -> Bottleneck:
        return transformer_bottleneck(
            self.model.transformer_blocks, self.model.config, self.native_shape, self.model.config.patch_size
        )

    def predict(self, x: Sample, time: Time, cond: Cond) -> Tensor:
        config, guidance = self.model.config, None
        self.check_size(x, config.patch_size)
        if config.guidance_embeds:
            guidance = config.guidance_embeds_scale * cond.get("guidance", time.new_full(time.shape, GUIDANCE))
        return self.model(
            x,
            encoder_hidden_states=self.cast(cond["prompt_embeds"]),
            encoder_attention_mask=cond["prompt_mask"],
            # Sana-Sprint's pipeline passes the flow's sigma whatever timestep_scale says.
            timestep=time / 1000 if config.guidance_embeds else time * config.timestep_scale,
            guidance=guidance,
        ).sample
