"""Contrastive training of a text tower and an image tower (CLIP, Radford et al. 2103.00020, figure 3).

    L = ( E_i -log softmax_j(s u_i . v_j)_i + E_j -log softmax_i(s u_i . v_j)_j ) / 2
    u, v: (b, d), of length 1, embeddings of images and of their texts; s: a learnt scale <= 100

Captions repeat in a batch here. That all images of an equal text are its positives needs no other loss: equal texts have equal
v, and then spreading the targets over them (Yang et al. 2204.03610, eq. 3 and 4) gives the same number; its least value is not
0 but the mean logarithm of how often a text is there. The text tower is what is kept.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from distill.byte_pairs import make_clip_tokenizer
from distill.methods.trained import TrainedModule
from distill.optimization import Optimization
from distill.types import Batch, DataSpec, Losses

Embedding = Float[Tensor, "b d"]
FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0
"""Of the logits (2103.00020, section 2.5)."""


def contrastive_loss(images: Embedding, texts: Embedding, scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Symmetric cross-entropy of embeddings of any length; row i of both is a pair."""
    logits = scale * normalize(images, dim=-1) @ normalize(texts, dim=-1).T
    pairs = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


class TwoTowers(nn.Module):
    """transformers' ``CLIPTextModel`` and ``CLIPVisionModel``, a projection of each, and the scale of the logits."""

    def __init__(self, text: Any, image: Any, dimension: int):
        super().__init__()
        from transformers import CLIPTextModel, CLIPVisionModel

        self.text: Any = CLIPTextModel(text)
        self.image: Any = CLIPVisionModel(image)
        self.text_projection = nn.Linear(text.hidden_size, dimension, bias=False)
        self.image_projection = nn.Linear(image.hidden_size, dimension, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    def scale(self) -> Tensor:
        """Scale of the logits, at most 100."""
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """``(n, d)`` of tokens ``(n, length)``."""
        return self.text_projection(self.text(tokens).pooler_output)

    def embed_images(self, images: Tensor) -> Tensor:
        """``(n, d)`` of images ``(n, c, h, w)`` in [-1, 1]."""
        return self.image_projection(self.image(images).pooler_output)


class TextImageTraining(TrainedModule):
    """Trains CLIP's two towers on images with captions; exported are ``tokenizer/`` and ``text_encoder/``.

    Args:
        corpus: words that become tokens of their own; texts of other words are spelt in bytes.
        text, image: keywords of ``CLIPTextConfig`` and ``CLIPVisionConfig``.
        optimization: see `TrainedModule`.
        length: tokens that a text is padded and cut to (77 in CLIP).
        dimension: d, of the common space.
    """

    student: TwoTowers

    def __init__(
        self,
        corpus: str,
        text: dict[str, Any],
        image: dict[str, Any],
        optimization: Optimization,
        length: int = 77,
        dimension: int = 64,
    ):
        from transformers import CLIPTextConfig, CLIPVisionConfig

        tokenizer = make_clip_tokenizer(corpus, length)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        text_config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=length, **ids, **text)
        super().__init__(TwoTowers(text_config, CLIPVisionConfig(**image), dimension), optimization)
        self.tokenizer = tokenizer

    def tokens(self, texts: list[str]) -> Tensor:
        """``(len(texts), length)`` on this module's device."""
        padded = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return padded.input_ids.to(self.device)

    def losses(self, batch: Batch) -> Losses:
        assert batch.x0 is not None and batch.prompts is not None
        texts, own = _distinct(batch.prompts, self.device)
        embedded = self.student.embed_texts(self.tokens(texts))[own]
        loss = contrastive_loss(self.student.embed_images(batch.x0), embedded, self.student.scale())
        return {"loss": loss, "scale": self.student.scale()}

    def check_data(self, spec: DataSpec) -> None:
        config = self.student.image.config
        shape = (config.num_channels, config.image_size, config.image_size)
        if not spec.prompts or spec.shape != shape:
            raise ValueError(
                f"model.image reads images of shape {shape} with captions, but data delivers {spec.shape} "
                f"{'with' if spec.prompts else 'without'} captions: set data.captions, or give another model.image."
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch.x0 is not None and batch.prompts is not None
        texts, own = _distinct(batch.prompts, self.device)
        towers = self.ema.module
        logits = towers.embed_images(batch.x0) @ normalize(towers.embed_texts(self.tokens(texts)), dim=-1).T
        # The share of images that are nearer to their own caption than to any other.
        self.log("val/accuracy", (logits.argmax(1) == own).float().mean(), batch_size=len(batch))

    def export(self, folder: Path, data: LightningDataModule) -> None:
        """Writes ``folder/tokenizer`` and ``folder/text_encoder``."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.ema.module.text.save_pretrained(folder / "text_encoder")


def _distinct(texts: list[str], device: torch.device) -> tuple[list[str], Tensor]:
    """The distinct texts in order, and the place of each text among them ``(len(texts),)``."""
    distinct = sorted(set(texts))
    places = {text: place for place, text in enumerate(distinct)}
    return distinct, torch.tensor([places[text] for text in texts], device=device)
