"""Untrusted checkpoints of the papers: invalid bytes are refused, without any side effect."""

from __future__ import annotations

import pickle
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden_dreamerv3 import GOLDEN, OBS_SHAPES, golden

from worldflux.errors import CheckpointError, ConfigurationError, WorldFluxError, a_type
from worldflux.interop import load_official_dreamerv3, load_official_tdmpc2

AGENT = next((GOLDEN / "dreamerv3_proprio_official" / "ckpt").glob("*/agent.pkl"))
PRESENT = GOLDEN / "tdmpc2_state_official.pt"
MARK = pickle.MARK


def load_dreamerv3(source: Any, **changes: Any) -> Any:
    return load_official_dreamerv3(source, **{"obs_shape": OBS_SHAPES["proprio"], "action_dim": 3, **changes})


def load_tdmpc2(source: Any, **changes: Any) -> Any:
    return load_official_tdmpc2(source, **{"obs_shape": (9,), "action_dim": 3, **changes})


# Pickles, written opcode by opcode


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def name(value: str) -> bytes:
    module, _, last = value.rpartition(".")
    return text(module) + text(last) + pickle.STACK_GLOBAL


def data(value: bytes) -> bytes:
    return pickle.BINBYTES + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def several(*items: bytes) -> bytes:
    return MARK + b"".join(items) + pickle.TUPLE


NONE, FALSE, TRUE = pickle.NONE, pickle.NEWFALSE, pickle.NEWTRUE
RECONSTRUCT = name("numpy._core.multiarray._reconstruct")
RECONSTRUCT += several(name("numpy.ndarray"), several(number(0)), data(b"b")) + pickle.REDUCE


def dtype(code: bytes = text("f4"), order: bytes = text("<"), flags: int = 0, rest: bytes = NONE * 3) -> bytes:
    made = name("numpy.dtype") + several(code, FALSE, TRUE) + pickle.REDUCE
    return made + several(number(3), order, rest, number(-1), number(-1), number(flags)) + pickle.BUILD


def array(shape: bytes, kind: bytes = b"", content: bytes = b"") -> bytes:
    state = several(number(1), shape, kind or dtype(), FALSE, content or data(b"\0" * 4))
    return RECONSTRUCT + state + pickle.BUILD


def buffer(*arguments: bytes) -> bytes:
    return name("numpy._core.numeric._frombuffer") + several(*arguments) + pickle.REDUCE


def params(*pairs: bytes) -> bytes:
    """A pickle with these keys and values as its parameters."""
    inner = pickle.EMPTY_DICT + MARK + b"".join(pairs) + pickle.SETITEMS
    return b"\x80\x05" + pickle.EMPTY_DICT + text("params") + inner + pickle.SETITEM + pickle.STOP


def one(value: bytes) -> bytes:
    return params(text("a"), value)


def doubled(times: int) -> bytes:
    """A tuple that contains another one twice, which contains another one twice, and so on, `times` levels deep."""
    return pickle.EMPTY_TUPLE + (pickle.BINPUT + b"\0" + pickle.BINGET + b"\0" + pickle.TUPLE2) * times


FORGED = name("numpy.dtype") + several(text("V8"), FALSE, TRUE) + pickle.REDUCE
FORGED += several(number(3), text("|"), NONE, several(text("a")), NONE, number(8), number(1), number(0)) + pickle.BUILD

KEPT = array(several(number(1000)), content=data(b"\0" * 4000) + pickle.BINPUT + b"\1")
AGAIN = array(several(number(1000)), content=pickle.BINGET + b"\1")

FOREIGN = (
    pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.BINPERSID, pickle.INST, pickle.OBJ,
    pickle.NEWOBJ_EX, pickle.DUP, pickle.POP, pickle.POP_MARK, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
    pickle.EMPTY_SET, pickle.FROZENSET, pickle.ADDITEMS, pickle.INT, pickle.LONG, pickle.FLOAT, pickle.STRING,
    pickle.UNICODE, pickle.PUT, pickle.GET, pickle.LIST, pickle.DICT, b"\xff", b"\0",
)  # fmt: skip
HUNGRY = (
    pickle.MEMOIZE, pickle.BINPUT, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND,
    pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD,
)  # fmt: skip

CALLABLES = ("builtins.eval", "builtins.getattr", "os.system", "numpy.load", "numpy.ctypeslib.load_library")

HOSTILE = {
    **{called: (b"\x80\x04" + name(called) + b".", f"refers to {called}.*could run code") for called in CALLABLES},
    "an old name": (b"cos\nsystem\n.", "refers to os.system"),
    "an empty file": (b"", "ends too early"),
    "no pickle": (b"not a pickle", "opcode"),
    "a number for an array": (params(text("a"), number(1)), "no mapping 'params'"),
    "flags that deny Python objects": (one(array(several(number(1)), FORGED, data(b"A" * 8))), "something else than"),
    "a function's defaults": (
        b"\x80\x04"
        + name("numpy._core.numeric._frombuffer")
        + several(NONE, pickle.EMPTY_DICT + text("__defaults__") + pickle.EMPTY_TUPLE + pickle.SETITEM)
        + pickle.BUILD
        + b".",
        "changes a Name",
    ),
    "the constructor of arrays": (
        one(name("numpy.ndarray") + several(several(number(10**9))) + pickle.REDUCE),
        "calls a Name",
    ),
    "a function from the memo": (one(number(1) + pickle.EMPTY_TUPLE + pickle.REDUCE), "calls an int"),
    "4 GB of bytes": (b"\x80\x04B\xff\xff\xff\xff.", "claims 4,294,967,295 bytes where 1 are left"),
    "2**63 bytes": (b"\x80\x05" + pickle.BYTEARRAY8 + b"\0" * 7 + b"\x80.", "claims 9,223,372,036,854,775,808 bytes"),
    "a text of 4 GB": (b"\x80\x04X\xff\xff\xff\xff.", "a text of 4,294,967,295 bytes"),
    "a text that is none": (b"\x80\x04\x8c\x01\xff.", "cannot be loaded"),
    "a number of 2 GB": (b"\x80\x04" + pickle.LONG4 + b"\xff\xff\xff\x7f.", "opcode"),
    "a large place in the memo": (b"\x80\x04}r\xff\xff\xff\xff.", "no mapping 'params'"),
    "a place in the memo that is empty": (b"\x80\x04j\xff\xff\xff\xff.", "KeyError"),
    "an endless name": (b"\x80\x04c" + b"a" * 10_000, "a name without an end"),
    "too many steps": (b"\x80\x04" + b"N" * 600_000 + b".", "more than 500,000 steps"),
    "no end": (b"\x80\x04}", "ends too early"),
    "nothing but the end": (b".", "cannot be loaded"),
    "a name of no text": (b"\x80\x04" + doubled(60) + text("a") + pickle.STACK_GLOBAL + b".", "without a name"),
    "a tuple as key": (params(doubled(60), NONE), "keys that are no names"),
    "numbers as keys": (params(number(1), NONE), "keys that are no names"),
    "a list as key": (params(pickle.EMPTY_LIST, NONE), "keys that are no names"),
    "a key without a value": (params(text("a")), "keys that are no names"),
    "tuples 100,000 deep": (one(pickle.EMPTY_TUPLE + pickle.TUPLE1 * 100_000), "no mapping 'params'"),
    "a mapping within itself": (b"\x80\x04}q\0" + text("params") + b"h\0s.", "no mapping 'params'"),
    "a list within itself": (b"\x80\x04]q\0h\0a.", "no mapping 'params'"),
    "no mapping": (b"\x80\x04].", "no mapping 'params'"),
    "a shape of numbers beyond 64 bits": (one(array(several(number(2**70), number(0)))), "whole numbers from 1 on"),
    "a shape of 2**70 in all": (one(array(several(number(2**35), number(2**35)))), "other bytes than it needs"),
    "a negative shape": (one(array(several(number(-1), number(-1)))), "whole numbers from 1 on"),
    "a shape of truths": (one(array(several(TRUE))), "whole numbers from 1 on"),
    "a shape of nine axes": (one(array(several(*[number(1)] * 9))), "no tuple of up to 8"),
    "a shape that is none": (one(array(number(1))), "no tuple of up to 8"),
    "an empty array": (one(array(several(number(0)), content=data(b""))), "whole numbers from 1 on"),
    "too few bytes": (one(array(several(number(2)))), "other bytes than it needs"),
    "text for bytes": (one(array(several(number(1)), content=text("abcd"))), "other bytes than it needs"),
    "an array for bytes": (
        one(array(several(number(1)), content=array(several(number(1))))),
        "other bytes than it needs",
    ),
    "a list for bytes": (one(array(several(number(1)), content=pickle.EMPTY_LIST)), "other bytes than it needs"),
    "no state": (one(RECONSTRUCT), "an array without a type"),
    "another state": (one(RECONSTRUCT + NONE + pickle.BUILD), "an unknown form"),
    "objects": (one(array(several(number(1)), dtype(text("O8"), text("|"), 63))), "Python objects"),
    "complex numbers": (one(array(several(number(1)), dtype(text("c8")), data(b"\0" * 8))), "no numbers"),
    "text": (one(array(several(number(1)), dtype(text("U1")))), "no numbers"),
    "times": (one(array(several(number(1)), dtype(text("M8")), data(b"\0" * 8))), "no numbers"),
    "a type of a type": (one(array(several(number(1)), dtype(dtype()))), "no numbers"),
    "a type of fields": (one(array(several(number(1)), dtype(text("f4,f4")))), "no numbers"),
    "a type with a subtype": (
        one(array(several(number(1)), dtype(rest=several(NONE) + NONE * 2))),
        "something else than",
    ),
    "an unknown order of bytes": (one(array(several(number(1)), dtype(order=text("?")))), "no numbers"),
    "an unknown order of axes": (one(buffer(data(b"\0" * 4), dtype(), several(number(1)), text("A"))), "unknown order"),
    "axes without an order": (one(buffer(data(b"\0" * 4), dtype(), several(number(1)), text("K"))), "unknown order"),
    "an axis twice": (
        one(buffer(data(b"\0" * 4), dtype(), several(number(1), number(1)), text("K"), several(number(0), number(0)))),
        "axes are in no order",
    ),
    "too many arguments": (one(buffer(*[NONE] * 9)), "TypeError"),
    "too few arguments": (one(buffer()), "TypeError"),
    "arguments that are no tuple": (one(name("numpy.dtype") + pickle.EMPTY_LIST + pickle.REDUCE), "calls a Name"),
    "the same bytes a hundred times": (
        params(text("a") + KEPT, *[text(f"b{i}") + AGAIN for i in range(99)]),
        "its arrays claim 400,000",
    ),
    **{
        f"the opcode {opcode!r}": (b"\x80\x04}" * 3 + opcode + b"\1\0\0\0\0\0\0\0\n\n.", "opcode") for opcode in FOREIGN
    },
    **{
        f"nothing for the opcode {opcode!r}": (b"\x80\x04" + opcode + b"\0\0\0\0.", "cannot be loaded")
        for opcode in HUNGRY
    },
}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The memory of Python and NumPy stays below a few megabytes."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused_and_leave_nothing_behind(case: str, tmp_path: Path, little_memory: None) -> None:
    content, message = HOSTILE[case]
    (tmp_path / "agent.pkl").write_bytes(content)
    started = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_dreamerv3(tmp_path / "agent.pkl")
    assert time.process_time() - started < 10
    assert "agent.pkl" in str(caught.value) and len(str(caught.value)) < 600
    rows = np.arange(6).reshape(2, 3)
    assert pickle.loads(pickle.dumps(rows, protocol=5)).tolist() == rows.tolist()


# What NumPy writes is read


def stored(value: Any, protocol: int, tmp_path: Path) -> Any:
    """A parameter of an otherwise valid checkpoint, written in the given form."""
    arrays = dict(golden("proprio").under("p/"))
    arrays["enc/mlp0/kernel"] = value(arrays["enc/mlp0/kernel"])
    (tmp_path / "agent.pkl").write_bytes(pickle.dumps({"params": arrays, "counters": {"updates": 3}}, protocol))
    return load_dreamerv3(tmp_path).encoder.mlp.linears[0].weight.detach().numpy().T


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        np.asfortranarray,
        lambda x: np.concatenate([x, x], 1)[:, : x.shape[1]],
        lambda x: x.astype(">f4"),
        lambda x: x.astype("f8"),
        lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    ],
    ids=["rows first", "columns first", "with gaps", "other byte order", "double", "read-only"],
)
def test_arrays_are_read_in_every_form_that_numpy_writes(form: Any, protocol: int, tmp_path: Path) -> None:
    expected = golden("proprio").under("p/")["enc/mlp0/kernel"]
    np.testing.assert_array_equal(stored(form, protocol, tmp_path), expected)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_axes_in_any_order_and_single_numbers_are_read(protocol: int, tmp_path: Path) -> None:
    arrays = dict(golden("proprio").under("p/"))
    kernel = arrays["dyn/dynhid0/kernel"]
    arrays["dyn/dynhid0/kernel"] = np.ascontiguousarray(kernel.transpose(1, 0, 2)).transpose(1, 0, 2)
    arrays["retnorm/lo/value"] = np.float32(-1.5)
    (tmp_path / "agent.pkl").write_bytes(pickle.dumps({"params": arrays}, protocol))
    model = load_dreamerv3(tmp_path)
    np.testing.assert_array_equal(model.rssm.hidden.weight.detach().numpy(), kernel)
    assert float(model.return_low) == -1.5


# Parameters that no DreamerV3 has


def zeros(*shape: int, kind: Any = np.float32) -> Any:
    return np.zeros(shape, kind)


WRONG_ARRAYS: dict[str, tuple[dict[Any, Any], str]] = {
    "two dimensions of three": ({"dyn/dynhid0/kernel": zeros(8, 8)}, "dyn/dynhid0/kernel has shape .8, 8., expected 3"),
    "one dimension of two": ({"dyn/obslogit/kernel": zeros(8)}, "dyn/obslogit/kernel has shape"),
    "no dimension": ({"rew/head/logits/bias": zeros()}, "rew/head/logits/bias has shape"),
    "five dimensions": ({"enc/mlp0/kernel": zeros(1, 1, 1, 1, 1)}, "expected 2 to 4 dimensions"),
    "no numbers": ({"dyn/obslogit/kernel": zeros(4, 0)}, "dimensions of at least 1"),
    "no blocks": ({"dyn/dynhid0/kernel": zeros(0, 0, 0)}, "dimensions of at least 1"),
    "narrow blocks": ({"dyn/dynhid0/kernel": zeros(8, 1, 8)}, "do not form a valid DreamerV3"),
    "a wide layer": ({"rew/mlp/linear0/kernel": zeros(1, 300_000)}, "has shape"),
    "wide blocks": ({"dyn/dynhid0/kernel": zeros(1, 3_000_000, 1)}, "do not form a valid DreamerV3|has shape"),
    "another kernel": ({"rew/head/logits/scale": zeros(3)}, "has 'reward_head.out.scale' that this model lacks"),
    "two numbers for one": ({"retnorm/lo/value": zeros(2)}, "retnorm/lo/value has shape"),
    "part of a vector's head": ({"dec/vec/more/pred/kernel": zeros(3, 3)}, "The checkpoint cannot be loaded"),
    "complex numbers": ({"enc/mlp0/kernel": zeros(2, 2, kind=complex)}, "expected real numbers"),
    "objects": ({"enc/mlp0/kernel": np.array([None])}, "expected real numbers"),
    "text": ({"enc/mlp0/kernel": "text"}, "expected real numbers"),
    "uneven rows": ({"enc/mlp0/kernel": [[1.0], [1.0, 2.0]]}, "cannot be loaded"),
    "a name that is none": ({3: zeros(2)}, "under an int"),
    "NaN": ({"enc/mlp0/bias": np.full(24, np.nan)}, "'encoder.mlp.linears.0.bias' has 24 of 24 values"),
    "infinity": ({"retnorm/hi/value": np.array(np.inf)}, "'return_high' has 1 of 1 values"),
    "infinite in 32 bits": ({"retnorm/hi/value": np.array(1e300)}, "'return_high' has 1 of 1 values"),
}


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_parameters_that_no_dreamerv3_has_are_named(case: str) -> None:
    changes, message = WRONG_ARRAYS[case]
    obs_shape = (11,) if "vector" in case else OBS_SHAPES["proprio"]
    with pytest.raises(CheckpointError, match=message):
        load_dreamerv3({**golden("proprio").under("p/"), **changes}, obs_shape=obs_shape)


@pytest.mark.parametrize(
    "arguments",
    [
        {"obs_shape": "text"},
        {"obs_shape": (0,)},
        {"action_dim": 0},
        {"action_type": "continous"},
        {"stoch_discrete": 0},
        {"stoch_discrete": 2.5},
    ],
)
def test_wrong_arguments_are_configuration_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        load_dreamerv3(AGENT, **arguments)
    if "action_dim" in arguments or "obs_shape" in arguments:
        with pytest.raises(ConfigurationError, match=next(iter(arguments))):
            load_tdmpc2(PRESENT, **arguments)


@pytest.mark.parametrize("source", [None, 3, [b"agent.pkl"]])
def test_what_is_neither_a_path_nor_parameters_is_refused(source: Any) -> None:
    for load in (load_dreamerv3, load_tdmpc2):
        with pytest.raises(WorldFluxError, match=rf"is {a_type(source)}, expected a path"):
            load(source)


@pytest.mark.parametrize("latest", [b"", b"..", b"../..", b"\xff\xfe", b"a\0b", b"long" * 100_000, None])
def test_whatever_the_file_of_the_newest_checkpoint_is(latest: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "agent.pkl").write_bytes(AGENT.read_bytes())
    (tmp_path / "ckpt").mkdir()
    if latest is None:
        (tmp_path / "ckpt" / "latest").mkdir()
        load_dreamerv3(tmp_path)
        return
    (tmp_path / "ckpt" / "latest").write_bytes(latest)
    with pytest.raises(CheckpointError, match=r"latest|has no agent\.pkl|File name too long"):
        load_dreamerv3(tmp_path)


# TD-MPC2


def parameters() -> dict[str, Any]:
    return dict(torch.load(PRESENT, weights_only=True)["model"])


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.qint8)


WRONG_TENSORS: dict[str, tuple[dict[Any, Callable[[], Any]], str]] = {
    "sparse": ({"_pi.0.bias": lambda: torch.zeros(3).to_sparse()}, "_pi.0.bias is sparse"),
    "quantised": ({"_pi.0.weight": quantised}, "_pi.0.weight is sparse, quantised"),
    "meta": ({"_pi.0.bias": lambda: torch.zeros(56, device="meta")}, "_pi.0.bias has a shape and no numbers"),
    "complex": ({"_pi.0.bias": lambda: torch.zeros(56, dtype=torch.complex64)}, "complex numbers"),
    "repeated": ({"_pi.0.bias": lambda: torch.zeros(1).expand(56)}, "repeat"),
    "repeated hugely": ({"_dynamics.0.weight": lambda: torch.zeros(1).expand(20_000, 20_000)}, "repeat"),
    "empty": ({"_pi.0.bias": lambda: torch.zeros(0)}, "empty|whole numbers from 1"),
    "one dimension of two": ({"_dynamics.0.weight": lambda: torch.zeros(4)}, "expected 2 dimensions"),
    "no dimension": ({"_detach_Qs_params.0.weight": lambda: torch.zeros(())}, "expected 3 dimensions"),
    "a wide layer": ({"_detach_Qs_params.2.weight": lambda: torch.zeros(1, 3, 200_000)}, "has shape"),
    "a million tasks": ({"_task_emb.weight": lambda: torch.zeros(1_000_000, 1)}, "1,000,000 tasks"),
    "masks that are NaN": (
        {"_task_emb.weight": lambda: torch.zeros(2, 4), "_action_masks": lambda: torch.full((2, 3), torch.nan)},
        "cannot be loaded",
    ),
    "masks that are infinite": (
        {"_task_emb.weight": lambda: torch.zeros(2, 4), "_action_masks": lambda: torch.full((2, 3), torch.inf)},
        "cannot be loaded",
    ),
    "a layer far away": (
        {"_dynamics.999999.weight": lambda: torch.zeros(8, 8)},
        "has 'dynamics.layers.999999.weight' that this model lacks",
    ),
    "a layer without end": ({f"_Qs.params.{'9' * 5000}": lambda: torch.zeros(8, 8)}, None),
    "other digits": ({"_dynamics.٣.weight": lambda: torch.zeros(8, 8)}, None),
    "two smallest deviations": ({"log_std_min": lambda: torch.zeros(2)}, "cannot be loaded"),
    "a deviation that is NaN": ({"log_std_min": lambda: torch.tensor(torch.nan)}, "do not form a valid TD-MPC2"),
    "NaN": ({"_pi.0.bias": lambda: torch.full((56,), torch.nan)}, "'actor.layers.0.bias' has 56 of 56 values"),
    "infinite in 32 bits": (
        {"_pi.0.bias": lambda: torch.full((56,), 1e300, dtype=torch.float64)},
        "has 56 of 56 values",
    ),
}


@pytest.mark.parametrize("stored", [False, True], ids=["given", "from a file"])
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_no_tdmpc2_has_are_named(case: str, stored: bool, tmp_path: Path) -> None:
    makers, message = WRONG_TENSORS[case]
    source: Any = {**parameters(), **{name: make() for name, make in makers.items()}}
    if stored:
        torch.save({"model": source}, tmp_path / "model.pt")
        source = tmp_path / "model.pt"
        if case in ("sparse", "quantised", "meta", "complex"):
            message = "could run code"  # nothing but dense numbers is built
    if case == "a layer without end" and stored:
        message = "a text of 5,011 bytes"
    if message is None:  # a name that means nothing
        load_tdmpc2(source)
        return
    with pytest.raises(CheckpointError, match=message):
        load_tdmpc2(source)


def rewritten(change: Callable[[str, bytes], bytes | None], tmp_path: Path, **options: Any) -> Path:
    """The checkpoint with changed members. A member is left out if the change returns None."""
    with zipfile.ZipFile(PRESENT) as old, zipfile.ZipFile(tmp_path / "model.pt", "w", **options) as new:
        for member in old.namelist():
            content = change(member, old.read(member))
            if content is not None:
                new.writestr(member, content)
    return tmp_path / "model.pt"


def only(ending: str, content: Any) -> Callable[[str, bytes], Any]:
    return lambda member, old: (content(old) if callable(content) else content) if member.endswith(ending) else old


HOSTILE_ARCHIVES: dict[str, tuple[Callable[[str, bytes], Any], dict[str, Any], str]] = {
    "compressed": (lambda member, old: old, {"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
    "without its pickle": (only("data.pkl", None), {}, "no data.pkl"),
    "without numbers": (only("data/7", None), {}, "numbers that it does not have"),
    "with fewer numbers": (only("data/7", lambda old: old[:-4]), {}, "numbers that it does not have"),
    "of the other byte order": (only("byteorder", b"big"), {}, "another order of bytes"),
    "that claims more numbers": (
        only("data.pkl", lambda old: old.replace(b"M\xb0\x01", b"J\xff\xff\xff\x7f")),
        {},
        "2,147,483,647 numbers",
    ),
    "with another function": (
        only("data.pkl", lambda old: old.replace(b"ctorch\nSize", b"cos\nsystem")),
        {},
        "refers to os.system",
    ),
    "with a long name": (only("data.pkl", b"\x80\x02X\xff\xff\xff\x00."), {}, "a text of 16,777,215 bytes"),
    "without tensors": (only("data.pkl", b"\x80\x02}."), {}, "no mapping of names to tensors"),
    "with a reference to nothing": (only("data.pkl", b"\x80\x02NQ."), {}, "something else than numbers"),
    "with a bytearray": (
        only("data.pkl", b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
        {},
        "bytearray",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_ARCHIVES)
def test_hostile_archives_are_refused(case: str, tmp_path: Path, little_memory: None) -> None:
    change, options, message = HOSTILE_ARCHIVES[case]
    with pytest.raises(CheckpointError, match=message):
        load_tdmpc2(rewritten(change, tmp_path, **options))


def test_a_damaged_number_is_found_by_its_checksum(tmp_path: Path) -> None:
    content = bytearray(PRESENT.read_bytes())
    weight = parameters()["_dynamics.1.weight"].numpy().tobytes()
    content[content.index(weight) + 100] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="CRC"):
        load_tdmpc2(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "form",
    [
        lambda x: torch.nn.Parameter(x),
        lambda x: x.t().contiguous().t() if x.ndim == 2 else x,
        lambda x: torch.cat([torch.zeros(3), x.flatten()])[3:].view(x.shape),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.double(),
    ],
    ids=["parameters", "columns first", "views", "with gaps", "double"],
)
def test_tensors_are_read_in_every_form_that_torch_writes(form: Any, tmp_path: Path) -> None:
    torch.save({"model": {k: form(v) if v.ndim else v for k, v in tensors().items()}}, tmp_path / "model.pt")
    expected = load_tdmpc2(PRESENT).state_dict()
    for key, value in load_tdmpc2(tmp_path / "model.pt").state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_halves_are_read_as_they_are(kind: torch.dtype, tmp_path: Path) -> None:
    torch.save({"model": {k: v.to(kind) for k, v in tensors().items()}}, tmp_path / "model.pt")
    weight = load_tdmpc2(tmp_path / "model.pt").dynamics.layers[0].weight
    assert torch.equal(weight, parameters()["_dynamics.0.weight"].to(kind).float())


def tensors() -> dict[str, torch.Tensor]:
    return {k: v for k, v in parameters().items() if isinstance(v, torch.Tensor)}


def test_weights_that_are_not_finite_are_taken_on_request(tmp_path: Path) -> None:
    arrays = {**golden("proprio").under("p/"), "enc/mlp0/bias": np.full(24, np.nan)}
    assert load_dreamerv3(arrays, allow_nonfinite=True).encoder.mlp.linears[0].bias.isnan().all()
    changed = {**parameters(), "_pi.0.bias": torch.full((56,), torch.inf)}
    assert load_tdmpc2(changed, allow_nonfinite=True).actor.layers[0].bias.isinf().all()
