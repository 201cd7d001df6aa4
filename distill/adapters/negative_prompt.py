"""Negative prompts in one evaluation (SpeedUpNet, Chai et al. 2312.08887): each cross-attention takes off what they would give.

    h = attn(Q, K c, V c) - (A n + B),   n = m |attn(Q, K c, V c)| / |m|,   m = attn(Q, K' c_negative, V' c_negative)
    Q, h, m, n: (b, n, d), A, B: (d,)

K' and V' start as copies of the base's K and V, as tensors of their own. h is what the attention's output layer sees.

Departures from the release: A is 0 at first (there 1), so that the student starts as its teacher; norms are of each sample
(there of the whole tensor, so that a sample depends on the others of its batch); the branch that adds a second attention to the
positive prompt is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.adapters.base import Adapter, AttachedAdapter, Values, find_modules, key_of, required
from distill.types import Cond, Sample, Time

Tokens = Float[Tensor, "b n d"]
MASKED = -10000.0
"""What diffusers adds to the scores of masked tokens."""


@dataclass
class NegativePrompt(Adapter):
    """SpeedUpNet's adapter: the network then also reads ``negative_prompt_embeds`` ``(b, n, d)``, as ``prompt_embeds`` are.

    Where ``prompt_mask`` is given, so must be ``negative_prompt_mask``. It has 2.2 percent of Stable Diffusion 1.5's parameters
    and 3.0 of 2.1's, but 13 of SDXL's, which has 70 cross-attentions to wide prompts: name some of them there.

    Attributes:
        targets: ends of the paths of cross-attentions; None for all that are called ``attn2``, as diffusers does.
    """

    name: ClassVar[str] = "negative_prompt"

    targets: list[str] | None = None

    def build(self, network: Any) -> AttachedNegativePrompt:
        return AttachedNegativePrompt(self, network)


class AttachedNegativePrompt(AttachedAdapter):
    """What `NegativePrompt` adds to one network: a part for each cross-attention.

    Attributes:
        reads_negatives: true, of adapters that read the negative prompt.
    """

    reads_negatives = True

    def __init__(self, settings: NegativePrompt, network: Any):
        super().__init__(settings)
        found = cross_attentions(network, settings.targets)
        layers = [getattr(network.model, name, None) for name in ("caption_projection", "caption_norm")]
        # A plain list: they are the model's, not parts of this one. A deep copy of the network copies both together.
        self.prompt_layers = [layer for layer in layers if layer is not None]
        self.attentions = nn.ModuleDict()
        for path, module in found.items():
            attention = NegativeAttention(module, self.call)
            self.attentions[key_of(path)] = attention
            self.after(module.to_q, attention.keep_query)
            self.before(module.to_out[0], attention.take_off)

    def read(self, x: Sample, time: Time, cond: Cond) -> None:
        """Takes the negative prompt, through the layers that the model itself has before its attentions."""
        self.call.clear()
        prompt = required(cond, "negative_prompt_embeds")
        for layer in self.prompt_layers:
            prompt = layer(prompt.to(next(layer.parameters()).dtype))
        self.call["prompt"] = prompt
        if "prompt_mask" in cond:
            mask = required(cond, "negative_prompt_mask").to(torch.float32)
            self.call["mask"] = (1 - mask)[:, None, None, :] * MASKED


class NegativeAttention(nn.Module):
    """The negative half of one cross-attention.

    Args:
        attention: diffusers' ``Attention``.
        call: the adapter's values of the present call.
    """

    def __init__(self, attention: Any, call: Values):
        super().__init__()
        self.heads, self.call, self.own = attention.heads, call, Values()
        self.to_k, self.to_v = _copy(attention.to_k), _copy(attention.to_v)
        width = attention.to_v.out_features
        device = attention.to_v.weight.device
        self.gain = nn.Parameter(torch.zeros(width, device=device))
        self.offset = nn.Parameter(torch.zeros(width, device=device))

    def keep_query(self, module: nn.Module, args: Any, kwargs: Any, output: Tokens) -> None:
        """After ``to_q``: it is not computed twice."""
        self.own["query"] = output

    def take_off(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before ``to_out.0``, whose input is the attention to the positive prompt."""
        positive, query = args[0], self.own.pop("query")
        negative, wide = self.attend(query).float(), positive.float()
        rescaled = negative * _norm(wide) / _norm(negative).clamp_min(torch.finfo(torch.float32).tiny)
        changed = wide - (self.gain * rescaled + self.offset)
        return (changed.to(positive.dtype), *args[1:]), kwargs

    def attend(self, query: Tokens) -> Tokens:
        """The queries' attention to the negative prompt, in the precision of the adapter (or of autocast)."""
        prompt = self.call["prompt"].to(self.to_k.weight.dtype)
        key, value = self.to_k(prompt), self.to_v(prompt)
        q, k, v = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in (query.to(key.dtype), key, value))
        mask = self.call["mask"].to(key.dtype) if "mask" in self.call else None
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def cross_attentions(network: Any, targets: list[str] | None) -> dict[str, Any]:
    """The cross-attentions of a network's model by their paths.

    Raises:
        ValueError: there are none, or a target is something else, or normalises queries, keys or its prompt.
    """
    if targets is None and not any(_is_cross(module) for module in network.model.modules()):
        raise ValueError(
            f"adapter=NegativePrompt: this {network.model_class} has no cross-attention to a prompt; give another adapter."
        )
    found: dict[str, Any] = find_modules(network, targets, ("attn2",), "adapter.targets")
    found = {path: module for path, module in found.items() if targets is not None or _is_cross(module)}
    for path, module in found.items():
        if not _is_cross(module):
            raise ValueError(f"adapter.targets: {path} is no cross-attention but a {type(module).__name__}; leave it out.")
        if any(getattr(module, norm, None) is not None for norm in ("norm_q", "norm_k", "norm_cross")):
            raise ValueError(f"adapter=NegativePrompt: {path} normalises queries, keys or its prompt, which is not known here.")
    return found


def _norm(tokens: Tokens) -> Tensor:
    """The Euclidean norm of each sample, ``(b, 1, 1)``."""
    return torch.linalg.vector_norm(tokens, dim=(1, 2), keepdim=True)


def _is_cross(module: Any) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) and hasattr(module, "to_out")


def _copy(layer: Any) -> nn.Linear:
    """A linear layer with the same values in tensors of its own, float32."""
    copied = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device=layer.weight.device)
    with torch.no_grad():
        copied.weight.copy_(layer.weight)
        if layer.bias is not None:
            copied.bias.copy_(layer.bias)
    return copied
