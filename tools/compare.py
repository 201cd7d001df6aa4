"""One report on several runs: which is best in how few steps, at what cost of training. HTML in one file, and Markdown.

    python tools/compare.py runs/tournament/{cd,sid,dmd2} --teacher runs/tournament/teacher --out runs/tournament

Each RUN holds ``evaluations/<name>/``, samples of tools/sample.py and in the same folder ``fid.json`` of tools/fid.py, best
with ``--bootstrap 1000``; and ``training_cost.json``, which every training writes. A teacher's folder holds evaluations alone.
Writes ``report.html``, which needs nothing but a browser, and ``report.md``.

Figures of unequal protocols are refused, and stale ones: of samples that were drawn again since they were measured, or of a run
that was trained further since.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

# The folder of this file is on the path when it is run as a script.
from evaluations import read_all
from report import html_page, markdown

from distill.checkpoints import atomic_writer
from distill.command_line import Parser, Refusal, writable


def main(arguments: list[str] | None = None) -> None:
    """Reads, compares, writes, says where; ends with 2 and one line on stderr if that cannot be done."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, with evaluations in them")
    parser.add_argument("--teacher", type=Path, help="a folder with evaluations of what they were distilled from")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write report.html and report.md in")
    options = parser.parse_args(words)
    try:
        contestants = read_all(options.runs, options.teacher)
        command = shlex.join(["python", "tools/compare.py", *words])
        with writable(f"--out {options.out}", "folder"):
            options.out.mkdir(parents=True, exist_ok=True)
            for name, make in (("report.html", html_page), ("report.md", markdown)):
                with atomic_writer(options.out / name) as file:
                    file.write(make(contestants, command).encode())
    except Refusal as refusal:
        parser.error(str(refusal))
    print(f"{len(contestants)} compared in {options.out / 'report.html'} and {options.out / 'report.md'}")


if __name__ == "__main__":
    main()
