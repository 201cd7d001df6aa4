"""Makes guided trajectories of a teacher, in shards that `datamodules.trajectories.TrajectoriesDataModule` trains on.

    python tools/make_trajectories.py --config configs/digits/trajectories.yaml --out data/trajectories/digits
    python tools/make_trajectories.py --config FILE --dtype=float16 --points=20 --out data/trajectories/sd15 --of 64 --shard 3

The config says of which teacher, by which sampler, guidance and data; further ``--a.b=c`` change it. Of each trajectory so
many ``points`` are stored, each as a sample of its own: number = trajectory * points + point. Encoded prompts are stored with
every point; texts alone (``embeddings: null``) are smaller. Without ``--shard`` all shards are made in turn. A finished shard
is not made again, a half one leaves nothing: start the same command again. Trajectories are drawn in the same whole batches
however many shards there are: on one kind of machine, ``--of`` changes no bit of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.shard_jobs import ShardJob, ShardWriter, run
from distill.trajectories import GuidedTrajectories
from distill.types import Batch


class TrajectoryWriter(ShardWriter):
    """Draws trajectories and writes what shards hold of their points: ``x0``, ``noise`` and, in the record, ``time``."""

    kind, unit = "trajectories", "trajectory"
    stored_settings = ("sampler", "steps", "guidance", "guidance_range", "seed", "dtype", "embeddings")
    draws: GuidedTrajectories

    def own_header(self) -> dict[str, Any]:
        return {"evaluations": self.draws.evaluations, "points": self.draws.each}

    def columns(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.x0 is not None and batch.noise is not None and batch.time is not None
        return {"x0": batch.x0, "noise": batch.noise, "time": batch.time}

    def precision(self, name: str) -> str | None:
        return self.job.dtype if name in ("x0", "noise") else super().precision(name)


def main(argv: list[str] | None = None) -> None:
    """Makes trajectories, and says what is there."""
    run(TrajectoryWriter, GuidedTrajectories, ShardJob, __doc__, argv)


if __name__ == "__main__":
    main()
