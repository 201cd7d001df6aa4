"""A recipe trained through the command line, whole and cut: both must end alike."""

from __future__ import annotations

from distill.checkpoints import read_checkpoint
from distill.cli import main


def train_cut_and_whole(recipe: str, *words: str) -> None:
    """Trains four steps of a recipe in the folder ``whole``, and in ``cut`` two and two more; asserts the same state."""
    # The learning rate falls to zero over the run: a run that is cut must have the whole one's length.
    length = "--model.init_args.optimization.learning_rate.total_steps=100"
    fit = ["fit", "--config", recipe, "--ckpt_path=last", "--trainer.val_check_interval=2", length, *words]
    main([*fit, "--trainer.max_steps=2", "--trainer.default_root_dir=cut"])
    main([*fit, "--trainer.max_steps=4", "--trainer.default_root_dir=cut"])
    main([*fit, "--trainer.max_steps=4", "--trainer.default_root_dir=whole"])
    cut, whole = (read_checkpoint(f"{name}/checkpoints/last.ckpt") for name in ("cut", "whole"))
    assert cut["global_step"] == cut["distill"]["batches_seen"] == 4
    assert all(value.equal(whole["state_dict"][name]) for name, value in cut["state_dict"].items())
