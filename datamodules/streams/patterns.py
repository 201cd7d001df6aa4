"""Which shards a pattern names."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from datamodules.kept_indices import SUFFIX

BESIDE = (".json", ".partial", SUFFIX)
"""Ends of the names of manifests, unfinished files and indices, which ``folder/*`` does not mean."""
URL = re.compile(r"(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")


def expand(key: str, shards: str | list[str]) -> list[str]:
    """The shards of patterns: braces (``{00000..00099}``), ``*``, ``?`` and ``[]`` of local paths, URLs.

    Raises:
        FileNotFoundError: a local path that is not there, a pattern without a match.
        ValueError: no shards, braces without an end, one shard twice, a URL of an unknown scheme.
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
                _check_scheme(key, name)
                found.append(name)
                continue
            matches = _matches(name) if glob.has_magic(name) and not Path(name).exists() else [name]
            if not matches or not Path(matches[0]).is_file():
                raise FileNotFoundError(f"{key}={pattern!r}: there is no {name}; make shards by tools/make_shards.py.")
            found += matches
    if not found:
        raise ValueError(f"{key}={shards!r}: names no shards; give paths, patterns or URLs.")
    if len(set(found)) < len(found):
        twice = max(found, key=found.count)
        raise ValueError(f"{key}={shards!r}: names {twice} more than once; its samples would be repeated.")
    return found


def _matches(pattern: str) -> list[str]:
    """The files that match, in the order of their names, but for what is written beside shards."""
    return sorted(name for name in glob.glob(pattern, recursive=True) if not name.endswith(BESIDE))


def _check_scheme(key: str, url: str) -> None:
    """Raises ValueError for a URL that webdataset has no reader of."""
    from webdataset.gopen import gopen_schemes

    scheme = url.partition(":")[0]
    if scheme not in gopen_schemes:
        known = ", ".join(sorted(gopen_schemes.keys() - {"__default__"}))
        remedy = "give pipe:COMMAND that writes the shard to stdout"
        raise ValueError(f"{key}={url!r}: nothing here reads {scheme}: (but {known}); {remedy}.")
