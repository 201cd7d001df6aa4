"""Conditioners: prompts become the conditions that networks read, as the pipelines of each family encode them."""

from distill.conditioners.base import Conditioner
from distill.conditioners.clip import ClipConditioner, StableDiffusionXLConditioner
from distill.conditioners.joint import FluxConditioner, StableDiffusion3Conditioner
from distill.conditioners.masked import GemmaConditioner, T5Conditioner

__all__ = [
    "ClipConditioner",
    "Conditioner",
    "FluxConditioner",
    "GemmaConditioner",
    "StableDiffusion3Conditioner",
    "StableDiffusionXLConditioner",
    "T5Conditioner",
]
