"""What a tournament reads of a recipe: whose teacher, what beside the teacher it needs, which of its numbers count steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from distill.command_line import Refusal

STEP_COUNTS = ("stage_steps", "total_steps")
"""Keys of curricula that count updates: they keep their share of the run."""
ROUNDS, WARMUP = "round_steps", "warmup_steps"
SOLVED = {"Heun": lambda steps: 2 * steps - 1}
"""Evaluations of a solver that needs more than one a step."""


def class_name(settings: Any) -> str:
    """The last part of ``class_path``; of a name alone that name."""
    path = settings.get("class_path", "") if isinstance(settings, dict) else str(settings or "")
    return path.rpartition(".")[2]


def arguments_of(settings: Any) -> dict[str, Any]:
    """``init_args``, {} for none."""
    return (settings.get("init_args") or {}) if isinstance(settings, dict) else {}


@dataclass(frozen=True)
class Recipe:
    """A config file as it is written, without what base.yaml and the command line add.

    Attributes:
        path: the file.
    """

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The file. Raises Refusal if it is no recipe of a method."""
        try:
            found = yaml.safe_load(self.path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise Refusal(f"--configs {self.path}: cannot be read ({error}); give recipes of configs/") from error
        if not isinstance(found, dict) or not class_name(found.get("model")) or "max_steps" not in (found.get("trainer") or {}):
            raise Refusal(f"--configs {self.path}: states no model and trainer.max_steps; give recipes of configs/")
        return found

    def opened(self, value: Any) -> Any:
        """A value, or what the fragment that it names holds."""
        if isinstance(value, str) and value.endswith(".yaml"):
            return yaml.safe_load((self.path.parent / value).read_text())
        return value

    @property
    def method(self) -> str:
        return class_name(self.settings["model"])

    @property
    def model(self) -> dict[str, Any]:
        return arguments_of(self.settings["model"])

    @property
    def max_steps(self) -> int:
        return self.settings["trainer"]["max_steps"]

    @property
    def callbacks(self) -> list[str]:
        return [class_name(each) for each in self.settings["trainer"].get("callbacks") or []]

    @property
    def keeps_best(self) -> bool:
        """Whether the best of its snapshots counts, by a figure of validations."""
        return "BestStudent" in self.callbacks

    # ---------------------------------------------------------------------------------------------------------- teacher

    @property
    def teacher_keys(self) -> list[str]:
        """Which arguments of the method are the teacher. Raises Refusal if none is, or one is another recipe's student."""
        found = []
        for key in ("teacher", "student"):
            value = self.model.get(key)
            if class_name(self.opened(value)) != "PretrainedDenoiser":
                continue
            if not isinstance(value, str):
                stage = f"model.{key} is {arguments_of(value).get('path')}, another stage's"
                raise Refusal(f"--configs {self.path}: {stage}; give recipes that start from the teacher's fragment")
            found.append(key)
        if not found:
            raise Refusal(f"--configs {self.path}: starts from no teacher; give recipes with a fragment of configs/teachers")
        return found

    @property
    def guidance(self) -> float | None:
        """The scale at which a student that reads one is drawn: 1, which all have as their target, if it was trained on it."""
        low, high = self.model.get("guidance_range") or (2, 0)
        return 1.0 if low <= 1 <= high else None

    @property
    def remark(self) -> str:
        """What a reader should know of its figures."""
        if self.model.get("guidance") or (self.model.get("guidance_range") and self.guidance is None):
            return "guided: its samples follow another law than the others'"
        if self.guidance is not None:
            return "reads a guidance scale; drawn at 1, which is none"
        if self.keeps_best:
            return "the best of four snapshots by the validation's distance"
        return "each number of steps by the student of its own round" if self.rounds else ""

    # ---------------------------------------------------------------------------------------------------------- lengths

    @property
    def cycle(self) -> int:
        """Updates after which all players had their turns."""
        if "fake_score" in self.model:
            return self.model["fake_score"].get("steps", 1) + 1
        return self.model["critic_steps"] + 1 if "critic_steps" in self.model else 1

    @property
    def rounds(self) -> list[int]:
        """Steps of the student of each round, of methods that halve them; [] of others."""
        steps, found = self.model.get("start_steps", 0), []
        while steps and steps >= self.model["end_steps"]:
            found.append(steps)
            steps //= 2
        return found

    @property
    def unit(self) -> int:
        """The number of updates is a multiple of this."""
        return len(self.rounds) or self.cycle

    def numbers(self, settings: Any = None, key: str = "model") -> Iterator[tuple[str, str, int]]:
        """Numbers of steps in the model: path on the command line, last key, value."""
        for name, value in (self.settings["model"] if settings is None else settings).items():
            if isinstance(value, dict):
                yield from self.numbers(value, f"{key}.{name}")
            elif name in (*STEP_COUNTS, WARMUP, ROUNDS) and isinstance(value, int):
                yield f"{key}.{name}", name, value

    def rescaled(self, updates: int) -> dict[str, tuple[int, int]]:
        """Numbers of steps by path, in the recipe and in a run of so many updates."""
        found = {}
        for path, key, value in self.numbers():
            if key == WARMUP:  # at most a tenth of the run, or of a round
                own = min(value, updates // max(len(self.rounds), 1) // 10)
            else:
                own = updates // len(self.rounds) if key == ROUNDS else max(round(value * updates / self.max_steps), 1)
            found[path] = (value, own)
        return found

    def steps(self, asked: list[int]) -> list[int]:
        """Of the asked numbers of steps those that the student was trained for, as far as the recipe tells."""
        own: Any = None
        if self.rounds:
            own = self.rounds
        elif self.method == "MMDFinetuning":
            own = arguments_of(self.settings["model"])["evaluation"]["steps"]
        elif self.method == "PiecewiseFlow":
            own = [steps for steps in asked if steps % self.model["windows"] == 0]
        return [steps for steps in asked if own is None or steps in own]

    def checkpoint(self, steps: int, updates: int) -> str:
        """Whose samples are measured at a number of steps, as tools/sample.py is told."""
        if self.rounds and steps != self.rounds[-1]:
            ended = (self.rounds.index(steps) + 1) * (updates // len(self.rounds))
            return f"checkpoints/step_{ended:08d}.ckpt"
        return "best" if self.keeps_best else "last"

    # ------------------------------------------------------------------------------------------------------ beside the teacher

    @property
    def on_pairs(self) -> bool:
        """Whether it learns of a teacher's pairs. Raises Refusal for data that is not prepared here."""
        data = self.opened(self.settings.get("data"))
        kind, folders = class_name(data), arguments_of(data).get("folder")
        if kind == "PairsDataModule" and isinstance(folders, str):
            return True
        if kind in ("PairsDataModule", "TrajectoriesDataModule"):
            words = "needs several folders of pairs" if kind == "PairsDataModule" else "needs stored trajectories"
            raise Refusal(f"--configs {self.path}: {words}, which are not prepared here; leave it out")
        return False

    @property
    def pairs_config(self) -> Path:
        return self.path.parent / "pairs.yaml"

    def pairs(self, most: float) -> tuple[int, int, str]:
        """How many pairs, evaluations of one, and both in words; at most ``most`` evaluations in all."""
        settings = yaml.safe_load(self.pairs_config.read_text())
        solver, steps = class_name(arguments_of(settings["sampler"]).get("solver", "Heun")), settings["steps"]
        each = SOLVED.get(solver, lambda steps: steps)(steps) * (2 if settings.get("guidance") else 1)
        count = int(min(settings["count"], most // each))
        return count, each, f"{count:,} pairs of {steps} {solver} steps"

    @property
    def on_classifier(self) -> bool:
        """Whether its losses read features of the classifier beside it."""
        return any(class_name(each) == "ClassifierFeatures" for each in self.model.get("features") or [])

    @property
    def classifier_config(self) -> Path:
        return self.path.parent / "classifier.yaml"
