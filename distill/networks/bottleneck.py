"""Where a network's inner features are read: a module, and how its output becomes a map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

Layer = Literal["middle", "encoder"]
"""``encoder``: the end of a U-Net's way down. ``middle``: what comes next, still at the lowest resolution, the last before it
goes up again; in a transformer, which has no encoder, the middle block under both names. DMD2's code (2405.14867) reads the
middle of Stable Diffusion and the end of the encoder of ImageNet-64's network; SiDA (2410.14919) the end of the encoder."""


@dataclass(frozen=True)
class Bottleneck:
    """A module of a network, and the feature map ``(b, channels, *size)`` in its output.

    Attributes:
        module: called once in an evaluation of the network.
        channels: of the map.
        size: height and width of the map for a sample of the network's native size.
        output: index of the features in a module's output that is a tuple; None for one that is a tensor.
        patch: height and width of the patches that the module's tokens ``(b, n, channels)`` stand for, row by row; None for a
            module that gives maps.
    """

    module: nn.Module
    channels: int
    size: tuple[int, int]
    output: int | None = None
    patch: int | None = None

    def feature_map(self, output: Any, height: int, width: int) -> Float[Tensor, "b c h w"]:
        """The features ``(b, channels, h, w)`` in what the module returned for samples of ``height`` and ``width``."""
        features = output if self.output is None else output[self.output]
        if self.patch is None:
            return features
        return features.transpose(1, 2).unflatten(2, (height // self.patch, width // self.patch))


def unet_bottleneck(model: Any, native_shape: tuple[int, ...], layer: Layer) -> Bottleneck:
    """Of a U-Net of diffusers: its middle block, or its last block on the way down.

    Raises:
        ValueError: ``middle`` of a model that has no middle block.
    """
    widths = model.config.block_out_channels
    factor = 2 ** (len(widths) - 1)
    # Downsampling rounds up.
    size = (-(-native_shape[1] // factor), -(-native_shape[2] // factor))
    if layer == "encoder":
        return Bottleneck(model.down_blocks[-1], widths[-1], size, output=0)
    if model.mid_block is None:
        raise ValueError(f"layer='middle': this {type(model).__name__} has no middle block; give layer='encoder'.")
    return Bottleneck(model.mid_block, widths[-1], size)


def edm_bottleneck(model: Any, native_shape: tuple[int, ...], layer: Layer) -> Bottleneck:
    """Of EDM's and EDM2's U-Nets: the second of the two blocks that begin the decoder, or the encoder's last."""
    block = model.encoder[-1].blocks[-1] if layer == "encoder" else model.decoder[0].entry[-1]
    halvings = len(model.encoder) - 1
    return Bottleneck(block, block.conv_out.weight.shape[0], (native_shape[1] >> halvings, native_shape[2] >> halvings))


def transformer_bottleneck(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    config: Any,
    native_shape: tuple[int, ...],
    patch: int,
    output: int | None = None,
) -> Bottleneck:
    """Of a transformer of diffusers: the last block of the first half, which is the larger one if their number is odd."""
    channels = config.num_attention_heads * config.attention_head_dim
    size = (native_shape[1] // patch, native_shape[2] // patch)
    return Bottleneck(blocks[(len(blocks) - 1) // 2], channels, size, output, patch)
