"""The model card of an exported student, and ``student.json``, the same for programs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

UNKNOWN = "unknown: ask the teacher's owner"


def licence_of(folder: Path | None) -> str:
    """The ``license`` of the front matter of a folder's README.md, or `UNKNOWN`."""
    file = None if folder is None else folder / "README.md"
    if file is None or not file.is_file():
        return UNKNOWN
    matter = re.match(r"\A---\s*\n(.*?)\n---", file.read_text(), re.DOTALL)
    found = matter and re.search(r"^license:[ \t]*(.+?)[ \t]*$", matter[1], re.MULTILINE)
    return found[1].strip("'\"") if found else UNKNOWN


def weights_hash(folder: Path) -> str:
    """sha256 over names and contents of all safetensors in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def recipe_record(method: str, config: dict[str, Any] | None) -> dict[str, Any]:
    """The method's class and the sha256 of the resolved config (None if there is none)."""
    text = None if config is None else json.dumps(config, sort_keys=True, default=str).encode()
    return {"method": method, "config_sha256": None if text is None else hashlib.sha256(text).hexdigest()}


def write_card(folder: Path, record: dict[str, Any], figures: Sequence[Path]) -> None:
    """Writes ``student.json`` (``record``) and ``README.md`` (the same in words, with the ``figures`` as they are)."""
    (folder / "student.json").write_text(json.dumps(record, indent=2) + "\n")
    teacher, licence = record["teacher"] or {}, record["license"]
    matter = {"license": "unknown" if licence == UNKNOWN else licence, "library_name": "diffusers", "tags": ["distillation"]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in matter.items()), "---", ""]
    lines += [f"# {record['recipe']['method']} student", "", "A few-step generator distilled by `distill`.", ""]
    lines += ["| | |", "|---|---|"]
    rows = {
        "recipe": f"{record['recipe']['method']}, config sha256 {record['recipe']['config_sha256']}",
        "weights": f"{record['weights']}, sha256 {record['sha256']}",
        "teacher": f"{teacher.get('path', 'none')}, sha256 {teacher.get('sha256', 'none')}",
        "teacher's licence": licence,
        "scheduler": record["scheduler"],
        "largest difference to the trained student": str(record["max_difference"]),
    }
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    if record["missing"]:
        parts = ", ".join(record["missing"])
        lines += ["", f"Not in this folder: {parts}. Give them to `from_pretrained`; None for those that a call does without."]
    lines += ["", "## How to call", "", "```python", *usage(record), "```"]
    for file in figures:
        lines += ["", f"## {file.name}", "", "```", file.read_text().rstrip(), "```"]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def usage(record: dict[str, Any]) -> list[str]:
    """Lines of Python that draw samples."""
    trusted = ", trust_remote_code=True" if record["custom_code"] else ""
    base = json.dumps((record["teacher"] or {}).get("path")) if record["lora"] else '"FOLDER"'
    lines = ["from diffusers import DiffusionPipeline", "", f"pipeline = DiffusionPipeline.from_pretrained({base}{trusted})"]
    if record["lora"]:
        scheduler = record["scheduler"]
        lines = [f"from diffusers import DiffusionPipeline, {scheduler}", *lines[1:]]
        lines += [f'pipeline.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")']
        lines += ['pipeline.load_lora_weights("FOLDER")']
    for steps, call in record["calls"].items():
        words = ", ".join(f"{key}={value!r}" for key, value in call.items())
        lines += [f"images = pipeline({record['prompt']}{words}).images  # {steps} step{'' if steps == 1 else 's'}"]
    return lines
