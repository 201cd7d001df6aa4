"""The command lines of tools: options by their whole names, and what is wrong in one line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


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
