"""Tiny random teachers in the places where the tiny overrides of full-size recipes look for them (``runs/tiny/<name>``)."""

from __future__ import annotations

from pathlib import Path

import tiny_captions
import tiny_codecs
import tiny_text
from families import FAMILIES


def write_sd15(folder: Path) -> None:
    """A whole Stable Diffusion 1.x pipeline but its safety checker: network, scheduler, text tower, tokenizer, autoencoder."""
    FAMILIES["sd15"].save(folder)
    tiny_text.clip_tokenizer(folder)
    tiny_text.clip_text_model(folder, width=FAMILIES["sd15"].config["cross_attention_dim"])
    tiny_codecs.kl(folder)


def write_sdxl(folder: Path) -> None:
    """A whole Stable Diffusion XL pipeline: two towers whose widths add up to the network's."""
    FAMILIES["sdxl"].save(folder)
    tiny_text.clip_tokenizer(folder)
    tiny_text.clip_tokenizer(folder, "tokenizer_2", pad="!")
    tiny_text.clip_text_model(folder, width=4)
    tiny_text.clip_text_model(folder, "text_encoder_2", width=8, projection=10)
    tiny_codecs.kl(folder)


WRITERS = {"sd15": write_sd15, "sdxl": write_sdxl, "captions": tiny_captions.write_captions}


def write_standins(root: Path) -> None:
    """All of them under ``root``."""
    for name, write in WRITERS.items():
        write(root / name)
