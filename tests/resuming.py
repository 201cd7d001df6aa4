"""A recipe trained through the command line, whole and cut."""

from __future__ import annotations

from typing import Any

import torch

from distill.checkpoints import read_checkpoint
from distill.cli import main


def train_cut_and_whole(recipe: str, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoints ``(cut, whole)`` of a recipe, trained four steps at once in ``whole``, and two and two in ``cut``."""
    # The learning rate falls to zero over the run: a run that is cut must have the whole one's length.
    length = "--model.init_args.optimization.learning_rate.total_steps=100"
    fit = ["fit", "--config", recipe, "--ckpt_path=last", "--trainer.val_check_interval=2", length, *words]
    main([*fit, "--trainer.max_steps=2", "--trainer.default_root_dir=cut"])
    main([*fit, "--trainer.max_steps=4", "--trainer.default_root_dir=cut"])
    main([*fit, "--trainer.max_steps=4", "--trainer.default_root_dir=whole"])
    cut, whole = (read_checkpoint(f"{name}/checkpoints/last.ckpt") for name in ("cut", "whole"))
    assert cut["global_step"] == cut["distill"]["batches_seen"] == 4
    return cut, whole


def same(first: object, second: object) -> bool:
    """Whether two nests of plain types and tensors are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and first.equal(second)
    if isinstance(first, dict):
        return isinstance(second, dict) and first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))  # type: ignore[arg-type]
    return first == second
