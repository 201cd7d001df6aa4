"""diffusers' ``UNet2DModel`` (DDPM, DDPM++; class labels or none) behind the common call ``net(x, time, cond, r) -> F``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from distill.adapters import ScalarInput
from distill.types import Cond, Sample, Time

if TYPE_CHECKING:
    from diffusers import UNet2DModel

SCALAR_ORIGINS = {"guidance": 1.0}
"""The value of each extra scalar input that is embedded as 0."""


class UNet2D(nn.Module):
    """A new, randomly initialised ``UNet2DModel``; `UNet2D.of` wraps one that exists.

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
        from diffusers import UNet2DModel

        unet = UNet2DModel(
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
        super().__init__()
        self._wrap(unet)

    @classmethod
    def of(cls, unet: UNet2DModel) -> UNet2D:
        """Wraps a ``UNet2DModel``; the last of its class embeddings, if it has any, must be the null class."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._wrap(unet)
        return self

    def _wrap(self, unet: UNet2DModel) -> None:
        self.unet = unet
        self.scalars = nn.ModuleDict()
        size = unet.config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        self.shape = (unet.config.in_channels, height, width)
        embeddings = unet.config.num_class_embeds
        self.num_classes = None if embeddings is None else embeddings - 1

    def add_scalar_input(self, name: str) -> None:
        """The network now also reads ``cond[name]`` ``(b,)``, at first without effect; see `ScalarInput`."""
        if name in self.scalars:
            return
        embedding = self.unet.time_embedding
        scalar = ScalarInput(embedding, embedding.linear_1.in_features, SCALAR_ORIGINS.get(name, 0.0))
        self.scalars[name] = scalar.to(embedding.linear_1.weight)

    def forward(self, x: Sample, time: Time, cond: Cond, r: Time | None = None) -> Sample:
        """Raw prediction ``(b, c, h, w)`` at network times ``(b,)``, for ``cond["labels"]`` if the network has classes."""
        if r is not None:
            raise ValueError("UNet2D has no second time input.")
        for name, scalar in self.scalars.items():
            if name not in cond:
                raise ValueError(f"cond[{name!r}] is missing: this network was trained with {name} as an input; pass a value.")
            scalar.value = cond[name]
        return self.unet(x, time, class_labels=cond["labels"] if self.num_classes is not None else None).sample
