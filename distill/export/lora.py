"""A LoRA student as one safetensors file that pipelines of diffusers load, every key accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.lora import ADAPTER
from distill.networks.base import DiffusersNetwork

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
"""Key of the file's metadata under which diffusers (0.34 and later) keeps rank, alpha and targets by component."""

SETTINGS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "bias", "use_rslora", "use_dora")


def check_lora(network: Any) -> None:
    """Raises ValueError if the student is not LoRA layers alone, or its pipeline loads none."""
    if ADAPTER not in getattr(network.model, "peft_config", {}):
        raise ValueError("lora: the student has no LoRA layers (model.lora is null); export it as a folder, without --lora.")
    if not hasattr(network.model, "load_lora_adapter"):
        raise ValueError(
            f"lora: diffusers loads no LoRA file into a {network.model_class}; export the student as a folder, without --lora."
        )
    if network.scalars:
        raise ValueError(
            f"lora: the student also reads {list(network.scalars)}, which a LoRA file does not hold; export it as a folder."
        )


def lora_state(network: DiffusersNetwork) -> dict[str, Tensor]:
    """The LoRA layers' weights, float32 on the CPU, by name in the model: ``... .lora_A.weight`` and ``... .lora_B.weight``."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network.model, adapter_name=ADAPTER)
    return {name: value.detach().float().cpu().contiguous() for name, value in state.items()}


def write_lora(network: DiffusersNetwork, folder: Path) -> dict[str, Tensor]:
    """Writes `FILE` and returns what is in it: `lora_state` under the name of the pipeline's component."""
    from safetensors.torch import save_file

    config = network.model.peft_config[ADAPTER].to_dict()
    # Not all keys: another version of peft refuses those that it does not know.
    metadata = {f"{network.component}.{key}": _plain(config[key]) for key in SETTINGS}
    state = {f"{network.component}.{name}": value for name, value in lora_state(network).items()}
    save_file(state, folder / FILE, metadata={"format": "pt", METADATA: json.dumps(metadata, indent=2, sort_keys=True)})
    return state


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def compare_keys(written: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    """Compares what was written with what a pipeline has after loading, both by name in the model.

    Raises:
        ValueError: a key that is missing or unexpected, another shape (another rank, say) or another value; names the first.
    """
    missing, unexpected = sorted(written.keys() - loaded.keys()), sorted(loaded.keys() - written.keys())
    if missing or unexpected:
        kinds = {"missing": missing, "unexpected": unexpected}
        parts = [f"{len(keys)} {kind}, first {keys[0]}" for kind, keys in kinds.items() if keys]
        raise ValueError(f"LoRA keys after loading: {'; '.join(parts)}.")
    for name, value in written.items():
        if value.shape != loaded[name].shape:
            shapes = tuple(value.shape), tuple(loaded[name].shape)
            raise ValueError(f"LoRA key {name}: written with shape {shapes[0]}, loaded with {shapes[1]}.")
        if not torch.equal(value, loaded[name].float()):
            raise ValueError(f"LoRA key {name}: loaded with other values than were written.")
