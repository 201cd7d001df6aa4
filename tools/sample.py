"""Draws samples of a run's student, or of a teacher, into a folder, with ``samples.json`` and ``grid.png``.

    python tools/sample.py --run runs/digits/cd --steps 1 --num 1800 --out samples/cd
    python tools/sample.py --run runs/captions/lcm_lora --steps 4 --prompts "a photo of the digit seven" --out samples/seven
    python tools/sample.py --teacher runs/digits/teacher/export --steps 32 --solver heun --out samples/teacher
    torchrun --nproc-per-node 8 -- tools/sample.py ... --num 50000 --format shards       # or srun: the same files

Sample i depends on the seed and on i alone; batches are the same on any number of processes. Labels or prompts run in turn
through those given; if none are, labels through all classes, and a run's prompts through the examples of its data.

``--format npz`` writes ``samples.npz`` (``arr_0`` uint8 n,h,w,c; ``arr_1`` labels), ``png`` writes ``images/000000.png`` ...
and ``labels.json``, ``shards`` WebDataset tars (``png``, and ``cls`` or ``txt``); tools/fid.py reads all three.

Batches are kept in ``OUT/parts`` until all are there: killed, the same command goes on where it was. What is complete is not
drawn again. A folder of other settings or weights is refused; ``--overwrite`` removes what is there, and begins anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from distill.command_line import Parser, Refusal
from distill.metrics.processes import joined, own_device
from distill.sample_folders import FORMATS, SOLVERS, SampleJob


def make_parser() -> Parser:
    """The options."""
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder of a student")
    source.add_argument("--teacher", help="diffusers folder of a teacher")
    add = parser.add_argument
    add("--checkpoint", default="last", help="of the run: last, best, or a file")
    add("--weights", default="ema", choices=["ema", "student"], help="of the run: averaged or present")
    add("--steps", type=int, default=1, help="sampler steps")
    add("--num", type=int, default=1000, help="number of samples")
    add("--seed", type=int, default=0, help="seed of the set")
    add("--labels", type=int, nargs="+", help="labels to run through instead of all classes")
    add("--prompts", nargs="+", help="prompts to run through")
    add("--negative-prompt", help="what to be guided away from instead of the empty prompt")
    add("--guidance", type=float, help="guidance scale, 1 is none")
    add("--solver", choices=sorted(SOLVERS), help="of a teacher (default heun)")
    add("--adapters", help="file of tools/adapters.py that is attached to the teacher")
    add("--batch-size", type=int, default=300, help="samples at once, in each process")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--format", choices=list(FORMATS), default="npz", help="how samples are stored (default npz)")
    add("--shard-size", type=int, default=5000, help="samples of a shard")
    add("--overwrite", action="store_true", help="remove samples that are in the folder, and begin anew")
    add("--out", required=True, help="folder to write")
    return parser


def check(parser: Parser, arguments: argparse.Namespace) -> None:
    """Ends with 2 if the options contradict each other."""
    for name, least in (("steps", 1), ("num", 1), ("seed", 0), ("batch_size", 1), ("shard_size", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')}={getattr(arguments, name)}: give at least {least}.")
    if arguments.run and arguments.solver:
        parser.error("--solver is for --teacher: a run's student is sampled by the sampler of its config.")
    if arguments.run and arguments.adapters:
        parser.error("--adapters is for --teacher: a run's student has its own.")
    if Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        parser.error(f"--out {arguments.out}: is no folder; give the name of one.")


def main(argv: list[str] | None = None) -> None:
    """Draws, writes, and says where; ends with 2 and one line on stderr if that cannot be done."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    check(parser, arguments)
    try:
        with joined() as processes:
            job = SampleJob(arguments, own_device(arguments.device), processes)
            drawn = job.run()
    except Refusal as refusal:
        if processes.rank:  # all are refused alike
            parser.exit(2)
        parser.error(str(refusal))
    if processes.rank == 0:
        what = "drawn" if drawn else "were there already, of the same settings, and nothing was drawn (--overwrite begins anew)"
        print(f"{arguments.out}: {arguments.num} samples, {arguments.format}, {what}; picture in {job.out / 'grid.png'}")


if __name__ == "__main__":
    main()
