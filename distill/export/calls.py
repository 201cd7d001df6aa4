"""How a pipeline is called with our conditions: the words of its call, guidance and sizes, the layout of its latents."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from distill.networks.flux import GUIDANCE as FLUX_GUIDANCE
from distill.types import Cond

CUSTOM_PIPELINE = "StudentPipeline"
"""The folder's own: of a network of images with or without classes."""


def accepted_words(name: str) -> list[str]:
    """Which of ``timesteps`` and ``sigmas`` the pipeline's call takes."""
    return [word for word in ("timesteps", "sigmas") if word in call_parameters(name)]


def call_parameters(name: str) -> set[str]:
    """Names of the arguments of the pipeline's call."""
    import diffusers

    if name == CUSTOM_PIPELINE:
        return {"class_labels", "batch_size", "num_inference_steps", "generator", "latents", "output_type"}
    return set(inspect.signature(getattr(diffusers, name).__call__).parameters)


def settings_of_call(
    name: str, network: Any, shape: Sequence[int], factor: int, cond: Cond, conditioner: Any = None
) -> dict[str, Any]:
    """What every call of the student's pipeline should be given besides the prompt: guidance, sizes, how prompts are read.

    Args:
        name: of the pipeline.
        network: the student's.
        shape: of a sample in model space.
        factor: pixels on a side for each element of a sample.
        cond: conditions; ``guidance`` in them is the scale that the student reads.
        conditioner: what encoded the student's prompts; None if that is not known.
    """
    known: set[str] = call_parameters(name)
    settings: dict[str, Any] = {}
    if "guidance_scale" in known:
        embedded = FLUX_GUIDANCE if "guidance" in network.own_scalars and network.model_class.startswith("Flux") else 1.0
        settings["guidance_scale"] = common(cond, "guidance") if "guidance" in cond else embedded
    if "height" in known:
        settings |= {"height": shape[-2] * factor, "width": shape[-1] * factor}
    if "clip_skip" in known and getattr(conditioner, "clip_skip", None):
        settings["clip_skip"] = conditioner.clip_skip
    if "clean_caption" in known:
        settings["clean_caption"] = False  # conditioners here never do
    if "max_sequence_length" in known and hasattr(conditioner, "max_length"):
        settings["max_sequence_length"] = conditioner.max_length
    if "complex_human_instruction" in known and not getattr(conditioner, "instruction", True):
        settings["complex_human_instruction"] = None
    if "time_ids" in cond and "original_size" in known:
        settings |= sizes_of(cond)
    if "use_resolution_binning" in known:
        settings["use_resolution_binning"] = False
    return settings


def common(cond: Cond, name: str) -> float:
    """The one value of ``cond[name]`` ``(b,)``. Raises ValueError if it is not the same for all."""
    values = cond[name].unique().tolist()
    if len(values) > 1:
        raise ValueError(f"cond[{name!r}]={values}: a pipeline is given one value for all samples.")
    return values[0]


def arguments(name: str, cond: Cond) -> dict[str, Any]:
    """A pipeline's words for conditions: tensors stay tensors, sizes and labels become lists."""
    words: dict[str, Any] = {}
    for key in ("prompt_embeds", "pooled_prompt_embeds"):
        if key in cond:
            words[key] = cond[key]
    if "prompt_mask" in cond:
        words["prompt_attention_mask"] = cond["prompt_mask"]
    if "labels" in cond and "class_labels" in call_parameters(name):
        words["class_labels"] = cond["labels"].tolist()
    return words


def sizes_of(cond: Cond) -> dict[str, list[int]]:
    """SDXL's sizes as its pipeline calls them. Raises ValueError if they are not the same for all samples."""
    rows = cond["time_ids"].unique(dim=0)
    if len(rows) > 1:
        raise ValueError("cond['time_ids'] differ from sample to sample: SDXL's pipeline takes one set for all.")
    sizes = [int(value) for value in rows[0]]
    return {"original_size": sizes[:2], "crops_coords_top_left": sizes[2:4], "target_size": sizes[4:]}


def pack(name: str, latents: Tensor) -> Tensor:
    """Latents ``(b, c, h, w)`` in the layout in which the pipeline's scheduler steps and draws noise."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2) if name == "FluxPipeline" else latents


def unpack(name: str, packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `pack` for latents of ``shape`` ``(c, h, w)``."""
    if name != "FluxPipeline":
        return packed
    return F.pixel_shuffle(packed.transpose(1, 2).unflatten(2, (shape[-2] // 2, shape[-1] // 2)), 2)
