"""Draws with an exported student as its users will: by diffusers alone, this package is not imported.

    python tools/sample_pipeline.py --pipeline exported/lcm --prompts "a photo of the digit seven" --num 8 --out samples/seven
    python tools/sample_pipeline.py --pipeline runs/captions/teacher/export --lora exported/lcm_lora \
        --prompts-file configs/captions/prompts.txt --num 500 --out samples/captions
    python tools/sample_pipeline.py --pipeline exported/cd --labels 0 1 2 3 4 5 6 7 8 9 --num 1800 --out samples/exported

``student.json``, which tools/export.py left in the folder (or beside the LoRA file), says how a pipeline is called. Prompts
or labels run in turn. Writes ``samples.npz`` (``arr_0`` uint8 n,h,w,c; ``arr_1`` the label, or the number of the prompt, of
each), ``samples.json`` and ``grid.png``: what tools/fid.py reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy

from distill.command_line import Parser

SUBJECTS = {"prompt": "--prompts or --prompts-file", "class_labels": "--labels", "": "neither prompts nor labels"}
"""How a call of a pipeline says what to draw, and by which options."""


def parse_arguments() -> argparse.Namespace:
    """The command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder that diffusers loads")
    parser.add_argument("--lora", type=Path, help="folder of a LoRA file for it")
    parser.add_argument("--steps", type=int, help="one of the numbers of steps in student.json; default the largest")
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--prompts", nargs="+", help="prompts to run through")
    subject.add_argument("--prompts-file", type=Path, help="a prompt a line")
    subject.add_argument("--labels", type=int, nargs="+", help="classes to run through")
    parser.add_argument("--num", type=int, default=500, help="number of samples")
    parser.add_argument("--batch-size", type=int, default=100, help="samples at once")
    parser.add_argument("--seed", type=int, default=0, help="of the generator of all noise")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    for name in ("num", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}={getattr(arguments, name)}: give at least 1.")
    return arguments


def read_student(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], bool, str]:
    """Number of steps, keywords of the call, whether the folder has code, and what a call is given: `SUBJECTS`.

    Raises:
        ValueError, FileNotFoundError: no export, or words that do not fit it.
    """
    path = (arguments.lora or arguments.pipeline) / "student.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; give a folder that tools/export.py wrote.")
    student = json.loads(path.read_text())
    if student["lora"] != (arguments.lora is not None):
        raise ValueError(f"--lora={arguments.lora}: {path} is of a {'LoRA file' if student['lora'] else 'whole pipeline'}.")
    subject = student["prompt"].partition("=")[0]
    given = "class_labels" if arguments.labels else "prompt" if arguments.prompts or arguments.prompts_file else ""
    if given != subject:
        raise ValueError(f"--pipeline {arguments.pipeline}: a {student['pipeline']} is given {SUBJECTS[subject]}.")
    calls = {int(steps): call for steps, call in student["calls"].items()}
    steps = arguments.steps or max(calls)
    if steps not in calls:
        raise ValueError(f"--steps={steps}: the student is for {sorted(calls)} steps.")
    return steps, calls[steps], student["custom_code"] and not student["lora"], subject


def load_pipeline(arguments: argparse.Namespace, trusted: bool) -> Any:
    """The pipeline, with the LoRA file and its scheduler if there is one; code of the folder only if it is ``trusted``."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(arguments.pipeline, trust_remote_code=trusted)
    if arguments.lora:
        config = json.loads((arguments.lora / "scheduler" / "scheduler_config.json").read_text())
        scheduler_class = getattr(diffusers, config["_class_name"])
        pipeline.scheduler = scheduler_class.from_pretrained(arguments.lora, subfolder="scheduler")
        pipeline.load_lora_weights(arguments.lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(arguments.device)


def draw(pipeline: Any, subject: str, shown: list[Any], call: dict[str, Any], arguments: argparse.Namespace) -> numpy.ndarray:
    """Images ``(num, h, w, c)``, uint8, of prompts or labels in turn, or of none."""
    import torch
    from tqdm import tqdm

    generator, parts = torch.Generator().manual_seed(arguments.seed), []
    for first in tqdm(range(0, arguments.num, arguments.batch_size), desc="sampling", unit="batch"):
        numbers = range(first, min(first + arguments.batch_size, arguments.num))
        words = {subject: [shown[i % len(shown)] for i in numbers]} if subject else {"batch_size": len(numbers)}
        parts.append(pipeline(**words, generator=generator, output_type="np", **call).images)
    return (numpy.concatenate(parts) * 255).round().astype(numpy.uint8)


def write(images: numpy.ndarray, numbers: numpy.ndarray | None, record: dict[str, Any], out: Path) -> None:
    """``samples.npz``, ``samples.json`` and a picture of the first hundred."""
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    numpy.savez_compressed(out / "samples.npz", images, *([] if numbers is None else [numbers]))
    (out / "samples.json").write_text(json.dumps(record, indent=2) + "\n")
    shown, columns = images[:100], 10
    height, width, channels = shown.shape[1:]
    lines = -(-len(shown) // columns)
    sheet = numpy.full((lines * (height + 1), columns * (width + 1), channels), 128, numpy.uint8)
    for i, image in enumerate(shown):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    factor = max(1, 32 // min(height, width))
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(out / "grid.png")


def main() -> None:
    """Draws, writes, and says where."""
    arguments = parse_arguments()
    try:
        steps, call, trusted, subject = read_student(arguments)
        prompts = arguments.prompts_file.read_text().splitlines() if arguments.prompts_file else arguments.prompts
        shown = arguments.labels or prompts or []
        images = draw(load_pipeline(arguments, trusted), subject, shown, call, arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    record = {"pipeline": str(arguments.pipeline), "lora": arguments.lora and str(arguments.lora), "seed": arguments.seed}
    record |= {"steps": steps, "call": call, "prompts": prompts, "labels": arguments.labels}
    record |= {"num": arguments.num, "device": arguments.device}
    turns = numpy.arange(arguments.num) % max(len(shown), 1)
    numbers = numpy.array(arguments.labels)[turns] if arguments.labels else turns
    write(images, numbers if shown else None, record, arguments.out)
    print(f"{len(images)} samples in {arguments.out / 'samples.npz'}, picture in {arguments.out / 'grid.png'}")


if __name__ == "__main__":
    main()
