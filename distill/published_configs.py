"""Configs of the published models that the recipes name: what a plan builds them from where their files are not at hand.

By path, as a recipe gives it, and by file in it. A key that is missing has the default of the model's class, which is what the
published file says. For Stable Diffusion the numbers of parameters are held to the published ones by tests/test_plan_states.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

UNET = "UNet2DConditionModel"
DDPM_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD15_UNET = {"_class_name": UNET, "sample_size": 64, "cross_attention_dim": 768}
SD21_UNET = {
    "_class_name": UNET,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SDXL_UNET = {
    "_class_name": UNET,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DDPM_CIFAR10 = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
DINO_LARGE = {
    "model_type": "dinov2",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,
    "patch_size": 14,
}
DIT_XL2 = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 32,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}


def _kl(scaling_factor: float, sample_size: int) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
    }


def _clip(width: int, layers: int, heads: int, projection: int, activation: str) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": projection,
        "hidden_act": activation,
    }


def _scheduler(name: str, **settings: Any) -> dict[str, Any]:
    return {"_class_name": name, **DDPM_BETAS, "steps_offset": 1, **settings}


def _edm(architecture: str, num_classes: int | None = None, **sizes: Any) -> dict[str, Any]:
    config = {"architecture": architecture, "num_classes": num_classes, **sizes}
    return {"config.json": {"network": "EDM", "config": config, "sigma_data": 0.5}}


CLIP_L = _clip(768, 12, 12, 768, "quick_gelu")
ADM = {"sample_size": 64, "width": 192, "multipliers": [1, 2, 3, 4], "blocks": 3, "attention": [32, 16, 8]}
EDM2_S = {
    "sample_size": 64,
    "in_channels": 3,
    "num_classes": 1000,
    "size": 192,
    "multipliers": [1, 2, 3, 4],
    "blocks": 3,
    "attention": [16, 8],
}

SD15 = {
    "unet/config.json": SD15_UNET,
    "scheduler/scheduler_config.json": _scheduler("PNDMScheduler", skip_prk_steps=True),
}

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        **SD15,
        "vae/config.json": _kl(0.18215, 512),
        "text_encoder/config.json": CLIP_L,
    },
    "stabilityai/stable-diffusion-2-1": {
        "unet/config.json": SD21_UNET,
        "scheduler/scheduler_config.json": _scheduler("DDIMScheduler", prediction_type="v_prediction"),
        "vae/config.json": _kl(0.18215, 768),
        "text_encoder/config.json": _clip(1024, 23, 16, 512, "gelu"),
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet/config.json": SDXL_UNET,
        "scheduler/scheduler_config.json": _scheduler("EulerDiscreteScheduler"),
        "vae/config.json": _kl(0.13025, 1024),
        "text_encoder/config.json": CLIP_L,
        "text_encoder_2/config.json": _clip(1280, 32, 20, 1280, "gelu"),
    },
    # What recipes leave for the next: another schedule, or a further scalar input.
    "exported/sd15_dmd2_first": SD15,
    "runs/sd15/reflow/export": {**SD15, "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler"}},
    "runs/sd15/meng/export": {**SD15, "scalar_inputs.json": {"names": ["guidance"]}},
    "google/ddpm-cifar10-32": {
        "unet/config.json": DDPM_CIFAR10,
        "scheduler/scheduler_config.json": {"_class_name": "DDPMScheduler", "beta_schedule": "linear"},
    },
    "openai/clip-vit-base-patch32": {"config.json": {"model_type": "clip"}},
    "facebook/dinov2-large": {"config.json": DINO_LARGE},
    "madebyollin/sdxl-vae-fp16-fix": {"config.json": _kl(0.13025, 512)},
    "facebook/DiT-XL-2-256": {
        "transformer/config.json": DIT_XL2,
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "beta_schedule": "linear"},
        "vae/config.json": _kl(0.18215, 256),
    },
    "weights/edm-cifar10-32x32-uncond-ve": _edm("ncsnpp"),
    "weights/edm-cifar10-32x32-uncond-vp": _edm("ddpmpp"),
    "weights/edm-cifar10-32x32-cond-vp": _edm("ddpmpp", 10),
    "weights/edm-imagenet-64x64-cond-adm": _edm("adm", 1000, **ADM),
    "weights/edm2-img64-s-1073741-0.075": {"config.json": {"network": "EDM2", "config": EDM2_S, "sigma_data": 0.5}},
}


def write_published(path: str, folder: Path) -> bool:
    """Writes the configs of ``path`` into a folder, as they lie in the published one; false if they are not known here."""
    for name, content in PUBLISHED.get(path, {}).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return path in PUBLISHED
