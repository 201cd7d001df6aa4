"""Stand-ins without memory: the tensors of a method on the meta device, and a batch, as a step can be gone through with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.plan.roles import reachable
from distill.types import Batch, Cond

TOKENS = 77
"""Of a prompt, where no text encoder says how many."""


def put_stand_ins(method: Any) -> None:
    """Replaces each parameter and buffer of ``method`` by one of the same shape and type; what was shared stays so.

    To be called under a `FakeTensorMode`, whose tensors claim to be on the CPU and hold no memory, before `players` is.
    """
    made: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh
        return made[id(tensor)]

    kept = []  # a tensor that was freed could give its id to another
    for module in reachable(method):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    kept.append(tensor)
                    tensors[name] = stand_in(tensor)  # type: ignore[assignment]


def sample_shape(denoiser: Denoiser) -> tuple[int, ...]:
    """Shape ``(c, h, w)`` of the samples that a denoiser's network was made for.

    Raises:
        ValueError: it does not say.
    """
    network = denoiser.network if isinstance(denoiser, NetworkDenoiser) else None
    shape = getattr(network, "native_shape", None) or denoiser.shape
    if shape is None or None in shape:
        raise ValueError(f"shape={shape}: the student's network does not say the size of its samples; give --shape c h w.")
    return tuple(shape)


def _conditions(denoiser: Denoiser, size: int, tokens: int) -> Cond:
    cond: Cond = {} if denoiser.num_classes is None else {"labels": torch.zeros(size, dtype=torch.long)}
    for name, width in denoiser.widths.items():
        cond[name] = torch.zeros((size, tokens, width) if name == "prompt_embeds" else (size, width))
    return cond


def batch_for(method: Any, size: int, shape: tuple[int, ...], paired: bool = False, trajectories: bool = False) -> Batch:
    """A batch in model space, as losses are given it.

    Args:
        method: it is told the shape of its samples.
        size: number of samples.
        shape: of a sample in model space.
        paired: whether it carries noise.
        trajectories: whether it carries noise and times.
    """
    method.sample_shape = shape
    towers = getattr(getattr(method, "space", None), "conditioner", None)
    lengths = [tower.length for tower in getattr(towers, "towers", [])]
    reader = method.teacher if method.has_teacher else method.student
    cond, null = (_conditions(reader, size, max(lengths, default=TOKENS)) for _ in range(2))
    noise = torch.zeros(size, *shape) if paired or trajectories else None
    time = torch.full((size,), method.student.schedule.t_max) if trajectories else None
    return Batch(torch.zeros(size, *shape), cond, null, noise=noise, encoded=True, time=time)
