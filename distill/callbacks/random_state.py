"""The random state of every rank in the checkpoint, and back from it on resume.

Each training step seeds its own draws from (seed, step, rank), so nothing here is needed for a method's times and noise; it
is for whatever else draws: a loader's shuffling, augmentations, what a user's network draws outside of a step.
"""

from __future__ import annotations

import random
from typing import Any, cast

import numpy
import torch
import torch.distributed
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

KEY = "random_states"
State = dict[str, Any]


def collect(device: torch.device) -> State:
    """The state of python's, numpy's and torch's generators, and of ``device``'s if it is a GPU: tensors and plain types."""
    version, words, gauss = random.getstate()
    name, key, position, has_gauss, cached = cast(tuple, numpy.random.get_state(legacy=True))
    state: State = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(words), gauss],
        "numpy": [str(name), torch.from_numpy(key.astype("int64")), int(position), int(has_gauss), float(cached)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: State, device: torch.device) -> None:
    """Puts back what `collect` gave. A GPU's state is skipped when either side has none."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, key, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, key.numpy().astype("uint32"), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


class RandomState(Callback):
    """Saves the state of each rank and restores it when training starts, after Lightning has made its loaders.

    On another number of ranks than the checkpoint's, states are not restored, and one line says so. Draws made in a validation
    leave no trace in training: Lightning does not repeat the validation of the step that it resumes from.
    """

    def __init__(self) -> None:
        self.states: list[State] = []
        self.before_validation: State = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the state that training left."""
        self.before_validation = collect(trainer.strategy.root_device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts it back."""
        restore(self.before_validation, trainer.strategy.root_device)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the states of all ranks, in rank order. Lightning calls it on every rank."""
        states: list[Any] = [None] * trainer.world_size
        mine = collect(trainer.strategy.root_device)
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, mine)
        else:
            states = [mine]
        checkpoint[KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the states until training starts: loading and making loaders draw random numbers themselves."""
        self.states = checkpoint.get(KEY, [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores this rank's state of a resumed run."""
        states, self.states = self.states, []
        if len(states) == trainer.world_size:
            restore(states[trainer.global_rank], trainer.strategy.root_device)
        elif states:
            rank_zero_info(
                f"random states not restored: the checkpoint holds {len(states)} ranks, this run has {trainer.world_size}; "
                "each step seeds its own draws from (seed, step, rank) all the same"
            )
