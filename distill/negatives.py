"""What a teacher is guided away from, when that is not always the same: negative prompts (SpeedUpNet, 2312.08887)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distill.denoiser import Denoiser
from distill.guidance import drop_conditions
from distill.types import Cond

NEGATIVE = "negative_"
PROMPT = ("prompt_embeds", "pooled_prompt_embeds", "prompt_mask")


def reads_negatives(student: Denoiser) -> bool:
    """Whether a student reads the negative prompt, by an adapter."""
    adapters = getattr(getattr(student, "network", None), "adapters", {})
    return any(getattr(adapter, "reads_negatives", False) for adapter in adapters.values())


@dataclass
class Negatives:
    """The prompts of other samples of the batch as negative prompts, and the null prompt for the rest.

    Attributes:
        null_probability: in [0, 1], share of samples that are guided away from the null prompt.

    Raises:
        ValueError: another share.
    """

    null_probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.null_probability <= 1:
            raise ValueError(f"null_probability={self.null_probability}: give a share in [0, 1].")

    def draw(self, cond: Cond, null: Cond) -> tuple[Cond, Cond]:
        """Conditions with the negative prompt of each sample, and null conditions that are these.

        Raises:
            ValueError: conditions without a prompt.
        """
        prompt = {key: value for key, value in cond.items() if key in PROMPT}
        if "prompt_embeds" not in prompt:
            raise ValueError(f"negatives: the conditions {list(cond)} hold no prompt; set it to null.")
        size = len(prompt["prompt_embeds"])
        if size == 1 and self.null_probability < 1:
            raise ValueError("negatives: a batch of one holds no other prompt; give data.batch_size of at least 2.")
        # A shift, not a permutation: no sample is then its own negative.
        shift = int(torch.randint(1, max(size, 2), ()))
        others = {key: value.roll(shift, 0) for key, value in prompt.items()}
        chosen = drop_conditions(others, {key: null[key].expand_as(others[key]) for key in others}, self.null_probability)
        null = {**null, **chosen}
        return self.of_null(cond, null), null

    def of_null(self, cond: Cond, null: Cond) -> Cond:
        """Conditions whose negative prompt is the null conditions' prompt."""
        read = {NEGATIVE + key: value for key, value in null.items() if key in PROMPT}
        return {**cond, **{key: value.expand_as(cond[key.removeprefix(NEGATIVE)]) for key, value in read.items()}}
