"""Draws from an exported folder with diffusers alone: run by the export's check in a process of its own.

    python -I clean_draw.py JOB.json ...

A job names the folder, its calls, a safetensors file of their tensors, the seed, and the files to write.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file


def load(job: dict[str, Any]) -> Any:
    """The pipeline of the folder in float32, with the LoRA file if there is one."""
    trusted = {"trust_remote_code": True} if job["custom"] else {}
    absent = dict.fromkeys(job["absent"])
    pipeline = DiffusionPipeline.from_pretrained(job["folder"], local_files_only=True, **trusted, **absent)
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it blackens what it takes for unsafe: noise, at times
    if job["lora"] is not None:
        pipeline.load_lora_weights(job["lora"], adapter_name="student")
    return pipeline


def lora_state(pipeline: Any, component: str) -> dict[str, torch.Tensor]:
    """What the pipeline's network has of the LoRA file."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(getattr(pipeline, component), adapter_name="student")
    return {name: value.contiguous() for name, value in state.items()}


def draw(pipeline: Any, call: dict[str, Any], tensors: dict[str, torch.Tensor], shape: list[int] | None, seed: int) -> Any:
    """Samples of one call, from one stream of random numbers: the initial noise first."""
    torch.manual_seed(seed)
    words = dict(call) | tensors | {"generator": torch.default_generator}
    if shape is not None:
        words["latents"] = torch.randn(shape)
    images = pipeline(**words).images
    return images if torch.is_tensor(images) else torch.from_numpy(images).permute(0, 3, 1, 2)


def work(job: dict[str, Any]) -> None:
    """Does one job."""
    pipeline, tensors = load(job), load_file(job["inputs"])
    samples = {
        steps: draw(pipeline, call, tensors, job["latents_shape"], job["seed"]).contiguous()
        for steps, call in job["calls"].items()
    }
    save_file(samples, job["samples"])
    if job["lora"] is not None:
        save_file(lora_state(pipeline, job["component"]), job["lora_state"])


def main() -> None:
    """Does the jobs, and exits with an error if the package that exported was imported."""
    for name in sys.argv[1:]:
        with open(name) as file:
            work(json.load(file))
    ours = sorted(name for name in sys.modules if name.split(".")[0] in ("distill", "datamodules"))
    if ours:
        sys.exit(f"not a clean process: {ours[0]} was imported")


if __name__ == "__main__":
    main()
