"""Settings and data of score distillation that contradict each other are refused, before any work is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import fit, small, trainer
from pytorch_lightning import Callback
from test_score_distillation import BATCHES, ROWS, SHAPE, batch, method, teacher
from torch import nn

from distill.adversarial import Adversarial, JointAdversarial
from distill.callbacks.export import ExportDenoiser
from distill.codecs import IdentityCodec
from distill.denoiser import NetworkDenoiser
from distill.distances import SquaredDistance
from distill.evaluation import Evaluation
from distill.guidance import ClassifierFreeGuidance
from distill.lora import LoRA
from distill.networks.unet2d import UNet2D
from distill.optimization import PlayerOptimization
from distill.schedules import RectifiedFlow, VariancePreserving
from distill.space import ModelSpace
from distill.times import IndexTimes, UniformTimes
from distill.types import Batch, label_conditions

CFG = ClassifierFreeGuidance(2.0)


def without_null_class() -> NetworkDenoiser:
    network = UNet2D.of(UNet2D(1, 4, 1, (8, 8), 1, heads_width=8, groups=4).model, null_class=False)
    return NetworkDenoiser(network, RectifiedFlow())


def on_another_schedule() -> NetworkDenoiser:
    student = teacher(1)
    student.schedule = VariancePreserving()
    return student


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"student": on_another_schedule()}, "model.student's schedule is VariancePreserving.*the teacher's RectifiedFlow"),
        ({"teacher": without_null_class(), "fake": {"null_probability": 0.5}}, "fake_score.null_probability=0.5.*null class"),
        ({"fake": {"warmup_steps": -1}}, "warmup_steps=-1: give 0 or more"),
        ({"fake_guidance": "teacher"}, "fake_guidance='teacher' and guidance=null: there is no rule to share"),
        ({"fake": {"times": IndexTimes(0, 9)}}, "fake_score.times: IndexTimes on RectifiedFlow"),
        ({"kind": "dmd2", "adversarial": Adversarial(IndexTimes(0, 9))}, "adversarial.times: IndexTimes on RectifiedFlow"),
        (
            {"kind": "vsd", "regression": SquaredDistance(), "times": (1.0, 0.5)},
            "regression is set with 2 times of sampler: pairs are of one step",
        ),
        ({"kind": "vsd", "shared_dropout": True, "guidance": CFG}, "shared_dropout=true: .*set fake_guidance to teacher"),
        ({"kind": "vsd", "shared_dropout": True, "fake_guidance": CFG}, "shared_dropout=true: .*set fake_guidance to teacher"),
        (
            {"kind": "vsd", "shared_dropout": True, "fake": {"lora": LoRA(2, dropout=0.1)}},
            "shared_dropout=true with fake_score.lora.dropout=0.1: set that to 0",
        ),
        (
            {"teacher": small(num_classes=2), "fake": {"optimization": PlayerOptimization(gradient_checkpointing=True)}},
            "fake_score.optimization.gradient_checkpointing=true",
        ),
    ],
)
def test_settings_that_contradict_are_named(settings: Any, words: str):
    with pytest.raises(ValueError, match=words):
        method(**settings)


@pytest.mark.parametrize("kind", [Adversarial, JointAdversarial])
@pytest.mark.parametrize("weights", [{"generator_weight": 0.0}, {"critic_weight": -1.0}])
def test_adversarial_factors_are_positive(kind: Any, weights: dict[str, float]):
    first = {"times": UniformTimes()} if kind is Adversarial else {}
    with pytest.raises(ValueError, match="give positive factors, or adversarial: null"):
        kind(**first, **weights)


def test_dropped_conditions_need_null_conditions():
    trained = method(fake={"null_probability": 0.5})
    with pytest.raises(ValueError, match="null_probability=0.5: the data delivers no null conditions"):
        fit(trained, [Batch(None, BATCHES[0].cond, {})], 2)


def test_a_batch_of_nothing_has_no_size():
    with pytest.raises(ValueError, match="has no size"):
        len(Batch(None, {}, {}))


def test_a_run_can_be_begun_again_after_one_that_failed():
    class Fails(Callback):
        def on_train_batch_end(self, *others: Any) -> None:
            raise RuntimeError("failed")

    trained = method()
    with pytest.raises(RuntimeError, match="failed"):
        fit(trained, BATCHES, 2, Fails())
    before = {name: value.clone() for name, value in trained.named_parameters()}
    assert fit(trained, BATCHES, 2).global_step == 2
    moved = {name.split(".")[0] for name, value in trained.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"student", "critic", "ema"}


def test_trained_times_are_not_lost_by_a_plain_export():
    with pytest.raises(ValueError, match="ExportDenoiser writes no trained times.*tools/export.py"):
        ExportDenoiser().setup(trainer(1), method(), "fit")


class Counting(IdentityCodec):
    """Counts what it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def encode(self, pixels: Any) -> Any:
        self.count += 1
        return super().encode(pixels)


@pytest.mark.parametrize(("kind", "encoded"), [("sid", 0), ("sim", 0), ("vsd", 0), ("sida", 2), ("dmd2", 2)])
def test_data_is_encoded_where_a_loss_reads_it_and_nowhere_else(kind: str, encoded: int):
    codec = Counting()
    fit(method(kind, space=ModelSpace(codec)), BATCHES, 2)
    assert codec.count == encoded


def test_streams_without_data_train_what_reads_none():
    labels = label_conditions(torch.arange(ROWS) % 2, 2)
    trained = method("sim", evaluation=Evaluation(steps=[1]))
    fit(trained, [Batch(None, *labels)], 2)
    assert trained.skipped.total == 0 and trained.model_shape == SHAPE


def test_gradients_reach_all_weights_after_a_simulation_under_autocast():
    """Weights that autocast has cast for the simulation, without a graph, are cast again for the step that is trained."""
    trained = method("vsd", times=(0.9, 0.5))
    trained.batches_seen = next(number for number in range(100) if exit_of(trained, number) == 1)
    with torch.autocast("cpu", torch.bfloat16):
        trained.losses(batch())["loss"].backward()
    without = [name for name, weight in trained.student.named_parameters() if weight.grad is None]
    assert not without


def exit_of(trained: Any, number: int) -> int:
    trained.batches_seen = number
    return trained.exit_index()


def test_steps_before_the_trained_one_are_taken_as_in_sampling():
    """Without dropout, though the student is in training mode for its own step."""
    trained, modes = method("vsd", times=(0.9, 0.6, 0.3)), []
    trained.batches_seen = next(number for number in range(100) if exit_of(trained, number) == 2)
    trained.student.network.register_forward_hook(lambda module, *_: modes.append(module.training))  # type: ignore[union-attr]
    trained.losses(batch())
    assert modes == [False, False, True]
    assert all(part.training for part in trained.student.modules() if isinstance(part, nn.Dropout))
