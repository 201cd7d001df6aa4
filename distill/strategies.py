"""Strategies of several ranks: ``ddp``, in which each player of a method exchanges gradients in its own turns, and ``fsdp2``,
Lightning's for sharded modules, with this package's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.overrides.distributed import prepare_for_backward
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed import group
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distill.methods.trained import TrainedModule
from distill.sharding import gathered, scattered_optimizer_state, take_weights_of_rank_zero


class DDPOfPlayers(DDPStrategy):
    """Lightning's DDP, but that players who take turns have a gradient exchange each.

    One exchange for all would wait in each turn for gradients that do not come; with ``find_unused_parameters`` it searches the
    graph for them, and sends zeros in their place. Buffers are those of rank zero at the start; what changes them later must do
    so alike on all ranks. Methods of one player are as under Lightning's own.
    """

    exchanges: tuple[DistributedDataParallel, ...] = ()
    """One for each player, over its trained parameters alone, in the order of the players; none for one player."""

    def configure_ddp(self) -> None:
        """Makes the exchanges, of a module that has the weights of rank zero on all ranks."""
        module = self.lightning_module
        assert module is not None
        players = module.seated_players() if isinstance(module, TrainedModule) else []
        if len(players) < 2:
            super().configure_ddp()
            return
        take_weights_of_rank_zero(module, self.root_device, group.WORLD)
        exchanges = []
        for player in players:
            player.take_turn(True)  # an exchange is over what requires gradients as it is made
            self.model = exchange = self._setup_model(nn.ParameterList(player.parameters))
            self._register_ddp_hooks()
            exchanges.append(exchange)
        self.model, self.exchanges = module, tuple(exchanges)

    @property
    def exchange(self) -> DistributedDataParallel:
        """That of the player whose turn it is."""
        module: Any = self.lightning_module
        return self.exchanges[module.playing]

    def pre_backward(self, closure_loss: Tensor) -> None:
        """The player's exchange awaits its gradients."""
        if self.exchanges:
            prepare_for_backward(self.exchange, closure_loss)
        else:
            super().pre_backward(closure_loss)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within the block no gradients are exchanged."""
        with self.exchange.no_sync() if self.exchanges else super().block_backward_sync():
            yield

    def teardown(self) -> None:
        """A next run makes exchanges of its own."""
        self.exchanges = ()
        super().teardown()


class FullyShardedStrategy(ModelParallelStrategy):
    """Shards every network over all devices of all nodes (FSDP2); see `distill.sharding`.

    A checkpoint is one file with whole tensors, gathered onto rank zero and written by the Trainer's checkpoint plugin. It is
    that of a run under any other strategy: what was saved on N ranks loads on M, under ``ddp`` or in one process.

    Args:
        offload_teacher: whether a rank's rows of the frozen teacher lie in (pinned) host memory, from where each block is
            fetched while it computes: memory of the device for time.
        process_group_backend: ``nccl``, ``gloo`` ...; None for that of the device.
        timeout: after which a rank that waits for the others ends with an error.
    """

    def __init__(
        self,
        offload_teacher: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(seconds=600),
    ):
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout)
        self.offload_teacher = offload_teacher

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimisers are loaded as usual, by `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """All ranks are one dimension of the mesh."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def model_to_device(self) -> None:
        """What is not sharded, and the rows, but for those of a teacher that is offloaded."""
        super().model_to_device()
        module: Any = self.lightning_module
        for part in module.frozen_parts() if self.offload_teacher else []:
            buffers = {name: buffer.to(self.root_device) for name, buffer in part.named_buffers()}
            part.cpu()
            for name, buffer in part.named_buffers():
                buffer.data = buffers[name]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state on rank zero, empty on the others."""
        assert self.lightning_module is not None
        state = gathered(self.lightning_module.state_dict(), self.is_global_zero)
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of an optimiser on rank zero, empty on the others."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = gathered(inner.state_dict(), self.is_global_zero)
        return state if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads the file on every rank, by the Trainer's plugin: `AtomicCheckpointIO` should be ``mapped``."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank takes its rows."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its rows."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(scattered_optimizer_state(state, optimizer))


# In the place of Lightning's own: `auto` chooses it as well.
StrategyRegistry.register("ddp", DDPOfPlayers, description="DDP, with a gradient exchange for each player", override=True)
StrategyRegistry.register("fsdp2", FullyShardedStrategy, description="every network sharded on its own by FSDP2")
StrategyRegistry.register(
    "fsdp2_offload", FullyShardedStrategy, description="likewise, the teacher in host memory", offload_teacher=True
)
