"""diffusers' ``DiTTransformer2DModel`` (Peebles & Xie 2212.09748): latents of ImageNet's classes, learned variance."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.networks.base import DiffusersNetwork
from distill.networks.bottleneck import Bottleneck, Layer, transformer_bottleneck
from distill.types import Cond, Sample, Time


class DiT(DiffusersNetwork):
    """Reads ``labels`` ``(b,)``; the null class is ``num_embeds_ada_norm``, the one after the last.

    Only square samples are put together again from their patches, and the published models know one size: it is fixed.
    """

    model_class, component = "DiTTransformer2DModel", "transformer"

    def _wrap(self, model: Any) -> None:
        super()._wrap(model)
        # In training mode diffusers replaces a tenth of the labels by the null class, anew in every block. Here conditions
        # are what they are said to be: who wants to drop them does so in the batch.
        for embedding in self._embeddings():
            embedding.class_embedder.dropout_prob = 0.0

    def read_config(self, config: Any) -> None:
        self.shape = self.native_shape = (config.in_channels, *self.sample_size(config))
        self.num_classes = config.num_embeds_ada_norm

    def _embeddings(self) -> list[Any]:
        """Every block has its own embedding of time and label; the first block's serves the output layer too."""
        return [block.norm1.emb for block in self.model.transformer_blocks]

    def time_embedding(self) -> tuple[nn.Module, int]:
        first = self._embeddings()[0].timestep_embedder
        return first, first.linear_1.in_features

    def class_embedding(self) -> tuple[nn.Module, int] | None:
        first = self._embeddings()[0].class_embedder
        return first, first.embedding_table.embedding_dim

    def add_scalar_input(self, name: str) -> None:
        if name in self.scalars:
            return
        super().add_scalar_input(name)
        scalar: Any = self.scalars[name]
        for embedding in self._embeddings()[1:]:
            scalar.add_to(embedding.timestep_embedder)

    def units(self) -> list[nn.Module]:
        """All blocks but the first, whose embedding the output layer reads."""
        return list(self.model.transformer_blocks[1:])

    def bottleneck(self, layer: Layer = "middle") -> Bottleneck:
        return transformer_bottleneck(
            self.model.transformer_blocks, self.model.config, self.native_shape, self.model.config.patch_size
        )

    def predict(self, x: Sample, time: Time, cond: Cond) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"samples of shape {tuple(x.shape[1:])}: this {self.model_class} takes {self.shape} alone.")
        return self.model(x, time, class_labels=cond["labels"]).sample
