"""What the recipes in configs/captions need of one another, untrained: parts and a teacher of the shapes that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_text

from distill.denoiser import NetworkDenoiser
from distill.networks.unet2d_condition import UNet2DCondition
from distill.pretrained import save_denoiser
from distill.schedules import VariancePreserving

WIDTH = 64
"""Of the text tower, which the U-Net of configs/captions/teacher.yaml reads."""

AUTOENCODER: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "sample_size": 8,
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
}

UNET: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
}


def write_captions(runs: Path) -> None:
    """``autoencoder/export``, ``clip/export`` and ``teacher/export`` in ``runs``, which stands for ``runs/captions``."""
    from diffusers import AutoencoderKL

    AutoencoderKL(**AUTOENCODER).save_pretrained(runs / "autoencoder/export/vae")
    tiny_text.clip_tokenizer(runs / "clip/export")
    tiny_text.clip_text_model(runs / "clip/export", width=WIDTH)
    schedule = VariancePreserving("scaled_linear", 0.00085, 0.012)
    save_denoiser(NetworkDenoiser(UNet2DCondition(UNET), schedule, "eps"), runs / "teacher/export")
