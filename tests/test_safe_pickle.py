"""Network pickles are read as data: what is in them arrives, and whatever they ask for, nothing is executed."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from published_edm import CASES, EasyDict, Persistent, fill, module, network, shapes_of, write_network, write_pickle

from distill.safe_pickle import NAMES, PickledObject, read_pickle

ROOT = Path(__file__).parent.parent


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that every payload here would make."""
    return tmp_path / "executed"


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.parts = function, arguments

    def __reduce__(self) -> tuple:
        return self.parts


# --------------------------------------------------------------------------------------------------------- what arrives


@pytest.mark.parametrize("case", CASES)
def test_tensors_and_settings_arrive(case, tmp_path):
    content = read_pickle(write_network(tmp_path / "network.pkl", case))
    inner = content["ema"].state["_modules"]["unet" if case == "edm2" else "model"]
    found = inner.tensors()
    assert list(found) and set(found) == set(shapes_of(case))
    assert all(torch.equal(value, fill(key, shapes_of(case)[key])) for key, value in found.items())
    settings = inner.arguments
    assert all(settings[key] == value for key, value in CASES[case].items() if key != "model_type")
    assert inner.state["skip_scale"] == 0.5**0.5 and isinstance(inner.state["skip_scale"], float)
    assert content["loss_fn"].class_name == "EDMLoss" and content["loss_fn"].state == {"P_mean": -1.2}
    assert content["dataset_kwargs"]["path"] == "x.zip"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_views_keep_their_values(dtype, tmp_path):
    base = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = {"a": base, "b": base.T, "c": base[1:3, ::2], "d": base[0, 0], "e": base[:0]}
    part = module("Part", {})
    part.persistent_state["_buffers"] = OrderedDict(tensors)
    found = read_pickle(write_pickle(tmp_path / "x.pkl", part)).tensors()
    for key, value in tensors.items():
        assert found[key].dtype == dtype and found[key].shape == value.shape and torch.equal(found[key], value)


def test_numbers_of_numpy_arrive_and_arrays_are_inert(tmp_path):
    values = [numpy.float64(0.3), numpy.float32(0.5), numpy.int64(-7), numpy.bool_(True)]
    content = read_pickle(write_pickle(tmp_path / "x.pkl", [*values, numpy.ones(3)]))
    assert content[:4] == [0.3, 0.5, -7, True] and [type(value) for value in content[:4]] == [float, float, int, bool]
    assert isinstance(content[4], PickledObject)


def test_buffers_that_are_not_persistent_are_left_out(tmp_path):
    part = module("Part", {"a": torch.ones(2), "freqs": torch.ones(2), "phases": torch.ones(2)})
    part.persistent_state["_non_persistent_buffers_set"].add("phases")
    assert set(read_pickle(write_pickle(tmp_path / "x.pkl", part)).tensors()) == {"a", "freqs"}


def test_arguments_that_were_not_recorded_are_an_error(tmp_path):
    part = module("Part", {})
    part.persistent_state["_init_args"] = (16,)
    with pytest.raises(ValueError, match="Part was pickled without the keywords"):
        read_pickle(write_pickle(tmp_path / "x.pkl", part)).arguments


# -------------------------------------------------------------------------------------------------- nothing is executed


def test_source_code_is_not_executed(tmp_path, marker):
    source = f"open({str(marker)!r}, 'w').close()"
    part = network("adm")
    part.source = source
    content = read_pickle(write_pickle(tmp_path / "x.pkl", {"ema": part, "loss_fn": Persistent("Loss", {}, source)}))
    assert content["ema"].class_name == "EDMPrecond" and not marker.exists()


def payloads(marker: Path) -> dict[str, tuple[Any, str]]:
    """Objects whose unpickling makes the marker, and the name that is to be refused."""
    touch = f"open({str(marker)!r}, 'w').close()"
    command = f"touch {marker}"
    return {
        "os.system": (Call(os.system, command), f"{os.system.__module__}.system"),
        "eval": (Call(builtins.eval, touch), "builtins.eval"),
        "exec": (Call(builtins.exec, touch), "builtins.exec"),
        "open": (Call(builtins.open, str(marker), "w"), "open"),
        "getattr": (Call(builtins.getattr, OrderedDict, "fromkeys"), "builtins.getattr"),
        "Popen": (Call(subprocess.Popen, ["touch", str(marker)]), "subprocess.Popen"),
        "import": (Call(builtins.__import__, "antigravity"), "builtins.__import__"),
        "torch.load": (Call(torch.load, "elsewhere"), "torch.serialization.load"),
        "pickle.loads": (Call(pickle.loads, pickle.dumps(Call(os.system, command))), "_pickle.loads"),
    }


@pytest.mark.parametrize("name", payloads(Path("x")))
@pytest.mark.parametrize("place", ["alone", "state", "tensor"])
def test_other_calls_are_refused_by_name(name, place, tmp_path, marker):
    payload, refused = payloads(marker)[name]
    holder = module("Part", {"a": torch.ones(1)})
    if place == "state":
        holder.persistent_state["_init_kwargs"] = {"payload": payload}
    elif place == "tensor":
        holder.persistent_state["_parameters"]["payload"] = payload
    path = write_pickle(tmp_path / "x.pkl", payload if place == "alone" else {"ema": holder})
    with pytest.raises(ValueError, match=rf"refused, and nothing in it was executed.*{refused}"):
        read_pickle(path)
    assert not marker.exists()


def storage_call(content: bytes) -> Call:
    return Call(torch.storage._load_from_bytes, content)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["pickle", "legacy", "zip"])
def test_a_pickle_within_the_storage_of_a_tensor_is_not_executed(form, tmp_path, marker):
    payload = Call(os.system, f"touch {marker}")
    if form == "pickle":
        content = pickle.dumps(payload)
    else:
        stream = io.BytesIO()
        torch.save(payload, stream, _use_new_zipfile_serialization=form == "zip")
        content = stream.getvalue()
    with pytest.raises(ValueError, match="refused"):
        read_pickle(write_pickle(tmp_path / "x.pkl", storage_call(content)))
    assert not marker.exists()
    # It is a real one: elsewhere it would have been.
    pickle.loads(content) if form == "pickle" else torch.load(io.BytesIO(content), weights_only=False)
    assert marker.exists()


def test_a_storage_that_is_none_is_refused(tmp_path):
    stream = io.BytesIO()
    torch.save({"a": 1}, stream)
    with pytest.raises(ValueError, match="a dict where a tensor's storage should be"):
        read_pickle(write_pickle(tmp_path / "x.pkl", storage_call(stream.getvalue())))


@pytest.mark.parametrize(
    "change", [(30, (2,), (1,)), (0, (2, 99), (99, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (-2,), (1,))]
)
def test_tensors_beyond_their_storage_are_refused(change, tmp_path):
    """Their values would be other parts of memory."""
    rebuild = Call(torch._utils._rebuild_tensor_v2, torch.ones(8)._typed_storage(), *change, False, OrderedDict())
    with pytest.raises(ValueError, match="refused"):
        read_pickle(write_pickle(tmp_path / "x.pkl", rebuild))


OPCODES = {
    "function": (b"ctorch._utils\n_rebuild_parameter\n", "it sets the state of a tensor or a function"),
    "class": (b"cdnnlib.util\nEasyDict\n", "'state'"),
    "module": (b"ctorch.nn.modules.linear\nLinear\n", "'state'"),
    "dict": (b"ccollections\nOrderedDict\n", "mappingproxy|immutable type"),
    "tensor": (pickle.dumps(torch.ones(2), protocol=4)[:-1], "it sets the state of a tensor or a function"),
    "storage": (pickle.dumps(torch.ones(2)._typed_storage(), protocol=4)[:-1], "it sets the state of a tensor or a function"),
}


@pytest.mark.parametrize("kind", OPCODES)
@pytest.mark.parametrize("state", [{"__call__": 1}, (None, {"__setstate__": 1})])
def test_what_stands_for_functions_classes_and_tensors_cannot_be_changed(kind, state, tmp_path):
    """BUILD on them: the opcode that sets attributes of what is on the stack."""
    begin, words = OPCODES[kind]
    before = {key: dict(vars(value)) if isinstance(value, type) else value for key, value in NAMES.items()}
    (tmp_path / "x.pkl").write_bytes(begin + pickle.dumps(state, protocol=2)[2:-1] + b"b.")
    with pytest.raises(ValueError, match=f"refused.*({words})"):
        read_pickle(tmp_path / "x.pkl")
    assert before == {key: dict(vars(value)) if isinstance(value, type) else value for key, value in NAMES.items()}


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04", pickle.dumps({"a": 1})[:-3], b"\x80\x04Pabc\n."])
def test_what_is_no_pickle_is_said_to_be_none(content, tmp_path):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="refused"):
        read_pickle(tmp_path / "x.pkl")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="path='.*none.pkl'"):
        read_pickle(tmp_path / "none.pkl")


def test_nothing_is_imported(tmp_path):
    """Neither the modules that a pickle names nor those of its source code; in a process of its own."""
    write_network(tmp_path / "network.pkl", "adm")
    program = (
        "import sys; from distill.safe_pickle import read_pickle; before = set(sys.modules); "
        f"read_pickle({str(tmp_path / 'network.pkl')!r}); new = {{name.split('.')[0] for name in set(sys.modules) - before}}; "
        "assert not new & {'dnnlib', 'torch_utils', 'training'}, new"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_easy_dicts_are_dicts(tmp_path):
    assert read_pickle(write_pickle(tmp_path / "x.pkl", EasyDict(a=EasyDict(b=2)))) == {"a": {"b": 2}}
