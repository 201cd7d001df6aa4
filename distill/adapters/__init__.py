"""What is added to a network beside its own weights, each without effect at first: scalar inputs and adapters."""

from distill.adapters.attention_guidance import AttentionGuidance
from distill.adapters.base import Adapter, AttachedAdapter, adapter_of, find_modules, required
from distill.adapters.guide_network import GuideNetwork
from distill.adapters.negative_prompt import NegativePrompt
from distill.adapters.removal import refuse_adapters, remove_hooks, remove_lora
from distill.adapters.scalar_input import SECOND_TIME, ScalarInput, SecondTime, sinusoid

__all__ = [
    "SECOND_TIME",
    "Adapter",
    "AttachedAdapter",
    "AttentionGuidance",
    "GuideNetwork",
    "NegativePrompt",
    "ScalarInput",
    "SecondTime",
    "adapter_of",
    "find_modules",
    "refuse_adapters",
    "remove_hooks",
    "remove_lora",
    "required",
    "sinusoid",
]
