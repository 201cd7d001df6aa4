"""Writing a student's network into a pipeline's folder: a model of diffusers, or one of ours with the file of its modules."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.adapters import refuse_adapters
from distill.export.schedulers import FILES
from distill.export.weights import GUIDANCE, fixed_biases, plain_model
from distill.networks.base import DiffusersNetwork, Network
from distill.networks.edm2_modules import EDM2UNet
from distill.networks.edm_modules import EDMUNet

CUSTOM_NETWORK = "student_network"
OWN_MODELS: tuple[type[nn.Module], ...] = (EDMUNet, EDM2UNet)
"""Models of ours; the files that define them import torch alone, and are copied into the folder."""


def is_own(network: nn.Module) -> bool:
    """Whether the network is not one of diffusers, but one whose file the folder can carry."""
    return isinstance(getattr(network, "model", None), OWN_MODELS)


def check_network(network: nn.Module) -> None:
    """Raises ValueError for a network that cannot be written."""
    if not isinstance(network, DiffusersNetwork) and not is_own(network):
        known = ", ".join(model.__name__ for model in OWN_MODELS)
        raise ValueError(
            f"the student's network is a {type(network).__name__}, neither of diffusers nor {known}: it is not exported."
        )
    refuse_adapters(network)


def write_network(folder: Path, network: Any, guidance: float | None, merge: bool = True) -> list[str]:
    """Writes the network into ``folder`` and returns its entry in ``model_index.json``; arguments of `plain_model`."""
    if not is_own(network):
        plain_model(network, guidance, merge).save_pretrained(folder, safe_serialization=True)
        return ["diffusers", network.model_class]
    write_own(folder, network, guidance)
    return [CUSTOM_NETWORK, "StudentNetwork"]


def write_own(folder: Path, network: Network, guidance: float | None) -> None:
    """Config, weights, and the two files of code that diffusers loads them with."""
    import diffusers
    from safetensors.torch import save_file

    model: Any = network.model
    name, settings = type(model).__name__, own_settings(network)
    state: dict[str, Tensor] = {key: value.detach().float() for key, value in model.state_dict().items()}
    if GUIDANCE in network.scalars:
        assert guidance is not None
        state |= fixed_biases(network, guidance)
    folder.mkdir()
    config = {
        "_class_name": "StudentNetwork",
        "_diffusers_version": diffusers.__version__,
        "settings": settings,
        "in_channels": settings["in_channels"],
        "sample_size": settings["sample_size"],
        "num_class_embeds": settings["num_classes"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {f"network.{key}": value.cpu().contiguous() for key, value in state.items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    # Under its own name: modules of all local folders share one package in a process, and must not shadow each other.
    source = Path(str(inspect.getsourcefile(type(model))))
    shutil.copyfile(source, folder / source.name)
    wrapper = (FILES / f"{CUSTOM_NETWORK}.py").read_text()
    line = f"from .{source.stem} import {name} as"
    (folder / f"{CUSTOM_NETWORK}.py").write_text(wrapper.replace("from .edm_modules import EDMUNet as", line))


def own_settings(network: Any) -> dict[str, Any]:
    """The arguments of the model's own class."""
    settings = dict(network.config)
    if "size" in settings:
        del settings["size"]
        settings["width"] = network.model.stem.weight.shape[0]
    return settings
