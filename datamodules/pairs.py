"""Noise-sample pairs: what a teacher made of numbered noise, from the shards of tools/make_pairs.py."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy

from datamodules.drawn import DrawnDataModule
from datamodules.ordered import OrderedDataModule
from datamodules.shards import again
from distill.noise import SeededNoise


def noise_hash(seed: int, shape: list[int]) -> str:
    """sha256 of the noise of pair 0 as this machine draws it."""
    return hashlib.sha256(SeededNoise(seed, [0], shape).draw().numpy().tobytes()).hexdigest()


class PairsDataModule(DrawnDataModule):
    """Pairs that tools/make_pairs.py wrote, as batches whose ``noise`` is what the teacher made ``x0`` of.

    Noise is drawn again from the seed of each pair, bit for bit. ``spec`` carries the hash of the teacher. The order of
    training is exact and resumable, see `OrderedDataModule`.

    Args:
        folder: the shards and their manifests; several folders of one teacher are read as one.
        repeat: how often the pairs of each folder come in a pass; null for once.
        real: data of validation, test, prediction and examples, whose settings are its own; null for the pairs' own samples.
        batch_size: training pairs a batch on each rank.
        num_workers: processes that read; pairs are read from the disk one by one.
        seed: of the order of training.
        batches_per_epoch: training batches of each rank in what Lightning calls an epoch.
        eval_samples: pairs of validation, evenly spaced; null for all. Not used with ``real``.
        eval_batch_size: at most so many pairs a batch on each rank in validation. Not used with ``real``.
        verify: whether every shard is read once and its hash compared at the start, rather than its size and header.

    Raises:
        FileNotFoundError: no folder, no manifest, a missing shard; names what to run.
        ValueError: a truncated or damaged shard, pairs of different teachers, noise that cannot be drawn again, ``real`` of
            another kind than the pairs, an argument out of its range.
    """

    def __init__(
        self,
        folder: str | list[str],
        repeat: list[int] | None = None,
        real: OrderedDataModule | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        batches_per_epoch: int = 100,
        eval_samples: int | None = None,
        eval_batch_size: int = 300,
        verify: bool = False,
    ):
        folders = [folder] if isinstance(folder, str) else folder
        loading = (batch_size, num_workers, seed, batches_per_epoch, eval_batch_size)
        super().__init__("pairs", folders, repeat, real, verify, eval_samples, *loading)

    def check_header(self, folder: str, header: dict[str, Any]) -> None:
        """Refuses noise that this machine draws otherwise than the one that made the pairs. Raises ValueError."""
        if header["noise_check"] is not None and noise_hash(header["seed"], header["shape"]) != header["noise_check"]:
            raise ValueError(
                f"folder={folder!r}: numpy {numpy.__version__} here draws other noise from the same seed than numpy "
                f"{header['computed_by']['numpy']}, by which the pairs were made: install that version, or {again('pairs')}."
            )
