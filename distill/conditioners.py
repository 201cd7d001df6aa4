"""Conditioners: prompts become the conditions that networks read, as the pipelines of each family encode them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from distill.types import Cond


class Conditioner(nn.Module, ABC):
    """Turns prompts into conditions. Never trained by a method.

    Attributes:
        widths: size of the last dimension of each condition that it makes, ``{"prompt_embeds": 768}``.
        identity: ``path`` and ``sha256`` of configs, tokenizers and weights, or None for one without weights.
    """

    widths: dict[str, int]
    identity: dict[str, str] | None = None

    @abstractmethod
    def forward(self, prompts: list[str]) -> tuple[Cond, Cond]:
        """Conditions and null conditions of the prompts, float32 on this module's device; both ``(b, ...)``.

        The null conditions are views of one row, expanded to the batch: computed once, not for every sample.
        """
