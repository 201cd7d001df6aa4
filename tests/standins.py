"""Tiny random teachers in the places where the tiny overrides of full-size recipes look for them (``runs/tiny/<name>``)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import tiny_captions
import tiny_codecs
import tiny_text
import torch
from families import FAMILIES

from distill.classifier import ConvClassifier
from distill.denoiser import NetworkDenoiser
from distill.edm_checkpoints import save_edm
from distill.networks.edm import EDM
from distill.schedules import VarianceExploding


def write_sd15(folder: Path, family: str = "sd15") -> None:
    """A whole Stable Diffusion 1.x pipeline but its safety checker: network, scheduler, text tower, tokenizer, autoencoder."""
    FAMILIES[family].save(folder)
    tiny_text.clip_tokenizer(folder)
    tiny_text.clip_text_model(folder, width=FAMILIES[family].config["cross_attention_dim"])
    tiny_codecs.kl(folder)


def write_sdxl(folder: Path) -> None:
    """A whole Stable Diffusion XL pipeline: two towers whose widths add up to the network's."""
    FAMILIES["sdxl"].save(folder)
    tiny_text.clip_tokenizer(folder)
    tiny_text.clip_tokenizer(folder, "tokenizer_2", pad="!")
    tiny_text.clip_text_model(folder, width=4)
    tiny_text.clip_text_model(folder, "text_encoder_2", width=8, projection=10)
    tiny_codecs.kl(folder)


def write_dit(folder: Path) -> None:
    """DiT with its autoencoder."""
    FAMILIES["dit"].save(folder)
    tiny_codecs.kl(folder)


def write_edm(folder: Path, num_classes: int | None = None) -> None:
    """A converted EDM network of 8x8 pixels."""
    torch.manual_seed(0)
    network = EDM(8, 3, num_classes, "ddpmpp", 16, (1, 2), 1, (4,))
    save_edm(NetworkDenoiser(network, VarianceExploding(), "edm"), folder)


WRITERS = {
    "sd15": write_sd15,
    "sd21": partial(write_sd15, family="sd2"),
    "sdxl": write_sdxl,
    "dit": write_dit,
    "captions": tiny_captions.write_captions,
    "edm_cifar10": write_edm,
    "edm_imagenet64": partial(write_edm, num_classes=10),
    "classifier": ConvClassifier(3, 8, 10, (4, 8), 16).save,
}


def write_standins(root: Path) -> None:
    """All of them under ``root``."""
    for name, write in WRITERS.items():
        write(root / name)
