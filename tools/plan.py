"""Says before a run is queued what it will hold, compute and send, whether it fits, and what to switch on if it does not.

    python tools/plan.py --config configs/FOLDER/RECIPE.yaml --devices 8 --memory 80 [--strategy auto] [--batch-size 2]

Further options are those of ``python -m distill fit``, e.g. a second ``--config``. No weights and no data are read: networks
are built on the meta device from their config.json, that of a local folder, of the hub's cache, or, for most models that the
recipes name, the published one; a batch of every player, and one of samples, is gone through on tensors without memory.
Figures are of one device and leave out what an allocator and kernels add: keep a tenth free. Encoding (by codec and text
encoders, where data is not encoded) is not gone through. Ends with 1 if the run does not fit, with 2 if the config is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any, get_args

import torch

from distill import hub
from distill.cli import DistillCLI, import_parts
from distill.command_line import Parser
from distill.plan.plan import Plan, Strategy, Work, make_plan
from distill.plan.table import GIB, described, states_table, turns_table

NO_DATA = "--data=SyntheticDataModule"
"""Ahead of the config: recipes whose data is the user's are planned without any."""


class Planned(DistillCLI):
    """Parses a config as a run does, and builds its method alone: neither data nor a Trainer."""

    def _set_seed(self) -> None:
        """Off: nothing is trained."""

    def instantiate_classes(self) -> None:
        """Nothing yet; see `build`."""
        self.data_settings = self.config.pop("data")

    def build(self, weights: bool = False) -> Any:
        """The method; on the meta device, and without reading weights, unless ``weights``."""
        with contextlib.nullcontext() if weights else hub.configs_only():
            method: Any = self.parser.instantiate(self.config, instantiators=[(self.construct, object, True)]).model
        return method.double() if str(self.config.trainer.precision).startswith("64") else method

    def work(self, shape: list[int] | None) -> Work | None:
        """What a step works on; None in 64 bits, where states alone are counted."""
        precision, data = str(self.config.trainer.precision), self.data_settings.init_args
        if precision.startswith("64"):
            return None
        return Work(
            batch_size=data.batch_size,
            eval_batch_size=data.get("eval_batch_size") or data.batch_size,
            shape=None if shape is None else tuple(shape),
            trajectories="Trajectories" in self.data_settings.class_path,
            autocast=torch.bfloat16 if precision in ("bf16", "bf16-mixed") else None,
            accelerator=self.config.trainer.accelerator != "cpu",
        )

    def switches(self) -> list[tuple[str, list[str]]]:
        """What could be set to hold less, in words and as options; what changes the training most comes last."""
        data, model = self.data_settings.init_args, self.config.model.init_args
        places = {"model.init_args": model, "model.init_args.fake_score": model.get("fake_score") or {}}

        def one(key: str) -> list[str]:
            return [f"--data.init_args.{key}=1"] if data.get(key, 1) > 1 else []

        def on(key: str, value: str) -> list[str]:
            return [f"--{place}.{key}={value}" for place, part in places.items() if key in part and not part[key]]

        found = [
            ("one sample at a time in validation", one("eval_batch_size")),
            ("gradient checkpointing", on("optimization.gradient_checkpointing", "true")),
            ("a batch of 1", one("batch_size")),
            ("LoRA", on("lora", "{rank: 64}")),
        ]
        return [(words, options) for words, options in found if options]


def parse_arguments(args: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it belongs to the config."""
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, action="append", help="recipe; may be given again")
    parser.add_argument("--memory", type=float, required=True, help="memory of one device in GiB")
    parser.add_argument("--devices", type=int, default=1, help="in all, over all nodes")
    parser.add_argument("--strategy", choices=("auto", *get_args(Strategy)), default="auto", help="auto: ddp if that fits")
    parser.add_argument("--states", action="store_true", help="weights, gradients and optimiser states alone, in seconds")
    parser.add_argument("--batch-size", type=int, help="of one device; that of the config's data by default")
    parser.add_argument("--shape", type=int, nargs=3, help="of a sample in model space; that of the student by default")
    parser.add_argument("--tflops", type=float, default=150.0, help="that a device sustains, 1e12 operations a second")
    parser.add_argument("--bandwidth", type=float, default=100.0, help="of a device to the others, GB a second")
    arguments, overrides = parser.parse_known_args(args)
    for key in ("memory", "devices", "batch_size", "tflops", "bandwidth"):
        if (value := getattr(arguments, key)) is not None and not value > 0:
            parser.error(f"--{key.replace('_', '-')}={value}: give a positive number")
    batch = [] if arguments.batch_size is None else [f"--data.init_args.batch_size={arguments.batch_size}"]
    return arguments, [word for file in arguments.config for word in ("--config", file)] + overrides + batch


def planned(words: list[str], arguments: argparse.Namespace) -> tuple[Planned, Plan]:
    """The parsed config and its plan; raises SystemExit with one line for a config that is wrong."""
    parsed = Planned([NO_DATA, *words], run=False)
    method = parsed.build()
    try:
        return parsed, make_plan(method, None if arguments.states else parsed.work(arguments.shape))
    except ValueError as error:
        print(f"states alone are planned: {error}", file=sys.stderr)
        return parsed, make_plan(method, None)


def least(plan: Plan, arguments: argparse.Namespace) -> tuple[Strategy, bool]:
    """The strategy to take, and whether the run fits under it: ``auto`` shards only where that is needed and possible."""
    strategies: list[Strategy] = [arguments.strategy]
    if arguments.strategy == "auto":
        strategies = ["ddp", "fsdp2"] if arguments.devices > 1 and plan.shardable else ["ddp"]
    for strategy in strategies:
        possible = plan.shardable or strategy != "fsdp2"
        if possible and plan.peak(arguments.devices, strategy).size <= arguments.memory * GIB:
            return strategy, True
    return strategies[-1], False


def advice(parsed: Planned, words: list[str], arguments: argparse.Namespace) -> Iterator[str]:
    """Line by line, what each switch would leave, on top of those before it, until one fits."""
    options: list[str] = []
    for name, more in parsed.switches():
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                plan = planned([*words, *options, *more], arguments)[1]
        except SystemExit:  # a method or network that does not take it
            continue
        options += more
        strategy, fits = least(plan, arguments)
        peak = described(plan.peak(arguments.devices, strategy), arguments.devices, strategy)
        yield f"with {name}: {peak}{': fits' if fits else ''}  {' '.join(more)}"
        if fits:
            return


def main(args: list[str] | None = None) -> None:
    """Prints the plan."""
    arguments, words = parse_arguments(args)
    import_parts()
    parsed, plan = planned(words, arguments)
    strategy, fits = least(plan, arguments)
    devices = arguments.devices
    lines = states_table(plan)
    if plan.turns:
        lines += ["", *turns_table(plan, devices, strategy, arguments.tflops * 1e12, arguments.bandwidth * 1e9)]
        lines += [f"seconds: at {arguments.tflops:g} TFLOP/s and {arguments.bandwidth:g} GB/s, one after the other"]
    print("\n".join(lines))
    if not fits:
        print("\n".join(advice(parsed, words, arguments)))
    peak = described(plan.peak(devices, strategy), devices, strategy)
    print(f"{peak}, of {arguments.memory:g}: {'fits' if fits else 'does not fit'}")
    sys.exit(int(not fits))


if __name__ == "__main__":
    main()
