"""Says before a run is queued what its states hold on a device, and whether they fit. No weights and no data are read.

    python tools/plan.py --config configs/FOLDER/RECIPE.yaml --memory 80

Further options are those of ``python -m distill fit``, e.g. a second ``--config``. The networks are built on the meta device
from their config.json: that of a local folder, of the hub's cache, or, for most models that the recipes name, the published
one. Sizes are in GiB: weights, gradients and optimiser states of one device that shards nothing. Activations, and the buckets
of several devices, come on top. Ends with 1 if the states do not fit, with 2 if the config is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from distill import hub
from distill.cli import DistillCLI, import_parts
from distill.plan.states import States, gradient_bytes, states_by_role

NO_DATA = "--data=SyntheticDataModule"
"""Ahead of the config: recipes whose data is the user's are planned without any."""
GIB = 2**30


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


def table(rows: dict[str, States]) -> list[str]:
    """One line a role and a total."""
    lines = [f"{'':<16}{'weights':>10}{'gradients':>11}{'optimiser':>11}  trained by"]
    for name, row in rows.items():
        sizes = f"{row.weights / GIB:>10.2f}{row.gradients / GIB:>11.2f}{row.optimizer / GIB:>11.2f}"
        lines.append(f"{name:<16}{sizes}  {row.player}".rstrip())
    total = [sum(getattr(row, key) for row in rows.values()) / GIB for key in ("weights", "gradients", "optimizer")]
    return [*lines, f"{'sum':<16}{total[0]:>10.2f}{total[1]:>11.2f}{total[2]:>11.2f}"]


def main(args: list[str] | None = None) -> None:
    """Prints the plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, action="append", help="recipe; may be given again")
    parser.add_argument("--memory", type=float, required=True, help="memory of one device in GiB")
    arguments, overrides = parser.parse_known_args(args)
    import_parts()
    configs = [word for file in arguments.config for word in ("--config", file)]
    method = Planned([NO_DATA, *configs, *overrides], run=False).build()
    players = method.players()
    rows = states_by_role(method, players)
    print("\n".join(table(rows)))
    turns = {player.name: gradient_bytes(rows, player.name) for player in players}
    name = max(turns, key=lambda key: turns[key])
    need = (sum(row.lasting for row in rows.values()) + turns[name]) / GIB
    fits = need <= arguments.memory
    print(f"states need {need:.2f} GiB of {arguments.memory:g} in the {name}'s turn: {'fit' if fits else 'do not fit'}")
    sys.exit(int(not fits))


if __name__ == "__main__":
    main()
