"""Every guidance rule as the teacher's from config: distilled at drawn scales, and in the step of a consistency method."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from guided_run import ode, teacher_at, train, write_teacher

from distill.checkpoints import read_checkpoint

PAIRS = {
    "class_path": "GridPairs",
    "init_args": {"grid": "UniformGrid", "points": {"class_path": "ConstantPoints", "init_args": {"count": 4}}},
}
CONSISTENCY = {"method": "Consistency", "solver": "DDIM", "pairs": PAIRS, "distance": "PseudoHuber"}
SHARED = {"evaluation": {"sampler": ode("DDIM"), "steps": [1], "teacher_sampler": ode("DDIM"), "teacher_steps": 2}}
RULES: dict[str, dict[str, Any]] = {
    "ClassifierFreeGuidance": {
        "scale": 3.0,
        "sigma_high": 5.0,
        "rescale": 0.7,
        "rescale_space": "flow",
        "weight": {"class_path": "CosineGuidanceWeight"},
    },
    "RandomGuidance": {"low": 2.0, "high": 4.0},
    "AdaptiveProjectedGuidance": {"scale": 3.0, "norm_threshold": 2.5},
    "CfgPlusPlus": {"scale": 0.6},
    "AdaptiveGuidance": {"scale": 3.0, "threshold": 0.99, "space": "x0"},
    "Autoguidance": {"scale": 2.0},
    "IndependentConditionGuidance": {"scale": 3.0},
    "TimeStepGuidance": {"scale": 3.0, "strength": 1.0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a guide, and a consistency run without guidance."""
    root = tmp_path_factory.mktemp("work")
    write_teacher(root / "teacher")
    write_teacher(root / "guide", seed=1)
    train(root / "unguided", root / "teacher", **SHARED, **CONSISTENCY)  # type: ignore[arg-type]
    return root


def losses(run: Path) -> list[float]:
    """Of each batch."""
    rows = csv.DictReader((run / "csv/metrics.csv").open())
    return [float(row["train/student/loss"]) for row in rows if row.get("train/student/loss")]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_guides_the_teacher_of_two_methods(name: str, root: Path, tmp_path: Path, capsys) -> None:
    """A student that starts as the teacher has something to learn where the rule does something; grids follow trajectories.

    CFG++ goes on with another noise than its prediction leaves: it can be stepped by, not distilled.
    """
    guide = {"guide": teacher_at(root / "guide")} if name == "Autoguidance" else {}
    settings = SHARED | {"guidance": {"class_path": name, "init_args": RULES[name] | guide}}
    runs = [train(tmp_path / "step", root / "teacher", **settings, **CONSISTENCY)]  # type: ignore[arg-type]
    assert losses(runs[0])[0] != pytest.approx(losses(root / "unguided")[0], rel=1e-4)
    if name == "CfgPlusPlus":
        with pytest.raises(SystemExit):
            train(tmp_path / "drawn", root / "teacher", guidance_range=[0.1, 0.9], **settings)  # type: ignore[arg-type]
        said = capsys.readouterr().err
        assert "GuidanceDistillation" in said and "DDIM" in said and not (tmp_path / "drawn").exists()
    else:
        scales = {"guidance_range": [2.0, 5.0]}
        runs.append(train(tmp_path / "drawn", root / "teacher", **settings, **scales))  # type: ignore[arg-type]
        assert losses(runs[1])[0] > 1e-6
    for run in runs:
        found, kept = losses(run), read_checkpoint(run / "checkpoints/last.ckpt")
        assert len(found) == 2 and all(map(math.isfinite, found))
        assert kept["global_step"] == 2 and not any("guide" in key or "teacher" in key for key in kept["state_dict"])
        assert [*kept["distill"]["guidance"]] == [*guide]
        assert not guide or kept["distill"]["guidance"]["guide"]["path"] == str(root / "guide")
