"""Time-step guidance (TSG, Sadat et al. 2407.02687): away from what the network says of a disturbed time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.guidance.evaluations import Memory, Query, Some, unit_numbers
from distill.guidance.two_evaluations import GuidedDenoiser, TwoEvaluationRule
from distill.guidance.weights import ShareOfTime
from distill.schedules import NoiseSchedule
from distill.types import Cond, Sample


@dataclass
class TimeStepGuidance(TwoEvaluationRule):
    """``x0 = x0~ + scale (x0 - x0~)``, ``x0~`` of the same input with a disturbed embedding of its time:

        emb~ = emb + strength u^power n,   n unit noise, drawn anew each time

    for networks with conditions and without. n is added to what the network's time embedding gives, by a hook for this call
    alone; a network with an embedding in each block (DiT) gets the same n in all. Along a trajectory n comes from the sampler's
    source of noise, so that sample i is the same in any batch; elsewhere from torch's generator.

    Attributes:
        scale: as in `ClassifierFreeGuidance`.
        strength, power: the paper's s >= 0 and alpha. u is the share of the schedule's time in [0, 1], see `ShareOfTime`: an s
            for DDPM's index is ``num_steps^power`` times smaller.
        schedule: in whose time u is counted; None for the denoiser's own.
        sigma_low, sigma_high: the interval of `TwoEvaluationRule`.

    Raises:
        ValueError: a negative strength, an empty interval; a denoiser whose time embedding is not known, or that is guided by
            another rule already; a compiled network, or checkpointed gradients, which would not see the hook.
    """

    scale: float | Tensor
    strength: float
    power: float = 1.0
    schedule: NoiseSchedule | None = None
    sigma_low: float | None = None
    sigma_high: float | None = None

    away_from_null = False

    def __post_init__(self) -> None:
        self.check_interval()
        if self.strength < 0:
            raise ValueError(f"strength={self.strength}: give 0 or a positive number.")
        self.share = ShareOfTime(self.schedule)

    def check(self, denoiser: Denoiser, null: Cond) -> None:
        self.share.check(denoiser.schedule)
        time_embeddings(network_of(denoiser))

    def evaluate(
        self, denoiser: Denoiser, query: Query, null: Cond, rows: Tensor | None, memory: Memory | None
    ) -> tuple[Sample, Some]:
        network = network_of(denoiser)
        refuse_unseen_hooks(network)
        size = self.strength * self.share(denoiser.schedule, query.t) ** self.power
        disturbance = Disturbance(query, size, rows, memory)
        hooks = [embedding.register_forward_hook(disturbance) for embedding in time_embeddings(network)]
        try:
            values = query.joined(query.take(rows)).asked(denoiser)
        finally:
            for hook in hooks:
                hook.remove()
        return values[: len(query)], values[len(query) :]


class Disturbance:
    """The hook: adds noise to the embeddings of all rows after the first b."""

    def __init__(self, query: Query, size: Tensor, rows: Tensor | None, memory: Memory | None):
        self.query, self.size, self.rows, self.memory = query, size, rows, memory
        self.noise: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.noise is None:
            # For the whole batch, whichever rows are guided: what a sample is given does not depend on the others.
            noise = unit_numbers(self.query.x, output.shape[1], self.memory) * self.size[:, None]
            self.noise = (noise if self.rows is None else noise[self.rows]).to(output)
        count = len(self.query)
        return torch.cat([output[:count], output[count:] + self.noise])


def network_of(denoiser: Denoiser) -> Any:
    """The raw network of a denoiser, under its views. Raises ValueError if there is none, or another rule above it."""
    while not isinstance(denoiser, NetworkDenoiser):
        inner = getattr(denoiser, "base", None)
        if isinstance(denoiser, GuidedDenoiser) or not isinstance(inner, Denoiser):
            raise ValueError(
                f"guidance=TimeStepGuidance: a {type(denoiser).__name__} has no time embedding to disturb; guide the denoiser "
                "of a network, by this rule alone."
            )
        denoiser = inner
    return denoiser.network


def time_embeddings(network: Any) -> list[nn.Module]:
    """The modules that embed times: the one that the network names, and its likes of the same name in other blocks.

    Raises:
        ValueError: a network that names none.
    """
    if not hasattr(network, "time_embedding"):
        raise ValueError(
            f"guidance=TimeStepGuidance: {type(network).__name__} does not say what embeds its times; it needs a "
            "`time_embedding`, see `distill.networks.base.Network`."
        )
    named, modules = network.time_embedding()[0], dict(network.named_modules())
    own = next(name.rpartition(".")[2] for name, module in modules.items() if module is named)
    return [m for name, m in modules.items() if name.rpartition(".")[2] == own and _alike(m, named)]


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether both are of the same class and sizes."""
    shapes = [[parameter.shape for parameter in module.parameters()] for module in (one, other)]
    return type(one) is type(other) and shapes[0] == shapes[1]


def refuse_unseen_hooks(network: Any) -> None:
    """Raises ValueError for a network that would not run the hook, or would run again without it."""
    model = getattr(network, "model", None)
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("optimization.compile=true: TimeStepGuidance hooks the network, which a compiled one does not see.")
    if torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False):
        raise ValueError(
            "optimization.gradient_checkpointing=true: blocks would be computed again without TimeStepGuidance's noise; set it "
            "to false."
        )
