"""A cache of the Hugging Face hub with what a test puts into it, and a repository that is fetched without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def use_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """The hub's cache is ``folder``, and nobody is offline, whatever the environment says."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return folder


def put(cache: Path, repository: str, folder: Path, refs: Sequence[str] = ("main",), listed: bool = False) -> Path:
    """Copies ``folder`` into the cache as the repository's only snapshot, which it returns.

    ``listed``: with the listing of the repository, from which huggingface_hub sees whether the snapshot is whole.
    """
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = Path(shutil.copytree(folder, place / "snapshots" / COMMIT))
    (place / "refs").mkdir()
    for ref in refs:
        (place / "refs" / ref).write_text(COMMIT)
    if listed:
        files = [file for file in snapshot.rglob("*") if file.is_file()]
        sizes = {file.relative_to(snapshot).as_posix(): {"size": file.stat().st_size, "blob_id": "0"} for file in files}
        (place / "trees").mkdir()
        (place / f"trees/{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": sizes}))
    return snapshot


class Repository:
    """``download`` stands for ``huggingface_hub.snapshot_download`` of the files in ``source``."""

    def __init__(self, source: Path, cache: Path):
        self.source, self.snapshot = source, cache / "models--owner--name/snapshots" / COMMIT

    def download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        if repo_id != "owner/name" or revision not in (None, "main"):
            raise FileNotFoundError(f"{repo_id} at {revision}")
        if local_files_only and not self.snapshot.is_dir():
            raise FileNotFoundError(f"{repo_id} is not in the cache")
        self.snapshot.mkdir(parents=True, exist_ok=True)
        names = [file.relative_to(self.source).as_posix() for file in self.source.rglob("*") if file.is_file()]
        for name in filter_repo_objects([] if local_files_only else names, allow_patterns=allow_patterns):
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / name, self.snapshot / name)
        return str(self.snapshot)

    def fetched(self) -> list[str]:
        """Names of the files that were fetched."""
        return sorted(file.relative_to(self.snapshot).as_posix() for file in self.snapshot.rglob("*") if file.is_file())
