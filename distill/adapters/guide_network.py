"""An external guide network (Plug-and-Play Diffusion Distillation, Hsiao et al. 2406.01954): a small network of its own that
reads what the base reads and the guidance scale, and adds feature maps to the base's decoder.

    out_i <- out_i + Z_i g_i(x_t, t, c, w),   Z_i a linear map that is zero at first,   w the guidance scale

i runs over the up blocks of a U-Net, or over the second half of a transformer's blocks. The paper's "tiny" guide has about 1
percent of the base's parameters, embeds the guidance number by Fourier features beside time and prompt, and is trained on the
output of classifier-free guidance at scales from 2 to 9; its layers are not published, and those here are our own: a pyramid of
residual blocks, one level for each of the decoder's resolutions, whose coarser maps are added to the finer ones.

The guide shares nothing with the base, not even embeddings of time, class and prompt: it runs before the base does,
outside of gradient checkpointing, and carries over to other checkpoints of the architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.adapters.base import Adapter, AttachedAdapter, Values, key_of, required
from distill.adapters.scalar_input import sinusoid
from distill.types import Cond, Sample, Time

Map = Float[Tensor, "b c h w"]
Rows = Float[Tensor, "b d"]
WAVES = 256
"""Sines and cosines of time and guidance."""


@dataclass
class GuideNetwork(Adapter):
    """The guide's size. With the default it has 1 percent of the parameters of Stable Diffusion 1.5.

    Attributes:
        width: channels of all its maps, a multiple of 8.
        depth: residual blocks at each level, at least 1.
    """

    name: ClassVar[str] = "guide_network"

    width: int = 320
    depth: int = 1

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8 or self.depth < 1:
            raise ValueError(f"width={self.width}, depth={self.depth}: give a multiple of 8 and at least one block.")

    def build(self, network: Any) -> AttachedGuide:
        return AttachedGuide(self, network)


class AttachedGuide(AttachedAdapter):
    """What `GuideNetwork` adds to one network: the guide, and a zero layer for each block of the decoder."""

    scalar_inputs = ("guidance",)

    def __init__(self, settings: GuideNetwork, network: Any):
        super().__init__(settings)
        found, levels, patch = decoder(network)
        self.embedding = Embedding(network, settings.width)
        self.guide = Pyramid(network.native_shape[0], settings.width, settings.depth, levels, patch)
        self.injections = nn.ModuleDict()
        for path, (module, channels, level) in found.items():
            injection = Injection(settings.width, channels, level, self.call)
            self.injections[key_of(path)] = injection
            self.after(module, injection.add)

    def read(self, x: Sample, time: Time, cond: Cond) -> None:
        self.call.clear()
        maps = self.guide(x.float(), self.embedding(time, cond))
        self.call.update({str(level): value for level, value in enumerate(maps)})


class Embedding(nn.Module):
    """Time, guidance scale and conditions as one vector ``(b, width)``: labels by a table, a prompt by the mean of its tokens.

    Args:
        network: whose ``num_classes`` and ``widths`` say which conditions there are; sizes of images are left out.
        width: of the vector.
    """

    def __init__(self, network: Any, width: int):
        super().__init__()
        self.time, self.guidance = (nn.Linear(WAVES, width) for _ in range(2))
        self.label = None if network.num_classes is None else nn.Embedding(network.num_classes + network.null_class, width)
        keys = [key for key in ("prompt_embeds", "pooled_prompt_embeds") if key in network.widths]
        self.prompts = nn.ModuleDict({key: nn.Linear(network.widths[key], width) for key in keys})
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, time: Time, cond: Cond) -> Rows:
        scale = required(cond, "guidance")
        value = self.time(sinusoid(time, WAVES)) + self.guidance(sinusoid(1000 * (scale - 1), WAVES))
        if self.label is not None:
            value = value + self.label(cond["labels"])
        for key, layer in self.prompts.items():
            prompt = cond[key].float()
            if key == "prompt_embeds":
                prompt = _mean(prompt, cond.get("prompt_mask"))
            value = value + layer(prompt)
        return self.last(value)


class Pyramid(nn.Module):
    """Maps ``(b, width, h / 2^l, w / 2^l)`` of a sample, l from 0, sizes rounded up; each has seen all coarser ones.

    Args:
        channels: of the sample.
        width: of the maps.
        depth: residual blocks a level.
        levels: number of maps.
        patch: the first map is of patches of this size.
    """

    def __init__(self, channels: int, width: int, depth: int, levels: int, patch: int):
        super().__init__()
        self.first = nn.Conv2d(channels, width, patch, stride=patch) if patch > 1 else nn.Conv2d(channels, width, 3, padding=1)
        self.levels = nn.ModuleList(nn.ModuleList(Block(width) for _ in range(depth)) for _ in range(levels))

    def forward(self, x: Map, embedding: Rows) -> list[Tensor]:
        value, maps = self.first(x), []
        for number, level in enumerate(self.levels):
            if number:
                value = F.avg_pool2d(value, 2, ceil_mode=True)
            for block in level:  # type: ignore[attr-defined]
                value = block(value, embedding)
            maps.append(value)
        for finer in reversed(range(len(maps) - 1)):
            maps[finer] = maps[finer] + F.interpolate(maps[finer + 1], maps[finer].shape[2:], mode="nearest")
        return maps


class Block(nn.Module):
    """A residual block whose middle is scaled and shifted by the embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Map, embedding: Rows) -> Map:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
        value = self.convolutions[0](F.silu(self.norms[0](x)))
        return x + self.convolutions[1](F.silu(self.norms[1](value) * (1 + scale) + shift))


class Injection(nn.Module):
    """Adds a map of the guide to the output of one block, through a linear layer that is zero at first.

    Args:
        width: of the guide's maps.
        channels: of the block's output.
        level: of the map.
        call: the adapter's values of the present call.
    """

    def __init__(self, width: int, channels: int, level: int, call: Values):
        super().__init__()
        self.level, self.call = str(level), call
        self.projection = nn.Linear(width, channels)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def add(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After the block: to a map, to tokens, or to the last of several outputs (blocks that return the prompt before)."""
        if isinstance(output, tuple):
            return (*output[:-1], self.add(module, args, kwargs, output[-1]))
        value = self.call[self.level]
        if output.dim() == 4 and output.shape[2:] != value.shape[2:]:
            value = F.interpolate(value, output.shape[2:], mode="nearest")
        added = self.projection(value.flatten(2).transpose(1, 2)).to(output.dtype)
        return output + (added if output.dim() == 3 else added.transpose(1, 2).unflatten(2, output.shape[2:]))


def decoder(network: Any) -> tuple[dict[str, tuple[nn.Module, int, int]], int, int]:
    """The blocks of a network's decoder by path, with channels and level of their outputs; the number of levels; the patch."""
    model = network.model
    if network.component == "unet":
        widths = list(model.config.block_out_channels)
        last = len(widths) - 1
        # Every up block but the last doubles the resolution of what it gives.
        levels = {f"up_blocks.{i}": (widths[last - i], max(last - 1 - i, 0)) for i in range(len(widths))}
        return {path: (model.get_submodule(path), *level) for path, level in levels.items()}, max(last, 1), 1
    tokens = network.bottleneck()
    kinds = ("transformer_blocks", "single_transformer_blocks")
    paths = [f"{kind}.{i}" for kind in kinds for i in range(len(getattr(model, kind, ())))]
    return {path: (model.get_submodule(path), tokens.channels, 0) for path in paths[len(paths) // 2 :]}, 1, tokens.patch


def _mean(prompt: Float[Tensor, "b n d"], mask: Tensor | None) -> Rows:
    """The mean of a prompt's tokens, of those that the mask ``(b, n)`` leaves."""
    if mask is None:
        return prompt.mean(1)
    kept = mask.to(prompt.dtype)[:, :, None]
    return (kept * prompt).sum(1) / kept.sum(1).clamp_min(1)
