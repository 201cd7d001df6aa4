"""The header of shards: what made them, by which a folder is refused to another teacher or protocol."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from datamodules.shards import EMBEDDINGS, FORMAT, OWN_NULL, Kind
from distill.numbered_draws import NumberedDraws
from distill.pretrained import identity_of
from distill.shard_jobs.job import ShardJob
from distill.shard_jobs.requests import Requests
from distill.space import check_fit

DRAWN_OWN_NULL = (*OWN_NULL, "guidance")


def make_header(
    kind: Kind, draws: NumberedDraws, job: ShardJob, requests: Requests, settings: dict[str, Any]
) -> dict[str, Any]:
    """What made the shards of this command; the same for all but for ``shard``.

    Torch, NumPy and the device are recorded and not compared: what others computed is of the same teacher, if not the same
    bits.

    Args:
        kind: of what is drawn.
        draws, job, requests: what is drawn, by what, and what it shows.
        settings: of the config, to be held as they are.

    Raises:
        ValueError: a teacher without a hash, or one that does not fit the data; embeddings that nothing makes; more shards than
            batches.
    """
    identity, spec, space = identity_of(draws.teacher), requests.spec, draws.space.identity
    if identity is None:
        name, reason = type(draws.teacher).__name__, f"was not read from a file, so nothing tells its {kind} from another's"
        raise ValueError(f"teacher={name}: {reason}; export it, and give a PretrainedDenoiser of the folder.")
    inside = draws.space.spec(spec)
    check_fit("teacher", draws.teacher, inside)
    if job.embeddings is not None and not set(EMBEDDINGS) & set(inside.widths):
        raise ValueError(f"embeddings={job.embeddings}: neither data nor prompts make any; set it to null.")
    batches = -(-requests.count // job.batch_size)
    if job.of > batches:
        raise ValueError(f"--of={job.of}: shards are of whole batches, and there are {batches}; lower --batch-size.")
    texts = spec.prompts and job.embeddings is None
    networks = {} if draws.guidance is None else draws.guidance.identity
    return {
        "kind": kind,
        "format": FORMAT,
        "teacher": identity,
        "codec": space["codec"] or (spec.codec and {"sha256": spec.codec}),
        "conditioner": space["conditioner"] or (spec.conditioner and {"sha256": spec.conditioner}),
        **({"guidance_networks": networks} if networks else {}),
        **settings,
        "shape": list(inside.shape),
        "num_classes": inside.num_classes,
        "widths": dict(spec.widths if texts else inside.widths),
        "own_null": sorted(DRAWN_OWN_NULL),
        "prompts": texts,
        "dataset": requests.record,
        "total": requests.count,
        "of": job.of,
        "batch_size": job.batch_size,
        "computed_by": {"torch": torch.__version__, "numpy": numpy.__version__, "device": device_name(job.computing_device)},
    }


def batch_range(header: dict[str, Any], shard: int) -> tuple[int, int]:
    """The batches of a shard, the first and the one after the last; the same batches, each whole, whatever ``of`` is."""
    batches = -(-header["total"] // header["batch_size"])
    return shard * batches // header["of"], (shard + 1) * batches // header["of"]


def device_name(device: Any) -> str:
    """What computes: ``cpu``, or the model of the GPU."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device)
