"""Runs of score distillation that are cut and resumed, after either player's turn."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import everything, fit, of_part, same
from pytorch_lightning import Callback
from score_methods import BATCHES, CFG, method

from distill.divergences import FDivergence
from distill.few_step import FewStepSampler
from distill.lora import LoRA


class SaveAfter(Callback):
    """Saves a checkpoint after so many batches."""

    def __init__(self, batches: int, path: Path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *others: Any) -> None:
        if pl_module.batches_seen == self.batches:
            trainer.save_checkpoint(self.path)


F_DISTILL: dict[str, Any] = {"divergence": FDivergence("forward_kl", decay=0.5), "lora": LoRA(2, dropout=0.1)}
RESUMED = {
    "sid": partial(method, "sid", fake={"warmup_steps": 1}),
    "dmd2": partial(method, "dmd2", (1.0, 0.6), guidance=CFG, fake={"steps": 2, "null_probability": 0.2}),
    "f-distill by LoRA": partial(method, "dmd2", (1.0, 0.6), fake={"lora": LoRA(2)}, **F_DISTILL),
}


@pytest.mark.parametrize(
    ("name", "cut", "player"), [("sid", 3, 0), ("sid", 4, 1), ("dmd2", 3, 0), ("dmd2", 4, 1), ("f-distill by LoRA", 4, 0)]
)
def test_resumed_run_ends_in_the_same_bits(name: str, cut: int, player: int, tmp_path: Path):
    """Cut after a turn of the generator (0), or in the middle of the fake score's (1); on weights not the checkpoint's."""
    build, path = RESUMED[name], tmp_path / "cut.ckpt"
    whole = build()
    assert whole.turn(cut - 1) == player
    ended = everything(fit(whole, BATCHES, 7, SaveAfter(cut, path)), whole)
    resumed = build()
    own = {id(parameter) for parameter in resumed.teacher.parameters()}
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(float(id(parameter) not in own))
    again = fit(resumed, BATCHES, 7, ckpt_path=path)
    assert same(ended, everything(again, resumed)) and resumed.batches_seen == 7
    for part in ("student", "ema", "critic"):
        assert not same(of_part(ended, part), of_part(dict(build().state_dict()), part)), part


@pytest.mark.parametrize(
    "other",
    [
        FewStepSampler(times=[1.0]),
        FewStepSampler(times=[1.0, 0.5], start="prior"),
        FewStepSampler(sigmas=[9.0, 1.0]),
    ],
)
def test_a_run_is_not_resumed_at_other_times(other: FewStepSampler, tmp_path: Path):
    path, times = tmp_path / "cut.ckpt", (1.0, 0.5)
    fit(method(times=times), BATCHES, 2, SaveAfter(2, path))
    kept = torch.load(path, weights_only=True)["distill"]["sampler"]
    assert kept == {"times": [1.0, 0.5], "sigmas": None, "start": "marginal"}
    with pytest.raises(ValueError, match="start a new run") as refused:
        fit(method(sampler=other), BATCHES, 4, ckpt_path=path)
    assert str(kept) in str(refused.value) and f"model.sampler is {other.settings()}" in str(refused.value)
    assert fit(method(times=times), BATCHES, 4, ckpt_path=path).global_step == 4
