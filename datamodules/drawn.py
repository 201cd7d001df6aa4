"""What noise-sample pairs and trajectories share: shards of what one teacher drew, beside real data of validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.ordered import OrderedDataModule, OrderedLoader
from datamodules.sharded import ShardedDataModule, ShardRows, as_tensor, spec_of
from datamodules.shards import Kind, Shard, again, read_folder, same
from distill.noise import SeededNoise
from distill.types import Batch, DataSpec

NOT_CONDITIONS = ("noise", "prompt")
GUIDANCE = ("guidance", "guidance_range", "anchored")
SAME = ("teacher", "codec", "conditioner", *GUIDANCE, "guidance_networks", "shape", "num_classes", "widths", "prompts")
"""What folders that are read together must agree in; samplers, their steps, and forms of storage may differ."""


class DrawnRows(ShardRows):
    """Batches of chosen samples of one folder: pairs, or points of trajectories, which have a time."""

    def __getitem__(self, items: Tensor) -> Batch:
        header, members = self.shards[0].header, self.read(items)
        records = members.pop("json")
        pixels = members.pop("png", None)
        columns = {name[:-4]: as_tensor(rows) for name, rows in members.items()}
        x0 = columns.pop("x0") if pixels is None else as_tensor(pixels).float() / 127.5 - 1
        if "noise" in columns:
            noise = columns.pop("noise")
        else:
            noise = SeededNoise(header["seed"], [record["noise"][1] for record in records], header["shape"]).draw()
        for name in records[0]:
            if name not in NOT_CONDITIONS:
                columns[name] = torch.tensor([record[name] for record in records])
        time = columns.pop("time", None)
        prompts = [record["prompt"] for record in records] if header["prompts"] else None
        return Batch(x0, columns, self.null(columns), noise, prompts, header["codec"] is not None, time)


class DrawnFolders(Dataset):
    """Batches of chosen samples of several folders, numbered over all of them.

    Args:
        folders: the samples of each.
    """

    def __init__(self, folders: list[DrawnRows]):
        self.folders, self.ends = folders, numpy.cumsum([len(rows) for rows in folders])

    def __getitem__(self, items: Tensor) -> Batch:
        """The batch of the samples with the numbers ``items`` ``(b,)``."""
        if len(self.folders) == 1:
            return self.folders[0][items]
        of = torch.from_numpy(numpy.searchsorted(self.ends, items.numpy(), side="right"))
        groups = {folder: torch.nonzero(of == folder).flatten() for folder in of.unique().tolist()}
        parts = [self.folders[n][items[rows] - int(self.ends[n]) + len(self.folders[n])] for n, rows in groups.items()]
        order = torch.cat(list(groups.values())).argsort()
        columns = {name: [getattr(part, name) for part in parts] for name in ("x0", "noise", "time")}
        joined = {name: torch.cat(values)[order] for name, values in columns.items() if values[0] is not None}
        cond = {name: torch.cat([part.cond[name] for part in parts])[order] for name in parts[0].cond}
        prompts = [prompt for part in parts for prompt in part.prompts or []]
        texts = [prompts[row] for row in order.tolist()] if prompts else None
        return replace(parts[0], cond=cond, null=self.folders[0].null(cond), prompts=texts, **joined)


def read_folders(
    folders: list[str], kind: Kind, verify: bool, check: Callable[[str, dict[str, Any]], None]
) -> list[list[Shard]]:
    """The shards of folders that belong together.

    Args:
        folders: at least one.
        kind: of all of them.
        verify: see `datamodules.shards.read_folder`.
        check: refuses a folder by its header.

    Raises:
        FileNotFoundError, ValueError: see `datamodules.shards.read_folder`; folders of different teachers, or that were guided
            or encoded differently; what ``check`` refuses.
    """
    found = [read_folder(folder, kind, verify) for folder in folders]
    first = found[0][0].header
    for name, shards in zip(folders, found, strict=True):
        header = shards[0].header
        for key in SAME:
            if not same(header, first, key):
                raise ValueError(
                    f"folder={name!r}: its {kind} have {key}={header.get(key)}, those of {folders[0]!r} {first.get(key)}: read "
                    f"together they are no {kind} of one flow; {again(kind)} with the same {key}."
                )
        check(name, header)
    return found


class DrawnDataModule(ShardedDataModule):
    """A `ShardedDataModule` over what a teacher drew, whose validation may read real data.

    Args:
        kind: of the shards.
        folders: the shards and their manifests.
        repeat: how often the samples of each folder come in a pass; None for once.
        real: data of validation, test, prediction and examples, whose settings are its own; None for the samples themselves.
        verify: whether every shard is read once and its hash compared.
        eval_samples, batch_size, num_workers, seed, batches_per_epoch, eval_batch_size: see `ShardedDataModule`.

    Raises:
        FileNotFoundError, ValueError: see `read_folders`; ``real`` of another kind than the samples; an argument out of its
            range.
    """

    def __init__(
        self,
        kind: Kind,
        folders: list[str],
        repeat: list[int] | None,
        real: OrderedDataModule | None,
        verify: bool,
        eval_samples: int | None,
        batch_size: int,
        num_workers: int,
        seed: int,
        batches_per_epoch: int,
        eval_batch_size: int,
    ):
        repeat = [1] * len(folders) if repeat is None else repeat
        if not folders or len(repeat) != len(folders) or min(repeat) < 1:
            raise ValueError(f"repeat={repeat}: give a number of at least 1 for each of {len(folders)} folders, or null.")
        found = read_folders(folders, kind, verify, self.check_header)
        rows, shards = [DrawnRows(shards) for shards in found], [shard for shards in found for shard in shards]
        loading = (batch_size, num_workers, seed, batches_per_epoch, eval_batch_size)
        super().__init__(DrawnFolders(rows), shards, eval_samples, *loading)
        self.sizes, self.repeat, self.real = [len(part) for part in rows], repeat, real
        header = found[0][0].header
        prompts = header["prompts"] or (real is not None and real.spec.prompts)
        told = {"paired": kind == "pairs", "trajectories": kind == "trajectories"}
        self.spec = spec_of(header, prompts=prompts, teacher=header["teacher"]["sha256"], **told)
        if real is not None:
            _check_real(kind, self.spec, real.spec)

    def check_header(self, folder: str, header: dict[str, Any]) -> None:
        """Refuses a folder that cannot be read here. Raises ValueError."""

    def training_items(self) -> Tensor:
        """The samples of each folder as often as it is repeated."""
        parts = torch.arange(self.size).split(self.sizes)
        return torch.cat([part.repeat(times) for part, times in zip(parts, self.repeat, strict=True)])

    def order(self) -> dict[str, Any]:
        return super().order() | {"repeat": self.repeat}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.real is not None:
            self.real.trainer = self.trainer  # for its rank

    @property
    def eval_batch_size(self) -> int:
        return super().eval_batch_size if self.real is None else self.real.eval_batch_size

    def examples(self, count: int) -> Batch:
        return super().examples(count) if self.real is None else self.real.examples(count)

    def val_dataloader(self) -> OrderedLoader:
        return super().val_dataloader() if self.real is None else self.real.val_dataloader()

    def held_out_dataloader(self) -> OrderedLoader:
        return self.val_dataloader() if self.real is None else self.real.held_out_dataloader()

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def _check_real(kind: Kind, drawn: DataSpec, real: DataSpec) -> None:
    """Raises ValueError if validation data is of another kind than the samples; pixels beside latents are encoded."""
    for key in ("shape", "num_classes", "codec"):
        mine, other = getattr(drawn, key), getattr(real, key)
        encoded_later = key != "num_classes" and real.codec is None and drawn.codec is not None
        if mine != other and not encoded_later:
            raise ValueError(f"real delivers {key}={other}, the {kind} {key}={mine}: give data like the teacher's own.")
