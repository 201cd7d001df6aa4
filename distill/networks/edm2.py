"""EDM2's U-Net (Karras et al. 2312.02696) behind the common call ``net(x, time, cond, r) -> F``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from distill import hub
from distill.networks.base import Network
from distill.networks.bottleneck import Bottleneck, Layer, edm_bottleneck
from distill.networks.edm2_modules import EDM2UNet
from distill.types import Cond, Sample, Time

WIDTHS = {"XXS": 64, "XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}
"""Channels of the first level in each published size."""


class EDM2(Network):
    """A new, randomly initialised `EDM2UNet`: EDM's F at ``time = ln(sigma) / 4``.

    Forced weight normalisation (2312.02696, section 2.3) is part of a forward that trains, in training mode and with gradient,
    and of no other: a target (without gradient), a sampler, an average or a frozen network never change their weights.

    Args:
        size: a published size, or the channels of the first level.
        sample_size, in_channels, num_classes, multipliers, blocks, attention, head_width, dropout, dropout_resolution: see
            `EDM2UNet`.

    Attributes:
        config: these arguments.
    """

    model_class, component = "EDM2UNet", "unet"

    def __init__(
        self,
        size: Literal["XXS", "XS", "S", "M", "L", "XL", "XXL"] | int = "S",
        sample_size: int = 64,
        in_channels: int = 3,
        num_classes: int | None = None,
        multipliers: tuple[int, ...] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: tuple[int, ...] = (16, 8),
        head_width: int = 64,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
    ):
        super().__init__()
        shared = dict(
            sample_size=sample_size,
            in_channels=in_channels,
            num_classes=num_classes,
            multipliers=tuple(multipliers),
            blocks=blocks,
            attention=tuple(attention),
            head_width=head_width,
            dropout=dropout,
            dropout_resolution=dropout_resolution,
        )
        self.config = {"size": size, **shared}
        with hub.built_on():
            self.model = EDM2UNet(width=size if isinstance(size, int) else WIDTHS[size], **shared)  # type: ignore[arg-type]
        self.shape = self.native_shape = (in_channels, sample_size, sample_size)
        self.num_classes, self.widths, self.scalars = num_classes, {}, nn.ModuleDict()

    def time_embedding(self) -> tuple[nn.Module, int]:
        return self.model.embed, self.model.embed.weight.shape[1]

    def bottleneck(self, layer: Layer = "middle") -> Bottleneck:
        return edm_bottleneck(self.model, self.native_shape, layer)

    def forward(self, x: Sample, time: Time, cond: Cond, r: Time | None = None) -> Sample:
        self.read_second_time(time, r)
        if self.training and torch.is_grad_enabled():
            self.model.normalize_weights()
        self.read_scalars(cond)
        return self.model(x.to(self.model.stem.weight.dtype), time, None if self.num_classes is None else cond["labels"])
