"""Noise-sample pairs of a teacher, of which reflow learns (Liu et al. 2209.03003): what its sampler makes of numbered noise, or
the noise that its flow leads to from data (rf++, Lee et al. 2405.20320, section 4.3)."""

from __future__ import annotations

from dataclasses import replace

import numpy
import torch
from pytorch_lightning.utilities import move_data_to_device

from distill.anchored import AnchoredGuidance
from distill.denoiser import Denoiser
from distill.frozen import Frozen
from distill.guidance import ClassifierFreeGuidance, GuidanceRule
from distill.inversion import invert
from distill.noise import SeededNoise
from distill.samplers import OdeSampler, Sampler
from distill.space import ModelSpace
from distill.types import Batch, Cond, Labels, PerSample


class NoisePairs:
    """Draws the pairs of a teacher. Pair i is a function of the seed, of i and of its conditions.

    Args:
        teacher: the denoiser whose pairs they are; its file's hash is stored with them.
        sampler: makes samples of noise; with ``invert`` an `OdeSampler`, whose solver and grid are run upwards.
        steps: of the sampler.
        space: codec and conditioner of the teacher; null for a teacher that works on pixels and reads no prompts.
        guidance: of the teacher; null for none.
        guidance_range: lowest and highest guidance scale; one is drawn for each pair, uniform, and stored with it as condition
            ``guidance``. A teacher that reads that condition is given it, another is guided classifier-free.
        anchored: guidance whose null conditions are optimised, instead of ``guidance``; with an `OdeSampler`.
        seed: of the noise and of all that is drawn.
        invert: pairs of the data's own samples, with the noise that the ODE leads to from them.

    Raises:
        ValueError: an argument out of its range, or two that exclude each other.
    """

    def __init__(
        self,
        teacher: Denoiser,
        sampler: Sampler,
        steps: int,
        space: ModelSpace | None = None,
        guidance: GuidanceRule | None = None,
        guidance_range: tuple[float, float] | None = None,
        anchored: AnchoredGuidance | None = None,
        seed: int = 0,
        invert: bool = False,
    ):
        for key, value, least in (("steps", steps, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{key}={value}: give at least {least}.")
        if guidance_range is not None and not 0 <= guidance_range[0] < guidance_range[1]:
            raise ValueError(f"guidance_range={list(guidance_range)}: give 0 <= low < high, or guidance for one scale.")
        ways = {"guidance": guidance, "guidance_range": guidance_range, "anchored": anchored}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]}={ways[given[0]]}: {given[1]} is given too; set all but one to null.")
        if anchored is not None and invert:
            raise ValueError("invert=true: anchored guidance is of samples from noise; set anchored to null.")
        if (invert or anchored is not None) and not isinstance(sampler, OdeSampler):
            raise ValueError(f"sampler={type(sampler).__name__}: invert and anchored follow an ODE; give an OdeSampler.")
        self.frozen, self.space = Frozen(teacher), space or ModelSpace()
        self.sampler, self.steps, self.seed, self.invert = sampler, steps, seed, invert
        self.guidance, self.guidance_range, self.anchored = guidance, guidance_range, anchored

    @property
    def teacher(self) -> Denoiser:
        """The teacher, never trained."""
        return self.frozen.module

    def to(self, device: torch.device | str) -> NoisePairs:
        """Moves the networks to where they shall compute."""
        self.frozen.to(device)
        self.space.to(device)
        return self

    @torch.no_grad()
    def draw(self, numbers: Labels, batch: Batch, shape: tuple[int, ...]) -> Batch:
        """The pairs with these numbers ``(b,)``, encoded, on the device: ``x0``, ``noise``, conditions, null conditions.

        Args:
            numbers: of the pairs, 0 or more.
            batch: what they are to show, in pixels and prompts or encoded; its samples are read only to be inverted.
            shape: of a sample in model space.
        """
        device = next(self.teacher.parameters(), torch.empty(0)).device
        state = numpy.random.SeedSequence((self.seed, int(numbers[0]))).generate_state(1)
        torch.manual_seed(int(state[0]))  # a codec draws its latents from torch's global generator
        ready = self.space.encode(move_data_to_device(batch, device))
        denoiser, cond = self.guided(numbers, ready)
        if self.invert:
            assert isinstance(self.sampler, OdeSampler) and ready.x0 is not None
            noise = invert(denoiser, ready.x0, cond, self.sampler.solver, self.sampler.grid, self.steps)
            return replace(ready, cond=cond, noise=noise)
        fresh = SeededNoise(self.seed, numbers.tolist(), shape)
        noise = fresh.draw(device)
        if self.anchored is not None:
            assert isinstance(self.sampler, OdeSampler)
            x0 = self.anchored.sample(denoiser, ready.null, self.sampler, noise, cond, self.steps)
        else:
            x0 = self.sampler(denoiser, noise, cond, self.steps, fresh)
        return replace(ready, x0=x0, cond=cond, noise=noise)

    def guided(self, numbers: Labels, batch: Batch) -> tuple[Denoiser, Cond]:
        """The teacher as it is sampled for these pairs, and its conditions."""
        if self.guidance_range is None:
            return (self.teacher if self.guidance is None else self.guidance(self.teacher, batch.null)), batch.cond
        scales = self.scales(numbers).to(next(iter(batch.cond.values()), numbers).device)
        own = "guidance" in self.teacher.scalar_inputs
        denoiser = self.teacher if own else ClassifierFreeGuidance(scales)(self.teacher, batch.null)
        return denoiser, batch.cond | {"guidance": scales}

    def scales(self, numbers: Labels) -> PerSample:
        """The guidance scales ``(b,)`` of pairs, from (seed, number); not of the stream that their noise comes from."""
        assert self.guidance_range is not None
        low, high = self.guidance_range
        states = [numpy.random.SeedSequence((self.seed, number)).generate_state(1)[0] for number in numbers.tolist()]
        return torch.tensor([low + (high - low) * int(state) / 2**32 for state in states])
