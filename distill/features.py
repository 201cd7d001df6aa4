"""Inner features of a denoiser's network: beside its x0 in one evaluation, or alone, in as much of one as they need.

Both are differentiable in the input and in the parameters, under autocast and with gradient checkpointing. A network that was
compiled runs as it was written here: compiled code has no inner modules to read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from distill.denoiser import Denoiser, NetworkDenoiser, ScheduleView
from distill.networks.base import inner_models
from distill.networks.bottleneck import Bottleneck, Layer
from distill.sharding import is_sharded, networks_of
from distill.types import Cond, Time

Image = Float[Tensor, "b channels height width"]
FeatureMap = Float[Tensor, "b c h w"]


class _Reached(Exception):
    """Ends an evaluation whose features have been read."""


def bottleneck_of(denoiser: Denoiser, layer: Layer = "middle") -> Bottleneck:
    """Where the features of a denoiser's network are; also of a view of it under another schedule.

    Raises:
        ValueError: a denoiser that is not one network evaluated once (a guided one), or whose network does not have the layer.
    """
    inner = denoiser
    while isinstance(inner, ScheduleView):
        inner = inner.base
    if not isinstance(inner, NetworkDenoiser):
        raise ValueError(f"features of a {type(inner).__name__} are not defined: give the NetworkDenoiser itself, unguided.")
    find = getattr(inner.network, "bottleneck", None)
    if find is None:
        raise ValueError(f"{type(inner.network).__name__} does not say where its inner features are read: give a Network.")
    return find(layer)


def denoise_with_features(
    denoiser: Denoiser, x: Image, t: Time, cond: Cond, layer: Layer = "middle"
) -> tuple[Image, FeatureMap]:
    """``x0``, as ``denoiser(x, t, cond)`` gives it, and the features in float32 (or wider), by one evaluation.

    Raises:
        ValueError: see `bottleneck_of`.
    """
    bottleneck = bottleneck_of(denoiser, layer)
    with _outputs(denoiser, bottleneck, stop=False) as outputs:
        x0 = denoiser(x, t, cond)
    return x0, _only(outputs, bottleneck, x)


def features_of(denoiser: Denoiser, x: Image, t: Time, cond: Cond, layer: Layer = "middle") -> FeatureMap:
    """The features in float32 (or wider); what the network would compute after them is not computed, unless it is sharded.

    Raises:
        ValueError: see `bottleneck_of`.
    """
    bottleneck = bottleneck_of(denoiser, layer)
    # Under sharding a call that is not ended leaves its weights gathered, and old.
    with _outputs(denoiser, bottleneck, stop=not is_sharded(denoiser)) as outputs, contextlib.suppress(_Reached):
        denoiser(x, t, cond)
    return _only(outputs, bottleneck, x)


@contextlib.contextmanager
def _outputs(denoiser: Denoiser, bottleneck: Bottleneck, stop: bool) -> Iterator[list[Any]]:
    """Collects what the bottleneck's module returns within the block, where it raises `_Reached` if asked to ``stop``."""
    outputs: list[Any] = []

    def read(module: Any, inputs: Any, output: Any) -> None:
        outputs.append(output)
        if stop:
            raise _Reached

    handles = [bottleneck.module.register_forward_hook(read)]
    for network in (part for part in networks_of(denoiser) if isinstance(part, FSDPModule)):
        # A sharded network gathers its weights for the backward pass when a gradient reaches what it returned: the features
        # too, for which they are among its outputs while FSDP looks at these.
        handles.append(network.register_forward_hook(lambda part, inputs, output: (output, outputs[-1]), prepend=True))
        handles.append(network.register_forward_hook(lambda part, inputs, output: output[0]))
    compiled = any(model._compiled_call_impl is not None for model in inner_models(denoiser))
    try:
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _only(outputs: list[Any], bottleneck: Bottleneck, x: Image) -> FeatureMap:
    """The map in the one output of the evaluation at ``x``."""
    if len(outputs) != 1:
        raise RuntimeError(f"The network called its {type(bottleneck.module).__name__} {len(outputs)} times; expected is once.")
    features = bottleneck.feature_map(outputs[0], x.shape[-2], x.shape[-1])
    return features.to(torch.promote_types(features.dtype, torch.float32))
