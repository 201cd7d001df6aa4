"""Taking additions off a model again: hooks, LoRA layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def remove_hooks(model: nn.Module, owner: nn.Module) -> None:
    """Removes the hooks that are methods of ``owner``, or of one of its parts, from all modules of ``model``.

    They are found by what they are bound to: a handle from before a deep copy knows nothing of the copy's hooks.
    """
    owners = {id(part) for part in owner.modules()}
    for module in model.modules():
        for hooks, with_keywords in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for number in [n for n, hook in hooks.items() if id(getattr(hook, "__self__", None)) in owners]:
                del hooks[number]
                with_keywords.pop(number, None)


def remove_lora(model: Any) -> None:
    """Puts the layers that LoRA layers stand on back into their places."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in wrapped:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False


def refuse_adapters(network: nn.Module) -> None:
    """Raises ValueError for a network with adapters, which no folder of diffusers can hold."""
    if adapters := list(getattr(network, "adapters", ())):
        raise ValueError(
            f"the network has adapters ({', '.join(adapters)}), which no folder of diffusers can hold: write them to a file of "
            "their own by distill.adapter_files.save_adapters."
        )
