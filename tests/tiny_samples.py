"""Numbered pictures and a recipe with a tiny space, for what is encoded beforehand."""

from __future__ import annotations

from pathlib import Path

import tiny_codecs
import tiny_text
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.ordered import OrderedDataModule
from distill.types import Batch, DataSpec, label_conditions

RECIPE = """
model:
  class_path: DenoisingTraining
  init_args:
    student:
      class_path: NetworkDenoiser
      init_args:
        network: {{class_path: UNet2D, init_args: {{in_channels: 4, sample_size: 4, channels: [8, 16]}}}}
        schedule: RectifiedFlow
    times: UniformTimes
    space: {space}
data:
  class_path: tiny_samples.NumberedPictures
  init_args: {{captions: {captions}}}
"""


class NumberedPictures(OrderedDataModule):
    """3x8x8 pictures of their own number, of which ``skip`` are not trained on, with labels or captions."""

    def __init__(self, size: int = 7, skip: int = 0, captions: bool = False, classes: int | None = None, batch_size: int = 2):
        super().__init__(batch_size, 0, 0, 3, 4)
        self.size, self.skip = size, skip
        self.spec = DataSpec((3, 8, 8), classes, captions)

    def rows(self) -> Dataset:
        return Rows(self.spec)

    def training_items(self) -> Tensor:
        return torch.arange(self.skip, self.size)

    def evaluation_items(self) -> Tensor:
        return torch.arange(self.size)

    def examples(self, count: int) -> Batch:
        raise NotImplementedError


class Rows(Dataset):
    def __init__(self, spec: DataSpec):
        self.spec = spec

    def __getitem__(self, items: Tensor) -> Batch:
        images = torch.stack([picture(item) for item in items.tolist()])
        classes = self.spec.num_classes
        cond, null = label_conditions(items % classes, classes) if classes else ({}, {})
        return Batch(images, cond, null, prompts=[caption(item) for item in items.tolist()] if self.spec.prompts else None)


def picture(number: int) -> Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(number)) * 2 - 1


def caption(number: int) -> str:
    return f"a photo of the digit {tiny_text.WORDS[5 + number % 10]}"


def towers(folder: Path, seed: int = 0) -> Path:
    """A folder with a vae (2x4x4 latents of 3x8x8) and a CLIP tower."""
    tiny_codecs.kl(folder, latent_channels=2, seed=seed)
    tiny_text.clip_tokenizer(folder)
    tiny_text.clip_text_model(folder, width=8)
    return folder


def recipe(file: Path, folder: Path, captions: bool = True, space: str | None = None) -> Path:
    """A recipe whose space is in ``folder``."""
    codec = f"{{class_path: AutoencoderKLCodec, init_args: {{path: {folder}}}}}"
    conditioner = f"{{class_path: ClipConditioner, init_args: {{path: {folder}}}}}" if captions else "null"
    space = space or f"{{codec: {codec}, conditioner: {conditioner}}}"
    file.write_text(RECIPE.format(space=space, captions=str(captions).lower()))
    return file
