"""NVIDIA's published EDM or EDM2 network as a folder of config.json and model.safetensors; nothing in the pickle is executed.

    python tools/convert_edm.py --source edm-cifar10-32x32-uncond-ve.pkl --out weights/edm-cifar10-32x32-uncond-ve
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.command_line import Parser
from distill.edm_checkpoints import file_hash, save_converted
from distill.edm_published import read_published


def convert(source: Path, out: Path) -> dict[str, Any]:
    """Writes the folder; returns what was read, and the tensors that were not needed. Raises as `read_published`."""
    published = read_published(source)
    save_converted(published, out, {"file": source.name, "sha256": file_hash(source)})
    count = sum(value.numel() for value in published.state.values())
    return {"network": published.network, "config": published.config, "numbers": count, "unread": published.unread}


def main(arguments: list[str] | None = None) -> None:
    """Reads the options, prints what was converted; ends with 2 and one line on stderr if it cannot be."""
    parser = Parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the published .pkl")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, empty or new")
    options = parser.parse_args(arguments)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"--out {options.out}: is not empty; give a new folder")
    try:
        print(json.dumps(convert(options.source, options.out), indent=2))
    except (OSError, ValueError) as error:
        parser.error(f"--source {options.source}: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()
