"""What a set of samples depends on, as ``samples.json`` says it, and by which a folder is known to hold that set or another."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from distill.sample_folders.sources import RunSource, TeacherSource
from distill.types import Batch

OPTIONS = ("seed", "steps", "guidance", "num", "prompts", "negative_prompt", "device", "labels", "batch_size", "format")
FOUND = ("evaluations", "sha256")
"""What is known only when all samples are there."""
NAMES = ("run", "checkpoint", "adapters")
"""Where weights were read from: the weights themselves are compared."""
LONGEST = 60
"""Characters of a value in a message."""


def describe(source: RunSource | TeacherSource, arguments: argparse.Namespace, wanted: Batch) -> dict[str, Any]:
    """The content of ``samples.json`` but for `FOUND`, as JSON gives it back.

    Rows of batches of another size may be rounded otherwise in their last bit, and so may those of another release of torch:
    size and versions are among the settings.
    """
    settings = source.record | {key: getattr(arguments, key) for key in OPTIONS}
    settings |= {"shard_size": arguments.shard_size} if arguments.format == "shards" else {}
    settings |= source.hashes
    for part, identity in source.space.identity.items():
        settings |= {f"{part}_sha256": identity["sha256"]} if identity else {}
    settings["requests_sha256"] = hash_of_requests(wanted)
    settings["versions"] = {"distill": version("distill"), "torch": torch.__version__}
    return json.loads(json.dumps(settings))


def hash_of_requests(wanted: Batch) -> str:
    """The sha256 of what all samples are to show."""
    digest = hashlib.sha256(json.dumps(wanted.prompts).encode())
    for side in (wanted.cond, wanted.null):
        for name, value in sorted(side.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first setting in which the samples of a folder differ from those asked for, with both values; None if none does."""
    for key in {**here, **there}:
        if key in (*FOUND, *NAMES):
            continue
        theirs, own = (_compared(key, settings.get(key)) for settings in (there, here))
        if theirs != own:
            shown = [_shown(value) if key in settings else "not stated" for settings, value in ((there, theirs), (here, own))]
            return f"{key} is {shown[0]} there, {shown[1]} here"
    return None


def _compared(key: str, value: Any) -> Any:
    """Of a teacher the hash counts, not the path."""
    return value.get("sha256") if key == "teacher" and isinstance(value, dict) else value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
