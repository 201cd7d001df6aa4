"""The options of ``tools/bench.py`` reach the players of every method."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from script import load_script

bench = load_script("bench")


def asked(**settings: Any) -> Namespace:
    return Namespace(**({"optimizer": "fused", "compile": False, "channels_last": False} | settings))


@pytest.mark.parametrize("name, fused, foreach", [("fused", True, None), ("foreach", None, True), ("loop", None, False)])
def test_how_adam_goes_through_the_parameters(name, fused, foreach):
    made = bench.optimization_of(asked(optimizer=name)).optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert (made.defaults["fused"], made.defaults["foreach"], made.defaults["lr"]) == (fused, foreach, 3e-4)


@pytest.mark.parametrize("option", ["compile", "channels_last"])
def test_options_are_the_recipes(option):
    made = bench.optimization_of(asked(**{option: True}))
    assert (made.compile, made.channels_last) == (option == "compile", option == "channels_last")


@pytest.mark.parametrize("method, players", [("consistency", 1), ("sid", 2), ("dmd2", 2)])
def test_all_players_are_given_them(method, players):
    optimization = bench.optimization_of(asked())
    assert [player.optimization for player in bench.METHODS[method](optimization).players()] == [optimization] * players
