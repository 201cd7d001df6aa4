"""Sharding by FSDP2: every rank keeps its rows of each parameter, and gathers a block's weights while it computes.

Each network is sharded on its own (`torch.distributed.fsdp.fully_shard`), with the blocks that it names as units
(`Network.units`), the frozen teacher and the average as well as what is trained. Optimisers and averages then work on the rows
of their rank alone; checkpoints hold whole tensors, gathered one at a time onto the CPU of rank zero, as those of other runs.

In the forward pass ranks meet in every block: all must call the networks equally often.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from distill.denoiser import NetworkDenoiser


def networks_of(module: nn.Module) -> list[nn.Module]:
    """The networks of the denoisers in a module, each once."""
    return list({part.network: None for part in module.modules() if isinstance(part, NetworkDenoiser)})


def is_sharded(module: nn.Module) -> bool:
    """Whether any part of it is."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def local(tensor: Tensor) -> Tensor:
    """The rows of this rank, the very memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------------------- networks


def shard(
    parts: Sequence[nn.Module], mesh: DeviceMesh, precision: torch.dtype | None = None, offloaded: Sequence[nn.Module] = ()
) -> None:
    """Shards each part over a mesh of one dimension, in place, with the weights that rank zero holds.

    Args:
        parts: modules that are called as a whole; no parameter may be in two of them.
        mesh: the ranks.
        precision: in which 32-bit weights are gathered and their gradients computed, which are then summed over ranks in
            float32; None for that of the weights. Weights of other types (a teacher in bfloat16) are gathered as they are.
        offloaded: of the parts, those whose rows lie in host memory. None may be trained.

    Raises:
        ValueError: parts that share parameters, or have parameters without rows.
    """
    check_parts(parts)
    cuda = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device(mesh.device_type)
    for part in parts:
        take_weights_of_rank_zero(part, device, mesh.get_group())
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if precision is not None and all(parameter.dtype == torch.float32 for parameter in part.parameters()):
            policy = MixedPrecisionPolicy(precision, torch.float32, cast_forward_inputs=False)
        hosted = any(part is other for other in offloaded)
        place = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if hosted else OffloadPolicy()
        units: Callable[[], Iterable[nn.Module]] = getattr(part, "units", tuple)
        for unit in reversed([part, *units()]):  # who holds another comes after it
            if next(unit.parameters(), None) is not None:
                fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=True)


@torch.no_grad()
def take_weights_of_rank_zero(part: nn.Module, device: torch.device, group: Any) -> None:
    """Sends every parameter and buffer of rank zero to all ranks of a group, one at a time; ``device`` is where they meet."""
    for tensor in (*part.parameters(), *part.buffers()):
        sent = tensor.detach().to(device)
        torch.distributed.broadcast(sent, 0, group=group)
        tensor.copy_(sent)


def check_parts(parts: Sequence[nn.Module]) -> None:
    """Raises ValueError for a parameter that is in two of the parts, or has no rows."""
    seen: dict[int, int] = {}
    for number, part in enumerate(parts):
        for name, parameter in part.named_parameters():
            if parameter.dim() == 0:  # EDM2's, which also normalises its weights before each training forward
                raise ValueError(
                    f"trainer.strategy=fsdp2: {name} of {type(part).__name__} is a single number, which has no rows to share "
                    "out; use trainer.strategy=ddp."
                )
            if seen.setdefault(id(parameter), number) != number:
                raise ValueError(
                    f"trainer.strategy=fsdp2: {name} is shared by two networks (LoRA layers or adapters on the teacher's "
                    "weights), and each network is sharded on its own; train whole copies, or use trainer.strategy=ddp."
                )


def check_whole(module: nn.Module) -> None:
    """Raises ValueError, naming it, for a trained parameter in no sharded part: its gradient would be that of one rank."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise ValueError(f"trainer.strategy=fsdp2: {name} is in no network that can be sharded; use trainer.strategy=ddp.")


def check_equal_batches(module: nn.Module, batches: Sequence[int | float], what: str) -> None:
    """Raises ValueError, on every rank, if those of a sharded module have unequal counts of batches: some would wait for ever.

    Args:
        module: that is called for each batch.
        batches: how many this rank has, of each loader.
        what: the pass over them, for the message.
    """
    if not is_sharded(module):
        return
    counts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, list(batches))
    if any(count != counts[0] for count in counts):
        raise ValueError(
            f"trainer.strategy=fsdp2: {what} has {counts} batches on the ranks, which must call sharded networks together; "
            "choose data.eval_samples or data.eval_batch_size so that they are equally many."
        )


# --------------------------------------------------------------------------------------------------------------- states


def gathered(state: Any, wanted: bool) -> Any:
    """A nested state with every sharded tensor whole, on the CPU. All ranks must call it, with the same state.

    Args:
        state: dictionaries and lists of tensors and plain values.
        wanted: whether this rank keeps the result; None stands for the tensors that were gathered elsewhere.
    """

    def whole(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if wanted else None

    return tree_map(whole, state)


def scattered(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a whole tensor, a copy, sharded as ``like`` is; the tensor itself if ``like`` is not sharded.

    Nothing is sent: every rank has the whole tensor, on any device.
    """
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    rows = distribute_tensor(whole.detach().to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return rows.clone()  # not a view, which would keep the whole


def scattered_state(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A state of whole tensors as ``module.load_state_dict`` takes it. A wrong shape is left as it is: loading refuses it."""
    own = {name: value for name, value in module.named_parameters(remove_duplicate=False) if isinstance(value, DTensor)}
    fits = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    return {**state, **{name: scattered(value, own[name]) for name, value in fits.items()}}


def scattered_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state of whole tensors as its ``load_state_dict`` takes it: what is of a parameter's shape is sharded.

    Nothing in it is a view of the given tensors.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def own(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        return scattered(value, parameter) if value.shape == parameter.shape else value.clone()

    states = {
        index: {key: own(value, parameters[index]) for key, value in values.items()} for index, values in state["state"].items()
    }
    return {**state, "state": states}


class Outline:
    """A module without its parameters' values: what a whole copy is made of after it has been sharded.

    Args:
        module: not sharded yet.
    """

    def __init__(self, module: nn.Module):
        empty = {id(value): nn.Parameter(torch.empty_like(value, device="meta"), False) for value in module.parameters()}
        self._module = copy.deepcopy(module, dict[int, Any](empty))

    def filled(self, state: Mapping[str, Tensor]) -> Any:
        """The module with the whole tensors of its ``state_dict()``, which are not copied."""
        module = copy.deepcopy(self._module)
        module.load_state_dict(state, strict=True, assign=True)
        return module
