"""``trainer.strategy: fsdp2``: Lightning's strategy for sharded modules, with this package's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch.optim import Optimizer

from distill.sharding import gathered, scattered_optimizer_state


class FullyShardedStrategy(ModelParallelStrategy):
    """Shards every network over all devices of all nodes (FSDP2); see `distill.sharding`.

    A checkpoint is one file with whole tensors, gathered onto rank zero and written by the Trainer's checkpoint plugin. It is
    that of a run under any other strategy: what was saved on N ranks loads on M, under ``ddp`` or in one process.

    Args:
        process_group_backend: ``nccl``, ``gloo`` ...; None for that of the device.
        timeout: after which a rank that waits for the others ends with an error.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = timedelta(seconds=600)):
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimisers are loaded as usual, by `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """All ranks are one dimension of the mesh."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

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


StrategyRegistry.register("fsdp2", FullyShardedStrategy, description="every network sharded on its own by FSDP2")
