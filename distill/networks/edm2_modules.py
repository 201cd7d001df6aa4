"""The U-Net of EDM2 (Karras et al. 2312.02696, configuration G): every layer preserves the magnitude of what it is given.

This file imports torch alone, so that an exported student can carry it along. Forwards never change weights: where training
forces their normalisation (section 2.3), `EDM2UNet.normalize_weights` does it, at the caller's word.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SILU_MAGNITUDE = 0.596  # of SiLU at a unit normal input (eq. 81)


def normalize(x: Tensor, dims: tuple[int, ...], eps: float = 1e-4) -> Tensor:
    """``x`` divided by its root mean square over ``dims`` plus ``eps``."""
    count = math.prod(x.shape[dim] for dim in dims)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (eps + norm / math.sqrt(count)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps a unit normal input at unit magnitude (eq. 81)."""
    return functional.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """``(1 - t) a + t b`` over its magnitude for independent unit inputs (eq. 88)."""
    return ((1 - balance) * a + balance * b) / math.hypot(1 - balance, balance)


def mp_cat(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """Channels of ``a`` and ``b`` side by side; ``balance``, not their numbers, sets what each contributes (eq. 103)."""
    wide_a, wide_b = a.shape[1], b.shape[1]
    scale = math.sqrt(wide_a + wide_b) / math.hypot(1 - balance, balance)
    return torch.cat([(1 - balance) * scale / math.sqrt(wide_a) * a, balance * scale / math.sqrt(wide_b) * b], dim=1)


def halve(x: Tensor) -> Tensor:
    """Half the height and width: means of 2x2 pixels."""
    return functional.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """Twice the height and width: each pixel four times."""
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


class MPFourier(nn.Module):
    """``sqrt(2) cos(f t + p)`` at fixed random frequencies and phases (eq. 75): ``(b,) -> (b, width)``, float32.

    Both stay in float32 when the network is cast: rounded ones would be other features.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def _apply(self, fn: Any, recurse: bool = True) -> MPFourier:
        kept = self.frequencies, self.phases
        super()._apply(fn, recurse)
        self.frequencies, self.phases = (value.to(self.frequencies.device) for value in kept)
        return self

    def forward(self, time: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(torch.outer(time.float(), self.frequencies) + self.phases)


class MPConv(nn.Module):
    """A convolution, or a linear map, without bias, whose rows have unit norm whatever the weights are (eq. 47).

    Args:
        width_in, width_out: channels.
        kernel: odd; None for a linear map of ``(b, width_in)``.
    """

    def __init__(self, width_in: int, width_out: int, kernel: int | None = None):
        super().__init__()
        size = () if kernel is None else (kernel, kernel)
        self.padding = 0 if kernel is None else kernel // 2
        self.weight = nn.Parameter(torch.randn(width_out, width_in, *size))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.weight.float() if self.weight.dtype in (torch.float16, torch.bfloat16) else self.weight
        dims = tuple(range(1, weight.dim()))
        weight = normalize(weight, dims) * (gain / math.sqrt(weight[0].numel()))
        weight = weight.to(x.dtype)
        return functional.linear(x, weight) if weight.dim() == 2 else functional.conv2d(x, weight, padding=self.padding)

    @torch.no_grad()
    def normalize_weight(self) -> None:
        """Brings each row of the weights themselves to unit root mean square (eq. 66)."""
        # Through `data`, unseen by autograd: a second forward before the backward changes nothing but the last bits.
        self.weight.data.copy_(normalize(self.weight, tuple(range(1, self.weight.dim()))))


class ClassEmbedding(MPConv):
    """A unit embedding of each class; that of the label ``num_classes``, none, is zero."""

    def of(self, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embeddings ``(b, width)`` of labels ``(b,)``."""
        classes = self.weight.shape[1]
        if labels is None:
            raise ValueError(f"labels=None: this network has {classes} classes; label {classes} means none.")
        rows = functional.one_hot(labels, classes + 1)[:, :-1].to(dtype)
        return self(math.sqrt(classes) * rows)


class Attention(nn.Module):
    """Self-attention of unit queries, keys and values, which take turns in the channels of each head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = MPConv(width, 3 * width, 1), MPConv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, high, wide = x.shape
        split = self.qkv(x).reshape(batch, self.heads, width // self.heads, 3, high * wide)
        query, key, value = normalize(split, (2,)).unbind(3)
        logits = torch.einsum("nhcq,nhck->nhqk", query, key / math.sqrt(width // self.heads))
        mixed = torch.einsum("nhqk,nhck->nhcq", logits.softmax(dim=3), value)
        return self.out(mixed.reshape(batch, width, high, wide))


class Block(nn.Module):
    """A residual block (figure 21): the encoder's normalises its main path pixel by pixel, the decoder's does not."""

    def __init__(
        self, width_in: int, width_out: int, width_embed: int, encoder: bool, resample: Any, heads: int, dropout: float
    ):
        super().__init__()
        self.encoder, self.resample, self.dropout = encoder, resample, dropout
        self.embed_gain = nn.Parameter(torch.zeros(()))
        self.conv_in = MPConv(width_out if encoder else width_in, width_out, 3)
        self.embed = MPConv(width_embed, width_out)
        self.conv_out = MPConv(width_out, width_out, 3)
        self.skip = MPConv(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.attention = Attention(width_out, heads) if heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = x if self.resample is None else self.resample(x)
        if self.encoder:
            x = normalize(self.skip(x), (1,))
        hidden = self.conv_in(mp_silu(x))
        scale = self.embed(embedding, self.embed_gain) + 1
        hidden = mp_silu(hidden * scale[:, :, None, None].to(hidden.dtype))
        hidden = self.conv_out(functional.dropout(hidden, self.dropout, self.training))
        x = mp_sum(x if self.encoder else self.skip(x), hidden, 0.3)
        if self.attention is not None:
            x = mp_sum(x, self.attention(x), 0.3)
        return x.clamp(-256, 256)


class EncoderLevel(nn.Module):
    """The blocks of one resolution on the way down; ``down``, which enters it, is None at the first."""

    def __init__(self, down: Block | None, blocks: list[Block]):
        super().__init__()
        self.down, self.blocks = down, nn.ModuleList(blocks)

    def forward(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Every output, the last one last."""
        outputs = []
        for block in [*([] if self.down is None else [self.down]), *self.blocks]:
            x = block(x, embedding)
            outputs.append(x)
        return outputs


class DecoderLevel(nn.Module):
    """The blocks of one resolution on the way up: those that enter it, and those that read the encoder's latest output left."""

    def __init__(self, entry: list[Block], blocks: list[Block]):
        super().__init__()
        self.entry, self.blocks = nn.ModuleList(entry), nn.ModuleList(blocks)

    def forward(self, x: Tensor, embedding: Tensor, outputs: list[Tensor]) -> Tensor:
        for block in self.entry:
            x = block(x, embedding)
        for block in self.blocks:
            x = block(mp_cat(x, outputs.pop(), 0.5), embedding)
        return x


class EDM2UNet(nn.Module):
    """``(x, time, labels) -> F`` of EDM's preconditioning, ``time = ln(sigma) / 4``.

    Args:
        sample_size: height and width of a sample, divisible by ``2^(levels - 1)``.
        in_channels: channels of a sample.
        num_classes: None for no labels.
        width: channels of the first level: 128, 192, 256, 320, 384, 448 in XS, S, M, L, XL, XXL.
        multipliers: of ``width``, for each level.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention: resolutions with self-attention (besides the one block at the bottom that always has it).
        head_width: channels of an attention head.
        dropout: in [0, 1).
        dropout_resolution: the largest resolution with dropout; None for all.

    Raises:
        ValueError: sizes that do not fit each other, by name.
    """

    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        num_classes: int | None = None,
        width: int = 192,
        multipliers: tuple[int, ...] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: tuple[int, ...] = (16, 8),
        head_width: int = 64,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
    ):
        super().__init__()
        if sample_size % 2 ** (len(multipliers) - 1) or blocks < 1:
            raise ValueError(
                f"sample_size={sample_size}, blocks={blocks}: {len(multipliers)} levels need a sample_size that is a multiple "
                f"of {2 ** (len(multipliers) - 1)}, and at least one block each."
            )
        self.attention, self.head_width = attention, head_width
        self.dropout, self.dropout_resolution = dropout, sample_size if dropout_resolution is None else dropout_resolution
        widths = [width * factor for factor in multipliers]
        self.width_embed = max(widths)
        self.time, self.embed = MPFourier(widths[0]), MPConv(widths[0], self.width_embed)
        self.label = None if num_classes is None else ClassEmbedding(num_classes, self.width_embed)
        self.stem = MPConv(in_channels + 1, widths[0], 3)
        self._build(widths, [sample_size >> level for level in range(len(widths))], blocks)
        self.conv_out, self.out_gain = MPConv(widths[0], in_channels, 3), nn.Parameter(torch.zeros(()))

    def _block(self, width_in: int, width_out: int, size: int, encoder: bool, attended: bool, resample: Any = None) -> Block:
        if attended and width_out % self.head_width:
            raise ValueError(f"head_width={self.head_width}: {width_out} channels at resolution {size} are no multiple of it.")
        heads = width_out // self.head_width if attended else 0
        dropout = self.dropout if size <= self.dropout_resolution else 0.0
        return Block(width_in, width_out, self.width_embed, encoder, resample, heads, dropout)

    def _build(self, widths: list[int], sizes: list[int], blocks: int) -> None:
        """Makes the levels of the encoder, and of the decoder with the bottom first."""
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        current, outputs = widths[0], [widths[0]]
        for level, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            down = self._block(current, current, size, True, False, halve) if level else None
            outputs += ([current] if level else []) + blocks * [width]
            attended = size in self.attention
            inner = [self._block(current if i == 0 else width, width, size, True, attended) for i in range(blocks)]
            self.encoder.append(EncoderLevel(down, inner))
            current = width
        for level, (width, size) in reversed(list(enumerate(zip(widths, sizes, strict=True)))):
            if level == len(widths) - 1:
                entry = [self._block(current, current, size, False, attended) for attended in (True, False)]
            else:
                entry = [self._block(current, current, size, False, False, double)]
            inner = []
            for _ in range(blocks + 1):
                inner.append(self._block(current + outputs.pop(), width, size, False, size in self.attention))
                current = width
            self.decoder.append(DecoderLevel(entry, inner))

    def normalize_weights(self) -> None:
        """Forced weight normalisation of the layers that are being trained: before each training forward, in no other."""
        for part in self.modules():
            if isinstance(part, MPConv) and part.weight.requires_grad:
                part.normalize_weight()

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """F ``(b, c, h, w)`` for ``x`` of the same shape; labels ``(b,)`` in ``0..num_classes``, the last is "no class"."""
        embedding = self.embed(self.time(time).to(x.dtype))
        if self.label is not None:
            embedding = mp_sum(embedding, self.label.of(labels, x.dtype), 0.5)
        embedding = mp_silu(embedding)
        # A channel of ones stands in for biases.
        x = self.stem(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        outputs = [x]
        for encoder in self.encoder:
            outputs += encoder(outputs[-1], embedding)
        x = outputs[-1]
        for decoder in self.decoder:
            x = decoder(x, embedding, outputs)
        return self.conv_out(x, self.out_gain)
