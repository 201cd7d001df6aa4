"""Writes what a run has added to its teacher's network as one file, and tries it on other checkpoints.

    python tools/adapters.py --run runs/digits/agd --out adapters/agd.safetensors
    python tools/adapters.py --run runs/digits/agd --out adapters/agd.safetensors --teachers runs/sibling/export

Adapters, LoRA layers and extra scalar inputs are in the file, the base is not. For each of the teachers, checkpoints of the
same architecture, it prints the relative error to that checkpoint's own guided prediction on the run's held-out data, without
the file and with it, by guidance scale.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from distill.command_line import Parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="run folder of a student with additions to its teacher")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--checkpoint", default="last", help="of the run: last, best, or a file")
    parser.add_argument("--weights", default="ema", choices=["ema", "student"], help="averaged or present")
    parser.add_argument("--teachers", nargs="*", default=[], help="diffusers folders of checkpoints to try it on")
    parser.add_argument("--scales", type=float, nargs="+", help="guidance scales, 1 is none (default 1.5 2 3 5, or the rule's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    return parser.parse_args(argv)


def check_stands_on_teacher(method: Any, run: str) -> None:
    """Raises ValueError for a run whose student has trained weights of its own: additions alone would not give it back."""
    if not hasattr(method, "shared_names") or not method.shared_names():
        raise ValueError(
            f"--run {run}: its {type(method).__name__} trains a network of its own, not additions to its teacher's; give a run "
            "with LoRA layers or an adapter, or use the folder that ExportDenoiser writes."
        )


def write(student: Any, file: Path) -> str:
    """Writes the additions, and says how large they are."""
    from distill.adapter_files import additions, save_adapters
    from distill.checkpoints import atomic_writer

    # safetensors writes another file than the one that is open, readable by nobody else.
    with TemporaryDirectory() as scratch, atomic_writer(file) as opened:
        save_adapters(student, written := Path(scratch) / "added.safetensors")
        opened.write(written.read_bytes())
    network = student.network
    added = sum(value.numel() for value in additions(network).values())
    base = sum(value.numel() for value in network.state_dict().values()) - added
    return f"{file}: {added} numbers, {added / base:.2%} of the base"


def measure(method: Any, data: Any, file: Path, folder: str, wanted: list[float] | None) -> dict[str, dict[str, float]]:
    """Relative errors on one checkpoint, by scale: ``without`` the file and ``with`` it."""
    from distill.adapter_files import load_adapters
    from distill.guidance_error import prepared, reads_scale, squared_errors
    from distill.pretrained import PretrainedDenoiser

    scales = wanted or ([1.5, 2.0, 3.0, 5.0] if reads_scale(method.student) else [method.guidance.scale])
    teacher, student = (PretrainedDenoiser(folder).to(method.device).eval() for _ in range(2))
    load_adapters(student, file)
    figures: dict[str, dict[str, float]] = {f"{scale:g}": {} for scale in scales}
    for name, each in {"without": teacher, "with": student.eval()}.items():
        batches = prepared(method, data.held_out_dataloader())
        sums = squared_errors(each, teacher, batches, scales, method.guidance, method.evaluation.seed)
        for scale, (error, whole) in zip(scales, sums.tolist(), strict=True):
            figures[f"{scale:g}"][name] = (error / whole) ** 0.5
    return figures


def main(argv: list[str] | None = None) -> None:
    """Writes, measures, and says what."""
    arguments = parse_arguments(argv)
    from distill.cli import load_run

    try:
        _, method, data = load_run(arguments.run, arguments.checkpoint)
        check_stands_on_teacher(method, arguments.run)
        method.to(arguments.device)
        file, trained = Path(arguments.out), method.ema.module if arguments.weights == "ema" else method.student
        said = write(trained, file)
        errors = {folder: measure(method, data, file, folder, arguments.scales) for folder in arguments.teachers}
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(said + (f"\n{json.dumps(errors, indent=2)}" if errors else ""))


if __name__ == "__main__":
    main()
