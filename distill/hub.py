"""Where weights come from: a local folder, or a repository of the Hugging Face hub in its local cache.

Only safetensors and the small files beside them (json, txt, tokenizers' model) are fetched and read; a pickle only where the
user says so. A part that reads from here has a static method ``locate(path, revision, ...)``, which takes some of its
constructor's arguments by name, fetches and checks all that the constructor will read, and loads no weights: the constructor
begins with it, and tools/fetch.py calls it for each part of a config.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from distill.published_configs import write_published

SMALL = (".json", ".txt", ".model")
WEIGHTS = {"safetensors": ("diffusion_pytorch_model", "model"), "bin": ("diffusion_pytorch_model", "pytorch_model")}
"""Names of weight files, of diffusers and of transformers, by the ending of the file."""

ADVICE = (
    "give a diffusers folder, for example one that 'python -m distill fit --config configs/digits/teacher.yaml' leaves in "
    "runs/digits/teacher/export, or a hub id (owner/name)"
)
FETCH = "run `python tools/fetch.py --config FILE` where there is a network, then start again"

_CACHE_ONLY: ContextVar[bool] = ContextVar("cache_only", default=False)
_CONFIGS: ContextVar[Path | None] = ContextVar("configs", default=None)


@contextmanager
def cache_only() -> Iterator[None]:
    """Within it nothing is fetched: as under ``HF_HUB_OFFLINE=1``."""
    token = _CACHE_ONLY.set(True)
    try:
        yield
    finally:
        _CACHE_ONLY.reset(token)


@contextmanager
def configs_only() -> Iterator[None]:
    """Within it pretrained networks are built from their configs on the meta device: nothing is fetched, no weights are read.

    A config is that of the folder, of the hub's cache, or of `distill.published_configs`.
    """
    with tempfile.TemporaryDirectory() as folder:
        token = _CONFIGS.set(Path(folder))
        try:
            yield
        finally:
            _CONFIGS.reset(token)


def reads_weights() -> bool:
    """Whether pretrained networks are to read their weights: not within `configs_only`."""
    return _CONFIGS.get() is None


def built_on() -> AbstractContextManager[Any]:
    """The device on which networks are built: the meta device within `configs_only`, else torch's own choice."""
    if reads_weights():
        return nullcontext()
    import torch

    return torch.device("meta")


def config_folder(path: str, files: Sequence[str] = ("config.json",)) -> Path:
    """Within `configs_only`: the local folder of ``path`` that holds one of ``files``, or the known configs of that path.

    Raises:
        FileNotFoundError: neither is there; says what to give.
    """
    base = _CONFIGS.get()
    assert base is not None
    if any((Path(path) / file).is_file() for file in files):
        return Path(path)
    known = base / path.replace("/", "--")
    if known.is_dir() or write_published(path, known):
        return known
    raise FileNotFoundError(
        f"path={path!r}: a plan needs the config.json of each network, and neither that folder nor the hub's cache has it: "
        "fetch the model (tools/fetch.py), or give a folder with its config files alone (no weights are read)."
    )


@contextmanager
def naming(path: str) -> Iterator[None]:
    """A ValueError within it is said to be of ``path``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"path={path!r}: {error}") from error


def is_offline() -> bool:
    """Whether the hub may not be asked: ``HF_HUB_OFFLINE``, as huggingface_hub or the environment has it now."""
    from huggingface_hub import constants

    stated = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return _CACHE_ONLY.get() or bool(constants.HF_HUB_OFFLINE) or stated


def is_hub_id(path_or_id: str) -> bool:
    """Whether it has the form ``owner/name``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_id) is not None


def resolve(path_or_id: str, revision: str | None = None, parts: Sequence[str] = ()) -> Path:
    """The folder of a local path, or of a hub repository's snapshot in the cache, where it is fetched to if need be.

    Args:
        path_or_id: a folder, or ``owner/name``; a folder of that name goes first.
        revision: branch, tag or commit of a hub repository.
        parts: patterns of the files that are needed of a hub repository, see `component_patterns`.

    Raises:
        FileNotFoundError: no such folder; a repository that is not in the cache while offline, or cannot be fetched.
        ValueError: a revision of a local folder.
    """
    folder = Path(path_or_id)
    if not reads_weights() and not folder.is_dir():
        return _cached_configs(path_or_id, revision, parts)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r}: path={path_or_id!r} is a local folder, which has none; leave it out.")
        return folder
    if not is_hub_id(path_or_id):
        raise FileNotFoundError(f"path={path_or_id!r}: there is no such folder; {ADVICE}.")
    return _snapshot(path_or_id, revision, parts)


def _cached_configs(path_or_id: str, revision: str | None, parts: Sequence[str]) -> Path:
    """The snapshot in the hub's cache, if its configs are there, or the known configs."""
    import huggingface_hub

    small = [part for part in parts if part.endswith(".json")]
    try:
        if is_hub_id(path_or_id):
            found = huggingface_hub.snapshot_download(
                path_or_id, revision=revision, allow_patterns=small, local_files_only=True
            )
            return Path(found)
    except Exception:  # not in the cache; huggingface_hub has another class of error for each reason
        pass
    return config_folder(path_or_id)


def _snapshot(repository: str, revision: str | None, parts: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    named = f"path={repository!r}" + (f" (revision={revision!r})" if revision else "")
    offline = is_offline()
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(parts), local_files_only=offline
        )
    except Exception as error:  # among them those of the HTTP library, another one in each version of huggingface_hub
        reason = " ".join(str(error).split())[:300]
        if offline:
            raise FileNotFoundError(
                f"{named}: neither a folder here nor whole in the hub's cache {constants.HF_HUB_CACHE}, and nothing is fetched "
                f"while offline (HF_HUB_OFFLINE=1): {FETCH} ({reason})"
            ) from error
        raise FileNotFoundError(
            f"{named}: not a folder here, and not to be had from the hub ({type(error).__name__}: {reason}); {ADVICE}."
        ) from error
    return Path(found)


def component_patterns(component: str, variant: str | None = None, pickle: bool = False) -> list[str]:
    """Patterns of the files of one component: its small files, and its weights (safetensors, or pickles if ``pickle``).

    ``component`` is a sub-folder, or "" for the repository's own root.
    """
    mark, ending = f".{variant}" if variant else "", "bin" if pickle else "safetensors"
    names = [f"*{suffix}" for suffix in SMALL]
    for stem in WEIGHTS[ending]:
        # A shard's number has five digits: "*" would also take the shards of another variant.
        names += [f"{stem}{mark}.{ending}", f"{stem}{mark}-?????-of-?????.{ending}"]
        names += [f"{stem}-?????-of-?????{mark}.{ending}"] if variant else []
    if not component:
        # fnmatch's "*" also crosses "/": the root's small files are named one by one.
        names = ["config.json", "model_index.json", *names[len(SMALL) :]]
        names += [f"{stem}.{ending}.index{mark}.json" for stem in WEIGHTS[ending]]
    return [f"{component}/{name}" if component else name for name in names]


def component_folder(
    path_or_id: str,
    component: str,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> Path:
    """The folder of one component (a diffusers or transformers model), whose ``config.json`` and weights are there.

    Args:
        path_or_id: a folder or a hub id.
        component: its sub-folder, or "" for the root itself.
        revision: of a hub repository.
        variant: ``fp16`` for ``diffusion_pytorch_model.fp16.safetensors``, and so on.
        allow_pickle: whether ``.bin`` weights will do where there are no safetensors.

    Raises:
        FileNotFoundError: as `resolve`; no such sub-folder, no config or no weights in it, a missing shard.
        ValueError: weights that are only there as a pickle; a broken config or index.
    """
    root = resolve(path_or_id, revision, component_patterns(component, variant))
    if allow_pickle and not Path(path_or_id).is_dir() and not weight_files(root / component, variant):
        root = resolve(path_or_id, revision, component_patterns(component, variant, pickle=True))
    component_files(root, component, variant, allow_pickle, named=path_or_id)
    return root / component


def component_files(
    root: Path, component: str, variant: str | None = None, allow_pickle: bool = False, named: str | None = None
) -> list[str]:
    """Names, relative to ``root``, of the config and the weight files that a component is loaded from.

    ``named`` is what errors call the root. Raises as `component_folder` does.
    """
    named, folder = named or str(root), root / component
    within = f"{component}/" if component else ""
    hint = f" ({FETCH})" if is_hub_id(named) and is_offline() else ""
    if component and not folder.is_dir():
        there = ", ".join(sorted(child.name for child in root.iterdir() if child.is_dir())) or "none"
        raise FileNotFoundError(f"path={named!r}: {within} is missing there (sub-folders: {there}){hint}; {ADVICE}.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"path={named!r}: {within}config.json is missing there{hint}; {ADVICE}.")
    with naming(named):
        read_json(folder / "config.json")
        weights = weight_files(folder, variant, allow_pickle)
    if not reads_weights():
        return [(folder / "config.json").relative_to(root).as_posix()]
    if not weights:
        _refuse_weights(named, within, folder, variant, allow_pickle, hint)
    missing = [file.name for file in weights if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"path={named!r}: {within}{missing[0]}, a shard of the weights, is missing there{hint}.")
    return [(folder / "config.json").relative_to(root).as_posix(), *(file.relative_to(root).as_posix() for file in weights)]


def _refuse_weights(named: str, within: str, folder: Path, variant: str | None, allow_pickle: bool, hint: str) -> None:
    wanted = "weights" if variant is None else f"weights of variant={variant!r}"
    there = ", ".join(sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))) or "none"
    if not allow_pickle and weight_files(folder, variant, allow_pickle=True):
        raise ValueError(
            f"path={named!r}: {within} has its {wanted} only as a pickle ({there}): give safetensors, or set "
            "allow_pickle: true (torch.load with weights_only)."
        )
    pickles = "" if allow_pickle else "; a pickle is fetched and read only with allow_pickle: true"
    raise FileNotFoundError(
        f"path={named!r}: {within} has no {wanted} there (*.safetensors); there are: {there}{pickles}{hint}."
    )


def weight_map(index: Path) -> list[str]:
    """Names of the files of sharded weights. Raises ValueError for an index that does not list files of its own folder."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or any(not isinstance(name, str) or Path(name).name != name for name in table.values()):
        raise ValueError(f"{index}: is no index of weights: it has no weight_map of file names; fetch it again.")
    return sorted(set(table.values()))


def weight_files(folder: Path, variant: str | None = None, allow_pickle: bool = False) -> list[Path]:
    """The weight files of a component: one file, or an index and the shards that it names; empty if there are none.

    As diffusers does, an index goes before a single file, and safetensors before a pickle.
    """
    mark = f".{variant}" if variant else ""
    for ending in ("safetensors", "bin") if allow_pickle else ("safetensors",):
        for stem in WEIGHTS[ending]:
            for index in (folder / f"{stem}.{ending}.index{mark}.json", folder / f"{stem}.{ending}{mark}.index.json"):
                if index.is_file():
                    return [index, *(folder / name for name in weight_map(index))]
            if (whole := folder / f"{stem}{mark}.{ending}").is_file():
                return [whole]
    return []


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, if there is none in it."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); fetch or export it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds no JSON object; fetch or export it again.")
    return content


def content_hash(folder: Path, parts: Sequence[str]) -> str:
    """sha256 over names (relative to ``folder``) and contents, in the order of the names.

    Args:
        folder: the root; neither its place nor its own name is in the hash.
        parts: files, or sub-folders, of which all small files and safetensors count, and ``.bin`` files if it has no
            safetensors. A part that is not there adds nothing.
    """
    files: set[Path] = set()
    for part in parts:
        if (place := folder / part).is_file():
            files.add(place)
        elif place.is_dir():
            inside = [file for file in place.rglob("*") if file.is_file()]
            weights = ".safetensors" if any(file.suffix == ".safetensors" for file in inside) else ".bin"
            files |= {file for file in inside if file.suffix in (*SMALL, weights)}
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        digest.update(name.encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def identity(path_or_id: str, folder: Path, parts: Sequence[str]) -> dict[str, str]:
    """What a checkpoint keeps of weights: ``path``, ``sha256`` of ``parts``, and of a hub repository ``revision``, its commit.

    Args:
        path_or_id: as the user gave it.
        folder: what `resolve` made of it.
        parts: as for `content_hash`.
    """
    commit = {} if folder == Path(path_or_id) else {"revision": folder.name}
    return {"path": path_or_id, **commit, "sha256": content_hash(folder, parts)}
