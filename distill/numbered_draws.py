"""What is drawn of a teacher beforehand, pairs and trajectories: each a function of a seed, its number and its conditions."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import nn

from distill.denoiser import Denoiser
from distill.frozen import Frozen
from distill.guidance import GuidanceRule, check_range, guided
from distill.samplers import Sampler
from distill.space import ModelSpace
from distill.types import Batch, Cond, Labels, PerSample


class NumberedDraws(ABC):
    """A teacher, how it is guided and sampled, and numbered draws of it.

    Args:
        teacher: the denoiser that is drawn of; its file's hash is stored with the draws.
        sampler: makes samples of noise.
        steps: of the sampler.
        space: codec and conditioner of the teacher; None for one that works on pixels and reads no prompts.
        guidance: of the teacher; None for none.
        guidance_range: lowest and highest guidance scale, of which one is drawn for each number, uniform, at which ``guidance``
            (None: classifier-free) guides; None for the scale of ``guidance``.
        seed: of all that is drawn.

    Attributes:
        each: samples of each number.

    Raises:
        ValueError: an argument out of its range.
    """

    each: int = 1

    def __init__(
        self,
        teacher: Denoiser,
        sampler: Sampler,
        steps: int,
        space: ModelSpace | None,
        guidance: GuidanceRule | None,
        guidance_range: tuple[float, float] | None,
        seed: int,
    ):
        for key, value, least in (("steps", steps, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{key}={value}: give at least {least}.")
        if guidance_range is not None:
            check_range(guidance_range, guidance)
        self.frozen, self.space = Frozen(teacher), space or ModelSpace()
        self.sampler, self.steps, self.seed = sampler, steps, seed
        self.guidance, self.guidance_range = guidance, guidance_range

    @property
    def teacher(self) -> Denoiser:
        """The teacher, never trained."""
        return self.frozen.module

    @property
    def device(self) -> torch.device:
        """Where the teacher is."""
        return next(self.teacher.parameters(), torch.empty(0)).device

    def to(self, device: torch.device | str) -> NumberedDraws:
        """Moves the networks to where they shall compute."""
        for part in (self.frozen, self.space, self.guidance):
            if isinstance(part, nn.Module):  # a rule is one if it has a network of its own
                part.to(device)
        return self

    @abstractmethod
    def draw(self, numbers: Labels, batch: Batch, shape: tuple[int, ...]) -> Batch:
        """The samples with these numbers ``(b,)``, `each` one after another of every number, encoded, on the device.

        Args:
            numbers: 0 or more.
            batch: what they are to show, in pixels and prompts or encoded.
            shape: of a sample in model space.
        """

    def encode(self, numbers: Labels, batch: Batch) -> Batch:
        """The batch on the device, in model space."""
        state = numpy.random.SeedSequence((self.seed, int(numbers[0]))).generate_state(1)
        torch.manual_seed(int(state[0]))  # a codec draws its latents from torch's global generator
        return self.space.encode(move_data_to_device(batch, self.device))

    def guided(self, numbers: Labels, batch: Batch) -> tuple[Denoiser, Cond]:
        """The teacher as it is sampled for these numbers, and its conditions, with ``guidance`` where scales are drawn.

        A teacher that reads that condition is given it, another is guided by the rule.
        """
        if self.guidance_range is None:
            return (self.teacher if self.guidance is None else self.guidance(self.teacher, batch.null)), batch.cond
        scales = self.scales(numbers).to(next(iter(batch.cond.values()), numbers).device)
        denoiser, cond = guided(self.teacher, batch.cond, batch.null, scales, self.guidance)
        return denoiser, cond | {"guidance": scales}

    def scales(self, numbers: Labels) -> PerSample:
        """The guidance scales ``(b,)``, from (seed, number); not of the stream that the noise comes from."""
        assert self.guidance_range is not None
        low, high = self.guidance_range
        states = [numpy.random.SeedSequence((self.seed, number)).generate_state(1)[0] for number in numbers.tolist()]
        return torch.tensor([low + (high - low) * int(state) / 2**32 for state in states])
