"""The U-Nets of EDM (Karras et al. 2206.00364, appendix F): DDPM++ and NCSN++ (2011.13456) and ADM (2105.05233).

This file imports torch alone, so that an exported student can carry it along.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Architecture = Literal["ddpmpp", "ncsnpp", "adm"]
ROOT_HALF = math.sqrt(0.5)


class Resample(nn.Module):
    """Half or twice the height and width, by a separable filter.

    Args:
        taps: the filter, of even length.
        up: twice rather than half.
        padded: whether the edges are padded with zeros such that the size is exactly half.
    """

    taps: Tensor

    def __init__(self, taps: tuple[int, ...], up: bool, padded: bool = True):
        super().__init__()
        self.up, self.padding = up, (len(taps) - 1) // 2 if padded else 0
        line = torch.tensor(taps, dtype=torch.float32)
        # Upsampling puts three zeros beside each value: four times the weight keeps the mean.
        self.register_buffer("taps", torch.outer(line, line) / line.sum() ** 2 * (4 if up else 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        filters = self.taps.to(x.dtype).repeat(x.shape[1], 1, 1, 1)
        convolve = functional.conv_transpose2d if self.up else functional.conv2d
        return convolve(x, filters, stride=2, padding=self.padding, groups=x.shape[1])


class Fourier(nn.Module):
    """Sine and cosine of ``2 pi f t`` at fixed random frequencies: ``(b,) -> (b, width)``, float32.

    The frequencies stay in float32 when the network is cast: rounded ones would be other features.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2) * scale)

    def _apply(self, fn: Any, recurse: bool = True) -> Fourier:
        kept = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = kept.to(self.frequencies.device)
        return self

    def forward(self, time: Tensor) -> Tensor:
        angles = torch.outer(time.float(), 2 * math.pi * self.frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Sinusoid(nn.Module):
    """Sines and cosines of ``t`` at frequencies that fall geometrically from 1: ``(b,) -> (b, width)``, float32.

    Args:
        to_end: DDPM++: the last frequency is 1/10000 itself, and sines come first. ADM stops one step before, cosines first.
    """

    def __init__(self, width: int, to_end: bool):
        super().__init__()
        self.width, self.to_end = width, to_end

    def forward(self, time: Tensor) -> Tensor:
        half = self.width // 2
        exponents = torch.arange(half, device=time.device) / (half - 1 if self.to_end else half)
        angles = torch.outer(time.float(), torch.exp(-math.log(10000) * exponents))
        parts = [angles.sin(), angles.cos()]
        return torch.cat(parts if self.to_end else parts[::-1], dim=1)


class ClassEmbedding(nn.Linear):
    """A linear map of unit rows times ``scale``: ``(b,) -> (b, width)``; the label ``num_classes``, none, is a row of zeros."""

    def __init__(self, num_classes: int, width: int, bias: bool, scale: float):
        super().__init__(num_classes, width, bias)
        self.scale = scale

    def forward(self, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError(f"labels=None: this network has {self.in_features} classes; label {self.in_features} means none.")
        rows = functional.one_hot(labels, self.in_features + 1)[:, :-1]
        return super().forward(self.scale * rows.to(self.weight.dtype))


class Attention(nn.Module):
    """Self-attention among the pixels. Queries, keys and values take turns in the channels of each head."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(width, eps)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, high, wide = x.shape
        split = self.qkv(self.norm(x)).reshape(batch * self.heads, width // self.heads, 3, high * wide)
        query, key, value = split.unbind(2)
        # The softmax in float32, whatever the precision of the rest.
        logits = torch.einsum("ncq,nck->nqk", query.float(), key.float() / math.sqrt(width // self.heads))
        mixed = torch.einsum("nqk,nck->ncq", logits.softmax(dim=2).to(value.dtype), value)
        return self.out(mixed.reshape(batch, width, high, wide))


class Block(nn.Module):
    """A residual block, optionally with resampling and self-attention.

    DDPM++ and NCSN++ add the embedding before the second normalisation and scale each sum by ``sqrt(1/2)``; ADM scales and
    shifts after it, and its sums are plain.
    """

    def __init__(
        self, width_in: int, width_out: int, width_embed: int, adm: bool, resample: Resample | None, heads: int, dropout: float
    ):
        super().__init__()
        eps = 1e-5 if adm else 1e-6
        self.adm, self.dropout, self.balance = adm, dropout, 1.0 if adm else ROOT_HALF
        self.resample = resample or nn.Identity()
        self.norm_in = group_norm(width_in, eps)
        self.conv_in = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.embed = nn.Linear(width_embed, 2 * width_out if adm else width_out)
        self.norm_out = group_norm(width_out, eps)
        self.conv_out = nn.Conv2d(width_out, width_out, 3, padding=1)
        projected = width_in != width_out or (resample is not None and not adm)
        self.skip = nn.Conv2d(width_in, width_out, 1) if projected else nn.Identity()
        self.attention = Attention(width_out, heads, eps) if heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.conv_in(self.resample(functional.silu(self.norm_in(x))))
        own = self.embed(embedding)[:, :, None, None]
        if self.adm:
            scale, shift = own.chunk(2, dim=1)
            hidden = self.norm_out(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm_out(hidden + own)
        hidden = self.conv_out(functional.dropout(functional.silu(hidden), self.dropout, self.training))
        x = (self.skip(self.resample(x)) + hidden) * self.balance
        return x if self.attention is None else (x + self.attention(x)) * self.balance


class EncoderLevel(nn.Module):
    """The blocks of one resolution on the way down; every output is kept for the way up.

    Args:
        down: from the resolution above; None at the first.
        image: NCSN++: brings the input, or the last sum with it, down to this resolution too.
        blocks: the others.
    """

    def __init__(self, down: Block | None, image: nn.Module | None, blocks: list[Block]):
        super().__init__()
        self.down, self.image, self.blocks = down, image, nn.ModuleList(blocks)

    def forward(self, x: Tensor, embedding: Tensor, image: Tensor) -> tuple[list[Tensor], Tensor]:
        outputs = []
        if self.down is not None:
            x = self.down(x, embedding)
            if self.image is not None:
                x = image = (x + self.image(image)) * ROOT_HALF
            outputs.append(x)
        for block in self.blocks:
            x = block(x, embedding)
            outputs.append(x)
        return outputs, image


class DecoderLevel(nn.Module):
    """The blocks of one resolution on the way up.

    Args:
        entry: the two blocks at the bottom, or the one that doubles the resolution.
        blocks: each of them reads the latest of the encoder's outputs that is left.
    """

    def __init__(self, entry: list[Block], blocks: list[Block]):
        super().__init__()
        self.entry, self.blocks = nn.ModuleList(entry), nn.ModuleList(blocks)

    def forward(self, x: Tensor, embedding: Tensor, outputs: list[Tensor]) -> Tensor:
        for block in self.entry:
            x = block(x, embedding)
        for block in self.blocks:
            x = block(torch.cat([x, outputs.pop()], dim=1), embedding)
        return x


class EDMUNet(nn.Module):
    """``(x, time, labels) -> F`` of EDM's preconditioning, ``time = ln(sigma) / 4``.

    Args:
        sample_size: height and width of a sample, divisible by ``2^(levels - 1)``.
        in_channels: channels of a sample.
        num_classes: None for no labels.
        architecture: ``ddpmpp``, ``ncsnpp`` or ``adm``.
        width: channels that the widths of the levels are multiples of.
        multipliers: of each level.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention: resolutions with self-attention (besides the one block at the bottom that always has it).
        head_width: channels of an attention head in ``adm``; the others have one head.
        dropout: in [0, 1).
        dropout_resolution: the largest resolution with dropout; None for all.

    Raises:
        ValueError: sizes that do not fit each other, by name.
    """

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
        if sample_size % 2 ** (len(multipliers) - 1) or blocks < 1:
            raise ValueError(
                f"sample_size={sample_size}, blocks={blocks}: {len(multipliers)} levels need a sample_size that is a multiple "
                f"of {2 ** (len(multipliers) - 1)}, and at least one block each."
            )
        adm, fourier = architecture == "adm", architecture == "ncsnpp"
        self.adm, self.attention, self.head_width = adm, attention, head_width
        self.taps = (1, 3, 3, 1) if fourier else (1, 1)
        self.dropout, self.dropout_resolution = dropout, sample_size if dropout_resolution is None else dropout_resolution
        self.time_width, self.width_embed = width * (2 if fourier else 1), 4 * width
        self.time = Fourier(self.time_width) if fourier else Sinusoid(self.time_width, to_end=not adm)
        self.embed = nn.Sequential(
            nn.Linear(self.time_width, self.width_embed), nn.SiLU(), nn.Linear(self.width_embed, self.width_embed)
        )
        self.label: ClassEmbedding | None = None
        if num_classes is not None and adm:
            self.label = ClassEmbedding(num_classes, self.width_embed, bias=False, scale=1.0)
        elif num_classes is not None:
            self.label = ClassEmbedding(num_classes, self.time_width, bias=True, scale=math.sqrt(num_classes))
        widths = [width * factor for factor in multipliers]
        self.stem = nn.Conv2d(in_channels, widths[0] if adm else width, 3, padding=1)
        sizes = [sample_size >> level for level in range(len(widths))]
        outputs = self._build_encoder(widths, sizes, blocks, in_channels if fourier else None)
        self._build_decoder(widths, sizes, blocks, outputs)
        self.norm_out = group_norm(widths[0], 1e-5 if adm else 1e-6)
        self.conv_out = nn.Conv2d(widths[0], in_channels, 3, padding=1)
        self._initialise()

    def _block(self, width_in: int, width_out: int, size: int, attended: bool = False, up: bool | None = None) -> Block:
        if attended and self.adm and (width_out < self.head_width or width_out % self.head_width):
            raise ValueError(f"head_width={self.head_width}: {width_out} channels at resolution {size} are no multiple of it.")
        heads = 0 if not attended else width_out // self.head_width if self.adm else 1
        dropout = self.dropout if size <= self.dropout_resolution else 0.0
        resample = None if up is None else Resample(self.taps, up)
        return Block(width_in, width_out, self.width_embed, self.adm, resample, heads, dropout)

    def _build_encoder(self, widths: list[int], sizes: list[int], blocks: int, image_width: int | None) -> list[int]:
        """Makes the levels; returns the widths of their outputs. ``image_width`` is None without NCSN++'s image path."""
        self.encoder, current = nn.ModuleList(), self.stem.out_channels
        outputs = [current]
        for level, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            down, image = None, None
            if level > 0:
                down = self._block(current, current, size, up=False)
                outputs.append(current)
                if image_width is not None:
                    # Convolved first, edges beyond the image included, and then halved.
                    wide = nn.Conv2d(image_width, current, 3, padding=1 + (len(self.taps) - 1) // 2)
                    image, image_width = nn.Sequential(wide, Resample(self.taps, up=False, padded=False)), current
            attended = size in self.attention
            inner = [self._block(current if i == 0 else width, width, size, attended) for i in range(blocks)]
            self.encoder.append(EncoderLevel(down, image, inner))
            outputs += blocks * [width]
            current = width
        return outputs

    def _build_decoder(self, widths: list[int], sizes: list[int], blocks: int, outputs: list[int]) -> None:
        """Makes the levels, the bottom first. DDPM++ and NCSN++ attend in the last block of a level alone."""
        self.decoder, current = nn.ModuleList(), widths[-1]
        for level in reversed(range(len(widths))):
            width, size = widths[level], sizes[level]
            if level == len(widths) - 1:
                entry = [self._block(current, current, size, attended=True), self._block(current, current, size)]
            else:
                entry = [self._block(current, current, size, up=True)]
            inner = []
            for index in range(blocks + 1):
                attended = size in self.attention and (self.adm or index == blocks)
                inner.append(self._block(current + outputs.pop(), width, size, attended))
                current = width
            self.decoder.append(DecoderLevel(entry, inner))

    def _initialise(self) -> None:
        """Each residual branch, and F, begins at zero (ADM; torch's own law for the rest) or close to it (Xavier's law)."""
        last = [block.conv_out for block in self.modules() if isinstance(block, Block)] + [self.conv_out]
        attentions = [part for part in self.modules() if isinstance(part, Attention)]
        if not self.adm:
            for part in self.modules():
                if isinstance(part, nn.Conv2d | nn.Linear):
                    nn.init.xavier_uniform_(part.weight)
                    nn.init.zeros_(part.bias)  # type: ignore[arg-type]
        elif self.label is not None:
            nn.init.normal_(self.label.weight)
        with torch.no_grad():
            for part in [*last, *(attention.out for attention in attentions)]:
                part.weight.mul_(0.0 if self.adm else 1e-5)
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]
            for attention in attentions if not self.adm else []:
                attention.qkv.weight.mul_(math.sqrt(0.2))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """F ``(b, c, h, w)`` for ``x`` of the same shape; labels ``(b,)`` in ``0..num_classes``, the last is "no class"."""
        features = self.time(time).to(x.dtype)
        if self.label is not None and not self.adm:
            features = features + self.label(labels)
        embedding = self.embed(features)
        if self.label is not None and self.adm:
            embedding = embedding + self.label(labels)
        embedding, image = functional.silu(embedding), x
        x = self.stem(x)
        outputs = [x]
        for encoder in self.encoder:
            new, image = encoder(x, embedding, image)
            outputs, x = outputs + new, new[-1]
        for decoder in self.decoder:
            x = decoder(x, embedding, outputs)
        return self.conv_out(functional.silu(self.norm_out(x)))


def group_norm(width: int, eps: float) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, width // 4), width, eps)
