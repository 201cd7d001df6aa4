"""Stable Diffusion 3 and Flux: CLIP towers and a T5 side by side (Esser et al. 2403.03206; Black Forest Labs' Flux.1)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

from distill import hub
from distill.conditioners.base import PipelineConditioner
from distill.conditioners.towers import CLIP, CLIP_PROJECTED, T5, Kind, Precision, locate_towers
from distill.types import Cond


def check_length(max_length: int) -> None:
    """Raises ValueError for a number of tokens below 2: an end token and one more."""
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: give at least 2 tokens.")


class StableDiffusion3Conditioner(PipelineConditioner):
    """SD3's two conditions, as StableDiffusion3Pipeline has them.

    ``prompt_embeds``: the last but one states of both CLIP towers, side by side and filled with zeros to T5's width, and after
    them T5's states; ``pooled_prompt_embeds``: both towers' projections. T5 is not told of the padding. Null: those of "".

    Args:
        path, revision, variant, dtype, allow_pickle: see `PipelineConditioner`.
        max_length: tokens of T5.
        t5: false for zeros in the place of T5's states, which saves its 5 billion weights and is what the pipeline does without
            it; their width is then read from ``transformer/config.json``.

    Raises:
        FileNotFoundError, ValueError: see `PipelineConditioner`; CLIP towers that are wider than T5.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision | None = None,
        max_length: int = 256,
        t5: bool = True,
        allow_pickle: bool = False,
    ):
        check_length(max_length)
        super().__init__(path, self._kinds(t5), revision, variant, dtype, allow_pickle)
        self.max_length, self.t5 = max_length, t5
        first, second = self.towers[:2]
        self.width = self.towers[2].width if t5 else self._joint_width(path, revision)
        if first.width + second.width > self.width:
            raise ValueError(
                f"path={path!r}: the CLIP towers' widths {first.width} + {second.width} exceed that of T5, {self.width}: "
                "the towers do not belong together."
            )
        self.identify({"max_length": max_length, "t5": t5, "width": self.width})
        projections = [tower.encoder.config.projection_dim for tower in (first, second)]
        self.widths = {"prompt_embeds": self.width, "pooled_prompt_embeds": sum(projections)}

    @staticmethod
    def _kinds(t5: bool) -> dict[str, Kind]:
        return {"": CLIP_PROJECTED, "_2": CLIP_PROJECTED} | ({"_3": T5} if t5 else {})

    @staticmethod
    def _joint_width(path: str, revision: str | None) -> int:
        file = hub.resolve(path, revision, ["transformer/config.json"]) / "transformer/config.json"
        if not file.is_file():
            raise FileNotFoundError(f"path={path!r}: t5=false takes T5's width from transformer/config.json, which is missing.")
        return hub.read_json(file)["joint_attention_dim"]

    @classmethod
    def locate(
        cls,
        path: str,
        revision: str | None = None,
        variant: str | None = None,
        t5: bool = True,
        allow_pickle: bool = False,
    ) -> Path:
        """Fetches and checks all that the constructor will read."""
        if not t5:
            cls._joint_width(path, revision)
        return locate_towers(path, cls._kinds(t5), revision, variant, allow_pickle)

    def encode(self, prompts: list[str]) -> Cond:
        length = self.towers[0].length  # the pipeline's for both
        outputs = [tower(prompts, length, states=True)[0] for tower in self.towers[:2]]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        clip = functional.pad(clip, (0, self.width - clip.shape[-1]))
        pooled = torch.cat([output[0] for output in outputs], -1)
        if self.t5:
            states = self.towers[2](prompts, self.max_length)[0][0]
        else:
            states = clip.new_zeros(len(prompts), self.max_length, self.width)
        return {"prompt_embeds": torch.cat([clip, states], 1), "pooled_prompt_embeds": pooled}


FLUX_TOWERS = {"": CLIP, "_2": T5}


class FluxConditioner(PipelineConditioner):
    """Flux's two conditions, as FluxPipeline has them.

    ``prompt_embeds``: T5's states, T5 not being told of the padding; ``pooled_prompt_embeds``: the CLIP tower's state at the
    end of the prompt. Null: those of "".

    Args:
        path, revision, variant, dtype, allow_pickle: see `PipelineConditioner`.
        max_length: tokens of T5; 512 for Flux.1 dev, 256 for schnell.

    Raises:
        FileNotFoundError, ValueError: see `PipelineConditioner`.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision | None = None,
        max_length: int = 512,
        allow_pickle: bool = False,
    ):
        check_length(max_length)
        super().__init__(path, FLUX_TOWERS, revision, variant, dtype, allow_pickle)
        self.identify({"max_length": max_length})
        self.max_length = max_length
        clip, t5 = self.towers
        self.widths = {"prompt_embeds": t5.width, "pooled_prompt_embeds": clip.width}

    @staticmethod
    def locate(path: str, revision: str | None = None, variant: str | None = None, allow_pickle: bool = False) -> Path:
        """Fetches and checks all that the constructor will read."""
        return locate_towers(path, FLUX_TOWERS, revision, variant, allow_pickle)

    def encode(self, prompts: list[str]) -> Cond:
        clip, t5 = self.towers
        pooled = clip(prompts, clip.length)[0].pooler_output
        return {"prompt_embeds": t5(prompts, self.max_length)[0][0], "pooled_prompt_embeds": pooled}
