"""What a conditioner is, and what those that read a pipeline's text towers share."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import hub
from distill.conditioners.towers import Kind, Precision, TextTower, locate_towers
from distill.types import Cond


class Conditioner(nn.Module, ABC):
    """Turns prompts into conditions. Never trained by a method.

    Attributes:
        widths: size of the last dimension of each condition that it makes, ``{"prompt_embeds": 768}``.
        identity: ``path`` and ``sha256`` of configs, tokenizers, weights and settings, or None for one without weights.
    """

    widths: dict[str, int]
    identity: dict[str, str] | None = None

    @abstractmethod
    def forward(self, prompts: list[str]) -> tuple[Cond, Cond]:
        """Conditions and null conditions of the prompts, float32 on this module's device; both ``(b, ...)``.

        The null conditions are views of one row, expanded to the batch: computed once, not for every sample.
        """


def check_prompts(prompts: Any) -> None:
    """Raises ValueError for what is not a list of texts, or an empty one."""
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValueError(f"prompts={prompts!r}: give a list with at least one text.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts[{index}]={prompt!r} is a {type(prompt).__name__}: give texts ('' for none).")


class PipelineConditioner(Conditioner, ABC):
    """Reads the tokenizers and text encoders of a pipeline's folder.

    Frozen, in evaluation mode for good and never under autocast: encoders compute in ``dtype``. Prompts that are too long are
    cut, as pipelines do.

    Args:
        path: a pipeline's folder, or a hub id.
        towers: what the folder must have, by the ending of its sub-folders' names: "" for ``tokenizer`` and ``text_encoder``,
            "_2" for ``tokenizer_2`` and ``text_encoder_2``.
        revision: of a hub repository.
        variant: of the weights' files, ``fp16`` for instance.
        dtype: precision in which encoders compute, float32 unless given.
        allow_pickle: whether weights may be a ``.bin`` file where there are no safetensors.

    Raises:
        FileNotFoundError: a missing folder, tokenizer, config or weights.
        ValueError: encoders of another kind, incomplete weights, or transformers is not installed.
    """

    towers: Any

    def __init__(
        self,
        path: str,
        towers: Mapping[str, Kind],
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision | None = None,
        allow_pickle: bool = False,
    ):
        super().__init__()
        self.root = locate_towers(path, towers, revision, variant, allow_pickle)
        self.towers = nn.ModuleList(
            TextTower(self.root, ending, kind, variant, dtype, allow_pickle) for ending, kind in towers.items()
        )
        parts = [f"tokenizer{ending}" for ending in towers]
        for ending in towers:
            parts += hub.component_files(self.root, f"text_encoder{ending}", variant, allow_pickle)
        self.identity = hub.identity(path, self.root, parts)
        self._null: Cond | None = None

    def identify(self, settings: Mapping[str, Any]) -> None:
        """Adds settings that change the conditions to ``identity``: the sha256 is over weights and settings."""
        assert self.identity is not None
        text = json.dumps(settings, sort_keys=True)
        both = hashlib.sha256((self.identity["sha256"] + text).encode()).hexdigest()
        self.identity = self.identity | {"sha256": both, "settings": text}

    @abstractmethod
    def encode(self, prompts: list[str]) -> Cond:
        """Conditions of the prompts, ``(b, ...)``."""

    def encode_null(self) -> Cond:
        """The row ``(1, ...)`` that stands for "no prompt"."""
        return self.encode([""])

    @property
    def device(self) -> torch.device:
        """Where the encoders are."""
        return next(self.parameters()).device

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> tuple[Cond, Cond]:
        check_prompts(prompts)
        cond = _float(self.encode(list(prompts)))
        if self._null is None:
            self._null = _float(self.encode_null())
        return cond, {name: row.expand(len(prompts), *row.shape[1:]) for name, row in self._null.items()}

    def train(self, mode: bool = True) -> PipelineConditioner:
        """Stays in evaluation mode: T5 would drop out."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PipelineConditioner:
        self._null = None  # it was computed elsewhere, or in another precision
        return super()._apply(fn, recurse)

    def rows(self, values: Sequence[int | float], count: int) -> Tensor:
        """The same numbers for each of ``count`` samples, ``(count, len(values))``."""
        return torch.tensor(values, dtype=torch.float32, device=self.device).repeat(count, 1)


def _float(cond: Cond) -> Cond:
    return {name: value.float() for name, value in cond.items()}


def pipeline_config(root: Path) -> dict[str, Any]:
    """What a pipeline's folder says of itself in ``model_index.json``; empty if it has none."""
    file = root / "model_index.json"
    return hub.read_json(file) if file.is_file() else {}
