"""Random images: the same in every run, each with its own label and prompt, in an order that is the seed's."""

from __future__ import annotations

import pytest
import torch

from datamodules.synthetic import SyntheticDataModule, random_image
from distill.noise import SeededNoise


def test_images_are_the_same_in_every_run_and_uniform():
    image = random_image(3, (3, 40, 50))
    assert image.shape == (3, 40, 50) and image.dtype == torch.float32
    assert torch.equal(image, random_image(3, (3, 40, 50))) and not torch.equal(image, random_image(4, (3, 40, 50)))
    assert -1 <= float(image.min()) < -0.99 and 0.99 < float(image.max()) < 1
    assert float(image.mean()) == pytest.approx(0, abs=0.03) and float(image.std()) == pytest.approx(3**-0.5, abs=0.02)


def test_a_pass_trains_on_every_image_once_with_its_own_label():
    data = SyntheticDataModule((1, 2, 3), 5, size=12, batch_size=4, seed=7, batches_per_epoch=3)
    batches = list(data.train_dataloader())
    assert [batch.x0.shape for batch in batches] == 3 * [(4, 1, 2, 3)]
    seen = []
    for batch in batches:
        for x0, label, null in zip(batch.x0, batch.cond["labels"], batch.null["labels"], strict=True):
            item = next(number for number in range(12) if torch.equal(x0, random_image(number, (1, 2, 3))))
            assert int(label) == item % 5 and int(null) == 5
            seen.append(item)
    assert sorted(seen) == list(range(12)) and seen != list(range(12))
    other = SyntheticDataModule((1, 2, 3), 5, size=12, batch_size=4, seed=8, batches_per_epoch=3)
    assert not torch.equal(next(iter(other.train_dataloader())).x0, batches[0].x0)


def test_validation_reads_all_in_order():
    data = SyntheticDataModule((1, 2, 2), size=10, eval_batch_size=4)
    images = torch.cat([batch.x0 for batch in data.val_dataloader()])
    assert torch.equal(images, torch.stack([random_image(item, (1, 2, 2)) for item in range(10)]))


def test_a_position_is_of_its_own_order_alone():
    data = SyntheticDataModule(size=10, seed=1)
    data.load_state_dict(SyntheticDataModule(size=10, seed=1).state_dict())
    for other, key in ((SyntheticDataModule(size=10, seed=2), "seed"), (SyntheticDataModule(size=12, seed=1), "size")):
        with pytest.raises(ValueError, match=f"data.{key}="):
            data.load_state_dict(other.state_dict())


def test_examples_spread_over_the_classes():
    data = SyntheticDataModule(num_classes=1000, prompts=True)
    batch = data.examples(4)
    assert batch.x0 is None and batch.cond["labels"].tolist() == [0, 250, 500, 750] and batch.prompts[3] == "image 3"
    assert SyntheticDataModule(num_classes=3).examples(3).cond["labels"].tolist() == [0, 1, 2]
    assert SyntheticDataModule().examples(2).cond == {} and SyntheticDataModule().examples(2).prompts is None


def test_spec_says_what_comes():
    spec = SyntheticDataModule((4, 8, 16), 7, prompts=True).spec
    assert (spec.shape, spec.num_classes, spec.prompts) == ((4, 8, 16), 7, True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shape": (3, 0, 8)}, r"shape=\(3, 0, 8\)"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"size": 0}, "size=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        SyntheticDataModule(**settings)


def test_paired_images_bring_their_own_noise():
    data = SyntheticDataModule((1, 2, 3), 5, size=6, paired=True, batch_size=6, seed=3)
    assert data.spec.paired and data.spec.teacher is None and not SyntheticDataModule().spec.paired
    batch = next(iter(data.train_dataloader()))
    for x0, noise in zip(batch.x0, batch.noise, strict=True):
        item = next(number for number in range(6) if torch.equal(x0, random_image(number, (1, 2, 3))))
        assert torch.equal(noise, SeededNoise(0, [item], (1, 2, 3)).draw()[0])
    assert next(iter(data.val_dataloader())).noise is not None and data.examples(2).noise is None
    assert next(iter(SyntheticDataModule().train_dataloader())).noise is None
