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
from distill.plan.plan import Plan, Strategy, Work, make_plan
from distill.plan.table import GIB, described, states_table, turns_table

NO_DATA = "--data=SyntheticDataModule"
"""Ahead of the config: recipes whose data is the user's are planned without any."""
SWITCHES = (("gradient checkpointing", "optimization.gradient_checkpointing", "true"), ("LoRA", "lora", "{rank: 64}"))
"""In words, a key of a player's settings, and its value."""


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

    def work(self, batch_size: int | None, shape: list[int] | None) -> Work | None:
        """What a step works on; None in 64 bits, where states alone are counted."""
        precision, data = str(self.config.trainer.precision), self.data_settings.init_args
        if precision.startswith("64"):
            return None
        autocast = torch.bfloat16 if precision in ("bf16", "bf16-mixed") else None
        return Work(
            batch_size=batch_size or data.batch_size,
            eval_batch_size=data.get("eval_batch_size") or data.batch_size,
            shape=None if shape is None else tuple(shape),
            trajectories="Trajectories" in self.data_settings.class_path,
            autocast=autocast,
            accelerator=self.config.trainer.accelerator != "cpu",
        )

    def switches(self) -> Iterator[tuple[str, list[str]]]:
        """What could be switched on to hold less, in words and as options; each with those before it."""
        model, options = self.config.model.init_args, []
        places = {"model.init_args": model}
        if (fake := model.get("fake_score")) is not None:
            places["model.init_args.fake_score"] = fake
        for words, key, value in SWITCHES:
            off = [f"--{place}.{key}={value}" for place, part in places.items() if key in part and not part[key]]
            if off:
                options += off
                yield words, list(options)


def parse_arguments(args: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it belongs to the config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
    return arguments, [word for file in arguments.config for word in ("--config", file)] + overrides


def planned(words: list[str], arguments: argparse.Namespace, batch_size: int | None) -> tuple[Planned, Plan]:
    """The parsed config and its plan; raises SystemExit with one line for a config that is wrong."""
    parsed = Planned([NO_DATA, *words], run=False)
    method = parsed.build()
    try:
        return parsed, make_plan(method, None if arguments.states else parsed.work(batch_size, arguments.shape))
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


def advice(parsed: Planned, plan: Plan, words: list[str], arguments: argparse.Namespace) -> Iterator[str]:
    """Line by line, what each switch would leave, until one fits; the smallest batch comes last."""
    tried = [*parsed.switches()]
    smallest = tried[0][1] if tried and "checkpointing" in tried[0][0] else []
    last = [] if arguments.states else [("a batch of 1", smallest, 1)]
    for name, options, batch_size in [*((*one, arguments.batch_size) for one in tried), *last]:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                other = planned([*words, *options], arguments, batch_size)[1]
        except SystemExit:  # a method or network that does not take it
            continue
        strategy, fits = least(other, arguments)
        peak = described(other.peak(arguments.devices, strategy), arguments.devices, strategy)
        yield f"with {name}: {peak}{': fits' if fits else ''}  {' '.join(options)}".rstrip()
        if fits:
            return


def main(args: list[str] | None = None) -> None:
    """Prints the plan."""
    arguments, words = parse_arguments(args)
    import_parts()
    parsed, plan = planned(words, arguments, arguments.batch_size)
    strategy, fits = least(plan, arguments)
    devices = arguments.devices
    lines = states_table(plan)
    if plan.turns:
        lines += ["", *turns_table(plan, devices, strategy, arguments.tflops * 1e12, arguments.bandwidth * 1e9)]
        lines += [f"seconds: at {arguments.tflops:g} TFLOP/s and {arguments.bandwidth:g} GB/s, one after the other"]
    print("\n".join(lines))
    if not fits:
        print("\n".join(advice(parsed, plan, words, arguments)))
    peak = described(plan.peak(devices, strategy), devices, strategy)
    print(f"{peak}, of {arguments.memory:g}: {'fits' if fits else 'does not fit'}")
    sys.exit(int(not fits))


if __name__ == "__main__":
    main()
