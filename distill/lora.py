"""How students start: as copies, or as their teacher's own weights with LoRA layers (Hu et al. 2106.09685) or other adapters.

In the latter the base weights are the teacher's very tensors: student, average and teacher cost the memory of one network and
a bit. LoRA layers are by peft through diffusers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from distill.adapters import Adapter
from distill.adapters.base import missing_targets
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
        if self.targets is None:
            usual = UNET_TARGETS if network.component == "unet" else TRANSFORMER_TARGETS
            missing = missing_targets(network.model, usual)
            return [target for target in usual if target not in missing]
        if missing := missing_targets(network.model, self.targets):
            raise ValueError(f"lora.targets={missing}: no layer of {network.model_class} has a name that ends so.")
        return self.targets

    def add_to(self, network: DiffusersNetwork) -> None:
        """Adds the layers, under the name `ADAPTER` and without effect at first.

        Raises:
            ValueError: a target that is not there.
        """
        from peft import LoraConfig, inject_adapter_in_model

        alpha = self.rank if self.alpha is None else self.alpha
        targets = self.targets_in(network)
        config = LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=self.dropout)
        if hasattr(network.model, "add_adapter"):
            network.model.add_adapter(config, adapter_name=ADAPTER)
        else:  # diffusers gives UNet2DModel and DiT no adapters of their own
            inject_adapter_in_model(config, network.model, ADAPTER)


def adapted_copy(base: Denoiser, lora: LoRA | None, adapter: Adapter | None) -> NetworkDenoiser:
    """A denoiser that equals ``base`` at first and whose only parameters of its own, all trained, are the additions.

    Its other parameters are those of ``base``, not copies.

    Raises:
        ValueError: ``base`` is not a diffusers model, or a target is not there.
    """
    if not isinstance(base, NetworkDenoiser) or not isinstance(base.network, DiffusersNetwork):
        key, what = ("lora", "LoRA layers") if lora is not None else ("adapter", "adapters")
        raise ValueError(f"{key}: only networks of diffusers take {what}; set model.{key} to null.")
    base.requires_grad_(False)
    student = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    network: Any = student.network
    if lora is not None:
        lora.add_to(network)
    if adapter is not None:
        network.add_adapter(adapter)
    return student.train()


def start_student(teacher: Denoiser, lora: LoRA | None, adapter: Adapter | None = None) -> Denoiser:
    """A student that equals its teacher: a copy whose weights are all trained, or additions to the teacher's own weights.

    An adapter may read a condition, such as ``guidance``, that the teacher does not.
    """
    return trainable_copy(teacher) if lora is None and adapter is None else adapted_copy(teacher, lora, adapter)


def read_guidance(student: Denoiser, asked: str) -> None:
    """Makes a student read ``cond["guidance"]``, by a scalar input that is trained whatever else of it is.

    Nothing changes if it does already, by itself or by an adapter.

    Args:
        student: at first it takes no notice of the scale.
        asked: the setting that asks for it, with its value, for the message.

    Raises:
        ValueError: its network cannot take a further input.
    """
    if "guidance" in student.scalar_inputs:
        return
    network: Any = student.network if isinstance(student, NetworkDenoiser) else None
    if not hasattr(network, "add_scalar_input"):
        raise ValueError(f"{asked}: the student's network cannot take an extra scalar input; do without.")
    network.add_scalar_input("guidance")


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
