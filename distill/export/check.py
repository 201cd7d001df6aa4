"""Reloads what was exported in a process that knows diffusers alone, and compares its samples with ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from distill.export.calls import arguments, call_parameters, pack, unpack
from distill.export.schedulers import FILES
from distill.export.sources import index_of
from distill.samplers import Sampler
from distill.types import Cond, Sample

LIMIT = 1e-5
"""Largest difference of a pixel in [0, 1] (of a latent, if the folder decodes none) that passes, in float32."""

SEED = 20


@dataclass
class Drawing:
    """What both sides draw.

    Attributes:
        pipeline: name of its class.
        calls: by number of steps, the words of the pipeline's call.
        generator, sampler: ours.
        codec: turns samples into pixels; None compares samples in model space.
        cond: conditions, on the CPU.
        prompts: given to the pipeline in place of the conditions made of them, if it has a text encoder; or None.
        shape: of one sample in model space.
        count: number of samples.
    """

    pipeline: str
    calls: dict[int, dict[str, Any]]
    generator: Denoiser
    sampler: Sampler
    codec: Any
    cond: Cond
    prompts: list[str] | None
    shape: Sequence[int]
    count: int


@torch.no_grad()
def draw_ours(drawing: Drawing, steps: int) -> Tensor:
    """Our samples: pixels in [0, 1], or latents in the pipeline's layout. The global random state stays as it was.

    Noise comes from one stream, the initial noise first, and is drawn in the pipeline's own layout.
    """

    def fresh(like: Sample) -> Sample:
        return unpack(drawing.pipeline, torch.randn(pack(drawing.pipeline, like).shape), drawing.shape)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        noise = fresh(torch.empty(drawing.count, *drawing.shape))
        samples = drawing.sampler(drawing.generator, noise, drawing.cond, steps, fresh)
    if drawing.codec is None:
        return pack(drawing.pipeline, samples)
    return (drawing.codec.decode(samples) / 2 + 0.5).clamp(0, 1)


@dataclass
class Exported:
    """What the clean process loads.

    Attributes:
        folder: of the pipeline.
        custom: whether code of the folder itself must be trusted.
        component: of the network in the pipeline.
        lora: folder of a LoRA file to be loaded onto it, or None.
    """

    folder: Path
    custom: bool
    component: str
    lora: Path | None = None


def write_job(drawing: Drawing, exported: Exported, scratch: Path) -> Path:
    """Writes into ``scratch`` what the clean process is to do: the file to give it."""
    from safetensors.torch import save_file

    index = index_of(exported.folder)
    words = arguments(drawing.pipeline, drawing.cond)
    if drawing.prompts is not None and index.get("text_encoder", [None])[0] is not None:
        words = {key: value for key, value in words.items() if not key.endswith("prompt_embeds")} | {"prompt": drawing.prompts}
    tensors = {key: value.contiguous() for key, value in words.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in words.items() if key not in tensors}
    known = call_parameters(drawing.pipeline)
    if "batch_size" in known and "class_labels" not in plain:
        plain["batch_size"] = drawing.count
    plain["output_type"] = "latent" if drawing.codec is None else "np"
    save_file(tensors, scratch / "inputs.safetensors")
    # Pipelines that draw the initial noise themselves draw it first, as we do.
    shape = list(pack(drawing.pipeline, torch.empty(drawing.count, *drawing.shape)).shape) if "latents" in known else None
    job = {name: str(scratch / f"{name}.safetensors") for name in ("inputs", "samples", "lora_state")} | {
        "folder": str(exported.folder.resolve()),
        "absent": [part for part, entry in index.items() if entry == [None, None]],
        "custom": exported.custom,
        "lora": None if exported.lora is None else str(exported.lora.resolve()),
        "component": exported.component,
        "calls": {str(steps): plain | call for steps, call in drawing.calls.items()},
        "latents_shape": shape,
        "seed": SEED,
    }
    file = scratch / "job.json"
    file.write_text(json.dumps(job))
    return file


def run_clean(files: Sequence[Path]) -> None:
    """Runs ``clean_draw.py`` on jobs, isolated from this folder, from ``PYTHONPATH`` and from the hub. Raises RuntimeError."""
    scratch = files[0].parent
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [sys.executable, "-I", str(FILES / "clean_draw.py"), *map(str, files)]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"what was exported does not draw in a clean process:\n{done.stderr[-2000:]}")


def compare(drawing: Drawing, scratch: Path) -> dict[int, float]:
    """Largest difference for each number of steps between our samples and those that a job left.

    Raises:
        ValueError: a difference above `LIMIT`, or samples of another shape.
    """
    from safetensors.torch import load_file

    differences = {}
    for steps, theirs in load_file(scratch / "samples.safetensors").items():
        ours = draw_ours(drawing, int(steps))
        if ours.shape != theirs.shape:
            raise ValueError(f"{steps} steps: diffusers draws {tuple(theirs.shape)}, we {tuple(ours.shape)}.")
        differences[int(steps)] = float((ours - theirs.float()).abs().max())
    if {steps: value for steps, value in differences.items() if not value <= LIMIT}:
        raise ValueError(f"diffusers draws other samples than we do: largest differences {differences}, the limit is {LIMIT}.")
    return differences


def check_export(drawing: Drawing, exported: Exported) -> tuple[dict[int, float], dict[str, Tensor]]:
    """Largest difference for each number of steps, and what the clean process' network has of the LoRA file.

    Raises:
        RuntimeError: the clean process failed; with the end of what it said.
        ValueError: see `compare`.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        run_clean([write_job(drawing, exported, Path(scratch))])
        loaded = {} if exported.lora is None else load_file(Path(scratch, "lora_state.safetensors"))
        return compare(drawing, Path(scratch)), loaded
