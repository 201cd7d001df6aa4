"""Files of what was added to a network: adapters, extra scalar inputs and LoRA layers, without the base they stand on.

One safetensors file; its metadata say of what model, so that it is attached to another checkpoint of the same architecture and
to no other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.adapters import adapter_of
from distill.denoiser import Denoiser, NetworkDenoiser
from distill.lora import ADAPTER, LoRA
from distill.networks.base import DiffusersNetwork

METADATA = "distill_adapters"
"""Key of the file's metadata, whose value is JSON."""

FREE = ("sample_size", "dropout", "upcast_attention")
"""Keys of a model's config that may differ between checkpoints of one architecture."""


def save_adapters(denoiser: Denoiser, file: str | Path) -> None:
    """Writes everything that was added to a denoiser's network, in the precision that it has.

    The metadata hold the settings of each part, the model's class and config, what it predicts, and which base this was trained
    on (its path and hash, None for one that was not read from a folder).

    Raises:
        ValueError: not a network of diffusers, or nothing was added to it.
    """
    from safetensors.torch import save_file

    network = _network(denoiser)
    state = {name: value.detach().cpu().contiguous() for name, value in additions(network).items()}
    if not state:
        raise ValueError(f"this {network.model_class} has no adapters, extra scalar inputs or LoRA layers to save.")
    described = _architecture(denoiser, network) | {
        "base": getattr(denoiser, "identity", None),
        "adapters": [adapter.settings.as_dict() for adapter in network.attached()],
        "scalars": list(network.scalars),
        "lora": _lora_settings(network),
    }
    save_file(state, file, metadata={"format": "pt", METADATA: json.dumps(described, sort_keys=True)})


def load_adapters(denoiser: Denoiser, file: str | Path) -> None:
    """Attaches what `save_adapters` wrote to a denoiser's network, which may be another checkpoint of the same architecture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of something else, another architecture (names the key and both values), weights that do not fit, or
            a network that has additions already. The network is then as it was.
    """
    from safetensors import safe_open

    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: there is no such file; give one that save_adapters wrote.")
    with safe_open(file, "pt") as opened:
        described = json.loads((opened.metadata() or {}).get(METADATA, "null"))
        state = {name: opened.get_tensor(name) for name in opened.keys()}
    if described is None:
        raise ValueError(f"{file} was not written by save_adapters: its metadata have no {METADATA}.")
    network = _network(denoiser)
    if there := sorted(additions(network)):
        raise ValueError(f"the network has additions already ({there[0]}, ...): call its detach_adapters() first.")
    check_architecture(str(file), described, _architecture(denoiser, network))
    try:
        _attach(network, described)
        _fill(str(file), network, state)
    except Exception:
        network.detach_adapters()
        raise


def additions(network: DiffusersNetwork) -> dict[str, Tensor]:
    """All tensors of a network that are not the model's own, buffers too, by their names in the network."""
    return {
        name: value
        for name, value in network.state_dict().items()
        if name.startswith(("adapters.", "scalars.")) or f".{ADAPTER}." in name
    }


def check_architecture(file: str, theirs: dict[str, Any], own: dict[str, Any]) -> None:
    """Compares the model's class, what it predicts and its config.

    Keys of the config that only one of them has, another version of diffusers' perhaps, are not compared.

    Raises:
        ValueError: they differ; names the first key and both values.
    """
    pairs = [(key, theirs[key], own[key]) for key in ("model_class", "prediction")]
    shared = sorted(theirs["config"].keys() & own["config"].keys())
    pairs += [(f"config.{key}", theirs["config"][key], own["config"][key]) for key in shared]
    for key, before, now in pairs:
        if before != now:
            raise ValueError(
                f"{file} was made for {key}={before!r}, this network has {key}={now!r}: "
                "give a checkpoint of the same architecture."
            )


def _network(denoiser: Denoiser) -> DiffusersNetwork:
    network = denoiser.network if isinstance(denoiser, NetworkDenoiser) else None
    if not isinstance(network, DiffusersNetwork):
        raise ValueError(f"adapters stand on networks of diffusers, not on {type(network or denoiser).__name__}.")
    return network


def _architecture(denoiser: Any, network: DiffusersNetwork) -> dict[str, Any]:
    config = {key: value for key, value in network.model.config.items() if key not in FREE and not key.startswith("_")}
    plain = json.loads(json.dumps(config, default=str))  # tuples become lists
    return {"model_class": network.model_class, "prediction": denoiser.prediction, "config": plain}


def _lora_settings(network: DiffusersNetwork) -> dict[str, Any] | None:
    config = getattr(network.model, "peft_config", {}).get(ADAPTER)
    if config is None:
        return None
    targets = sorted(config.target_modules)
    return {"rank": config.r, "alpha": config.lora_alpha, "targets": targets, "dropout": config.lora_dropout}


def _attach(network: DiffusersNetwork, described: dict[str, Any]) -> None:
    if described["lora"] is not None:
        LoRA(**described["lora"]).add_to(network)
    for name in described["scalars"]:
        network.add_scalar_input(name)
    for settings in described["adapters"]:
        network.add_adapter(adapter_of(settings))


def _fill(file: str, network: DiffusersNetwork, state: dict[str, Tensor]) -> None:
    """Puts the file's tensors into the additions. Raises ValueError, naming the first, if they are not the same ones."""
    own = additions(network)
    if wrong := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{file}: {wrong[0]} is only in {'the network' if wrong[0] in own else 'the file'}.")
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ValueError(f"{file}: {name} has shape {tuple(value.shape)}, the network needs {tuple(own[name].shape)}.")
    for name, value in state.items():
        own[name].copy_(value)
