"""Short runs of a guided method through the real command line, on images like the digits, and the teachers that they need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from distill.cli import main
from distill.denoiser import NetworkDenoiser
from distill.networks.unet2d import UNet2D
from distill.pretrained import save_denoiser
from distill.schedules import RectifiedFlow

IMAGES = {"shape": [1, 8, 8], "num_classes": 10, "size": 24, "batch_size": 16, "eval_batch_size": 16}
"""Few images in two batches of validation: the digits' module validates on all of its 1,797."""


def write_teacher(folder: Path, seed: int = 0, channels: tuple[int, int] = (8, 16)) -> Path:
    """A small random flow of the digits' classes, whose samples differ by their class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2D(num_classes=10, channels=channels, layers_per_block=1)
    with torch.no_grad():
        network.model.class_embedding.weight.mul_(3)
    save_denoiser(NetworkDenoiser(network, RectifiedFlow(), "flow"), folder)
    return folder


def teacher_at(folder: Path) -> dict[str, Any]:
    """The part of a config that reads a teacher."""
    return {"class_path": "PretrainedDenoiser", "init_args": {"path": str(folder)}}


def ode(solver: str) -> dict[str, Any]:
    """The part of a config that is a sampler."""
    return {"class_path": "OdeSampler", "init_args": {"solver": solver, "grid": "UniformGrid"}}


def train(
    folder: Path,
    teacher: Path,
    method: str = "GuidanceDistillation",
    callbacks: tuple[Any, ...] = (),
    steps: int = 2,
    **settings: Any,
) -> Path:
    """Trains ``steps`` steps and returns ``folder``, the run's; ``settings`` are the method's.

    The rates are high, so that two steps show.
    """
    evaluation = {"sampler": ode("Euler"), "steps": [2], "teacher_sampler": ode("DDIM"), "teacher_steps": 2}
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-2, "fused": True}}
    own = {"teacher": teacher_at(teacher), "optimization": {"optimizer": optimizer}, "evaluation": evaluation}
    config = {
        "model": {"class_path": method, "init_args": own | settings},
        "data": {"class_path": "SyntheticDataModule", "init_args": IMAGES},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "val_check_interval": steps,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
        },
        "sample_grid": {"lines": 1},
    }
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps(config))
    main(["fit", "--config", str(file), f"--trainer.default_root_dir={folder}"])
    return folder
