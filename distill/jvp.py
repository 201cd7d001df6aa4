"""Jacobian-vector products of a denoiser along a direction of its input and time: what continuous-time methods train on.

    value = f(x, t),   derivative = d/dh f(x + h dx, t + h dt) at h = 0,   x, dx, value, derivative: (b, *shape), t, dt: (b,)

With ``dx`` the velocity of the probability-flow ODE and ``dt = 1`` it is the total derivative along a trajectory: of sCM
(Lu & Song 2410.11081), of MeanFlow (Geng et al. 2505.13447). A pass of its own computes it, without a graph: the gradient comes
from an ordinary pass of the method.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.denoiser import Denoiser
from distill.gradients import Call, denoise
from distill.networks.base import inner_models
from distill.types import Cond, Sample, Time

Function = Callable[[Sample, Time], Sample]


class JacobianVectorProduct(ABC):
    """``product(denoiser, x, t, cond, dx, dt) -> (value, derivative)``.

    Autocast is off within, and nothing has a graph. What the network draws (dropout) is the same wherever it is evaluated, and
    the caller's next pass draws it again. Gradient checkpointing does not concern a pass without gradient; a compiled network
    runs as it was written.
    """

    def __call__(
        self,
        denoiser: Denoiser,
        x: Sample,
        t: Time,
        cond: Cond,
        dx: Sample,
        dt: Time,
        call: Call = denoise,
    ) -> tuple[Sample, Sample]:
        """The value and its derivative along ``(dx, dt)``.

        Args:
            denoiser, x, t, cond: see `Denoiser.forward`.
            dx, dt: the direction, of the types of ``x`` and ``t``.
            call: what is computed of the denoiser, x0 by default; a tensor with the batch dimension first.

        Raises:
            ValueError: a network whose derivative cannot be had so; says what to use instead.
        """
        self.check(denoiser)
        autocast = torch.autocast(x.device.type, enabled=False)
        with torch.no_grad(), autocast, as_written(denoiser), same_draws(x.device):
            return self.differentiate(lambda x, t: call(denoiser, x, t, cond), x, t, dx, dt)

    def check(self, denoiser: Denoiser) -> None:
        """Refuses a network whose derivative cannot be had so, for methods to ask before they train. Raises ValueError."""

    @abstractmethod
    def differentiate(self, function: Function, x: Sample, t: Time, dx: Sample, dt: Time) -> tuple[Sample, Sample]:
        """Value and derivative of ``function``, which draws from torch's generators as it finds them."""


class ForwardMode(JacobianVectorProduct):
    """By forward-mode differentiation, exact, in one pass that costs about two evaluations.

    Attention runs on torch's math backend, which keeps the weights of all pairs of tokens: the fused ones know no forward mode
    (pytorch#128971, flash-attention#1672). The derivative has the precision of the weights, and is coarse in bfloat16.
    """

    def differentiate(self, function: Function, x: Sample, t: Time, dx: Sample, dt: Time) -> tuple[Sample, Sample]:
        try:
            with sdpa_kernel(SDPBackend.MATH):
                value, derivative, *_ = torch.func.jvp(function, (x, t), (dx, dt))
        except NotImplementedError as error:
            raise ValueError(
                f"ForwardMode: the network holds an operation without forward mode ({str(error).splitlines()[0]}); "
                "use FiniteDifference, or plain operations (attention by scaled_dot_product_attention)."
            ) from error
        return value, derivative


class FiniteDifference(JacobianVectorProduct):
    """By a central difference ``(f(x + h dx, t + h dt) - f(x - h dx, t - h dt)) / 2h``: any network, three evaluations.

    The error is of order ``h^2``, and of rounding about ``6e-8 |f| / h`` in float32. A network that reads 1000 times its time
    in sinusoids turns them by up to ``1000 h dt``. The function must be defined ``h dt`` beyond every ``t``.

    Args:
        step: h, > 0, in units of the direction: with ``dt = 1`` a difference of times.
    """

    def __init__(self, step: float = 1e-4):
        if not (step > 0 and math.isfinite(step)):
            raise ValueError(f"step={step}: give a positive number.")
        self.step = step

    def check(self, denoiser: Denoiser) -> None:
        for value in denoiser.parameters():
            if value.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"FiniteDifference: the network computes in {value.dtype}, in whose rounding a difference of "
                    f"step={self.step} is lost; use ForwardMode, or weights in float32 (dtype: null)."
                )

    def differentiate(self, function: Function, x: Sample, t: Time, dx: Sample, dt: Time) -> tuple[Sample, Sample]:
        def at(step: float) -> Tensor:
            with same_draws(x.device):
                return function(x + step * dx, t + step * dt)

        return at(0.0), (at(self.step) - at(-self.step)) / (2 * self.step)


def as_written(denoiser: Denoiser) -> contextlib.AbstractContextManager:
    """Within the block networks that were compiled run uncompiled: function transforms do not pass through compiled code."""
    compiled = any(model._compiled_call_impl is not None for model in inner_models(denoiser))
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


@contextlib.contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """After the block torch's generators, of the CPU and of ``device``, are as they were before it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
