"""Tiny autoencoders of the real classes with random weights, in the folder of a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def kl(folder: str | Path, name: str = "vae", channels: int = 3, latent_channels: int = 4, seed: int = 0, **config: Any) -> Any:
    """Writes ``folder/name`` and returns an AutoencoderKL that turns 4x4 pixels into one element."""
    from diffusers import AutoencoderKL

    model = _seeded(
        lambda: AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 8, 8),
            latent_channels=latent_channels,
            norm_num_groups=2,
            sample_size=16,
            **config,
        ),
        seed,
    )
    model.save_pretrained(Path(folder) / name)
    return model


def deep_compression(folder: str | Path, name: str = "vae", seed: int = 0) -> Any:
    """Writes ``folder/name`` and returns an AutoencoderDC that turns 4x4 pixels into one element."""
    from diffusers import AutoencoderDC

    blocks = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {"block_types": "ResBlock", "block_out_channels": (8, 8, 8), "qkv_multiscales": ((), (), ())}.items()
    }
    layers = {"encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1)}
    model = _seeded(
        lambda: AutoencoderDC(latent_channels=2, attention_head_dim=4, scaling_factor=0.41407, **blocks, **layers), seed
    )
    model.save_pretrained(Path(folder) / name)
    return model


def tiny(folder: str | Path, name: str = "vae", seed: int = 0, **config: Any) -> Any:
    """Writes ``folder/name`` and returns an AutoencoderTiny that turns 4x4 pixels into one element."""
    from diffusers import AutoencoderTiny

    model = _seeded(
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            latent_channels=4,
            **config,
        ),
        seed,
    )
    model.save_pretrained(Path(folder) / name)
    return model


def _seeded(make: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()
