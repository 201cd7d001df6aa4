"""A data module over numbered samples: an exact order of training that is resumed anywhere, validation in order."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import DataModule
from datamodules.order import OrderedLoader, ResumableLoader, permuted_items, trained_batches

HASH = "(sha256"
"""How `OrderedDataModule.order` begins what stands for the contents of files."""


class OrderedDataModule(DataModule):
    """Samples that have numbers, 0 to ``size - 1``, each of which can be read at any time.

    Training reads permutation after permutation of `training_items` (seeded by the seed and the pass), the global batch k being
    items ``k * batch_size * ranks`` onwards and each rank's share a slice of it. Nothing is lost or repeated in a pass, also
    when a run is cut anywhere and resumed, with another batch size or number of ranks if need be. Validation, test and
    prediction read `evaluation_items` in order, each on one rank.

    Args:
        batch_size: training samples a batch on each rank.
        num_workers: processes that prepare the batches.
        seed: of the order of training.
        batches_per_epoch: training batches of each rank in what Lightning calls an epoch.
        eval_batch_size: at most so many samples a batch on each rank in validation; see `eval_batch_size`.

    Raises:
        ValueError: an argument out of its range; names it, its value and the range.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int, batches_per_epoch: int, eval_batch_size: int):
        super().__init__()
        positive = {"batch_size": batch_size, "batches_per_epoch": batches_per_epoch, "eval_batch_size": eval_batch_size}
        for least, values in ((1, positive), (0, {"num_workers": num_workers, "seed": seed})):
            for key, value in values.items():
                if value < least:
                    raise ValueError(f"{key}={value}: give a number of at least {least}.")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.batches_per_epoch, self.largest_eval_batch = batches_per_epoch, eval_batch_size
        self._start = 0
        self._trained_at_start: int | None = None

    @abstractmethod
    def rows(self) -> Dataset:
        """``rows()[items]`` is the batch of the samples with the numbers ``items`` ``(b,)``; may be sent to a worker."""

    @abstractmethod
    def training_items(self) -> Tensor:
        """Numbers ``(n,)`` of the samples that are trained on."""

    @abstractmethod
    def evaluation_items(self) -> Tensor:
        """Numbers ``(n,)`` of the samples of validation."""

    def order(self) -> dict[str, Any]:
        """What the order of training depends on, by the name of the argument."""
        return {"seed": self.seed}

    @property
    def ranks(self) -> tuple[int, int]:
        """This process's rank and the number of ranks; 0 and 1 without a trainer."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    # ------------------------------------------------------------------------------------------------------ training

    @property
    def consumed(self) -> int:
        """Samples, over all ranks, that training has worked on since the run began: the position in the order."""
        if self._trained_at_start is None:
            return self._start
        return self._start + (trained_batches(self.trainer) - self._trained_at_start) * self.batch_size * self.ranks[1]

    def setup(self, stage: str) -> None:
        """A new trainer starts the order afresh; Lightning restores the position of a resumed run after this."""
        if self.trainer is not None and trained_batches(self.trainer) == 0:
            self._start, self._trained_at_start = 0, None

    def train_dataloader(self) -> ResumableLoader:
        """Epochs of ``batches_per_epoch`` batches, from the position on.

        Raises:
            ValueError: the trainer asks for ``overfit_batches``, which this order cannot repeat.
        """
        overfit = getattr(self.trainer, "overfit_batches", 0)
        if overfit > 0:
            raise ValueError(f"trainer.overfit_batches={overfit}: the order repeats no batch; leave it 0.")
        self._start, self._trained_at_start = self.consumed, trained_batches(self.trainer)
        return ResumableLoader(self.rows(), self._next_batches, self.batches_per_epoch, self.num_workers)

    def _next_batches(self) -> list[Tensor]:
        """The items of this rank in the next ``batches_per_epoch`` batches."""
        training, (rank, ranks) = self.training_items(), self.ranks
        first = self.consumed + rank * self.batch_size
        starts = range(first, first + self.batches_per_epoch * self.batch_size * ranks, self.batch_size * ranks)
        return [training[permuted_items(len(training), self.seed, start, self.batch_size)] for start in starts]

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"consumed": self.consumed, **self.order(), "batch": self.batch_size * self.ranks[1]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the position saved.

        Raises:
            ValueError: another order: samples would be lost or repeated.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return  # validation of a checkpoint consumes no training data
        for key, value in self.order().items():
            if (before := state_dict.get(key)) != value:
                files = str(value).startswith(HASH)
                remedy = "put those back that it began with" if files else f"set data.{key}={before}"
                raise ValueError(
                    f"data.{key}={value}: the run to be resumed has {before}, hence another order, and samples "
                    f"would be lost or repeated; {remedy}, or start a new run."
                )
        before, now = state_dict["batch"], self.batch_size * self.ranks[1]
        if before != now:
            rank_zero_info(f"The batch over all ranks was {before} samples, from here on {now}; none is lost or repeated.")
        self._start, self._trained_at_start = state_dict["consumed"], None

    # ---------------------------------------------------------------------------------------------------- evaluation

    @property
    def eval_batch_size(self) -> int:
        """Samples a batch on each rank in validation: batch k of rank r starts at sample ``(k * ranks + r) * eval_batch_size``.

        The largest not above the argument with which every rank has as many batches as the others, the last one apart.
        """
        ranks, count = self.ranks[1], len(self.evaluation_items())
        batches = -(-count // (self.largest_eval_batch * ranks)) * ranks
        return -(-count // batches)

    def val_dataloader(self) -> OrderedLoader:
        """The samples of validation in order, split over the ranks.

        Raises:
            ValueError: so many ranks that one would have no batch.
        """
        items, (rank, ranks), size = self.evaluation_items(), self.ranks, self.eval_batch_size
        batches = items.split(size)
        if len(batches) < ranks:
            raise ValueError(f"{ranks} ranks cannot share {len(items)} samples in batches of {size}: validate on fewer ranks.")
        mine = list(batches[rank::ranks])
        return OrderedLoader(self.rows(), lambda: mine, len(mine), self.num_workers)

    def held_out_items(self) -> Tensor:
        """Of `evaluation_items` those that are never trained on, where the data keeps any back; else all."""
        return self.evaluation_items()

    def held_out_dataloader(self) -> OrderedLoader:
        """Those samples, in order, every rank its share."""
        rank, ranks = self.ranks
        mine = list(self.held_out_items()[rank::ranks].split(self.eval_batch_size))
        return OrderedLoader(self.rows(), lambda: mine, len(mine), self.num_workers)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader
