"""Turns what jsonargparse says of a wrong config into one line that names the key, the value and the remedy.

jsonargparse reports a wrong value in the words of its type checks, nested as deep as the config is and with every alternative
that did not fit. What a person needs is in there: the path of keys, the value, and what would have been right.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse._util import import_object

LISTED = 40
"""So many names are listed in full: all methods, for one, fit on a screen."""
HELP = "--print_config shows every key, --print_config=comments also what it means"
UNKNOWN_KEY = (r"[Oo]ption '([^']+)'", r"unrecognized arguments: (?:--)?([^=\s]+)", r"Unexpected keys?: (\S+)")
UNKNOWN_CLASS = (
    r"import path string: (\S+)",
    r"given class_path '([^']+)':\s+(?:No module named|module '[^']+' has no attribute)",
    r"Import path (\S* ?)does not correspond to a subclass",
)


def explain(message: str, parser: ArgumentParser) -> str:
    """One line for the ``message`` of a parser's error, made of ``key=value: what is wrong; remedy``."""
    path = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    if unknown := _first(UNKNOWN_KEY, message):
        group = re.search(r"Group '([^']+)' does not", message)
        key = ".".join(part for part in (path, group and group[1], unknown[1]) if part)
        while not (known := sorted(_keys_at(key.rpartition(".")[0], message, parser))):
            key = key.rpartition(".")[0]
        return f"{key}: there is no such key; {_suggest(key.rpartition('.')[2], known)}"
    if unknown := _first(UNKNOWN_CLASS, message):
        name = unknown[1].strip() or _given_value(message)
        known = sorted({cls.__name__ for base in _classes_at(path, message, parser) for cls in _concrete(base)})
        return f"{path}={name}: there is no such class of that kind; {_suggest(name.rpartition('.')[2], known)}"
    expected = [_plain(text) for text in re.findall(r"Expected (?:an? )?(.+?)(?:\. Got value: .*)?$", message, re.M)]
    expected = [text for text in dict.fromkeys(expected) if text != "None" and not text.startswith("path but")]
    if path and expected:
        return f"{path}={_given_value(message)}: not accepted; give {' or '.join(expected)}"
    if required := re.search(r"arguments are required: (.*)", message):
        keys = ", ".join(".".join([*filter(None, [path]), key.strip()]) for key in required[1].split(","))
        return f"{keys}: required and not given; state it in a file given by --config, or on the command line; {HELP}"
    return f"{' '.join(message.split())}; {HELP}"


def _first(patterns: tuple[str, ...], message: str) -> re.Match | None:
    return next((found for pattern in patterns if (found := re.search(pattern, message))), None)


def _keys_at(path: str, message: str, parser: ArgumentParser) -> set[str]:
    """The names that are accepted below the key ``path``."""
    if owners := _owners(message):
        rest = path.removeprefix(".".join(re.findall(r'Parser key "([^"]+)"', message))).strip(".")
        found = [owners[-1]] if not rest else _argument_classes(owners[-1], rest)
        return {name for cls in found for name in inspect.signature(cls).parameters}
    prefix = f"{path}." if path else ""
    keys = {action.dest.removeprefix(prefix) for action in parser._actions if action.dest.startswith(prefix)}
    return {key.partition(".")[0] for key in keys} - {"help", ""}


def _classes_at(path: str, message: str, parser: ArgumentParser) -> list[type]:
    """The classes of which the value at the key ``path`` must be."""
    if owners := _owners(message):
        return _argument_classes(owners[-1], re.findall(r'Parser key "([^"]+)"', message)[-1])
    hints = [getattr(action, "_typehint", None) for action in parser._actions if action.dest == path]
    return [cls for hint in hints for cls in _classes_of(hint)]


def _owners(message: str) -> list[type]:
    """The classes whose arguments are in question, from the outermost inwards."""
    owners = []
    for class_path in re.findall(r"given class_path '([^']+)'", message):
        try:
            owners.append(import_object(class_path))
        except (ImportError, AttributeError, ValueError):
            break
    return owners


def _argument_classes(owner: type, path: str) -> list[type]:
    """The classes in the type of an argument; ``a.b`` is argument b of the class of argument a."""
    found = [owner]
    for name in path.split("."):
        hints = [typing.get_type_hints(cls.__init__).get(name) for cls in found]  # type: ignore[misc]
        found = [cls for hint in hints for cls in _classes_of(hint)]
    return found


def _classes_of(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and hint.__module__ != "builtins" and not typing.get_args(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _classes_of(part)


def _concrete(base: type) -> Iterator[type]:
    """``base`` and its subclasses that a config may name; not the whole of torch for ``nn.Module``."""
    elsewhere = base.__module__.startswith(("builtins", "torch", "pytorch_lightning", "lightning_fabric"))
    if not (inspect.isabstract(base) or elsewhere or base.__name__.startswith("_")):
        yield base
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        yield from _concrete(subclass)


def _suggest(word: str, candidates: list[str]) -> str:
    near = [name for name in candidates if word and name.startswith(word)] or get_close_matches(word, candidates, 1)
    known = f"known: {', '.join(candidates)}" if 0 < len(candidates) <= LISTED else HELP
    return f"did you mean {near[0]}? ({known})" if near else known


def _plain(text: str) -> str:
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", lambda found: found[1].replace("NoneType", "None"), text)
    return re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", text)


def _given_value(message: str) -> str:
    """The value that was refused, as it was given."""
    given = re.findall(r"Got value: (.+)$", message, re.M) or re.findall(r"Given value: (.+)$", message, re.M) or ["?"]
    nested = re.search(r"NestedArg\(key='[^']*', val=(.*)\)", given[-1])
    return nested[1].strip("'") if nested else given[-1]
