"""Writes a run's student as a folder (or a LoRA file) that diffusers alone loads, and checks it in a clean process.

    python tools/export.py --run runs/digits/cd --steps 1 4 --out exported/cd
    python tools/export.py --run runs/captions/lcm_lora --steps 4 --lora --out exported/lcm_lora

The folder has a model card, README.md, that says how to call it. It is there only if its samples are ours, to 1e-5.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distill.command_line import Parser

SAMPLES = 2


def parse_arguments() -> argparse.Namespace:
    """The command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="run folder of a student")
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="numbers of sampler steps that it is for")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not be there yet")
    parser.add_argument("--lora", action="store_true", help="the LoRA layers alone, not merged into a whole pipeline")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a file")
    parser.add_argument("--weights", default="ema", choices=["ema", "student"], help="averaged or present")
    parser.add_argument("--guidance", type=float, help="scale (1 is none) for a student that reads one; default mid-range")
    parser.add_argument("--figures", type=Path, nargs="+", default=[], help="files for the model card, e.g. fid.json")
    return parser.parse_args()


def main() -> None:
    """Exports, and says what and how well it agrees."""
    arguments = parse_arguments()
    from distill.cli import load_run
    from distill.export.student import export_student
    from distill.methods.sampled import SampledModule

    try:
        config, method, data = load_run(arguments.run, arguments.checkpoint)
        if not isinstance(method, SampledModule):
            raise ValueError(f"--run {arguments.run}: a {type(method).__name__} has no student; its run folder has its export.")
        record = export_student(
            method,
            arguments.out,
            arguments.steps,
            data.examples(SAMPLES),  # type: ignore[attr-defined]
            SAMPLES,
            arguments.weights,
            arguments.lora,
            arguments.guidance,
            config,
            arguments.figures,
        )
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.out}: {record['pipeline']} with {record['scheduler']}; teacher's licence: {record['license']}")
    print(f"largest difference to our samples, by steps: {record['max_difference']}")
    if record["missing"]:
        print(f"not in the folder, since not found with the teacher: {', '.join(record['missing'])}")


if __name__ == "__main__":
    main()
