"""Stable Diffusion 1.x, 2.x and XL: one or two CLIP towers (Rombach et al. 2112.10752; Podell et al. 2307.01952)."""

from __future__ import annotations

from pathlib import Path

import torch

from distill.conditioners.base import PipelineConditioner, pipeline_config
from distill.conditioners.towers import CLIP, CLIP_PROJECTED, Precision, locate_towers
from distill.types import Cond

SDXL_TOWERS = {"": CLIP, "_2": CLIP_PROJECTED}


class ClipConditioner(PipelineConditioner):
    """``prompt_embeds``: the last states of one CLIP tower, as StableDiffusionPipeline has them. Null: those of "".

    Args:
        path, revision, variant, dtype, allow_pickle: see `PipelineConditioner`.
        clip_skip: layers left out at the tower's end, 0 for none. The null condition leaves none out, as in the pipeline.

    Raises:
        FileNotFoundError, ValueError: see `PipelineConditioner`; more layers left out than there are.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision | None = None,
        clip_skip: int = 0,
        allow_pickle: bool = False,
    ):
        super().__init__(path, {"": CLIP}, revision, variant, dtype, allow_pickle)
        layers = self.towers[0].encoder.config.num_hidden_layers
        if not 0 <= clip_skip < layers:
            raise ValueError(f"clip_skip={clip_skip}: give 0 to {layers - 1}, the tower has {layers} layers.")
        self.identify({"clip_skip": clip_skip})
        self.clip_skip, self.widths = clip_skip, {"prompt_embeds": self.towers[0].width}

    @staticmethod
    def locate(path: str, revision: str | None = None, variant: str | None = None, allow_pickle: bool = False) -> Path:
        """Fetches and checks all that the constructor will read."""
        return locate_towers(path, {"": CLIP}, revision, variant, allow_pickle)

    def encode(self, prompts: list[str]) -> Cond:
        return self._encode(prompts, self.clip_skip)

    def encode_null(self) -> Cond:
        return self._encode([""], 0)

    def _encode(self, prompts: list[str], skip: int) -> Cond:
        tower = self.towers[0]
        masked = getattr(tower.encoder.config, "use_attention_mask", False)
        output, _ = tower(prompts, tower.length, masked, states=skip > 0)
        if skip == 0:
            return {"prompt_embeds": output[0]}
        body = getattr(tower.encoder, "text_model", tower.encoder)  # transformers 5 does without that level
        return {"prompt_embeds": body.final_layer_norm(output.hidden_states[-(skip + 1)])}


class StableDiffusionXLConditioner(PipelineConditioner):
    """SDXL's three conditions, as StableDiffusionXLPipeline has them.

    ``prompt_embeds``: the last but one states of both towers, side by side; ``pooled_prompt_embeds``: the projection of the
    second; ``time_ids``: original height and width, top and left of the crop, target height and width. Null: zeros where the
    pipeline says ``force_zeros_for_empty_prompt``, else those of ""; the same ``time_ids``.

    Args:
        path, revision, variant, dtype, allow_pickle: see `PipelineConditioner`.
        target_size: height and width that are asked for, the same for all samples; null if the data delivers ``time_ids`` of
            each sample.
        original_size: of the image before it was resized; null for ``target_size``.
        crop: top and left of the crop.

    Raises:
        FileNotFoundError, ValueError: see `PipelineConditioner`; an ``original_size`` without ``target_size``.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision | None = None,
        target_size: tuple[int, int] | None = (1024, 1024),
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        allow_pickle: bool = False,
    ):
        if target_size is None and original_size is not None:
            raise ValueError(f"original_size={original_size} with target_size=null: give both, or neither.")
        super().__init__(path, SDXL_TOWERS, revision, variant, dtype, allow_pickle)
        self.time_ids = None if target_size is None else [*(original_size or target_size), *crop, *target_size]
        self.zeros = pipeline_config(self.root).get("force_zeros_for_empty_prompt", True)
        self.identify({"time_ids": self.time_ids, "force_zeros_for_empty_prompt": self.zeros})
        first, second = self.towers
        self.widths = {
            "prompt_embeds": first.width + second.width,
            "pooled_prompt_embeds": second.encoder.config.projection_dim,
        }
        if self.time_ids is not None:
            self.widths["time_ids"] = len(self.time_ids)

    @staticmethod
    def locate(path: str, revision: str | None = None, variant: str | None = None, allow_pickle: bool = False) -> Path:
        """Fetches and checks all that the constructor will read."""
        return locate_towers(path, SDXL_TOWERS, revision, variant, allow_pickle)

    def encode(self, prompts: list[str]) -> Cond:
        outputs = [tower(prompts, tower.length, states=True)[0] for tower in self.towers]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return self._with_ids({"prompt_embeds": embeds, "pooled_prompt_embeds": outputs[1][0]})

    def encode_null(self) -> Cond:
        if not self.zeros:
            return self.encode([""])
        embeds = torch.zeros(1, self.towers[0].length, self.widths["prompt_embeds"], device=self.device)
        pooled = torch.zeros(1, self.widths["pooled_prompt_embeds"], device=self.device)
        return self._with_ids({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def _with_ids(self, cond: Cond) -> Cond:
        if self.time_ids is None:
            return cond
        return cond | {"time_ids": self.rows(self.time_ids, len(cond["prompt_embeds"]))}
