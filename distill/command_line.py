"""The command lines of tools: options by their whole names, and what is wrong in one line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class Refusal(Exception):
    """Something that the user can put right; its message names option, value and remedy."""


class Parser(argparse.ArgumentParser):
    """Shows a description as it is laid out, and reports what is wrong in one line, with exit code 2.

    Args:
        description: a script's docstring.
    """

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


@contextmanager
def writable(named: str, kind: str) -> Iterator[None]:
    """Refuses what cannot be written, a ``kind`` of thing that an option names."""
    try:
        yield
    except OSError as error:
        raise Refusal(f"{named}: cannot be written ({error}); give another {kind}") from error


def read_object(named: str, path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file that an option names. Raises Refusal, with the remedy, if there is none in it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refusal(f"{named}: {path} is no JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise Refusal(f"{named}: {path} holds no JSON object; {remedy}")
    return content
