"""slurm/preflight.py: what would end a job later is said before it, with the remedy."""

from __future__ import annotations

import importlib.util
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cluster import free_ports
from torch import nn

from distill.frozen import Frozen

ROOT = Path(__file__).resolve().parents[2]
USAGE = namedtuple("USAGE", "total used free")


def load() -> Any:
    spec = importlib.util.spec_from_file_location("preflight", ROOT / "slurm/preflight.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


preflight = load()


def said(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str) -> tuple[int, list[str]]:
    """The exit code and the lines of one rank, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MASTER_PORT", str(free_ports(1)[0]))
    with pytest.raises(SystemExit) as ended:
        preflight.main([*words, "--run", str(tmp_path / "run"), "--trainer.accelerator=cpu"])
    return int(ended.value.code or 0), capsys.readouterr().out.splitlines()


def test_a_run_that_can_start(capsys, monkeypatch, tmp_path):
    code, lines = said(capsys, monkeypatch, tmp_path, "--config", str(ROOT / "configs/digits/teacher.yaml"))
    assert code == 0 and [line[:5].strip() for line in lines] == ["ok"] * 5
    assert [line[7:].partition(":")[0] for line in lines] == ["all-reduce", "devices", "disk", "files", "memory"]
    assert "0 of 0 pretrained parts" in lines[3] and not list((tmp_path / "run").iterdir())


def test_weights_that_are_not_there(capsys, monkeypatch, tmp_path):
    code, lines = said(capsys, monkeypatch, tmp_path, "--config", str(ROOT / "configs/digits/cd.yaml"))
    assert code == 1 and "ok     all-reduce: 1 ranks over gloo" in lines
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert len(wrong) == 1 and "files: model.teacher: " in wrong[0] and "runs/digits/teacher/export" in wrong[0]


def test_a_wrong_config_ends_with_two(capsys, monkeypatch, tmp_path):
    code, lines = said(capsys, monkeypatch, tmp_path, "--config", str(ROOT / "configs/digits/teacher.yaml"), "--data.batch=3")
    assert code == 2 and not lines


def ranks(gathered: list | None = None) -> Any:
    """Two ranks of one node, of which this is the first, and what they gather."""
    return SimpleNamespace(rank=0, local=0, node=0, count=2, on_node=2, cuda=0, gather=lambda mine: gathered)


@pytest.mark.parametrize(
    ("accelerator", "seen", "kind", "words"),
    [
        ("gpu", [("a", 2, 0), ("a", 2, 0)], "ok", "2 ranks on 1 nodes, 2 GPUs each"),
        ("auto", [("a", 1, 0), ("a", 1, 0)], "WRONG", "a task on a sees 1 GPUs, 2 tasks run on a node; ask by --gpus-per-node"),
        ("auto", [("a", 2, 0), ("b", 0, 1)], "WRONG", "a task on b sees 0 GPUs"),
        ("gpu", [("a", 0, 0), ("a", 0, 0)], "WRONG", "a task on a sees 0 GPUs"),
        ("auto", [("a", 0, 0), ("b", 0, 1)], "note", "no GPU; 2 ranks on 2 nodes compute on CPUs"),
        ("cpu", [("a", 0, 0), ("b", 0, 1)], "ok", "no GPU"),
    ],
)
def test_each_task_needs_a_device(accelerator, seen, kind, words):
    found = list(preflight.devices(ranks(seen), accelerator))
    assert len(found) == 1 and found[0][0] == kind and words in found[0][1]


def test_shards_are_held_against_those_who_read_them():
    for count, kind in ((8, "ok"), (7, "note")):
        (found,) = preflight.shards(SimpleNamespace(files=["a"] * count), 8)
        assert found[0] == kind and f"{count} for 8 readers" in found[1]
    assert not list(preflight.shards(SimpleNamespace(), 8))


class Pair(nn.Module):
    """A student of 1000 numbers beside a teacher of 500 that is not a part of it, and 10 that are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(1000, 1, bias=False)
        self.register_buffer("average", torch.zeros(10))
        self._teacher = Frozen(nn.Linear(500, 1, bias=False))


def test_memory_counts_weights_gradients_moments_and_the_teacher(monkeypatch, tmp_path):
    """A thousand trained numbers four times, the teacher's 500 and the other 10: 4510 of 4 bytes; saved are 3010 of them."""
    model, free = Pair(), 10**9
    monkeypatch.setattr(preflight.os, "sysconf", lambda name: 2 if name == "SC_PHYS_PAGES" else pages)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: USAGE(0, 0, free))
    for pages, kind in ((4 * 4510, "ok"), (4 * 4510 - 1, "WRONG")):  # of two pages in all, one for each of two ranks
        (found,) = preflight.memory(model, ranks(), True, tmp_path, "auto")
        assert found[0] == kind and found[1].startswith("memory")
    free = 3 * 4 * 3010 - 1
    found = list(preflight.memory(model, ranks(), True, tmp_path, "auto"))
    assert found[-1][0] == "WRONG" and "three checkpoints" in found[-1][1]
