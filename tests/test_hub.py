"""Where weights come from: local folders, the hub's cache through huggingface_hub itself, and what is fetched and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from hub_cache import COMMIT, Repository, put, use_cache
from huggingface_hub import HfApi, constants

from distill import hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_cache(monkeypatch, tmp_path / "cache")


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def write(folder: Path, *names: str) -> Path:
    """Files with their own names as content; a config is JSON, an index names two shards."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        stem = name.rsplit("/")[-1].split(".")[0]
        shards = {"a": f"{stem}-00001-of-00002.safetensors", "b": f"{stem}-00002-of-00002.safetensors"}
        content = json.dumps({"weight_map": shards}) if ".index." in name else "{}" if name.endswith(".json") else name
        (folder / name).write_text(content)
    return folder


# ---------------------------------------------------------------------------------------------------------- resolving


def test_a_local_folder_is_itself(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_local_folder_goes_before_an_id(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    put(offline, "owner/name", write(tmp_path / "repository", "config.json"))
    Path("owner/name").mkdir(parents=True)
    assert hub.resolve("owner/name") == Path("owner/name")


def test_a_local_folder_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match="revision='main'.*is a local folder"):
        hub.resolve(str(tmp_path), "main")


@pytest.mark.parametrize("path", ["nowhere", "/no/where", "../nowhere", "runs/digits/nowhere", "owner/", "owner/a b"])
def test_what_is_neither_a_folder_nor_an_id_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="path='.*there is no such folder; give a diffusers folder.*or a hub id"):
        hub.resolve(path)


@pytest.mark.parametrize("revision", [None, "main", "v2", COMMIT])
def test_an_id_is_found_in_the_cache_while_offline(revision, offline, tmp_path):
    put(offline, "owner/name", write(tmp_path / "repository", "unet/config.json"), refs=("main", "v2"))
    found = hub.resolve("owner/name", revision, ["unet/config.json"])
    assert found == offline / f"models--owner--name/snapshots/{COMMIT}" and (found / "unet/config.json").is_file()
    with pytest.raises(FileNotFoundError, match="'v3'"):
        hub.resolve("owner/name", "v3", ["unet/config.json"])
    identity = hub.identity("owner/name", found, ["unet"])
    assert identity == {"path": "owner/name", "revision": COMMIT, "sha256": hub.content_hash(found, ["unet"])}


def test_an_id_while_offline_is_refused_by_name(offline):
    with pytest.raises(FileNotFoundError) as error:
        hub.resolve("owner/name", "v2", ["*.json"])
    assert all(word in str(error.value) for word in ("'owner/name'", "'v2'", "HF_HUB_OFFLINE", "tools/fetch.py --config"))


def test_a_cache_that_lacks_a_file_is_refused_while_offline(offline, tmp_path):
    """As huggingface_hub knows from the repository's listing, which it keeps."""
    repository = write(tmp_path / "repository", "unet/config.json", "unet/diffusion_pytorch_model.safetensors")
    snapshot = put(offline, "owner/name", repository, listed=True)
    assert hub.resolve("owner/name", parts=hub.component_patterns("unet")) == snapshot
    (snapshot / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="owner/name.*HF_HUB_OFFLINE.*unet/diffusion_pytorch_model.safetensors"):
        hub.resolve("owner/name", parts=hub.component_patterns("unet"))
    assert hub.resolve("owner/name", parts=hub.component_patterns("vae")) == snapshot


@pytest.mark.parametrize("how", ["constant", "environment", "context"])
def test_nobody_is_asked_while_offline(how, cache, monkeypatch):
    asked = []
    monkeypatch.setattr(HfApi, "repo_info", lambda *args, **settings: asked.append(settings))
    assert not hub.is_offline()
    if how == "constant":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with hub.cache_only() if how == "context" else pytest.MonkeyPatch.context():
        assert hub.is_offline()
        with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
            hub.resolve("owner/name")
    assert hub.is_offline() == (how != "context") and not asked


@pytest.mark.parametrize("failure", [ConnectionError, RuntimeError], ids=["network", "another library's"])
def test_a_hub_that_does_not_answer_is_one_named_error(failure, cache, monkeypatch):
    def fail(*args: object, **settings: object) -> None:
        raise failure("no route\nto host")

    monkeypatch.setattr(HfApi, "repo_info", fail)
    with pytest.raises(FileNotFoundError, match=f"path='owner/name': not a folder here.*{failure.__name__}: no route to host"):
        hub.resolve("owner/name")


# --------------------------------------------------------------------------------------------------- what is fetched

FILES = [
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/run.py",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.fp16-00001-of-00001.safetensors",
    "text_encoder/model-00001-of-00001.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "name-v1.safetensors",
]


@pytest.fixture
def repository(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """``owner/name`` on a hub that is not there: huggingface_hub's own filter says what is fetched of it."""
    source = Repository(write(tmp_path / "source", *FILES), cache)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", source.download)
    return source


@pytest.mark.parametrize(
    ("component", "settings", "expected"),
    [
        ("unet", {}, ["config.json", "diffusion_pytorch_model.safetensors"]),
        ("unet", {"variant": "fp16"}, ["config.json", "diffusion_pytorch_model.fp16.safetensors"]),
        ("unet", {"allow_pickle": True}, ["config.json", "diffusion_pytorch_model.safetensors"]),
        ("vae", {"allow_pickle": True}, ["config.json", "diffusion_pytorch_model.bin"]),
        (
            "text_encoder",
            {},
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
        ),
    ],
)
def test_only_what_is_read_is_fetched(component, settings, expected, repository):
    folder = hub.component_folder("owner/name", component, **settings)
    assert folder == repository.snapshot / component
    assert repository.fetched() == [f"{component}/{name}" for name in expected]


def test_both_manners_of_naming_a_variants_shards_are_fetched(repository):
    hub.resolve("owner/name", parts=hub.component_patterns("text_encoder", "fp16"))
    shards = [name for name in repository.fetched() if name.endswith(".safetensors")]
    names = ("model-00001-of-00001.fp16.safetensors", "model.fp16-00001-of-00001.safetensors")
    assert shards == [f"text_encoder/{name}" for name in names]


def test_a_component_at_the_root_is_fetched_without_the_sub_folders(repository):
    write(repository.source, "config.json", "diffusion_pytorch_model.safetensors")
    assert hub.component_folder("owner/name", "") == repository.snapshot
    assert repository.fetched() == ["config.json", "diffusion_pytorch_model.safetensors", "model_index.json"]


def test_a_pickle_is_not_fetched_and_the_error_says_how_it_would_be(repository):
    with pytest.raises(FileNotFoundError, match="path='owner/name': vae/ has no weights there.*allow_pickle: true"):
        hub.component_folder("owner/name", "vae")
    assert repository.fetched() == ["vae/config.json"]


def test_a_part_that_a_cache_lacks_while_offline_can_be_fetched(offline, tmp_path):
    put(offline, "owner/name", write(tmp_path / "repository", "scheduler/scheduler_config.json"))
    with pytest.raises(FileNotFoundError, match=r"owner/name.*unet/ is missing there.*scheduler.*tools/fetch.py --config"):
        hub.component_folder("owner/name", "unet")


# ------------------------------------------------------------------------------------------------- what is in a folder

WEIGHTS = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("names", "settings", "error", "words"),
    [
        (["vae/config.json"], {}, FileNotFoundError, r"unet/ is missing there \(sub-folders: vae\)"),
        ([f"unet/{WEIGHTS}.safetensors"], {}, FileNotFoundError, "unet/config.json is missing there"),
        (["unet/config.json"], {}, FileNotFoundError, r"unet/ has no weights there \(\*.safetensors\); there are: none"),
        (["unet/config.json", f"unet/{WEIGHTS}.bin"], {}, ValueError, f"only as a pickle .{WEIGHTS}.bin.*allow_pickle: true"),
        (
            ["unet/config.json", f"unet/{WEIGHTS}.safetensors"],
            {"variant": "fp16"},
            FileNotFoundError,
            f"unet/ has no weights of variant='fp16' there.*there are: {WEIGHTS}.safetensors",
        ),
        (
            ["unet/config.json", f"unet/{WEIGHTS}.safetensors.index.json", f"unet/{WEIGHTS}-00001-of-00002.safetensors"],
            {},
            FileNotFoundError,
            f"unet/{WEIGHTS}-00002-of-00002.safetensors, a shard of the weights, is missing",
        ),
    ],
)
def test_an_incomplete_component_is_named(names, settings, error, words, tmp_path):
    write(tmp_path, *names)
    with pytest.raises(error, match=f"path='{tmp_path}': .*{words}"):
        hub.component_folder(str(tmp_path), "unet", **settings)


@pytest.mark.parametrize("content", ["{", "[1]"])
@pytest.mark.parametrize("name", ["config.json", f"{WEIGHTS}.safetensors.index.json"])
def test_broken_json_is_named(name, content, tmp_path):
    write(tmp_path, "unet/config.json", f"unet/{WEIGHTS}.safetensors")
    (tmp_path / "unet" / name).write_text(content)
    with pytest.raises(ValueError, match=f"path='{tmp_path}': .*unet/{name}.*JSON"):
        hub.component_folder(str(tmp_path), "unet")


def test_a_pickle_is_taken_where_it_may_be_and_nothing_better_is_there(tmp_path):
    write(tmp_path, "unet/config.json", f"unet/{WEIGHTS}.bin")
    expected = ["unet/config.json", f"unet/{WEIGHTS}.bin"]
    assert hub.component_files(tmp_path, "unet", allow_pickle=True) == expected
    write(tmp_path, f"unet/{WEIGHTS}.safetensors")
    assert hub.component_files(tmp_path, "unet", allow_pickle=True)[1] == f"unet/{WEIGHTS}.safetensors"


def test_shards_are_those_that_the_index_names(tmp_path):
    shards = [f"unet/{WEIGHTS}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = f"unet/{WEIGHTS}.safetensors.index.json"
    write(tmp_path, "unet/config.json", index, *shards, f"unet/{WEIGHTS}-00003-of-00003.safetensors")
    assert hub.component_files(tmp_path, "unet") == ["unet/config.json", index, *shards]


# ------------------------------------------------------------------------------------------------------------- hashes


def test_a_hash_follows_names_and_contents_not_places(tmp_path):
    names = ["unet/config.json", "unet/a.safetensors", "unet/deep/b.safetensors", "notes.txt"]
    first, parts = write(tmp_path / "first", *names), ["unet", "notes.txt"]
    same = hub.content_hash(shutil.copytree(first, tmp_path / "second"), parts)
    assert hub.content_hash(first, parts) == hub.content_hash(first, parts[::-1] + ["unet"]) == same
    for change in ("content", "name", "swap", "move"):
        other = shutil.copytree(first, tmp_path / change)
        a, b = other / "unet/a.safetensors", other / "unet/deep/b.safetensors"
        if change == "content":
            a.write_text("another")
        elif change == "swap":
            a.write_text(b.read_text()), b.write_text("unet/a.safetensors")
        else:
            a.rename(other / "unet" / ("c.safetensors" if change == "name" else "deep/a.safetensors"))
        assert hub.content_hash(other, parts) != same, change


def test_only_what_can_be_loaded_is_hashed(tmp_path):
    write(tmp_path, "unet/config.json", "unet/a.safetensors")
    before = hub.content_hash(tmp_path, ["unet"])
    write(tmp_path, "unet/README.md", "unet/a.bin", "vae/config.json")
    assert hub.content_hash(tmp_path, ["unet"]) == hub.content_hash(tmp_path, ["unet", "missing"]) == before
    write(tmp_path, "unet/merges.txt")
    assert (text := hub.content_hash(tmp_path, ["unet"])) != before
    write(tmp_path, "unet/spiece.model")
    assert hub.content_hash(tmp_path, ["unet"]) != text


def test_a_pickle_is_hashed_where_it_is_what_is_loaded(tmp_path):
    write(tmp_path, "unet/config.json")
    before = hub.content_hash(tmp_path, ["unet"])
    write(tmp_path, "unet/a.bin")
    assert hub.content_hash(tmp_path, ["unet"]) != before


def test_a_local_folders_identity_has_no_revision(tmp_path):
    write(tmp_path, "config.json")
    identity = hub.identity(str(tmp_path), tmp_path, ["config.json"])
    assert identity == {"path": str(tmp_path), "sha256": hub.content_hash(tmp_path, ["config.json"])}


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {"a": "../elsewhere.safetensors"}}', '{"weight_map": ["a"]}'])
def test_an_index_that_lists_no_files_of_its_folder_is_refused(content, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match="is no index of weights"):
        hub.weight_map(index)
