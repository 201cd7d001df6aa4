"""What a run's training has cost: evaluations of each network, images, seconds; ``RUN/training_cost.json``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import nn
from torch.utils.hooks import RemovableHandle

from distill.callbacks.throughput import finish_work, now
from distill.checkpoints import atomic_writer
from distill.plan.roles import networks_by_role
from distill.types import Batch

KEY, FILE = "training_cost", "training_cost.json"


class TrainingCost(Callback):
    """Counts on every rank, on the host alone; ranks are added up where a checkpoint is saved, and at the end.

    An evaluation is a forward of a role's network on one sample (see `distill.plan.roles`), in training: not in validations and
    what is drawn there. Forwards that a backward pass makes again for a whole network count, those of blocks inside of one
    (gradient checkpointing) do not. The file says:

    - ``method``, ``updates`` (optimiser steps), ``batches`` (of each rank), ``images`` (of all ranks);
    - ``evaluations`` by role and in ``total``, of all ranks;
    - ``seconds`` without validations, and ``device_seconds``, the same times the devices;
    - ``devices``, ``device``;
    - ``parameters``: ``trained``, by any player (a fake score's too), and ``student``, all that the student has.

    A run that goes on from a checkpoint goes on with what that had cost; seconds after the last checkpoint are forgotten with
    the steps in them. Where the checkpoint does not say, no file is written: it would be wrong.
    """

    def __init__(self) -> None:
        self.before: dict[str, Any] = _nothing()
        self.known = True
        self.evaluations: Counter[str] = Counter()
        self.images = 0
        self.seconds = 0.0
        self.running_since: float | None = None
        self.counting = False
        self.roles: dict[nn.Module, str] = {}
        self.hooks: list[RemovableHandle] = []

    # ---------------------------------------------------------------------------------------------------------- counting

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts hooks on the networks, and starts the clock."""
        self.evaluations, self.images, self.seconds = Counter(), 0, 0.0
        self.roles, self.running_since = networks_by_role(pl_module), now()

        def count(network: nn.Module, inputs: Any) -> None:
            if self.counting:
                if network not in self.roles:  # a copy that the method has made meanwhile, hooks and all
                    self.roles = networks_by_role(pl_module)
                self.evaluations[self.roles[network]] += len(inputs[0])

        self.hooks = [network.register_forward_pre_hook(count) for network in self.roles]

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Counts from here to the end of the batch. A checkpoint after it, whoever saves it, holds its images."""
        self.counting = True
        self.images += len(batch)
        if self.running_since is None:
            self.running_since = now()

    def on_train_batch_end(self, trainer: Trainer, *others: Any) -> None:  # type: ignore[override]
        """Counts no longer."""
        self.counting = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock until the next batch of training."""
        if self.running_since is not None:
            finish_work(trainer)
            self.seconds, self.running_since = self.seconds + now() - self.running_since, None

    # ------------------------------------------------------------------------------------------------------- writing

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the cost of all ranks to the checkpoint, and writes the file. Lightning calls it on every rank."""
        if self.known:
            checkpoint[KEY] = self._write(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Goes on with what the checkpoint had cost."""
        self.known = KEY in checkpoint
        self.before = checkpoint.get(KEY, _nothing())
        if not self.known:
            rank_zero_info(f"no {FILE}: the checkpoint does not say what its training has cost")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file, and removes the hooks."""
        if self.known:
            self._write(trainer, pl_module)
        self._remove_hooks(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the hooks."""
        self._remove_hooks(pl_module)

    def _remove_hooks(self, pl_module: LightningModule) -> None:
        for hook in self.hooks:
            hook.remove()
            for network in networks_by_role(pl_module):  # those of the copies
                network._forward_pre_hooks.pop(hook.id, None)
        self.hooks, self.roles, self.running_since = [], {}, None

    def _write(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """The cost so far of all ranks, as a checkpoint keeps it; rank zero writes it with the rest of the file."""
        if self.running_since is not None:
            finish_work(trainer)
            ended = now()
            self.seconds, self.running_since = self.seconds + ended - self.running_since, ended
        own: dict[str, Any] = {"evaluations": dict(self.evaluations), "images": self.images, "seconds": self.seconds}
        ranks = [own]
        if trainer.world_size > 1:
            ranks = [{}] * trainer.world_size
            torch.distributed.all_gather_object(ranks, own)
        cost = added_up(self.before, *ranks)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with atomic_writer(Path(trainer.default_root_dir) / FILE) as file:
                file.write((json.dumps(described(cost, trainer, pl_module), indent=2) + "\n").encode())
        return cost


def _nothing() -> dict[str, Any]:
    return {"evaluations": {}, "images": 0, "seconds": 0.0, "device_seconds": 0.0}


def added_up(before: dict[str, Any], *ranks: dict[str, Any]) -> dict[str, Any]:
    """What was spent before and, since then, by each of the ranks: all images and evaluations, the longest time."""
    evaluations, seconds = Counter(before["evaluations"]), max(rank["seconds"] for rank in ranks)
    for rank in ranks:
        evaluations.update(rank["evaluations"])
    return {
        "evaluations": dict(evaluations),
        "images": before["images"] + sum(rank["images"] for rank in ranks),
        "seconds": before["seconds"] + seconds,
        "device_seconds": before["device_seconds"] + seconds * len(ranks),
    }


def described(cost: dict[str, Any], trainer: Trainer, method: Any) -> dict[str, Any]:
    """The content of the file."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    evaluations, device = cost["evaluations"], trainer.strategy.root_device
    return {
        "method": type(method).__name__,
        "updates": trainer.global_step,
        "batches": method.batches_seen,
        "images": cost["images"],
        "evaluations": evaluations | {"total": sum(evaluations.values())},
        "seconds": cost["seconds"],
        "device_seconds": cost["device_seconds"],
        "devices": trainer.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "parameters": {"trained": trained, "student": sum(parameter.numel() for parameter in method.student.parameters())},
    }
