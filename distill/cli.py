"""Command line: ``python -m distill fit|validate|test|predict --config FILE [--config ...] [--a.b=c]``.

LightningCLI with the package's defaults (``configs/base.yaml``), a run folder for each recipe, and errors of one line. A class
is named by its short name: every module of ``distill`` and ``datamodules`` is imported, none of which imports a heavy library.
"""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import os
import pkgutil
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace, set_parsing_settings
from jsonargparse.typing import PositiveFloat
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import datamodules
import distill
from distill.callbacks.loggers import run_loggers
from distill.callbacks.memory_plan import MemoryPlan
from distill.callbacks.predictions import PredictionWriter
from distill.callbacks.preemption import Preemption
from distill.callbacks.random_state import RandomState
from distill.callbacks.run_record import RunRecord
from distill.callbacks.sample_grid import SampleGrid
from distill.callbacks.step_progress import StepProgressBar
from distill.callbacks.steps_curve import StepsCurve
from distill.callbacks.throughput import Throughput
from distill.callbacks.training_cost import TrainingCost
from distill.checkpoints import AtomicCheckpointIO, RunCheckpoint, checkpoint_folder, find_checkpoint, read_checkpoint
from distill.methods.trained import TrainedModule
from distill.parse_errors import explain

BASE_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "base.yaml"
EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # the averages of the student are
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own call
    r"`torch.jit.script` is deprecated",  # a dependency's
    r"FSDP2-wrapped module .* returned a view tensor",  # nothing is added to it in place
)
TIMEOUT_HELP = (
    "Seconds after which a rank that waits for the others ends with an error, under a strategy given by its name "
    "(a class_path has its own timeout)."
)
PRECISIONS = ("32", "32-true", "64", "64-true", "bf16", "bf16-mixed")
SHARDED = ("fsdp2", "fsdp2_offload")
PROGRAM = ("distill.cli", "distill.__main__")


def import_parts() -> None:
    """Imports every module of the two packages, so that a new file needs no registration to be found by short name."""
    for package in (distill, datamodules):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name not in PROGRAM:
                importlib.import_module(module.name)


class Parser(LightningArgumentParser):
    """Reports errors in one line and exits with 2. With ``JSONARGPARSE_DEBUG`` set, raises instead."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"allow_abbrev": False})  # --trainer.max_step would be taken for max_steps

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the process, unless this is the parser of a part of the config: that of the whole has more to say."""
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        owner = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {message if isinstance(ex, Refusal) else explain(message, owner)}\n")
        self.exit(2)


class Refusal(Exception):
    """A config that parses but cannot be run; its message names key, value and remedy."""


def run_folder(config: Namespace) -> str:
    """``runs/<config folder>/<config name>`` of the first ``--config``: configs/digits/cd.yaml gives runs/digits/cd."""
    files = [Path(str(file)).resolve() for file in config.get("config") or []]
    if not files:
        raise Refusal("trainer.default_root_dir=null: without --config give --trainer.default_root_dir=FOLDER")
    parts = files[0].with_suffix("").parts
    if "configs" in parts[:-1]:
        return str(Path("runs", *parts[len(parts) - parts[::-1].index("configs") :]))
    return str(Path("runs", *parts[-2:]))


def check_trainer(trainer: Namespace, fitting: bool) -> None:
    """Refuses settings that the Trainer would take and a `Method` cannot use.

    Raises:
        Refusal: naming the key, its value and what to set instead.
    """
    own = (("gradient_clip_val", None, "gradient_clip_norm"), ("accumulate_grad_batches", 1, "accumulate_batches"))
    for key, unset, ours in own:
        if (value := trainer[key]) != unset:
            raise Refusal(f"trainer.{key}={value}: methods do this themselves; set model.optimization.{ours}={value} instead")
    if str(trainer.precision) not in PRECISIONS:
        reason = "losses are not scaled for half precision, and averages and optimisers need 32 bits"
        raise Refusal(f"trainer.precision={trainer.precision}: {reason}; use bf16-mixed, or one of {', '.join(PRECISIONS)}")
    if str(trainer.strategy).startswith("fsdp") and trainer.strategy not in SHARDED:
        reason = "Lightning's FSDP1 takes one network and automatic optimisation"
        raise Refusal(f"trainer.strategy={trainer.strategy}: {reason}; use fsdp2, which shards each network on its own")
    steps = trainer.max_steps
    if steps == 0 or steps < -1:
        raise Refusal(f"trainer.max_steps={steps}: must be a positive number of steps, e.g. --trainer.max_steps=1000")
    if fitting and steps == -1 and trainer.max_epochs in (None, -1) and trainer.max_time is None and not trainer.fast_dev_run:
        raise Refusal("trainer.max_steps=-1: training would never end; state it in the recipe, e.g. --trainer.max_steps=1000")
    for key in ("log_every_n_steps", "val_check_interval", "check_val_every_n_epoch", "num_nodes"):
        value = trainer.get(key)
        if isinstance(value, (int, float)) and value <= 0:
            raise Refusal(f"trainer.{key}={value}: must be positive, e.g. --trainer.{key}=1")


class DistillCLI(LightningCLI):
    """LightningCLI over `TrainedModule` and a data module, with checkpoints, grids, loggers and the record in a run folder."""

    def __init__(self, args: list[str] | None = None, run: bool = True):
        settings: dict[str, Any] = {"parser_mode": "omegaconf+"}
        with_base = settings | {"default_config_files": [str(BASE_CONFIG)]}
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            TrainedModule,
            LightningDataModule,
            save_config_callback=RunRecord,
            seed_everything_default=0,
            parser_kwargs=settings | {name: with_base for name in self.subcommands()} if run else with_base,
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            run=run,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # it writes the config into every checkpoint
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks that every run has."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SampleGrid, "sample_grid")
        parser.add_lightning_class_args(StepsCurve, "steps_curve")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(MemoryPlan, "plan")
        parser.add_argument("--process_group_timeout", type=PositiveFloat, default=600.0, help=TIMEOUT_HELP)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, names the run folder, and refuses what can be seen to fail."""
        try:
            self.config = parser.parse_args(args)
            config = self.config.get(str(self.config.get("subcommand")), self.config)
            if config.trainer.default_root_dir is None:
                config.trainer.default_root_dir = run_folder(config)
            if "subcommand" in self.config:
                check_trainer(config.trainer, fitting=self.config.subcommand == "fit")
                self.choose_checkpoint(config, self.config.subcommand)
        except (Refusal, OmegaConfBaseException) as error:
            parser.error(str(error).replace("\n", " "), error)

    def choose_checkpoint(self, config: Namespace, subcommand: str) -> None:
        """Turns ``--ckpt_path last|best`` into a file of the run folder, and refuses to start over a run that is there.

        Raises:
            Refusal: a run would be overwritten, or the checkpoint asked for is not there.
        """
        run, which = config.trainer.default_root_dir, config.ckpt_path
        there = sorted(checkpoint_folder(run).glob("*.ckpt"))
        if which is None and subcommand != "fit":
            which = "last"  # without a checkpoint, untrained weights would be measured
        if which is None:
            if there and not config.trainer.fast_dev_run:
                raise Refusal(
                    f"trainer.default_root_dir={run}: holds checkpoints of a run ({there[0].name} ...); continue it "
                    "with --ckpt_path last, or start another with --trainer.default_root_dir=FOLDER"
                )
            return
        path = find_checkpoint(run, which)
        if path is None and subcommand == "fit" and which == "last":
            rank_zero_info(f"no checkpoint in {checkpoint_folder(run)} yet: starting from scratch")
        elif path is None or not path.is_file():
            raise Refusal(f"ckpt_path={which}: no such checkpoint of {run}; there are: {', '.join(map(str, there)) or 'none'}")
        config.ckpt_path = None if path is None else str(path)

    def _parse_ckpt_path(self) -> None:
        """Off: Lightning would read hyperparameters from the checkpoint over the config and the command line."""

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer; what their constructors refuse is reported with the key of the class."""
        self.config_init = self.parser.instantiate(self.config, instantiators=[(self.construct, object, True)])
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")
        try:
            self.model.check_data(self.datamodule.spec)
        except ValueError as error:
            self.refuse(str(error))
        try:
            self.trainer = self.instantiate_trainer()
        except (MisconfigurationException, ValueError) as error:
            self.refuse(f"trainer: {error}")

    def construct(self, class_type: type, *args: Any, **kwargs: Any) -> Any:
        """Builds one object of the config."""
        try:
            return class_type(*args, **kwargs)
        except (ValueError, OSError) as error:
            key = key_of(self.config.get(str(self.subcommand), self.config), class_type)
            self.refuse(str(error) if str(error).startswith("model.") else f"{key}{error}")

    def refuse(self, message: str) -> NoReturn:
        """Ends with one line, or with the traceback under ``JSONARGPARSE_DEBUG``."""
        self.parser.error(message, Refusal(message))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this package's checkpoint files, loggers and callbacks beside those of the config."""
        config = self._get(self.config_init, "trainer")
        plugins = config.plugins if isinstance(config.plugins, list) else [config.plugins] if config.plugins else []
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO(mapped=config.strategy in SHARDED)]
        if SLURMEnvironment.detect():  # Lightning's requeue loses checkpoints, and leaves hpc_ckpt files that override ours
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))
        timeout = timedelta(seconds=self._get(self.config_init, "process_group_timeout"))
        callbacks: list[Callback] = [RandomState(), *([PredictionWriter()] if self.subcommand == "predict" else [])]
        if self.subcommand == "fit":
            callbacks += [Preemption(timeout), TrainingCost()]
        if config.enable_progress_bar is not False:
            callbacks.append(StepProgressBar())
        if config.logger in (None, True):
            kwargs["logger"] = run_loggers(config.default_root_dir)
        self.trainer_defaults = {"callbacks": callbacks}
        trainer = super().instantiate_trainer(**kwargs)
        if isinstance(config.strategy, str) and hasattr(trainer.strategy, "_timeout"):
            trainer.strategy._timeout = timeout  # Lightning has no way to give it to a strategy that is chosen by name
        return trainer


def key_of(config: Namespace, class_type: type) -> str:
    """``model.averaging.``, the place of a class in the config; the name of the class if it is there more than once."""
    name, arguments = f"{class_type.__module__}.{class_type.__qualname__}", set(inspect.signature(class_type).parameters)
    places = []
    for key, value in config.items(branches=True):
        if isinstance(value, Namespace) and not key.endswith(".init_args"):
            given = vars(value)
            if given.get("class_path", name) == name and set(vars(given.get("init_args", value))) == arguments:
                places.append(key.replace(".init_args", ""))
    return f"{places[0]}." if len(places) == 1 else f"{class_type.__name__}: "


class _Rebuilt(DistillCLI):
    """Builds the data module and the method of a config, and no Trainer."""

    def _set_seed(self) -> None:
        """Off: whoever loads a run has seeds of their own."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None is needed."""


def load_run(folder: str | Path, checkpoint: str = "last") -> tuple[dict[str, Any], TrainedModule, LightningDataModule]:
    """The config, the trained module (in eval mode, on the CPU) and the data module of a run.

    Args:
        folder: the run folder.
        checkpoint: ``last``, ``best`` or a path.

    Raises:
        FileNotFoundError: no config or no such checkpoint there.
        ValueError, RuntimeError: the checkpoint is broken, or does not fit the config.
    """
    config, path = Path(folder) / "config.yaml", find_checkpoint(folder, checkpoint)
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds no config.yaml; give a run folder that `python -m distill fit` made")
    if path is None:
        raise FileNotFoundError(f"no {checkpoint}.ckpt in {checkpoint_folder(folder)}; train it, or name another checkpoint")
    import_parts()
    rebuilt = _Rebuilt(["--config", str(config)], run=False)
    content = read_checkpoint(path)
    rebuilt.model.on_load_checkpoint(content)
    rebuilt.model.load_state_dict(content["state_dict"], strict=True)
    return copy.deepcopy(rebuilt.config.as_dict()), rebuilt.model.eval(), rebuilt.datamodule


def main(args: list[str] | None = None) -> None:
    """Runs one subcommand. Exits with 2 and one line on stderr for whatever is wrong with the config."""
    if not BASE_CONFIG.is_file():
        sys.exit(f"{BASE_CONFIG} is missing: install with `pip install -e .` from a clone of the repository")
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    import_parts()
    DistillCLI(args)


def run() -> NoReturn:
    """`main` as a program: ends with its exit code.

    What is left of a run, data and process groups among it, is freed first. Python would end with their threads alive, and one
    that then wants to do something aborts the process (seen with gloo: exit code 134 of a run that was complete).
    """
    code: Any = 0
    try:
        main()
    except SystemExit as left:
        code = left.code
    gc.collect()  # trainer, model and callbacks hold each other; the groups that they held are destroyed by Lightning at exit
    sys.exit(code)
