"""diffusers' ``UNet2DModel`` (DDPM, DDPM++; class labels or none) behind the common call ``net(x, time, cond, r) -> F``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.networks.base import DiffusersNetwork
from distill.networks.bottleneck import Bottleneck, Layer, unet_bottleneck
from distill.types import Cond, Sample, Time


class UNet2D(DiffusersNetwork):
    """A new, randomly initialised ``UNet2DModel``; `of` wraps one that exists. The last class embedding is the null class.

    Args:
        in_channels: channels of a sample.
        sample_size: height and width of a sample, divisible by ``2^(levels - 1)``.
        num_classes: classes of ``cond["labels"]``; one more is the null class. None for no labels.
        channels: width of each resolution level, multiples of ``groups``.
        layers_per_block: residual blocks a level.
        attention: for each level, whether its blocks have self-attention.
        heads_width: channels an attention head.
        groups: groups of the group normalisation.
        dropout: in [0, 1).
    """

    model_class, component = "UNet2DModel", "unet"

    def __init__(
        self,
        in_channels: int = 1,
        sample_size: int = 8,
        num_classes: int | None = 10,
        channels: tuple[int, ...] = (32, 64),
        layers_per_block: int = 2,
        attention: tuple[bool, ...] = (False, True),
        heads_width: int = 16,
        groups: int = 8,
        dropout: float = 0.0,
    ):
        if len(attention) != len(channels):
            raise ValueError(f"attention={attention} and channels={channels}: give one value for each level.")
        if any(width % groups for width in channels):
            raise ValueError(f"channels={channels}: give multiples of groups={groups}.")
        if sample_size % 2 ** (len(channels) - 1):
            raise ValueError(f"sample_size={sample_size}: {len(channels)} levels need multiples of {2 ** (len(channels) - 1)}.")
        super().__init__(
            dict(
                sample_size=sample_size,
                in_channels=in_channels,
                out_channels=in_channels,
                block_out_channels=channels,
                layers_per_block=layers_per_block,
                down_block_types=tuple("AttnDownBlock2D" if attended else "DownBlock2D" for attended in attention),
                up_block_types=tuple("AttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(attention)),
                attention_head_dim=heads_width,
                norm_num_groups=groups,
                dropout=dropout,
                num_class_embeds=None if num_classes is None else num_classes + 1,
            )
        )

    @classmethod
    def of(cls, model: Any, null_class: bool = True) -> Any:
        """Wraps a ``UNet2DModel``.

        Args:
            model: the model, weights and all.
            null_class: whether its last class embedding is the null class. Models that were trained without
                classifier-free guidance, as those of consistency models (Song et al. 2303.01469), have none.
        """
        network = super().of(model)
        if not null_class and network.num_classes is not None:
            network.null_class, network.num_classes = False, network.num_classes + 1
        return network

    def read_config(self, config: Any) -> None:
        # Fourier features are of sigma itself and learned times are whole numbers: neither is what `predict` passes.
        self.refuse_unknown(config, {"class_embed_type": None, "time_embedding_type": "positional"})
        self.shape = self.native_shape = (config.in_channels, *self.sample_size(config))
        self.num_classes = None if config.num_class_embeds is None else config.num_class_embeds - 1
        self.guidance_targets = tuple(f"attentions.{number}" for number in range(config.layers_per_block + 1))

    def time_embedding(self) -> tuple[nn.Module, int]:
        return self.model.time_embedding, self.model.time_embedding.linear_1.in_features

    def class_embedding(self) -> tuple[nn.Module, int] | None:
        embedding = self.model.class_embedding
        return None if embedding is None else (embedding, embedding.embedding_dim)

    def bottleneck(self, layer: Layer = "middle") -> Bottleneck:
        return unet_bottleneck(self.model, self.native_shape, layer)

    def predict(self, x: Sample, time: Time, cond: Cond) -> Tensor:
        return self.model(x, time, class_labels=cond["labels"] if self.num_classes is not None else None).sample
