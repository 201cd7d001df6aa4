"""Makes noise-sample pairs of a teacher, in shards that `datamodules.pairs.PairsDataModule` trains on.

    python tools/make_pairs.py --config configs/digits/pairs.yaml --out data/pairs/digits
    python tools/make_pairs.py --config configs/sd15/pairs.yaml --out data/pairs/sd15 --of 64 --shard 3

The config says of which teacher, by which sampler, guidance and data; further ``--a.b=c`` change it. Without ``--shard`` all
shards are made in turn. A finished shard is not made again, a half one leaves nothing: start the same command again. Pairs are
drawn in the same whole batches however many shards there are: on one kind of machine, ``--of`` changes no bit of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from datamodules.members import to_png
from datamodules.pairs import noise_hash
from distill.metrics.features import to_uint8
from distill.noise_pairs import NoisePairs
from distill.shard_jobs import ShardJob, ShardWriter, run
from distill.types import Batch


@dataclass
class PairJob(ShardJob):
    """Which pairs are made, and how they are stored.

    Attributes:
        store: ``array`` for samples in model space, ``png`` for pixels in 8 bits.
    """

    store: Literal["array", "png"] = "array"


class PairWriter(ShardWriter):
    """Draws pairs and writes what shards hold of them: samples, and noise by its number, or itself if it was inverted."""

    kind, unit = "pairs", "pair"
    stored_settings = (
        *("sampler", "steps", "guidance", "guidance_range", "anchored", "seed", "invert", "store", "dtype", "embeddings"),
    )
    draws: NoisePairs
    job: PairJob

    def own_header(self) -> dict[str, Any]:
        """Noise that is drawn otherwise has another ``noise_check``, which is compared."""
        shape, codec = self.header["shape"], self.header["codec"]
        if self.job.store == "png" and (codec or shape[0] not in (1, 3)):
            words = f"holds pixels of 1 or 3 channels, not samples of shape {shape} in a codec's; give array"
            raise ValueError(f"store=png: {words}.")
        return {"noise_check": None if self.draws.invert else noise_hash(self.draws.seed, shape)}

    def columns(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.x0 is not None and batch.noise is not None
        return {"x0": batch.x0} | ({"noise": batch.noise} if self.draws.invert else {})

    def record(self, number: int) -> dict[str, Any]:
        return {} if self.draws.invert else {"noise": [self.draws.seed, number]}

    def precision(self, name: str) -> str | None:
        return self.job.dtype if name == "x0" and self.job.store == "array" else super().precision(name)

    def encoder(self, name: str) -> tuple[str, Callable[[Tensor], bytes]]:
        if name == "x0" and self.job.store == "png":
            return "png", lambda value: to_png(to_uint8(value).numpy())
        return super().encoder(name)


def main(argv: list[str] | None = None) -> None:
    """Makes pairs, and says what is there."""
    run(PairWriter, NoisePairs, PairJob, __doc__, argv)


if __name__ == "__main__":
    main()
