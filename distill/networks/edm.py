"""EDM's networks (Karras et al. 2206.00364; DDPM++, NCSN++, ADM) behind the common call ``net(x, time, cond, r) -> F``."""

from __future__ import annotations

from torch import nn

from distill import hub
from distill.networks.base import Network
from distill.networks.bottleneck import Bottleneck, Layer, edm_bottleneck
from distill.networks.edm_modules import Architecture, Block, EDMUNet
from distill.types import Cond, Sample, Time


class EDM(Network):
    """A new, randomly initialised `EDMUNet`: EDM's F at ``time = ln(sigma) / 4``.

    The published sizes: CIFAR-10 ``ddpmpp`` or ``ncsnpp``, width 128, multipliers (2, 2, 2), 4 blocks, attention at 16;
    ImageNet-64 ``adm``, width 192, multipliers (1, 2, 3, 4), 3 blocks, attention at 32, 16 and 8.

    Args:
        sample_size, in_channels, num_classes, architecture, width, multipliers, blocks, attention, head_width, dropout,
            dropout_resolution: see `EDMUNet`.

    Attributes:
        config: these arguments.
    """

    model_class, component = "EDMUNet", "unet"

    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        num_classes: int | None = None,
        architecture: Architecture = "ddpmpp",
        width: int = 128,
        multipliers: tuple[int, ...] = (2, 2, 2),
        blocks: int = 4,
        attention: tuple[int, ...] = (16,),
        head_width: int = 64,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
    ):
        super().__init__()
        self.config = dict(
            sample_size=sample_size,
            in_channels=in_channels,
            num_classes=num_classes,
            architecture=architecture,
            width=width,
            multipliers=tuple(multipliers),
            blocks=blocks,
            attention=tuple(attention),
            head_width=head_width,
            dropout=dropout,
            dropout_resolution=dropout_resolution,
        )
        with hub.built_on():
            self.model = EDMUNet(**self.config)  # type: ignore[arg-type]
        self.shape = self.native_shape = (in_channels, sample_size, sample_size)
        self.num_classes, self.widths, self.scalars = num_classes, {}, nn.ModuleDict()

    def time_embedding(self) -> tuple[nn.Module, int]:
        return self.model.embed, self.model.time_width

    def units(self) -> list[nn.Module]:
        return [part for part in self.model.modules() if isinstance(part, Block)]

    def bottleneck(self, layer: Layer = "middle") -> Bottleneck:
        return edm_bottleneck(self.model, self.native_shape, layer)

    def forward(self, x: Sample, time: Time, cond: Cond, r: Time | None = None) -> Sample:
        self.read_second_time(time, r)
        self.read_scalars(cond)
        return self.model(x.to(self.model.stem.weight.dtype), time, None if self.num_classes is None else cond["labels"])
