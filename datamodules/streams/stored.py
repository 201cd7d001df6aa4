"""What a sample of the tools' own shards is: encoded samples, or what a teacher drew, read as a stream without manifests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

import numpy
import torch

from datamodules.drawn import DrawnRows
from datamodules.encoded import EncodedRows
from datamodules.members import DECODERS
from datamodules.pairs import noise_hash
from datamodules.sharded import ShardRows, in_float32, spec_of
from datamodules.shards import FORMAT, Kind, Shard, again, differences, kind_of
from datamodules.streams.contents import Contents, Row
from datamodules.streams.decoding import Bytes, Draws, check_finite, read_array
from datamodules.streams.rejects import Reject
from distill.types import Batch

LEARNT_FROM = 16
"""Samples that say what all must be."""


class _Given(ShardRows):
    """Rows that were read already: all of them are the batch.

    Args:
        header, null: of their shards.
        columns: of each member by name, decoded.
    """

    def __init__(self, header: dict[str, Any], null: dict[str, torch.Tensor], columns: dict[str, Any]):
        self.shards = [Shard(Path(), header, "", numpy.zeros(1, numpy.int64), 0, [], None)]
        self.shared_null, self.own_null, self.columns = null, header["own_null"], columns

    def read(self, items: torch.Tensor) -> dict[str, Any]:
        return dict(self.columns)


class _GivenEncoded(_Given, EncodedRows):
    pass


class _GivenDrawn(_Given, DrawnRows):
    pass


class StoredContents(Contents):
    """Samples of shards that a tool wrote; every shard must be made by the same things as the first one."""

    rows: type[_Given]
    endings: tuple[str, ...]
    kinds: tuple[Kind, ...]

    def bind(self, shard: str, leading: Mapping[str, bytes]) -> None:
        """Takes the header of the first shard, and the null conditions.

        Raises:
            ValueError: no such shard, or one of another kind.
        """
        from safetensors.torch import load

        try:
            self.header = json.loads(leading["__header__"])
            self.null = {name: in_float32(row) for name, row in load(leading["__null__"]).items()}
            found, known = kind_of(self.header), self.header["format"]
        except Exception as error:
            reason = f"not a shard of {' or '.join(self.kinds)} ({error!r})"
            raise ValueError(f"shards: {shard}: {reason}; {again(self.kinds[0])}.") from error
        if found not in self.kinds or known != FORMAT:
            wanted = " or ".join(self.kinds)
            raise ValueError(f"shards: {shard}: {found} of format {known}, not {wanted}; {again(self.kinds[0])}.")
        self.shapes = {"x0": tuple(self.header["shape"])} | {name: tuple(row.shape[1:]) for name, row in self.null.items()}

    def learn(self, samples: Iterable[Mapping[str, Bytes]]) -> None:
        """Takes from the first samples what the header does not say: names of members, keys of records, shapes of arrays.

        What most of the good ones are is expected of all. Done before there are workers, each of which would otherwise expect
        what the first sample is that it happens to see.
        """
        found: list[StoredContents] = []
        for members in samples:
            one = copy(self)
            one.shapes = dict(self.shapes)
            for own in ("names", "record"):
                one.__dict__.pop(own, None)
            with suppress(Reject):
                one.decode(members, None)
                found.append(one)
        counts = Counter(one._expected() for one in found)
        if usual := next((one for one in found if one._expected() == counts.most_common(1)[0][0]), None):
            self.__dict__.update(usual.__dict__)

    def _expected(self) -> str:
        own = self.__dict__
        return f"{sorted(own['names'])} {sorted(own.get('record', ()))} {sorted(self.shapes.items())}"

    def check_header(self, header: bytes | None) -> None:
        try:
            other = json.loads(header or b"{}")
        except ValueError as error:
            raise Reject("other header", error) from error
        if keys := differences(self.header, other):
            raise Reject("other header", f"{keys[0]} is {other.get(keys[0])}, in the first shard {self.header.get(keys[0])}")

    def wants(self, ending: str) -> bool:
        return ending.rpartition(".")[2] in self.endings

    def decode(self, members: Mapping[str, Bytes], draws: Draws | None) -> Row:
        row: Row = {name: self._decode(name, content) for name, content in members.items()}
        record = row["json"][0] if "json" in row else {}
        needed = {"json"} & set(self.endings) | {f"{name}.npy" for name in self.null if name not in record}
        missing = sorted(needed - row.keys()) if row.keys() & {"x0.npy", "png"} else ["x0"]
        first = self.__dict__.setdefault("names", set(row)) if not missing else set()
        if missing or row.keys() != first:
            raise Reject(f"no {missing[0]}" if missing else "other members", f"there are {sorted(row)}")
        return row

    def _decode(self, name: str, content: Bytes) -> Any:
        """One member, an array ``(1, ...)`` or a list of one."""
        kind = name.rpartition(".")[2]
        if kind == "npy":
            array = check_finite(read_array(content))
            expected = self.shapes.setdefault(name[:-4], array.shape)
            if array.shape != expected:
                raise Reject("other shape", f"{name} is {array.shape} instead of {expected}")
            return array[None]
        try:
            value = DECODERS[kind]([content])
        except (ValueError, RecursionError) as error:
            raise Reject(f"bad {'image' if kind == 'png' else kind}", error) from error
        if kind == "png" and value.shape[1:] != self.shapes["x0"]:
            raise Reject("other shape", f"{name} is {value.shape[1:]} instead of {self.shapes['x0']}")
        if kind == "json" and (not isinstance(value[0], dict) or value[0].keys() != self._record(value[0]).keys()):
            raise Reject("bad json", f"{value[0]!r:.80}: another record than the first")
        return value

    def _record(self, first: dict[str, Any]) -> dict[str, Any]:
        """The first record that was read."""
        return self.__dict__.setdefault("record", first)

    def batch(self, rows: list[Row]) -> Batch:
        columns = {}
        for name in sorted(rows[0]):
            values = [row[name] for row in rows]
            arrays = isinstance(values[0], numpy.ndarray)
            columns[name] = numpy.concatenate(values) if arrays else [value for each in values for value in each]
        return self.rows(self.header, self.null, columns)[torch.arange(len(rows))]


class EncodedContents(StoredContents):
    """Latents and conditions, from the shards of tools/encode_latents.py; for the exact order see `EncodedDataModule`."""

    rows, endings, kinds = _GivenEncoded, ("npy",), ("encoded",)
    exact_by = "EncodedDataModule (folder: theirs)"

    def bind(self, shard: str, leading: Mapping[str, bytes]) -> None:
        super().bind(shard, leading)
        self.spec = spec_of(self.header)


class DrawnContents(StoredContents):
    """Pairs and trajectories, from the shards of tools/make_pairs.py and tools/make_trajectories.py.

    For the exact order see `PairsDataModule` and `TrajectoriesDataModule`.
    """

    rows, endings, kinds = _GivenDrawn, ("npy", "png", "json"), ("pairs", "trajectories")
    exact_by = "PairsDataModule or TrajectoriesDataModule (folder: theirs)"

    def bind(self, shard: str, leading: Mapping[str, bytes]) -> None:
        super().bind(shard, leading)
        header, kind = self.header, kind_of(self.header)
        check = header.get("noise_check")
        if check is not None and noise_hash(header["seed"], header["shape"]) != check:
            raise ValueError(
                f"shards: {shard}: numpy {numpy.__version__} here draws other noise from the same seed than numpy "
                f"{header['computed_by']['numpy']}, by which they were made: install that version, or {again(kind)}."
            )
        told = {"paired": kind == "pairs", "trajectories": kind == "trajectories"}
        self.spec = spec_of(header, prompts=header["prompts"], teacher=header["teacher"]["sha256"], **told)
