"""The pictures of a folder, with the captions beside them."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.types import Batch, DataSpec

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Pictures(Dataset):
    """Pictures of a folder and its sub-folders, in the order of their names, as batches in [-1, 1].

    Args:
        folder: the pictures; ``a.txt`` beside ``a.png`` is its caption, and either all have one or none.
        size: shorter sides are resized to it, the middle is kept.

    Raises:
        FileNotFoundError: no folder, no pictures, a picture without a caption where others have one.
    """

    def __init__(self, folder: str, size: int):
        self.size = size
        self.files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in PICTURES)
        if not self.files:
            raise FileNotFoundError(f"images={folder!r}: there are no pictures ({', '.join(PICTURES)}).")
        bare = [file for file in self.files if not file.with_suffix(".txt").is_file()]
        if bare and len(bare) < len(self.files):
            raise FileNotFoundError(f"{bare[0].with_suffix('.txt')}: missing, though other pictures have captions.")
        self.spec = DataSpec((3, size, size), prompts=not bare)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, items: Tensor) -> Batch:
        """The batch of the pictures with the numbers ``items`` ``(b,)``."""
        files = [self.files[item] for item in items.tolist()]
        prompts = [file.with_suffix(".txt").read_text().strip() for file in files] if self.spec.prompts else None
        return Batch(torch.stack([self.read(file) for file in files]), {}, {}, prompts=prompts)

    def read(self, file: Path) -> Tensor:
        """One picture ``(3, size, size)``."""
        from PIL import Image, ImageOps

        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            square = ImageOps.fit(upright, (self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(numpy.array(square)).permute(2, 0, 1) / 127.5 - 1
