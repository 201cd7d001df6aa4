"""The validation that a run was left or killed at: last.ckpt is saved before it, and Lightning does not go back to it."""

from __future__ import annotations

import copy

from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_info

from distill.callbacks.random_state import RandomState


def is_missed(trainer: Trainer, validated_step: int) -> bool:
    """Whether the step that a run is resumed from was to be validated, and its checkpoint does not say that it was.

    A validation that ended after its step was saved is made again, for the checkpoint cannot know: figures and grid come out
    the same. Only what ``val_check_interval`` counts across epochs is seen (``check_val_every_n_epoch: null``, the default).

    Args:
        trainer: with the progress of the checkpoint restored.
        validated_step: of the last validation that the checkpoint knows of.
    """
    batches, interval = trainer.fit_loop.epoch_loop.batch_progress.total.ready, trainer.val_check_interval
    if trainer.fast_dev_run or not trainer.enable_validation:  # type: ignore[attr-defined]
        return False
    if trainer.check_val_every_n_epoch is not None or not isinstance(interval, int):
        return False
    return batches > 0 and batches % interval == 0 and validated_step != trainer.global_step


def validate(trainer: Trainer) -> None:
    """Runs the validation of training before training goes on, with all of its hooks, as Lightning runs its sanity check.

    Nothing of it is left in the state of the loop or of the random generators.
    """
    rank_zero_info(f"step {trainer.global_step} was saved, but not validated: validating it first")
    loop, connector, stage = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector, trainer.state.stage
    first, progress, restarting = connector._first_loop_iter, copy.deepcopy(loop.batch_progress), loop.restarting
    loop.restarting = False  # else it would go on behind the batches of the validation before
    generators = [callback for callback in trainer.callbacks if isinstance(callback, RandomState)]  # type: ignore[attr-defined]
    for callback in generators:  # a better student is saved now, with these states
        states = callback.states
        callback.on_train_start(trainer, trainer.lightning_module)
        callback.states = states  # making the loaders of training draws once more
    trainer.validating = True
    loop.run()
    trainer.state.stage, connector._first_loop_iter = stage, first
    loop.batch_progress, loop.restarting = progress, restarting
