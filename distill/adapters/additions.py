"""What `AttentionGuidance` is made of: the embedding of a guidance scale, and the parts that stand beside single modules."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.adapters.base import Values, first_argument
from distill.adapters.scalar_input import sinusoid
from distill.types import PerSample

Tokens = Float[Tensor, "b n d"]
Added = Float[Tensor, "b m c"]
Rows = Float[Tensor, "b d"]


class ScaleEmbedding(nn.Module):
    """``LayerNorm(MLP(cos(2 pi (f w m + p))))``: ``(b,)`` to ``(b, width)``; f and p are drawn once and kept."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int, frequency: float):
        super().__init__()
        self.register_buffer("frequencies", frequency * torch.randn(width))
        self.register_buffer("phases", torch.rand(width))
        first = nn.Linear(width, 4 * width)
        self.layers = nn.Sequential(first, nn.ReLU(), nn.Linear(4 * width, width), nn.LayerNorm(width))

    def forward(self, value: PerSample) -> Rows:
        turns = value.float()[:, None] * self.frequencies.float() + self.phases.float()
        return self.layers((2 * math.pi * turns).cos().to(next(self.layers.parameters()).dtype))


class JointTokens(nn.Module):
    """Tokens that an MLP makes of several embeddings together: ``(b, 1, parts width)`` to ``(b, count, width)``."""

    def __init__(self, parts: int, width: int, count: int):
        super().__init__()
        self.count = count
        self.layers = nn.Sequential(nn.Linear(parts * width, 4 * width), nn.SiLU(), nn.Linear(4 * width, count * width))

    def forward(self, told: Tokens) -> Added:
        return self.layers(told[:, 0]).unflatten(1, (self.count, -1))


def places(height: int, width: int, count: int, device: torch.device) -> Float[Tensor, "n k"]:
    """``cos(pi k (i + 1/2) / n)``, k = 1 ... count, of a map's rows and then of its columns: ``(height width, 2 count)``."""
    order = torch.arange(1, count + 1, device=device)
    rows, columns = (((torch.arange(n, device=device) + 0.5) / n)[:, None] * math.pi * order for n in (height, width))
    both = torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], 2)
    return both.cos().flatten(0, 1)


class Addition(nn.Module):
    """One part: its hook adds what it makes of a module's input and the values of the call to the module's output.

    Args:
        call: the adapter's own dictionary, also in a copy of both.
        positions: cosines of each axis that follow the channels of a map's tokens.
    """

    def __init__(self, call: Values, positions: int = 0):
        super().__init__()
        self.call, self.positions = call, positions

    def tokens(self, x: Tokens) -> Added:
        """``(b, n or 1, channels of the output)`` for tokens ``(b, n, channels of the input, and places)``."""
        raise NotImplementedError

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook. An output that is a tuple begins with the image's tokens (joint attention)."""
        image = output[0] if isinstance(output, tuple) else output
        x = first_argument(args, kwargs, "hidden_states" if "hidden_states" in kwargs else "input_tensor")
        if is_map := x.ndim == 4:
            # Tokens of transformers come normalised, a U-Net's maps do not.
            height, width = x.shape[2:]
            x = F.layer_norm(x.flatten(2).transpose(1, 2).float(), x.shape[1:2])
            if self.positions:
                x = torch.cat([x, places(height, width, self.positions, x.device).expand(len(x), -1, -1)], 2)
        added = self.tokens(x).to(image.dtype)
        if is_map:
            added = added.transpose(1, 2)
            added = added[..., None] if added.shape[-1] == 1 else added.unflatten(2, image.shape[2:])
        return (image + added, *output[1:]) if isinstance(output, tuple) else image + added


class AttentionAddition(Addition):
    """Tokens ask ``[w, t, class or prompt ...]``, or what `JointTokens` made of the first three.

    Args:
        inputs, outputs: channels of the module.
        width: of queries, keys and values.
        call: values of the present call.
        heads: divides ``width``.
        embedding: width of what is asked; None for ``width``.
        positions: see `Addition`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        call: Values,
        heads: int = 1,
        embedding: int | None = None,
        positions: int = 0,
    ):
        super().__init__(call, positions)
        self.heads, asked = heads, embedding or width
        sizes = (inputs + 2 * positions, asked, asked)
        self.query, self.key, self.value = (nn.Linear(size, width, bias=False) for size in sizes)
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight)
        self.out = zeroed(nn.Linear(width, outputs))

    def tokens(self, x: Tokens) -> Added:
        call = self.call
        names = ("joint", "prompt") if "joint" in call else ("scale", "time", "label", "prompt")
        asked = torch.cat([call[name] for name in names if name in call], dim=1)
        count, width = asked.shape[1:]
        asked = asked + sinusoid(torch.arange(float(count), device=asked.device), width).to(asked.dtype)
        mask = None
        if "mask" in call:
            # All but the prompt's tokens can always be seen.
            mask = F.pad(call["mask"], (count - call["mask"].shape[1], 0), value=True)[:, None, None]
        values = self.query(x.to(self.query.weight.dtype)), self.key(asked), self.value(asked)
        query, key, value = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in values)
        return self.out(F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2))


class BiasAddition(Addition):
    """The same bias for all tokens."""

    def __init__(self, inputs: int, outputs: int, width: int, call: Values):
        super().__init__(call)
        last = zeroed(nn.Linear(width, outputs))
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width), last)

    def tokens(self, x: Tokens) -> Added:
        total = sum((self.call[name] for name in ("time", "label") if name in self.call), self.call["scale"])
        if "prompt" in self.call:
            prompt = self.call["prompt"]
            seen = self.call["mask"][..., None].to(prompt.dtype) if "mask" in self.call else torch.ones_like(prompt[..., :1])
            total = total + (prompt * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
        return self.layers(total)


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer with weight and bias 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
