"""Noise-sample pairs of a teacher, of which reflow learns (Liu et al. 2209.03003): what its sampler makes of numbered noise, or
the noise that its flow leads to from data (rf++, Lee et al. 2405.20320, section 4.3)."""

from __future__ import annotations

from dataclasses import replace

import torch

from distill.anchored import AnchoredGuidance
from distill.denoiser import Denoiser
from distill.guidance import GuidanceRule
from distill.inversion import invert
from distill.noise import SeededNoise
from distill.numbered_draws import NumberedDraws
from distill.samplers import OdeSampler, Sampler
from distill.space import ModelSpace
from distill.types import Batch, Labels


class NoisePairs(NumberedDraws):
    """Draws the pairs of a teacher. Pair i is a function of the seed, of i and of its conditions.

    Args:
        teacher: the denoiser whose pairs they are; its file's hash is stored with them.
        sampler: makes samples of noise; with ``invert`` an `OdeSampler`, whose solver and grid are run upwards.
        steps: of the sampler.
        space: codec and conditioner of the teacher; null for a teacher that works on pixels and reads no prompts.
        guidance: of the teacher; null for none.
        guidance_range: lowest and highest guidance scale; one is drawn for each pair, uniform, and stored with it as condition
            ``guidance``. A teacher that reads that condition is given it, another is guided at it by ``guidance`` (null:
            classifier-free).
        anchored: guidance whose null conditions are optimised, instead of the two; with an `OdeSampler`.
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
        super().__init__(teacher, sampler, steps, space, guidance, guidance_range, seed)
        for name, value in (("guidance", guidance), ("guidance_range", guidance_range)):
            if anchored is not None and value is not None:
                raise ValueError(f"{name}={value}: anchored is given too; set one of them to null.")
        if anchored is not None and invert:
            raise ValueError("invert=true: anchored guidance is of samples from noise; set anchored to null.")
        if (invert or anchored is not None) and not isinstance(sampler, OdeSampler):
            raise ValueError(f"sampler={type(sampler).__name__}: invert and anchored follow an ODE; give an OdeSampler.")
        self.anchored, self.invert = anchored, invert

    @torch.no_grad()
    def draw(self, numbers: Labels, batch: Batch, shape: tuple[int, ...]) -> Batch:
        """The pairs with these numbers ``(b,)``, encoded, on the device: ``x0``, ``noise``, conditions, null conditions.

        Args:
            numbers: of the pairs, 0 or more.
            batch: what they are to show, in pixels and prompts or encoded; its samples are read only to be inverted.
            shape: of a sample in model space.
        """
        ready = self.encode(numbers, batch)
        denoiser, cond = self.guided(numbers, ready)
        if self.invert:
            assert isinstance(self.sampler, OdeSampler) and ready.x0 is not None
            noise = invert(denoiser, ready.x0, cond, self.sampler.solver, self.sampler.grid, self.steps)
            return replace(ready, cond=cond, noise=noise)
        fresh = SeededNoise(self.seed, numbers.tolist(), shape)
        noise = fresh.draw(self.device)
        if self.anchored is not None:
            assert isinstance(self.sampler, OdeSampler)
            x0 = self.anchored.sample(denoiser, ready.null, self.sampler, noise, cond, self.steps)
        else:
            x0 = self.sampler(denoiser, noise, cond, self.steps, fresh)
        return replace(ready, x0=x0, cond=cond, noise=noise)
