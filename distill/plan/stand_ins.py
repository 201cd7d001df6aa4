"""Stand-ins without memory: a method whose tensors hold nothing, and a batch, as a step can be gone through with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.frozen import Frozen
from distill.plan.roles import reachable
from distill.types import Batch, Cond

SMALL = 4096
"""Elements of a tensor that is computed with though the rest is not."""
TOKENS = 77
"""Of a prompt, where no text encoder says how many."""


class KnownValues(TorchDispatchMode):
    """Over a `FakeTensorMode`: small tensors that depend on no stand-in (times, grids, counts) have their values.

    Where the host asks for the value of another it is given 1, or False.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls: stand-ins ask it of each other
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if func is not torch.ops.aten._local_scalar_dense.default:
                return func(*args, **kwargs)
            return 1.0 if args[0].is_floating_point() else False if args[0].dtype == torch.bool else 1
        if not (small := all(tensor.numel() <= SMALL for tensor in given)) or not given:
            made = func(*args, **kwargs)
            if not small or not all(leaf.numel() <= SMALL for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
                return made
        with _disable_current_modes():
            return func(*args, **kwargs)


def widen_norms(method: Any) -> None:
    """Normalisations of ``method`` take their input in 32 bits under autocast, as on CUDA; that of the CPU leaves it narrow."""

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        wide = torch.is_autocast_enabled("cpu")
        return tuple(value.float() if wide and isinstance(value, Tensor) else value for value in inputs)

    for module in reachable(method):
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(widen)


@contextlib.contextmanager
def stand_in(method: Any) -> Iterator[Any]:
    """A copy of ``method`` whose tensors claim to be on the CPU and hold no memory; within the block none that is made does.

    What ``method`` shares between its networks its copy shares too. ``method`` itself stays as it is.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {id(trainer): trainer for trainer in [getattr(method, "_trainer", None)] if trainer is not None}
    with fake:
        for module in reachable(method):
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = _without_memory(tensor)
    planned = copy.deepcopy(method, memo)
    for part in reachable(planned):
        if isinstance(part, Frozen):  # copies share what it holds
            object.__setattr__(part, "module", copy.deepcopy(part.module, memo))
    with torch.random.fork_rng(devices=[]), fake, KnownValues():
        yield planned


def _without_memory(tensor: Tensor) -> Tensor:
    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh


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
    tokens = denoiser.widths.get("prompt_mask", tokens)
    for name, width in denoiser.widths.items():
        cond[name] = torch.zeros((size, tokens, width) if name == "prompt_embeds" else (size, width))
    return cond


def batch_for(method: Any, size: int, shape: tuple[int, ...], trajectories: bool = False) -> Batch:
    """A batch in model space, with noise, as losses are given it.

    Args:
        method: it is told the shape of its samples.
        size: number of samples.
        shape: of a sample in model space.
        trajectories: whether it is points of a teacher's trajectories, with their times and guidance scales.
    """
    method.sample_shape = shape
    towers = getattr(getattr(method, "space", None), "conditioner", None)
    lengths = [tower.length for tower in getattr(towers, "towers", [])]
    reader = method.teacher if method.has_teacher else method.student
    cond, null = (_conditions(reader, size, max(lengths, default=TOKENS)) for _ in range(2))
    if trajectories and method.guidance_range is not None:
        cond["guidance"] = torch.ones(size)
    time = torch.full((size,), method.student.schedule.t_max) if trajectories else None
    return Batch(torch.zeros(size, *shape), cond, null, noise=torch.zeros(size, *shape), encoded=True, time=time)
