"""The digits: what they are, who is trained on, in what order, and that a run cut anywhere goes on as if it had not been."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.digits import NAMES, SIZE, DigitsDataModule, caption, load_digits, split
from datamodules.order import permuted_items
from distill.types import Batch

NUMBERS = {image.numpy().tobytes(): number for number, image in enumerate(load_digits()[0])}


def numbers(images: Tensor) -> list[int]:
    """The places of images in the data set."""
    return [NUMBERS[image.numpy().tobytes()] for image in images]


class Recorder(LightningModule):
    """Learns next to nothing and writes down which images it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False
        self.seen: list[list[int]] = []
        self.validated: list[int] = []
        self.predicted: list[int] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen.append(numbers(batch.x0))
        self.manual_backward((self.weight - 1) ** 2)
        self.optimizers().step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += numbers(batch.x0)

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        self.predicted += numbers(batch.x0)


class Killed(Exception):
    """The end of a process."""


class SaveAndDie(Callback):
    """Saves in one of Lightning's hooks after so many steps and ends the run, or only saves."""

    def __init__(self, step: int, path: Path, hook: str = "on_train_batch_end", die: bool = True):
        self.step, self.path, self.die = step, path, die
        setattr(self, hook, self._act)

    def _act(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
            if self.die:
                raise Killed


def trainer_of(callbacks: list[Callback], **options: Any) -> Trainer:
    names = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    quiet = dict.fromkeys(names, False)
    defaults = {"accelerator": "cpu", "max_steps": 11, "max_epochs": -1, "limit_val_batches": 0}
    return Trainer(**(quiet | defaults | options), callbacks=callbacks)


def data(**arguments: Any) -> DigitsDataModule:
    return DigitsDataModule(**({"batch_size": 7, "batches_per_epoch": 4, "holdout": 1760} | arguments))


def fit(callbacks: list[Callback], ckpt: Path | None = None, module: Any = None, **options: Any) -> Recorder:
    """A run of 11 steps, in epochs of 4, over 37 images in batches of 7: a pass ends within a batch."""
    recorder = Recorder()
    try:
        trainer_of(callbacks, **options).fit(recorder, datamodule=module or data(), ckpt_path=ckpt)
    except Killed:
        pass
    return recorder


def on_ranks(module: DigitsDataModule, ranks: int, rank: int, trained: int = 0) -> DigitsDataModule:
    """As a data module is seen by one of several ranks."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=trained))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    state = SimpleNamespace(fn="fit")
    module.trainer = SimpleNamespace(world_size=ranks, global_rank=rank, fit_loop=loop, overfit_batches=0, state=state)
    return module


# ------------------------------------------------------------------------------------------------------------ content


def test_images_and_labels_are_those_of_the_package():
    from sklearn.datasets import load_digits as reference

    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert torch.equal((images[:, 0] + 1) * 8, torch.from_numpy(reference().images).float())
    assert torch.equal(labels, torch.from_numpy(reference().target))
    assert images.min() == -1 and images.max() == 1 and len(NUMBERS) == SIZE


def test_a_batch_has_the_labels_of_its_images():
    module = data(batch_size=64)
    batch = next(iter(module.train_dataloader()))
    assert isinstance(batch, Batch) and module.spec.shape == batch.x0.shape[1:] and module.spec.num_classes == 10
    assert torch.equal(batch.cond["labels"], load_digits()[1][numbers(batch.x0)])
    assert torch.equal(batch.null["labels"], torch.full((64,), 10))


def test_without_labels_the_data_is_unconditional():
    module = data(labels=False)
    batch = next(iter(module.train_dataloader()))
    assert module.spec.num_classes is None and batch.cond == {} and batch.null == {}
    assert module.examples(3).cond == {}


def test_examples_run_through_the_classes():
    examples = data().examples(12)
    assert examples.x0 is None and examples.prompts is None
    assert examples.cond["labels"].tolist() == [*range(10), 0, 1] and examples.null["labels"].tolist() == [10] * 12


def test_captions_name_the_digit_of_each_image():
    module = data(captions=True)
    assert module.spec.prompts and not data().spec.prompts
    batch = next(iter(module.train_dataloader()))
    assert batch.prompts == [caption(digit) for digit in batch.cond["labels"].tolist()]
    assert module.examples(8).prompts[7] == "a photo of the digit seven"
    assert module.examples(10).prompts == [f"a photo of the digit {name}" for name in NAMES]


@pytest.mark.parametrize("holdout", [0, 1, 10, 297, 1000, 1796])
def test_split_is_complete_and_in_proportion_to_the_classes(holdout):
    labels = load_digits()[1]
    training, held_out = split(labels, holdout)
    assert len(held_out) == holdout and sorted(torch.cat([training, held_out]).tolist()) == list(range(SIZE))
    share = torch.bincount(labels) * holdout / SIZE
    assert (torch.bincount(labels[held_out], minlength=10) - share).abs().max() < 1 + 1e-6


def test_held_out_images_are_never_trained_on_and_all_others_once_a_pass():
    module = DigitsDataModule(batch_size=300, batches_per_epoch=10, holdout=297, seed=5)
    seen = Counter(number for batch in module.train_dataloader() for number in numbers(batch.x0))
    training, _ = split(load_digits()[1], 297)
    assert seen == Counter({int(number): 2 for number in training})


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": -3},
        {"batch_size": 0},
        {"eval_batch_size": 0},
        {"batches_per_epoch": 0},
        {"num_workers": -1},
        {"seed": -1},
        {"holdout": -1},
        {"holdout": 1797},
    ],
)
def test_arguments_out_of_range_are_named(arguments):
    ((key, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"^{key}={value}: give .*\d"):
        DigitsDataModule(**arguments)


# -------------------------------------------------------------------------------------------------------------- order


def test_order_is_permutations_one_after_another_read_from_any_position():
    whole = permuted_items(10, 3, 0, 40)
    for number in range(4):
        assert sorted(whole[number * 10 : number * 10 + 10].tolist()) == list(range(10))
    assert len({tuple(whole[start : start + 10].tolist()) for start in range(0, 40, 10)}) == 4
    assert all(torch.equal(permuted_items(10, 3, start, 17), whole[start : start + 17]) for start in range(23))
    assert not torch.equal(permuted_items(10, 4, 0, 10), whole[:10])
    assert not torch.equal(permuted_items(10, 4, 0, 10), whole[10:20])  # the passes of one seed are not those of the next


def test_order_is_frozen():
    """A resumed run may run on other versions, so the order must not follow them."""
    assert permuted_items(10, 0, 0, 10).tolist() == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_each_global_batch(ranks):
    module = data(batch_size=6 // ranks, batches_per_epoch=9)
    alone = [numbers(batch.x0) for batch in data(batch_size=6, batches_per_epoch=9).train_dataloader()]
    shares = [[numbers(b.x0) for b in on_ranks(module, ranks, rank).train_dataloader()] for rank in range(ranks)]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == alone


def test_a_batch_larger_than_the_data_crosses_passes():
    seen = numbers(next(iter(data(batch_size=100).train_dataloader())).x0)
    assert len(seen) == 100 and set(Counter(seen).values()) == {2, 3}


def test_reading_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    for loader in (data().train_dataloader(), data().val_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------------- resume

WHOLE = [numbers(batch.x0) for batch in data(batches_per_epoch=30).train_dataloader()]


def test_an_uninterrupted_run_reads_the_order_across_its_epochs():
    assert fit([]).seen == WHOLE[:11]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cuts", [(1,), (3,), (4,), (6,), (8,), (5, 7), (9, 10), (2, 4, 8)])
def test_a_run_cut_and_resumed_sees_what_the_uninterrupted_one_sees(tmp_path, cuts, workers):
    seen: list[list[int]] = []
    path = None
    for part, cut in enumerate((*cuts, 99)):
        new = tmp_path / f"{part}.ckpt"
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # such as Lightning's, of loaders that cannot be resumed
            warnings.filterwarnings("ignore", "Checkpoint directory|You are trying|The `srun`|.*LeafSpec|.*CPU|.*worker")
            seen += fit([SaveAndDie(cut, new)], path, data(num_workers=workers)).seen
        path = new
    assert seen == WHOLE[:11]


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("step", [4, 6, 8])
def test_checkpoints_of_any_hook_hold_the_position(tmp_path, hook, step):
    path = tmp_path / "a.ckpt"
    options = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    first = fit([SaveAndDie(step, path, hook)], **options)
    if hook == "on_train_epoch_end" and step == 6:
        assert not path.exists()
        return
    rest = fit([], path, **options)
    assert len(first.seen) == step and first.seen + rest.seen == WHOLE[:11]


def test_a_run_saved_at_its_end_is_continued(tmp_path):
    path = tmp_path / "end.ckpt"
    fit([SaveAndDie(8, path, "on_train_end")], max_steps=8)
    assert fit([], path).seen == WHOLE[8:11]


def test_epochs_counted_by_lightning(tmp_path):
    path = tmp_path / "a.ckpt"
    options = {"max_steps": -1, "max_epochs": 3}
    first = fit([SaveAndDie(6, path)], **options)
    rest = fit([], path, **options)
    assert first.seen + rest.seen == WHOLE[:12]


def test_limited_epochs_lose_nothing():
    assert fit([], limit_train_batches=3).seen == WHOLE[:11]


def test_a_second_fit_of_one_data_module_starts_afresh():
    module = data()
    assert fit([], module=module).seen == fit([], module=module).seen == WHOLE[:11]


def test_a_fit_after_a_resumed_one_of_another_batch_size_starts_afresh(tmp_path):
    path, module = tmp_path / "a.ckpt", data(batch_size=10)
    fit([SaveAndDie(3, path)])
    assert fit([], path, module).seen[0] == sum(WHOLE, [])[21:31]
    assert fit([], module=module).seen[0] == sum(WHOLE, [])[:10]


def test_batches_prefetched_by_workers_are_not_counted():
    module = on_ranks(data(num_workers=2), 1, 0)
    batches = iter(module.train_dataloader())
    next(batches)
    assert module.state_dict()["consumed"] == 0
    module.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 1
    assert module.state_dict()["consumed"] == 7


def test_other_ranks_and_batch_sizes_go_on_where_the_others_stopped():
    """2 ranks, then 1, then 4, with other batches: each image of the order once."""
    seen: list[int] = []
    state: dict[str, Any] | None = None
    for ranks, batch_size, batches in ((2, 5, 4), (1, 3, 5), (4, 5, 3)):
        shares = []
        for rank in range(ranks):
            module = on_ranks(data(batch_size=batch_size, batches_per_epoch=9), ranks, rank)
            module.setup("fit")
            if state is not None:
                module.load_state_dict(state)
            shares.append([numbers(b.x0) for b in module.train_dataloader()][:batches])
        seen += [number for parts in zip(*shares, strict=True) for share in parts for number in share]
        module.trainer.fit_loop.epoch_loop.batch_progress.total.processed = batches
        state = module.state_dict()
    assert seen == sum(WHOLE, [])[: len(seen)] and len(seen) == 40 + 15 + 60


@pytest.mark.parametrize("arguments", [{"seed": 1}, {"holdout": 1761}])
def test_another_order_is_refused(tmp_path, arguments):
    path = tmp_path / "a.ckpt"
    fit([SaveAndDie(3, path)])
    ((key, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"data\.{key}={value}: .*set data\.{key}={getattr(data(), key)}"):
        fit([], path, data(**arguments))
    recorder = Recorder()
    trainer_of([], limit_val_batches=1).validate(recorder, data(**arguments), ckpt_path=path, verbose=False)
    assert recorder.validated == list(range(300))


def test_checkpoints_load_as_data(tmp_path):
    path = tmp_path / "a.ckpt"
    fit([SaveAndDie(3, path)])
    state = torch.load(path, weights_only=True)["DigitsDataModule"]
    assert state == {"consumed": 21, "seed": 0, "holdout": 1760, "batch": 7}


def test_overfit_batches_are_refused():
    with pytest.raises(ValueError, match=r"trainer\.overfit_batches=1.*leave it 0"):
        fit([], overfit_batches=1)


# --------------------------------------------------------------------------------------------------------- evaluation


def test_validation_and_prediction_read_all_images_in_order():
    recorder, trainer = Recorder(), trainer_of([], limit_val_batches=None)
    trainer.validate(recorder, DigitsDataModule(), verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.predict(recorder, DigitsDataModule(), return_predictions=False)
    assert recorder.validated == recorder.predicted == list(range(SIZE))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8, 16])
def test_ranks_share_validation_evenly_and_in_order(ranks):
    """Image i is on one rank, at the place that its batch and rank say: samples are numbered by it."""
    places: dict[int, int] = {}
    lengths = set()
    for rank in range(ranks):
        module = on_ranks(DigitsDataModule(), ranks, rank)
        loader, size = module.val_dataloader(), module.eval_batch_size
        assert size <= 300
        lengths.add(len(loader))
        for k, batch in enumerate(loader):
            first = (k * ranks + rank) * size
            for place, number in enumerate(numbers(batch.x0), start=first):
                assert number not in places
                places[number] = place
    assert places == {number: number for number in range(SIZE)} and len(lengths) == 1


def test_more_ranks_than_can_share_validation_are_refused():
    with pytest.raises(ValueError, match="1000 ranks cannot share 1797 samples"):
        on_ranks(DigitsDataModule(), 1000, 0).val_dataloader()
