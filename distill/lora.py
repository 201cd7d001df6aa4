"""Students that are low-rank adapters on their teacher's own weights (LoRA, Hu et al. 2106.09685), by peft through diffusers.

The base weights are the teacher's very tensors: student, average and teacher cost the memory of one network and a bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.frozen import trainable_copy
from distill.networks.base import DiffusersNetwork

ADAPTER = "student"
UNET_TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut downsamplers.0.conv "
    "upsamplers.0.conv time_emb_proj"
).split()
TRANSFORMER_TARGETS = (
    "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out ff.net.0.proj ff.net.2 ff_context.net.0.proj "
    "ff_context.net.2 ff.conv_inverted ff.conv_point proj_mlp proj_out"
).split()


@dataclass
class LoRA:
    """What is added to which layers.

    Attributes:
        rank: of the added matrices, at least 1; LCM-LoRA has 64 (Luo et al. 2311.05556).
        alpha: the addition is multiplied by ``alpha / rank``; None for ``alpha = rank``.
        targets: ends of the names of the layers; None for the layers of LCM-LoRA in a U-Net (diffusers' training script:
            attention, feed-forward, residual and resampling layers), in a transformer its attention, feed-forward and output.
        dropout: in [0, 1), on the input of the addition.
    """

    rank: int = 64
    alpha: int | None = None
    targets: list[str] | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"rank={self.rank}, dropout={self.dropout}: give a rank of at least 1 and a dropout in [0, 1).")

    def targets_in(self, network: DiffusersNetwork) -> list[str]:
        """The targets that the network has.

        Raises:
            ValueError: a target that was asked for by name and is not there.
        """
        names = [name for name, _ in network.model.named_modules()]

        def there(target: str) -> bool:
            return any(name == target or name.endswith("." + target) for name in names)

        if self.targets is None:
            usual = UNET_TARGETS if network.component == "unet" else TRANSFORMER_TARGETS
            return [target for target in usual if there(target)]
        if missing := [target for target in self.targets if not there(target)]:
            raise ValueError(f"lora.targets={missing}: no layer of {network.model_class} has a name that ends so.")
        return self.targets


def lora_copy(base: Denoiser, lora: LoRA) -> NetworkDenoiser:
    """A denoiser that equals ``base`` at first and whose only parameters of its own, all trained, are low-rank additions.

    Its other parameters are those of ``base``, not copies.

    Raises:
        ValueError: ``base`` is not a diffusers model, or a target is not there.
    """
    if not isinstance(base, NetworkDenoiser) or not isinstance(base.network, DiffusersNetwork):
        raise ValueError("lora: only networks of diffusers take LoRA layers; set model.lora to null.")
    from peft import LoraConfig, inject_adapter_in_model

    base.requires_grad_(False)
    student = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    alpha = lora.rank if lora.alpha is None else lora.alpha
    network: Any = student.network
    targets = lora.targets_in(network)
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=lora.dropout)
    if hasattr(network.model, "add_adapter"):
        network.model.add_adapter(config, adapter_name=ADAPTER)
    else:  # diffusers gives UNet2DModel and DiT no adapters of their own
        inject_adapter_in_model(config, network.model, ADAPTER)
    return student.train()


def start_student(teacher: Denoiser, lora: LoRA | None) -> Denoiser:
    """A student that equals its teacher: a copy whose weights are all trained, or LoRA layers on the teacher's own."""
    return trainable_copy(teacher) if lora is None else lora_copy(teacher, lora)


def diffusers_networks(module: nn.Module) -> list[DiffusersNetwork]:
    """The networks of diffusers in a module."""
    return [part for part in module.modules() if isinstance(part, DiffusersNetwork)]


def checkpoint_gradients(module: nn.Module, key: str) -> None:
    """Has the networks of a module compute activations again in the backward pass instead of keeping them.

    Raises:
        ValueError: none of them is of diffusers; names the ``key`` that asked for it.
    """
    if not (networks := diffusers_networks(module)):
        raise ValueError(f"{key}.gradient_checkpointing=true: only networks of diffusers can; set it to false.")
    for network in networks:
        network.model.enable_gradient_checkpointing()
