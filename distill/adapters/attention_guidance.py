"""Adapters that put guidance into one evaluation (AGD, Perez Jensen & Sadat 2503.07274): ``block(x) + A(x; w, t, c)``.

``w`` is the guidance scale minus 1, ``t`` and the class are embedded by the base itself. A is zero at first, whatever its kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from distill.adapters.additions import Addition, AttentionAddition, BiasAddition, JointTokens, Rows, ScaleEmbedding
from distill.adapters.base import Adapter, AttachedAdapter, find_modules, key_of, required
from distill.types import Cond, Sample, Time


@dataclass
class AttentionGuidance(Adapter):
    """AGD's adapters, one beside each attention.

    Kind ``attention``: tokens of the image ask the few tokens that say how to guide, ``[w, t, class or prompt ...]`` with a
    sinusoidal position, by heads of ``width`` channels together. Kind ``additive``: the sum of these (a prompt's mean) through
    an MLP is a bias per channel, the same for all tokens, at about half the weights.

    The published code has widths 256 for DiT and 320 for Stable Diffusion, and embeddings of w, t, class and prompt of its own
    in every block. Here all blocks share them. Additions come to 2 percent of the base or less with ``additive`` 256 or
    ``attention`` 160 on DiT-XL/2, ``attention`` 320 on Stable Diffusion 1.5 and 2.1, ``attention`` 240 on SDXL.

    Attributes:
        kind: ``attention`` or ``additive``.
        width: of queries, keys and values; an even number.
        targets: ends of the paths of the modules that are added to: attentions, or a U-Net's residual blocks and convolutions
            that keep the size of their maps. None for the self-attentions of transformers and of ``UNet2DModel``, the cross-
            attentions of ``UNet2DConditionModel``. Where image and prompt are one sequence (Flux' single blocks) all of it is
            added to, elsewhere the image's tokens alone.
        frequency: m of w's Fourier features ``cos(2 pi (f w m + p))``, f from N(0, 1), p from U(0, 1): scales that differ by
            much less than ``1 / m`` are read alike, by much more unlike. 1 is that of the published attention kind; the
            additive one has 1000, at which features of two drawn scales have nothing in common.
        heads: of kind ``attention``; 1 in the paper. With the three tokens of a class-conditional network each head moves the
            image's tokens along two directions only.
        tokens: how many tokens an MLP makes of w, t and class together, in the place of one for each; None for the paper's.
            Of kind ``attention``, as are the following two.
        embedding_width: of the embeddings of w, t, class and prompt, an even number; None for ``width``.
        positions: cosines of each axis by which an image's token asks with its place too, ``cos(pi k (i + 1/2) / n)`` with k up
            to this number. For maps: tokens of transformers hold their places. (The published code has learned ones.)
    """

    name: ClassVar[str] = "attention_guidance"

    kind: Literal["attention", "additive"] = "attention"
    width: int = 256
    targets: list[str] | None = None
    frequency: float = 1.0
    heads: int = 1
    tokens: int | None = None
    embedding_width: int | None = None
    positions: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "embedding_width"):
            value = getattr(self, name)
            if value is not None and (value < 4 or value % 2):
                raise ValueError(f"{name}={value}: give an even number of at least 4.")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: give a positive number, or null for one each of scale, time and class.")
        if self.positions < 0:
            raise ValueError(f"positions={self.positions}: give a number of cosines, or 0 for none.")
        for name in ("tokens", "embedding_width", "positions"):
            if self.kind == "additive" and (value := getattr(self, name)):
                raise ValueError(f"{name}={value}: the additive kind asks no tokens; leave it out, or set kind to attention.")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads={self.heads}: give a number of heads that divides width={self.width}.")
        if self.frequency <= 0:
            raise ValueError(f"frequency={self.frequency}: give a positive number.")

    def build(self, network: Any) -> AttachedGuidance:
        return AttachedGuidance(self, network)


class AttachedGuidance(AttachedAdapter):
    """What `AttentionGuidance` adds to one network: embeddings, and a part beside each module."""

    scalar_inputs = ("guidance",)

    def __init__(self, settings: AttentionGuidance, network: Any):
        super().__init__(settings)
        found = find_modules(network, settings.targets, network.guidance_targets, "adapter.targets")
        sizes = {path: channels(path, module) for path, module in found.items()}
        if settings.positions and (sequences := [path for path, module in found.items() if not reads_maps(module)]):
            raise ValueError(
                f"adapter.positions={settings.positions}: {sequences[0]} reads a sequence, whose tokens hold their places; "
                "set it to 0, or name targets that read maps."
            )
        width = settings.embedding_width or settings.width
        self.scale = ScaleEmbedding(width, settings.frequency)
        embedding = network.time_embedding()[0]
        self.time = nn.Linear(embedding.linear_2.out_features, width)
        self.after(embedding, self._keep_time)
        self.label, self.prompt = None, None
        if (classes := network.class_embedding()) is not None:
            self.label = nn.Linear(classes[1], width)
            self.after(classes[0], self._keep_label)
        if "prompt_embeds" in network.widths:
            self.prompt = nn.Linear(network.widths["prompt_embeds"], width)
        self.told = ("scale", "time") if self.label is None else ("scale", "time", "label")
        self.joint = None if settings.tokens is None else JointTokens(len(self.told), width, settings.tokens)
        self.blocks = nn.ModuleDict()
        for path, size in sizes.items():
            block = self._part(size, width)
            self.blocks[key_of(path)] = block
            self.after(found[path], block.add)

    def _part(self, size: tuple[int, int], embedding: int) -> Addition:
        """What stands beside a module of so many input and output channels."""
        settings: Any = self.settings
        if settings.kind == "additive":
            return BiasAddition(*size, embedding, self.call)
        return AttentionAddition(*size, settings.width, self.call, settings.heads, embedding, settings.positions)

    def read(self, x: Sample, time: Time, cond: Cond) -> None:
        self.call.clear()
        self.call["scale"] = self.scale(required(cond, "guidance") - 1)[:, None]
        if self.prompt is not None:
            self.call["prompt"] = self.prompt(cond["prompt_embeds"].to(self.prompt.weight.dtype))
            if "prompt_mask" in cond:
                self.call["mask"] = cond["prompt_mask"].bool()

    def _keep_time(self, module: nn.Module, args: Any, kwargs: Any, output: Rows) -> None:
        self.call["time"] = self.time(output.to(self.time.weight.dtype))[:, None]
        if self.label is None:
            self._join()

    def _keep_label(self, module: nn.Module, args: Any, kwargs: Any, output: Rows) -> None:
        assert self.label is not None
        self.call["label"] = self.label(output.to(self.label.weight.dtype))[:, None]
        self._join()

    def _join(self) -> None:
        """Makes the joint tokens, after the last of what they are made of (networks embed the class after the time).

        Once, and not when all is there: DiT's first block embeds time and class, and where its activations are checkpointed it
        is computed again beside the values of the first time, which must make no difference.
        """
        if self.joint is not None:
            self.call["joint"] = self.joint(torch.cat([self.call[name] for name in self.told], 2))


def reads_maps(module: Any) -> bool:
    """Whether the input of an attention, a residual block or a convolution is ``(b, c, h, w)``, not ``(b, n, c)``."""
    return not hasattr(module, "to_q") or module.group_norm is not None


def channels(path: str, module: Any) -> tuple[int, int]:
    """Channels that go into and come out of an attention, a residual block or a convolution.

    Raises:
        ValueError: something else, or a convolution with a stride; names the module by its path.
    """
    for pair in (("query_dim", "out_dim"), ("in_channels", "out_channels")):
        if all(hasattr(module, key) for key in pair) and getattr(module, "stride", (1, 1)) == (1, 1):
            return getattr(module, pair[0]), getattr(module, pair[1])
    kind = type(module).__name__
    raise ValueError(f"adapter.targets: {path} is a {kind}, no attention, residual block or convolution of stride 1.")
