"""The networks of a method by the part that they play, each tensor once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from distill.denoiser import NetworkDenoiser
from distill.frozen import Frozen
from distill.networks.base import Network

CRITICS = {"score": "fake score", "head": "discriminator"}
"""What the parts of a two-player method's critic are called in a plan."""
OTHERS = "others"
"""Whatever a method holds beside its roles: features of a distance, guides, counters."""


def reachable(root: Any) -> Iterator[nn.Module]:
    """Every module that an object of this package leads to, also those in `Frozen` and in settings that are no modules."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, Tensor):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
            waiting += list(value.children())
        if isinstance(value, dict):
            waiting += list(value.values())
        elif isinstance(value, list | tuple):
            waiting += list(value)
        elif type(value).__module__.startswith("distill"):
            waiting += list(vars(value).values()) if hasattr(value, "__dict__") else []
    return iter(found)


def tensors_of(root: Any) -> Iterator[Tensor]:
    """Parameters and buffers of all modules that ``root`` leads to; one that several hold comes several times."""
    for module in reachable(root):
        yield from (value for value in module._parameters.values() if value is not None)
        yield from (value for value in module._buffers.values() if value is not None)


def roots(method: Any) -> Iterator[tuple[str, Any]]:
    """Names of roles and what holds their tensors; where two hold the same ones, they belong to the first.

    The teacher goes first: LoRA layers of student and fake score stand on its weights.
    """
    holders = {"teacher": getattr(method, "_teacher", None), "space": getattr(method, "_space", None)}
    teacher, space = (frozen.module if isinstance(frozen, Frozen) else frozen for frozen in holders.values())
    yield "teacher", teacher
    yield "student", method.student
    if (critic := getattr(method, "critic", None)) is not None:
        parts = critic.items() if isinstance(critic, nn.ModuleDict) else {"": critic}.items()
        yield from ((CRITICS.get(name, "critic"), part) for name, part in parts)
    yield "average", method.ema
    yield "target average", getattr(method, "target", None)
    yield "teacher", getattr(method, "previous", None)  # of later rounds
    if space is not None:
        yield "codec", space.codec
        yield "text encoders", space.conditioner
    yield OTHERS, method


def tensors_by_role(method: Any) -> dict[str, list[Tensor]]:
    """The tensors of each role, one for each storage; roles that hold nothing of their own are left out."""
    seen: set[int] = set()
    roles: dict[str, list[Tensor]] = {}
    for name, root in roots(method):
        for tensor in tensors_of(root):
            if (key := tensor.untyped_storage()._cdata) not in seen:
                seen.add(key)
                roles.setdefault(name, []).append(tensor)
    return roles


def networks_by_role(method: Any) -> dict[nn.Module, str]:
    """What a method's denoisers evaluate, each network with the first role that leads to it."""
    names: dict[nn.Module, str] = {}
    for name, root in roots(method):
        for module in reachable(root):
            if isinstance(module, Network):
                names.setdefault(module, name)
            elif isinstance(module, NetworkDenoiser):
                names.setdefault(module.network, name)
    return names
