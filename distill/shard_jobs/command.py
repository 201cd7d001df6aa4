"""The command of a tool that draws of a teacher: a config and its changes are read, the shards that are missing are made."""

from __future__ import annotations

import sys
import warnings
from inspect import signature
from typing import Any

from jsonargparse import ActionConfigFile, Namespace, set_parsing_settings
from tqdm import tqdm

from datamodules.shard_writing import unfinished_shards
from distill.cli import EXPECTED_WARNINGS, Parser, import_parts
from distill.numbered_draws import NumberedDraws
from distill.shard_jobs.job import ShardJob
from distill.shard_jobs.writing import ShardWriter


def run(
    writer_class: type[ShardWriter],
    draws_class: type[NumberedDraws],
    job_class: type[ShardJob],
    description: str | None,
    argv: list[str] | None,
) -> None:
    """Makes the shards that a command line asks for and that are not there, and says what is there.

    Args:
        writer_class: writes the shards.
        draws_class, job_class: their arguments are the keys of the config.
        description: of the tool.
        argv: the command line; None for the process's.
    """
    settings, parser = read_command(draws_class, job_class, description, argv)
    try:
        built = parser.instantiate(settings)
        draws = draws_class(**{key: built[key] for key in signature(draws_class).parameters})
        job = job_class(**{key: built[key] for key in signature(job_class).parameters})
        writer = writer_class(draws, job, plain(settings))
        wanted = range(job.of) if job.shard is None else [job.shard]
        made = unfinished_shards(job.out, writer.header, wanted)
        draws.to(job.computing_device)
        count, kind = sum(len(writer.draws_in(shard)) for shard in made), writer.kind
        with tqdm(total=count, desc=kind, unit=writer.unit, disable=None) as bar:
            for shard in made:
                writer.write(shard, bar)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    there = f"{len(made)} shards made, {len(wanted) - len(made)} were there, of {job.of} in all"
    print(f"{job.out}: {count} {kind} made; {there}")


def read_command(
    draws_class: type[NumberedDraws], job_class: type[ShardJob], description: str | None, argv: list[str] | None
) -> tuple[Namespace, Parser]:
    """What the config and the command line say; exits with 2 on what they cannot."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    import_parts()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser = Parser(description=description, parser_mode="omegaconf+")
    parser.add_argument("--config", action=ActionConfigFile, help="a file of these keys; may be given repeatedly")
    parser.add_class_arguments(draws_class, sub_configs=True)
    parser.add_class_arguments(job_class, sub_configs=True, skip={"batch_size"})
    size = signature(job_class).parameters["batch_size"].default
    parser.add_argument("--batch-size", type=int, default=size, help="how many are drawn at once")
    return parser.parse_args(argv), parser


def plain(value: Any) -> Any:
    """A setting as JSON has it, without the places of the files that it was read from."""
    if isinstance(value, Namespace | dict):
        parts = (vars(value) if isinstance(value, Namespace) else value).items()
        return {str(key): plain(part) for key, part in parts if not str(key).startswith("__")}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value
