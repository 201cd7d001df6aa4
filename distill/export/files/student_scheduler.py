"""A few-step student's own sampler, for pipelines of diffusers; needs torch and diffusers alone.

What a call of the network sees, the state, is a linear combination of the state before, of the x0 of the calls so far and of
fresh noises. The coefficients, by number of steps, are this scheduler's config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class StudentSchedulerOutput(BaseOutput):
    """``prev_sample``: what the network sees next, or the sample; ``pred_original_sample``: the x0 of this call."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """Samples with the numbers of steps that ``tables`` has.

    Args:
        tables: by number of steps, a row for each call of the network: its ``time``; ``keep`` and ``gain``, ``x0 = keep * state
            + gain * output``; ``clip``, the bound on ``|x0|``, or None; shares in the next state of this one (``carry``), of
            each ``x0`` and each ``noise`` so far, the latest first; ``draws``, how many noises are new.
        init_noise_sigma: standard deviation of the initial noise.
    """

    order = 1

    @register_to_config
    def __init__(self, tables: dict[str, list[dict[str, Any]]] | None = None, init_noise_sigma: float = 1.0):
        self.init_noise_sigma = init_noise_sigma
        self.timesteps = torch.zeros(0)
        self.index = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Chooses a table. ``sigmas`` and ``mu``, which some pipelines make up, are not read: the times are the student's."""
        tables = self.config.tables or {}
        if num_inference_steps is None and sigmas is not None:
            num_inference_steps = len(sigmas)
        if str(num_inference_steps) not in tables:
            raise ValueError(f"num_inference_steps={num_inference_steps}: this student samples in {', '.join(tables)} steps.")
        self.rows = tables[str(num_inference_steps)]
        self.memory = max(len(row[kind]) for row in self.rows for kind in ("x0", "noise"))
        self.timesteps = torch.tensor([row["time"] for row in self.rows], dtype=torch.float32, device=device)
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts anew; only 0, the first call, is known."""
        if begin_index:
            raise ValueError(f"begin_index={begin_index}: this student samples from its first time on.")
        self.index = 0
        self.x0: list[torch.Tensor] = []
        self.noises: list[torch.Tensor] = []

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample: states are what the network sees."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> StudentSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """From the network's output at ``sample`` to its next input; calls must come in the order of ``timesteps``."""
        row, wide = self.rows[self.index], sample.float()
        x0 = row["keep"] * wide + row["gain"] * model_output.float()
        if row["clip"] is not None:
            x0 = x0.clamp(-row["clip"], row["clip"])
        self.x0.insert(0, x0)
        for _ in range(row["draws"]):
            self.noises.insert(0, randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype))
        state = row["carry"] * wide
        for share, part in [*zip(row["x0"], self.x0), *zip(row["noise"], self.noises)]:
            state = state + share * part if share != 0 else state
        del self.x0[self.memory :], self.noises[self.memory :]
        self.index += 1
        if self.index == len(self.rows):
            self.set_begin_index(0)  # lets go of what is remembered
        state, x0 = state.to(sample.dtype), x0.to(sample.dtype)
        return StudentSchedulerOutput(state, x0) if return_dict else (state, x0)

    def __len__(self) -> int:
        return len(self.timesteps)
