"""A student's network as a plain model of diffusers: LoRA layers merged, extra inputs made into what the model itself has."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from distill.adapters import ScalarInput, sinusoid
from distill.lora import ADAPTER
from distill.networks.base import DiffusersNetwork, Network

GUIDANCE = "guidance"
LCM_WIDTH = "time_cond_proj_dim"


def reads_guidance(network: Network) -> bool:
    """Whether the exported model is told a guidance scale at each call."""
    return GUIDANCE in network.own_scalars or (GUIDANCE in network.scalars and _has_condition(network))


def _has_condition(network: Network) -> bool:
    """Whether the model's class can have latent consistency models' input of its time embedding."""
    return isinstance(network, DiffusersNetwork) and network.model_class == "UNet2DConditionModel"


def check_scalars(network: Network) -> None:
    """Raises ValueError for an extra input other than guidance, or one that cannot be fixed."""
    embedding = network.time_embedding()[0]
    if GUIDANCE in network.scalars and not any(hasattr(embedding, first) for first in ("linear_1", "0")):
        name = type(network).__name__
        raise ValueError(f"the student's {name} reads guidance before a layer without bias: it is not exported.")
    if other := [name for name in network.scalars if name != GUIDANCE]:
        raise ValueError(f"the student reads {other}, which no pipeline of diffusers gives: it is not exported.")


def plain_model(network: DiffusersNetwork, guidance: float | None, merge: bool = True) -> Any:
    """A new model in float32 with the student's weights, that diffusers saves and loads; the network stays as it is.

    A ``UNet2DCondition`` that was given ``guidance`` as an extra input becomes one with ``time_cond_proj_dim``, whose
    ``cond_proj`` is the same map. For other models the scale is fixed at ``guidance``: what it adds to the input of the time
    embedding is a constant, and goes into the bias of the first layer.

    Args:
        network: the student's network.
        guidance: the scale to be fixed, if there is one to fix.
        merge: whether LoRA layers are added to the weights, or left out.
    """
    config, state = dict(network.model.config), bare_state(network, merge)
    if GUIDANCE in network.scalars and _has_condition(network):
        scalar: Any = network.scalars[GUIDANCE]
        config[LCM_WIDTH] = scalar.dimension
        state["time_embedding.cond_proj.weight"] = scalar.projection.weight.detach().float()
    elif GUIDANCE in network.scalars:
        assert guidance is not None
        state |= fixed_biases(network, guidance)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    model = type(network.model).from_config(config)
    model.load_state_dict(state, strict=True)
    return model.float().eval()


def bare_state(network: DiffusersNetwork, merge: bool) -> dict[str, Tensor]:
    """The model's weights, float32, LoRA layers added to the weights that they stand on if ``merge``, else left out."""
    model = network.model
    if getattr(model, "peft_config", None):
        model = copy.deepcopy(model).float()
        if merge:
            model.fuse_lora(adapter_names=[ADAPTER])
        model.unload_lora()
    return {name: value.detach().float() for name, value in model.state_dict().items()}


def fixed_biases(network: Any, guidance: float) -> dict[str, Tensor]:
    """Biases ``b + W e`` of the layers ``W (x + e) + b`` whose input the scale moves by ``e``, by their names in the model."""
    scalar: Any = network.scalars[GUIDANCE]
    value = torch.tensor([guidance], device=scalar.projection.weight.device)
    moved = scalar.projection(sinusoid(1000 * (value - scalar.origin), scalar.dimension))[0].detach().double()
    biases = {}
    for name, module in network.model.named_modules():
        if _is_hooked(module, scalar):
            first = "linear_1" if hasattr(module, "linear_1") else "0"
            layer: Any = getattr(module, first, None)
            if getattr(layer, "bias", None) is None:
                raise ValueError(f"a {network.model_class} has no bias that could hold its guidance scale: it is not exported.")
            bias = layer.bias.double() + layer.weight.double() @ moved
            biases[f"{name}.{first}.bias"] = bias.detach().float()
    return biases


def _is_hooked(module: nn.Module, scalar: ScalarInput) -> bool:
    return any(getattr(hook, "__self__", None) is scalar for hook in module._forward_pre_hooks.values())
