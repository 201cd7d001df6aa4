"""Checks shards of samples: reads every member of every tar, says how many there are, what they are like, and what is wrong.

    python tools/check_shards.py "data/shards/photos/*.tar"
    python tools/check_shards.py "/data/laion/{00000..00999}.tar" --workers 16 --out report.json
    python tools/check_shards.py "data/shards/photos/*.tar" --contents contents.yaml

Pictures, texts, labels, JSON and arrays are decoded by the endings of their names; other members are counted alone. What most
samples have, all must have; arrays of one name must be of one shape and type. With ``--contents``, a YAML file with what the
config has under ``data.init_args.contents``, each sample is also decoded as training does. Where a tar has a manifest beside
it, its size, its hash and the number of its samples must be those written there. Ends with 1 if anything is wrong.

The index that training in exact order needs of each shard is kept on the way, beside it or in ``--index-cache``, a folder that
``data.index_cache`` then names: training does not read the headers of all shards when it starts.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datamodules.shard_checks import ShardReport, by_reason, check_shard, compare
from datamodules.streams.contents import Contents
from datamodules.streams.decoding import MAX_PIXELS
from distill.command_line import Parser

SHOWN = 5
KINDS_SHOWN = 20
NUMBERED = re.compile(r"(\d{5})-of-(\d{5})\.tar")


def files_of(patterns: list[str]) -> list[str]:
    """The files that patterns name, each once, whether they are there or not; of ``3-of-10`` also the other nine.

    Raises:
        ValueError: a URL, braces that do not match.
        FileNotFoundError: a glob that nothing matches.
    """
    from braceexpand import braceexpand

    files: set[str] = set()
    for pattern in patterns:
        if re.match(r"pipe:|\w+://", pattern):
            raise ValueError(f"{pattern}: only files can be checked; copy the shards to a disk first.")
        for name in braceexpand(pattern):
            found = glob(name) if has_magic(name) else [name]
            if not found:
                raise FileNotFoundError(f"{name}: no file matches it.")
            files.update(found)
    for folder, of in {(Path(name).parent, found[2]) for name in files if (found := NUMBERED.fullmatch(Path(name).name))}:
        files.update(str(folder / f"{number:05d}-of-{of}.tar") for number in range(int(of)))
    return sorted(files)


def read_contents(file: str | None) -> Contents | None:
    """What a sample is, from a YAML file; a wrong key of it ends the process with 2.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML; contents of the tools' own shards.
    """
    import yaml

    from distill.cli import Parser, import_parts

    if file is None:
        return None
    try:
        settings = yaml.safe_load(Path(file).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--contents={file}: no YAML ({error}).") from error
    import_parts()
    parser = Parser(parser_mode="omegaconf+")
    parser.add_argument("--contents", type=Contents)
    contents = parser.instantiate(parser.parse_object({"contents": settings})).contents
    if contents.exact_by is not None:
        name = type(contents).__name__
        raise ValueError(f"--contents={file}: shards of {name} say themselves what they hold; leave the option out.")
    return contents


def table(reports: list[ShardReport]) -> str:
    """A line a shard, then what pictures and arrays there are, then the first problems of each reason."""
    lines = [f"{'samples':>9} {'MB':>9} {'wrong':>6}  shard: members"]
    kinds = Counter[str]()
    for report in reports:
        members = ", ".join(f"{name} {count}" for name, count in sorted(report.members.items()))
        row = f"{len(report.keys):9d} {report.bytes / 1e6:9.2f} {len(report.problems):6d}  {report.file}: {members or 'none'}"
        lines.append(row)
        kinds.update(report.pictures)
        kinds.update({f"{name} {shape}": len(keys) for name, found in report.arrays.items() for shape, keys in found.items()})
    lines += [f"{count:9d} {kind}" for kind, count in kinds.most_common(KINDS_SHOWN)]
    lines += [f"{'':9} and {len(kinds) - KINDS_SHOWN} other kinds"] * (len(kinds) > KINDS_SHOWN)
    for reason, found in by_reason(reports).items():
        lines += [f"{reason}: {shard} {key} ({detail})" for shard, key, detail in found[:SHOWN]]
        lines += [f"{reason}: and {len(found) - SHOWN} more"] * (len(found) > SHOWN)
    return "\n".join(lines).encode(errors="backslashreplace").decode()  # names in tars need be no UTF-8


def record(reports: list[ShardReport]) -> dict[str, Any]:
    """What ``--out`` holds."""
    shards = [
        {
            "file": report.file,
            "bytes": report.bytes,
            "samples": len(report.keys),
            "members": report.members,
            "pictures": report.pictures,
            "arrays": {name: {shape: len(keys) for shape, keys in found.items()} for name, found in report.arrays.items()},
            "problems": [dict(zip(("reason", "key", "detail"), problem)) for problem in report.problems],
        }
        for report in reports
    ]
    counts = {reason: len(found) for reason, found in by_reason(reports).items()}
    return {"samples": sum(len(report.keys) for report in reports), "wrong": counts, "shards": shards}


def main(argv: list[str] | None = None) -> None:
    """Checks, and exits with 1 if anything is wrong."""
    parser = Parser(__doc__)
    parser.add_argument("patterns", nargs="+", help="tars, globs, or braces such as {00000..00099}, in quotes")
    parser.add_argument("--contents", help="YAML file that says what a sample is, class_path and init_args")
    parser.add_argument("--out", help="JSON file for everything that was found")
    parser.add_argument("--workers", type=int, default=1, help="processes that read")
    parser.add_argument("--index-cache", help="folder of the shards' indices; default: beside each shard")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="of a picture; one of more is wrong")
    arguments = parser.parse_args(argv)
    for name in ("workers", "max_pixels"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}={getattr(arguments, name)}: give at least 1.")
    try:
        files, contents = files_of(arguments.patterns), read_contents(arguments.contents)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    check = partial(check_shard, most_pixels=arguments.max_pixels, contents=contents, index_cache=arguments.index_cache)
    with ProcessPoolExecutor(arguments.workers) as pool:
        found = pool.map(check, files) if arguments.workers > 1 else map(check, files)
        reports = list(tqdm(found, total=len(files), desc="checking", unit="shard", disable=None))
    compare(reports)
    content = record(reports)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(content, indent=1))
    print(table(reports))
    if unkept := [report for report in reports if report.unkept]:
        words = f"of {unkept[0].file}: {unkept[0].unkept}; give --index-cache a folder that can be written"
        print(f"{len(unkept)} indices could not be kept, that {words}")
    wrong = ", ".join(f"{count} {reason}" for reason, count in content["wrong"].items())
    print(f"{len(reports)} shards, {content['samples']} samples: {wrong or 'nothing wrong'}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
