"""Fetches all weights that a config needs from the Hugging Face hub into the local cache, ahead of a job without a network.

    python tools/fetch.py --config configs/FOLDER/RECIPE.yaml
    python tools/fetch.py --config configs/FOLDER/RECIPE.yaml --list

One line for each pretrained part of the config: what was fetched, what was there, what is missing and why. ``--list`` fetches
nothing. Further options are those of ``python -m distill fit``, e.g. ``--model.teacher.init_args.path=owner/name``. Ends with 1
if something is missing, with 2 if the config is wrong. No weights are loaded.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from jsonargparse import Namespace

from distill import hub
from distill.cli import DistillCLI, import_parts
from distill.command_line import Parser


class _Parsed(DistillCLI):
    """Parses a config as a run does, and builds nothing."""

    def _set_seed(self) -> None:
        """Off: nothing is drawn."""

    def instantiate_classes(self) -> None:
        """Nothing is built."""


def pretrained_parts(config: Any, key: str = "") -> Iterator[tuple[str, type, dict[str, Any]]]:
    """Key, class and arguments of each part of a config that reads pretrained weights: whose class has ``locate``."""
    if isinstance(config, Namespace):
        config = vars(config)
    if isinstance(config, dict):
        if isinstance(config.get("class_path"), str):
            part, arguments = _class_of(config["class_path"]), config.get("init_args") or Namespace()
            if hasattr(part, "locate"):
                yield key, part, vars(arguments)
            config = vars(arguments)
        for name, value in config.items():
            yield from pretrained_parts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from pretrained_parts(value, f"{key}[{number}]")


def _class_of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def provide(part: Any, arguments: dict[str, Any], only_list: bool) -> tuple[str, str]:
    """``present``, ``fetched`` or ``missing`` of one part, and the name or the reason."""
    place = arguments.get("path") or arguments.get("weights")
    named = str(place) + (f" (revision {arguments['revision']})" if arguments.get("revision") else "")
    known = {name: value for name, value in arguments.items() if name in inspect.signature(part.locate).parameters}
    try:
        with hub.cache_only():
            part.locate(**known)
        there, reason = True, ""
    except (ValueError, OSError) as error:
        there, reason = False, str(error)
    if only_list:
        return ("present", named) if there else ("missing", reason)
    try:
        part.locate(**known)  # also where it is there: a branch may have moved on
    except (ValueError, OSError) as error:
        return "missing", str(error)
    return "present" if there else "fetched", named


def main(args: list[str] | None = None) -> None:
    """Fetches or lists, one line a part."""
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, action="append", help="recipe; may be given again")
    parser.add_argument("--list", action="store_true", help="only say what is there and what is missing")
    arguments, overrides = parser.parse_known_args(args)
    import_parts()
    configs = [word for file in arguments.config for word in ("--config", file)]
    parsed = _Parsed([*configs, *overrides], run=False)
    missing = False
    for key, part, given in pretrained_parts(parsed.config):
        state, text = provide(part, given, arguments.list)
        missing |= state == "missing"
        print(f"{state}  {key}  {' '.join(text.split())}")
    sys.exit(int(missing))


if __name__ == "__main__":
    main()
