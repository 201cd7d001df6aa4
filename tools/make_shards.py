"""Makes shards of pictures with captions or labels: WebDataset tars that `datamodules.webdataset` streams.

    python tools/make_shards.py --digits --of 8 --out data/shards/digits
    python tools/make_shards.py --images photos --labels --of 64 --out data/shards/photos
    python tools/make_shards.py --images photos --captions captions.csv --of 64 --shard 3 --out data/shards/photos

The pictures are those of a folder, with the captions beside them (``a.png`` and ``a.txt``) if there are any; those that a
table names, with a caption or a label in its columns; or scikit-learn's digits. Files go into the tars as they are, in an order
that is drawn from ``--seed``. Without ``--shard`` all shards are made in turn. A finished shard is not made again, a half one
leaves nothing: start the same command again. Beside each shard are its index, by which training in exact order reads it, and
its manifest, which is written last.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datamodules.digits import NUM_CLASSES, SIZE, caption, load_digits
from datamodules.kept_indices import read_index
from datamodules.members import to_npy, to_png
from datamodules.order import permutation
from datamodules.pictures import Pictures
from datamodules.shards import differences, shard_name
from datamodules.streams.decoding import FORMATS
from distill.checkpoints import TEMPORARY, atomic_writer
from distill.command_line import Parser

FORMAT = 1
Members = dict[str, bytes]
"""The files of a sample by their endings."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    parser.add_argument("--out", required=True, help="folder of the shards")
    parser.add_argument("--images", help="folder of pictures and of sub-folders with pictures")
    parser.add_argument("--captions", help="table of the pictures to take: .csv with a line of titles, or .jsonl")
    parser.add_argument("--image-column", default="image", help="its column of pictures, paths inside --images")
    parser.add_argument("--caption-column", help="its column of captions")
    parser.add_argument("--label-column", help="its column of labels, all whole numbers or all names")
    parser.add_argument("--labels", action="store_true", help="the sub-folders of --images are the classes")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits, with labels and captions")
    parser.add_argument("--store", choices=["png", "npy"], default="png", help="digits as pictures, or as arrays in [-1, 1]")
    parser.add_argument("--of", type=int, default=1, help="number of shards in all")
    parser.add_argument("--shard", type=int, help="the one shard to make, 0 to OF - 1 (an array task's number); default all")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples")
    arguments = parser.parse_args(argv)
    if arguments.store == "npy" and not arguments.digits:
        parser.error("--store=npy: goes with --digits; pictures are written as they are.")
    if arguments.digits == (arguments.images is not None):
        parser.error(f"--digits={arguments.digits} and --images={arguments.images}: give one of them.")
    columns = (arguments.caption_column, arguments.label_column)
    if (arguments.captions is not None) != any(columns) or (arguments.captions and arguments.images is None):
        given = f"--captions={arguments.captions}, --caption-column={columns[0]}, --label-column={columns[1]}"
        parser.error(f"{given}: a table goes with --images and at least one of the columns.")
    if arguments.labels and (arguments.captions or arguments.images is None):
        parser.error("--labels: goes with --images alone; a table has --label-column.")
    for name, least in (("of", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}={getattr(arguments, name)}: give at least {least}.")
    if arguments.shard is not None and not 0 <= arguments.shard < arguments.of:
        parser.error(f"--shard={arguments.shard}: give 0 to {arguments.of - 1}, there are {arguments.of} shards (--of).")
    return arguments


# ------------------------------------------------------------------------------------------------------ what is written


@dataclass
class Source:
    """Numbered samples.

    Attributes:
        names: of the samples, such as the picture's path.
        members: ``members(number)`` are the files of a sample.
        record: what all of them are, JSON.
        classes: names of the classes, the label being the number in it; None without labels.
    """

    names: list[str]
    members: Callable[[int], Members]
    record: Any
    classes: list[str] | None


def digits(store: str) -> Source:
    """The digits as arrays, to the bit, or as PNGs, where the values v, 0 to 16, become ``round(v * 255 / 16)``."""
    images, labels = load_digits()
    pixels = images.add(1).mul(8).mul(255 / 16).round().byte().numpy()

    def members(number: int) -> Members:
        label = int(labels[number])
        image = to_png(pixels[number]) if store == "png" else to_npy(images[number].numpy())
        return {store: image, "cls": str(label).encode(), "txt": caption(label).encode()}

    names = [f"digit {number}" for number in range(SIZE)]
    return Source(names, members, f"digits in {store}", [str(digit) for digit in range(NUM_CLASSES)])


def pictures(arguments: argparse.Namespace) -> Source:
    """The pictures of a folder, all of them or those of a table.

    Raises:
        FileNotFoundError: no folder, no table, a picture or a caption that is missing.
        ValueError: a table without a column or a value, labels that no folder says, a format that training does not read.
    """
    root = Path(arguments.images)
    if arguments.captions is not None:
        files, captions, labels = read_table(arguments, root)
    else:
        found = Pictures(arguments.images, 1)
        files = found.files
        captions = [file.with_suffix(".txt") for file in files] if found.spec.prompts else None
        labels = [folder_of(file, root) for file in files] if arguments.labels else None
    if foreign := [file for file in files if file.suffix.lower()[1:] not in FORMATS]:
        raise ValueError(f"{foreign[0]}: training reads {', '.join(FORMATS)} alone; convert it, or leave it out.")
    names = [file.relative_to(root).as_posix() for file in files]
    numbers, classes = classes_of(labels) if labels else (None, None)

    def members(number: int) -> Members:
        content = {files[number].suffix.lower()[1:]: not_empty(files[number].read_bytes(), files[number])}
        if captions:
            text = captions[number]
            content["txt"] = not_empty(text.read_bytes(), text) if isinstance(text, Path) else text.encode()
        return content | ({"cls": str(numbers[number]).encode()} if numbers else {})

    texts = [text if isinstance(text, str) else None for text in captions or [None] * len(files)]
    listed = json.dumps([names, texts, numbers]).encode()
    return Source(names, members, {"pictures": hashlib.sha256(listed).hexdigest()}, classes)


def not_empty(content: bytes, file: Path) -> bytes:
    """The content, or ValueError if there is none."""
    if not content.strip():
        raise ValueError(f"{file}: is empty; fill it, or leave the picture out.")
    return content


def folder_of(file: Path, root: Path) -> str:
    """The name of the sub-folder that a picture lies in."""
    parts = file.relative_to(root).parts
    if len(parts) < 2:
        raise ValueError(f"--labels: {file} lies in no sub-folder of {root} that is its class; move it, or leave --labels out.")
    return parts[0]


def classes_of(labels: list[str]) -> tuple[list[int], list[str]]:
    """Numbers of the labels and the names of all classes: whole numbers are themselves, names are numbered in their order."""
    if all(label.isdecimal() for label in labels):
        numbers = [int(label) for label in labels]
        return numbers, [str(number) for number in range(max(numbers) + 1)]
    classes = sorted(set(labels))
    places = {name: number for number, name in enumerate(classes)}
    return [places[label] for label in labels], classes


def read_table(arguments: argparse.Namespace, root: Path) -> tuple[list[Path], list[Path | str] | None, list[str] | None]:
    """Pictures, captions and labels of a table; see `pictures` for what is raised."""
    table = Path(arguments.captions)
    if not table.is_file() or table.suffix not in (".csv", ".jsonl"):
        raise FileNotFoundError(f"--captions={table}: no such file ending in .csv or .jsonl.")
    text = table.read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text, newline=""))) if table.suffix == ".csv" else json_lines(text, table)
    if not rows:
        raise ValueError(f"--captions={table}: holds no rows.")

    def column(option: str) -> list[str]:
        name = getattr(arguments, option)
        for number, row in enumerate(rows, 1):
            if row.get(name) is None or not str(row[name]).strip():
                there = ", ".join(str(key) for key in row)
                asked = f"--{option.replace('_', '-')}={name}"
                raise ValueError(f"{table}: row {number} has no value in the column {name!r} ({asked}; it has {there}).")
        return [str(row[name]) for row in rows]

    files = [root / name for name in column("image_column")]
    for number, file in enumerate(files, 1):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such picture, though row {number} of {table} names it.")
    captions: list[Path | str] | None = [*column("caption_column")] if arguments.caption_column else None
    return files, captions, column("label_column") if arguments.label_column else None


def json_lines(text: str, table: Path) -> list[dict[str, Any]]:
    """The records of a text, one a line."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{table}: line {number} is no record in JSON ({error}).") from error
    return rows


# ------------------------------------------------------------------------------------------------------------- writing


def finished_shards(out: Path, header: dict[str, Any]) -> set[int]:
    """The shards of a folder that are whole: their manifest is there, and a tar of the size that it says.

    Raises:
        ValueError: the folder holds a shard of other samples.
    """
    finished = set()
    for path in sorted(out.glob("*-of-*.json")):
        try:
            manifest = json.loads(path.read_text())
            other, whole = dict(manifest["header"]), path.with_suffix(".tar").stat().st_size == manifest["bytes"]
        except (ValueError, LookupError, TypeError, FileNotFoundError):
            continue  # damaged, or its tar is gone: it is made again
        if keys := differences(header, other):
            key = keys[0]
            raise ValueError(
                f"--out={out}: holds shards of other samples: {path.name} has {key}={other.get(key)}, this command "
                f"{key}={header.get(key)}; give another folder, or the same settings."
            )
        if whole:
            finished.add(other["shard"])
    return finished


def write_shard(out: Path, header: dict[str, Any], source: Source) -> None:
    """Writes one shard under a temporary name and, when it is whole, its index and its manifest."""
    from webdataset import TarWriter

    number, of, total = header["shard"], header["of"], header["total"]
    path, counts = out / shard_name(number, of), Counter[str]()
    for leftover in out.glob(f"{path.name}.*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)
    first, end = number * total // of, (number + 1) * total // of
    items = permutation(total, header["seed"], 0)[first:end].tolist()
    with atomic_writer(path.with_suffix(".tar")) as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for place, item in enumerate(tqdm(items, desc=path.name, unit="sample", disable=None), first):
            members = source.members(item)
            writer.write({"__key__": f"{place:09d}", **members})
            counts.update(members.keys())
    with open(path.with_suffix(".tar"), "rb") as file:
        digest, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    read_index(path.with_suffix(".tar"))
    manifest = {"header": header, "count": end - first, "bytes": size, "sha256": digest, "first": first}
    with atomic_writer(path.with_suffix(".json")) as file:
        file.write(json.dumps(manifest | {"endings": counts, "sources": [source.names[item] for item in items]}).encode())


def main(argv: list[str] | None = None) -> None:
    """Makes shards, and says what is there."""
    arguments = parse_arguments(argv)
    out = Path(arguments.out)
    try:
        source = digits(arguments.store) if arguments.digits else pictures(arguments)
        if arguments.of > len(source.names):
            raise ValueError(f"--of={arguments.of}: there are {len(source.names)} samples, give at most as many shards.")
        header = {"format": FORMAT, "kind": "images", "samples": source.record, "classes": source.classes}
        header |= {"total": len(source.names), "of": arguments.of, "seed": arguments.seed}
        finished = finished_shards(out, header)
        wanted = range(arguments.of) if arguments.shard is None else [arguments.shard]
        made = [shard for shard in wanted if shard not in finished]
        for shard in made:
            write_shard(out, header | {"shard": shard}, source)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    there = f"{len(made)} shards made, {len(wanted) - len(made)} were there, of {arguments.of} in all"
    print(f"{out}: {there}; {len(source.names)} samples, {len(source.classes or ())} classes")


if __name__ == "__main__":
    main()
