"""Which shards a pattern names."""

from __future__ import annotations

import glob
import re
from pathlib import Path

URL = re.compile(r"(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")


def expand(key: str, shards: str | list[str]) -> list[str]:
    """The shards of patterns: braces (``{00000..00099}``), ``*``, ``?`` and ``[]`` of local paths, URLs.

    Raises:
        FileNotFoundError: a local path that is not there, a pattern without a match.
        ValueError: no shards, braces without an end, one shard twice.
    """
    from braceexpand import braceexpand

    found: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        try:
            names = list(braceexpand(pattern))
        except ValueError as error:
            raise ValueError(f"{key}={pattern!r}: braces that do not match; write such as {{00000..00099}}.tar.") from error
        for name in names:
            if URL.match(name):
                found.append(name)
                continue
            matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) and not Path(name).exists() else [name]
            if not matches or not Path(matches[0]).is_file():
                raise FileNotFoundError(f"{key}={pattern!r}: there is no {name}; make shards by tools/make_shards.py.")
            found += matches
    if not found:
        raise ValueError(f"{key}={shards!r}: names no shards; give paths, patterns or URLs.")
    if len(set(found)) < len(found):
        twice = max(found, key=found.count)
        raise ValueError(f"{key}={shards!r}: names {twice} more than once; its samples would be repeated.")
    return found
