"""What score distillation reads of its data: conditions alone, but where a loss compares with samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import fit, same
from score_methods import BATCHES, ROWS, SHAPE, method

from distill.codecs import IdentityCodec
from distill.distances import SquaredDistance
from distill.space import ModelSpace
from distill.types import Batch, label_conditions


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "dmd2"}, "model.adversarial is set, but data delivers no samples to compare with: set it to null"),
        ({"kind": "sida"}, "model.adversarial is set, but data delivers no samples to compare with: set it to null"),
        (
            {"kind": "vsd", "regression": SquaredDistance()},
            "model.regression is set, but data delivers no pairs of noise and samples: set it to null",
        ),
    ],
)
def test_data_that_a_loss_misses_is_named(settings: Any, words: str):
    trained = method(**settings)
    with pytest.raises(ValueError, match=words):
        fit(trained, [Batch(None, BATCHES[0].cond, BATCHES[0].null)], 2)


@pytest.mark.parametrize("kind", ["sid", "sim", "vsd"])
def test_no_data_is_read(kind: str):
    """Conditions alone are a batch; with samples in it the run is the same."""
    ends = []
    for x0 in (None, BATCHES[0].x0):
        trained = method(kind, (1.0, 0.5))
        fit(trained, [Batch(x0, BATCHES[0].cond, BATCHES[0].null)], 4)
        ends.append(dict(trained.state_dict()))
    assert same(*ends)


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
    trained = method("sim")
    fit(trained, [Batch(None, *labels)], 2)
    assert trained.skipped.total == 0 and trained.model_shape == SHAPE


def test_dropped_conditions_need_null_conditions():
    trained = method(fake={"null_probability": 0.5})
    with pytest.raises(ValueError, match="null_probability=0.5: the data delivers no null conditions"):
        fit(trained, [Batch(None, BATCHES[0].cond, {})], 2)


def test_a_batch_of_nothing_has_no_size():
    with pytest.raises(ValueError, match="has no size"):
        len(Batch(None, {}, {}))
