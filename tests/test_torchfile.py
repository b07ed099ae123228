"""`.pt` files: what torch.save wrote we read, what we write torch.load reads, and nothing else changes."""

import argparse
import collections
import copy
import copyreg
import enum
import io
import math
import pickle
import pickletools
import random
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptlab.errors import CheckpointError, LayoutError
from ckptlab.formats.fileplan import Elements, Zeros
from ckptlab.formats.torch import pickles, torchfile
from ckptlab.formats.torch.pickles import Foreign, Size, foreign, named
from ckptlab.formats.torch.torchfile import Pending
from ckptlab.stored import Stored, row_major_strides

DTYPES = [
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64",
]  # fmt: skip


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def random_tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bits that the dtype can hold."""
    kind = getattr(torch, dtype)
    if dtype == "bool":
        return torch.randint(0, 2, shape, dtype=torch.bool)
    size = torch.empty(0, dtype=kind).element_size()
    return torch.randint(0, 256, (*shape, size), dtype=torch.uint8).view(kind).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def saved(path, obj):
    torch.save(obj, path)
    return torchfile.read(path)


def rewritten(tmp_path, obj):
    """What torch.load gives of a file that was saved by torch, read by us, and written by us."""
    value = saved(tmp_path / "source.pt", obj)
    torchfile.write(tmp_path / "written.pt", value)
    return torch.load(tmp_path / "written.pt", weights_only=False)


def storages(path) -> int:
    """How many there are in a file."""
    with zipfile.ZipFile(path) as records:
        return sum("/data/" in name for name in records.namelist())


def pickle_of(path) -> bytes:
    with zipfile.ZipFile(path) as records:
        return records.read(next(name for name in records.namelist() if name.endswith("/data.pkl")))


# Reading tensors


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (4, 5), (2, 1, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_reads_and_writes_bit_for_bit(tmp_path, dtype, shape):
    tensor = random_tensor(dtype, shape)
    stored = saved(tmp_path / "a.pt", {"w": tensor})["w"]
    assert (stored.shape, stored.dtype) == (shape, numpy_dtype(dtype))
    assert stored.map().tobytes() == stored.flat.tobytes() == bits(tensor)
    for leaf in (stored, stored.map()):
        torchfile.write(tmp_path / "b.pt", {"w": leaf})
        for mmap in (False, True):
            again = torch.load(tmp_path / "b.pt", weights_only=True, mmap=mmap)["w"]
            assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
            assert bits(again) == bits(tensor)


def test_views_are_read_where_they_lie(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {
        "slice": base[1:3],
        "transposed": base.T,
        "stepped": base[::2, 1::2],
        "expanded": base[:1].expand(5, 6),
    }
    for name, stored in saved(tmp_path / "a.pt", views).items():
        assert np.array_equal(stored.map(), views[name].numpy()), name
        assert np.array_equal(stored.flat, views[name].numpy().reshape(-1)), name
        assert stored.contiguous == views[name].is_contiguous(), name
        assert not stored.map().flags.writeable
        assert not stored.flat.flags.writeable
    torchfile.write(tmp_path / "b.pt", torchfile.read(tmp_path / "a.pt"))
    again = torch.load(tmp_path / "b.pt")
    assert all(torch.equal(again[name], views[name]) for name in views)


def test_tied_tensors_share_a_place_and_still_do_when_written(tmp_path):
    weight = torch.randn(3, 2)
    value = saved(tmp_path / "a.pt", {"embed": weight, "head": weight.view(3, 2), "same": weight})
    assert value["embed"] == value["head"]
    assert value["embed"] is value["same"]
    torchfile.write(tmp_path / "b.pt", value)
    assert storages(tmp_path / "b.pt") == 1
    again = torch.load(tmp_path / "b.pt")
    assert again["embed"].data_ptr() == again["head"].data_ptr()
    assert again["embed"] is again["same"]


def test_parameters_and_tensors_with_attributes_read_as_tensors(tmp_path):
    flat = torch.randn(4)
    flat.ds_id = 3
    value = saved(tmp_path / "a.pt", {"parameter": torch.nn.Parameter(torch.ones(2)), "attribute": flat})
    assert value["parameter"].map().tolist() == [1.0, 1.0]
    assert value["attribute"].map().tolist() == flat.tolist()


def test_reading_opens_no_data(tmp_path):
    holes = tmp_path / "holes.pt"
    with torch._subclasses.FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"w": torch.empty(1 << 34, dtype=torch.uint8)}, holes)
    assert torchfile.read(holes)["w"].nbytes == 1 << 34


# Stored


def test_stored_travels_and_is_small():
    stored = Stored("some.pt", 64, np.dtype(ml_dtypes.bfloat16), (2, 3), (3, 1))
    assert pickle.loads(pickle.dumps(stored)) == copy.deepcopy(stored) == stored
    assert hash(pickle.loads(pickle.dumps(stored))) == hash(stored)
    assert len(pickle.dumps(stored)) < 300


def test_reshape_moves_nothing_and_refuses_what_would_copy(tmp_path):
    value = saved(tmp_path / "a.pt", {"w": torch.arange(6), "t": torch.arange(6).reshape(2, 3).T})
    assert value["w"].reshape((2, 3)).map().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert value["w"].elements(2, 3).map().tolist() == [2, 3, 4]
    with pytest.raises(LayoutError, match="elements 4 to 7"):
        value["w"].elements(4, 3)
    with pytest.raises(LayoutError, match="6 elements"):
        value["w"].reshape((4,))
    with pytest.raises(LayoutError, match="not contiguous"):
        value["t"].reshape((6,))


def test_a_file_cut_behind_our_back_is_an_error_and_a_new_one_is_seen(tmp_path):
    path = tmp_path / "a.pt"
    stored = saved(path, {"w": torch.arange(5000)})["w"]
    assert stored.map()[-1] == 4999
    whole = path.read_bytes()
    path.write_bytes(whole[: stored.offset + 8 * 4999])
    with pytest.raises(CheckpointError, match=r"a\.pt has \d+ bytes.*open"):
        stored.map()
    path.write_bytes(whole[: stored.offset] + bytes(8 * 5000) + whole[stored.offset + 8 * 5000 :])
    assert not stored.map().any()
    torch.save({"w": torch.ones(5000, dtype=torch.int64)}, tmp_path / "b.pt")
    (tmp_path / "b.pt").replace(path)
    assert stored.map().all()


def test_many_tensors_of_a_file_cost_one_mapping(tmp_path):
    value = saved(tmp_path / "a.pt", [torch.full((3,), n) for n in range(200)])
    views = [stored.map() for stored in value]
    assert [view[0] for view in views] == list(range(200))
    assert len({id(view.base) for view in views}) == 1


@given(st.lists(st.integers(0, 4), max_size=4).map(tuple))
def test_strides_are_numpys(shape):
    assert Stored("", 0, np.dtype("u1"), shape, row_major_strides(shape)).contiguous
    if 0 not in shape:
        assert row_major_strides(shape) == np.empty(shape, np.uint8).strides


# Placeholders: classes that a loader cannot import


class Colour(enum.Enum):
    RED = "red"


class Outer:
    class Colour(enum.Enum):
        RED = "red"

    class Plain:
        def __init__(self):
            self.depth = 2


class Slots:
    __slots__ = ("a", "b")

    def __init__(self):
        self.a, self.b = 1, [2]


class KeywordMade:
    def __new__(cls, *, depth):
        made = super().__new__(cls)
        made.depth = depth
        return made

    def __getnewargs_ex__(self):
        return (), {"depth": self.depth}


class ListWithName(list):
    pass


class OldStyle(int):
    def __reduce__(self):
        return copyreg._reconstructor, (OldStyle, int, int(self)), self.__dict__


def client_state() -> dict:
    """What a training script puts beside the tensors, of many kinds."""
    shared = [1, 2]
    named_list = ListWithName([1, 2])
    named_list.name = "x"
    old = OldStyle(3)
    old.seen = True
    state = {
        "args": argparse.Namespace(hidden_size=8, name="run", nested=argparse.Namespace(tp=2)),
        "enum": Colour.RED,
        "inner enum": Outer.Colour.RED,
        "inner": Outer.Plain(),
        "slots": Slots(),
        "list": named_list,
        "old": old,
        "default": collections.defaultdict(list, {"a": [1], "b": shared}),
        "counter": collections.Counter("abca"),
        "deque": collections.deque([1, 2], maxlen=3),
        "random": random.Random(0).getstate(),
        "numpy random": np.random.RandomState(0).get_state(),
        "numpy scalar": np.float64(0.1),
        "bytes": b"\x00\xff", "no bytes": b"", "bytearray": bytearray(b"ab"),
        "set": {1, 2}, "frozenset": frozenset({"a"}),
        "complex": 1 - 2j, "slice": slice(1, None, 2), "range": range(0, 9, 2),
        "dtype": torch.bfloat16, "device": torch.device("cpu"), "size": torch.Size([2, 3]), "class": list,
        "numbers": [0, -1, 255, 1 << 40, -(1 << 70), 0.1, float("inf"), True, None],
        "shared": shared, "text": "ü\n",
        "tensor": torch.arange(3),
    }  # fmt: skip
    state["state dict"] = torch.nn.Linear(2, 1).state_dict()  # an OrderedDict with an attribute
    return state


def same(one, other, seen=None) -> bool:
    """Whether two objects are equal, of the same classes, attribute by attribute."""
    seen = {} if seen is None else seen
    if seen.setdefault(id(one), id(other)) != id(other):
        return False
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    attributes = getattr(one, "__dict__", None)
    if not isinstance(one, type | enum.Enum) and isinstance(attributes, dict):
        if attributes.keys() != other.__dict__.keys():
            return False
        if not all(same(attributes[key], other.__dict__[key]) for key in attributes):
            return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Slots):
        return (one.a, one.b) == (other.a, other.b)
    return isinstance(one, argparse.Namespace | Outer.Plain) or one == other


def test_client_state_is_the_same_after_reading_and_writing(tmp_path):
    again = rewritten(tmp_path, client_state())
    for key, value in client_state().items():
        if key != "state dict":
            assert same(again[key], value), key
    assert again["state dict"]._metadata == client_state()["state dict"]._metadata
    assert again["default"]["b"] is again["shared"]
    assert again["slots"].b == [2]
    assert again["default"].default_factory is list


def test_objects_are_made_by_the_opcodes_that_made_them():
    def opcodes(data: bytes) -> list[tuple[str, object]]:
        kept = {"GLOBAL", "REDUCE", "NEWOBJ", "BUILD"}
        return [(opcode.name, value) for opcode, value, _ in pickletools.genops(data) if opcode.name in kept]

    state = client_state()
    for of_torch in ("tensor", "state dict", "dtype", "device", "size"):
        del state[of_torch]
    original = pickle.dumps(state, protocol=2)
    assert opcodes(pickles.dumps(pickles.loads(original, "x"))) == opcodes(original)


def test_what_was_read_is_equal_to_what_is_read_of_the_copy(tmp_path):
    value = saved(tmp_path / "a.pt", client_state())
    torchfile.write(tmp_path / "b.pt", value)
    again = torchfile.read(tmp_path / "b.pt")
    for read in (value, again):
        read["state dict"] = {name: stored.map().tolist() for name, stored in read["state dict"].items()}
        read["tensor"] = read["tensor"].map().tolist()
    assert again == value
    changed = copy.deepcopy(value)
    changed["args"].state["hidden_size"] = 9
    assert changed != value


def test_a_class_that_is_gone_reads_and_comes_back(tmp_path, monkeypatch):
    module = types.ModuleType("gone_project")
    module.Config = type("Config", (), {"__module__": "gone_project"})
    monkeypatch.setitem(sys.modules, "gone_project", module)
    config = module.Config()
    config.depth = 3
    config.me = config
    torch.save({"config": config}, tmp_path / "a.pt")
    monkeypatch.delitem(sys.modules, "gone_project")
    value = torchfile.read(tmp_path / "a.pt")
    assert (value["config"].module, value["config"].name, value["config"].depth) == (
        "gone_project",
        "Config",
        3,
    )
    assert value["config"].me is value["config"]
    torchfile.write(tmp_path / "b.pt", value)
    monkeypatch.setitem(sys.modules, "gone_project", module)
    again = torch.load(tmp_path / "b.pt", weights_only=False)["config"]
    assert type(again) is module.Config
    assert again.depth == 3
    assert again.me is again


def test_new_and_call_are_kept_apart(tmp_path):
    value = saved(tmp_path / "a.pt", client_state())
    assert value["args"].new
    assert not value["enum"].new
    assert value["enum"].args == ("red",)
    assert value["default"].items == [("a", [1]), ("b", [1, 2])]
    assert value["list"].elements == [1, 2]
    assert value["slots"].attributes == {"a": 1, "b": [2]}
    assert value["dtype"] == named("torch", "bfloat16")
    assert value["size"] == (2, 3)
    assert type(value["size"]) is Size


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_keyword_arguments_of_new_are_kept(protocol):
    data = pickle.dumps(KeywordMade(depth=4), protocol)
    again = pickle.loads(pickles.dumps(pickles.loads(data, "x")))
    assert type(again) is KeywordMade
    assert again.depth == 4


def test_recursive_structures_keep_their_shape():
    ring: list = [1]
    ring.append({"ring": ring})
    box = argparse.Namespace()
    box.friends = [box, ring]
    again = pickle.loads(pickles.dumps(pickles.loads(pickle.dumps((ring, box), 2), "x")))
    assert again[0][1]["ring"] is again[0]
    assert again[1].friends[0] is again[1]
    assert again[1].friends[1] is again[0]


def test_an_object_inside_its_own_arguments_is_written_once():
    holder: list = []
    looped = foreign("builtins", "frozenset", holder)
    holder.append(looped)
    again = pickles.loads(pickles.dumps({"looped": looped, "holder": holder}), "x")
    assert again["holder"][0] is not None
    assert isinstance(again["looped"], frozenset)


def test_placeholders_read_like_the_objects_they_stand_for(tmp_path):
    args = saved(tmp_path / "a.pt", {"args": argparse.Namespace(tp=2, name="run", _secret=1)})["args"]
    assert args.tp == 2
    assert args.attributes["name"] == "run"
    assert args.attributes["_secret"] == 1
    for absent in ("dp", "_secret", "__array_interface__"):
        with pytest.raises(AttributeError, match="Namespace"):
            getattr(args, absent)
    changed = args.with_attributes(tp=4)
    assert (changed.tp, args.tp) == (4, 2)
    assert pickle.loads(pickle.dumps(changed)) == changed != args
    assert repr(args) == "<argparse.Namespace(tp=2, name='run', _secret=1), not imported>"


def test_placeholders_can_be_made_to_be_written(tmp_path):
    obj = {
        "args": foreign("argparse", "Namespace", state={"tp": 2}, new=True),
        "stage": foreign(__name__, "Colour", "red"),
        "dtype": named("torch", "bfloat16"),
        "shape": Size((2, 3)),
        "metadata": OrderedDict(a=1),
    }
    torchfile.write(tmp_path / "a.pt", obj)
    again = torch.load(tmp_path / "a.pt", weights_only=False)
    assert again["args"] == argparse.Namespace(tp=2)
    assert again["stage"] is Colour.RED
    assert again["dtype"] is torch.bfloat16
    assert again["shape"] == torch.Size([2, 3])
    assert type(again["shape"]) is torch.Size


@pytest.mark.parametrize("obj", [Colour.RED, np.float32(1), io.BytesIO, print, torch.zeros(1), object()])
def test_what_only_we_could_read_is_not_written(tmp_path, obj):
    with pytest.raises((TypeError, pickle.PicklingError)):
        torchfile.write(tmp_path / "a.pt", {"x": obj})


def test_globals_seen_are_what_a_loader_would_have_imported(tmp_path):
    torch.save({"w": torch.zeros(2), "args": argparse.Namespace()}, tmp_path / "a.pt")
    assert torchfile.read_contents(tmp_path / "a.pt").globals_seen == {
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch", "FloatStorage"),
        ("collections", "OrderedDict"),
        ("argparse", "Namespace"),
    }


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        | st.builds(argparse.Namespace, a=inner, b=inner)
    ),
    max_leaves=20,
)


@pytest.mark.slow
@given(plain)
def test_any_plain_object_survives(obj):
    assert pickle.loads(pickles.dumps(pickles.loads(pickle.dumps(obj, 2), "x"))) == obj


# Writing


@dataclass(frozen=True)
class Chunks:
    """Gives these arrays, whatever was asked for."""

    arrays: Sequence[np.ndarray]

    def chunks(self, lo: int, hi: int) -> Sequence[np.ndarray]:
        return self.arrays


def in_chunks(dtype: np.dtype, shape: tuple[int, ...], chunks: Sequence[np.ndarray]) -> Pending:
    return Pending(dtype, shape, (Elements(Chunks(chunks), dtype, 0, math.prod(shape)),))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 60), max_size=5).map(sorted))
def test_a_pending_tensor_is_its_chunks(tmp_path_factory, cuts):
    path = tmp_path_factory.mktemp("pending") / "a.pt"
    array = np.arange(60, dtype=np.float32).reshape(6, 10)
    leaf = in_chunks(array.dtype, array.shape, np.split(array.reshape(-1), cuts))
    torchfile.write(path, {"w": leaf})
    assert torch.equal(torch.load(path)["w"], torch.from_numpy(array))
    assert np.array_equal(leaf.load(), array)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([np.zeros(5, np.float32)], "only 5"),
        ([np.zeros(5, np.float32), np.zeros(2, np.float32)], "more"),
        ([np.zeros((2, 3), np.float32)], r"shape \(2, 3\)"),
        ([np.zeros(6, np.float64)], "float64"),
        ([], "only 0"),
    ],
)
def test_chunks_that_do_not_add_up_leave_no_file_behind(tmp_path, chunks, message):
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match=message):
        torchfile.write(path, {"w": in_chunks(np.dtype(np.float32), (2, 3), chunks)})
    assert path.stat().st_size == 0


def test_storages_are_aligned_and_checksums_right(tmp_path):
    path = tmp_path / "a.pt"
    torchfile.write(path, {f"{n}": np.arange(n, dtype=np.uint8) for n in range(1, 130)})
    assert all(stored.offset % 64 == 0 for stored in torchfile.read(path).values())
    with zipfile.ZipFile(path) as records:
        assert records.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in records.infolist())


def test_torch_finds_storages_where_they_are_without_reading_them(tmp_path):
    path = tmp_path / "a.pt"
    torchfile.write(path, [np.arange(n, dtype=np.int64) for n in (3, 500, 7)])
    meta = torch.load(path, map_location="meta")
    offsets = [tensor.untyped_storage()._checkpoint_offset for tensor in meta]
    assert offsets == [stored.offset for stored in torchfile.read(path)]


def test_an_array_written_twice_is_one_tensor(tmp_path):
    array = np.arange(4.0)
    torchfile.write(tmp_path / "a.pt", {"a": array, "b": array})
    assert storages(tmp_path / "a.pt") == 1
    again = torch.load(tmp_path / "a.pt")
    assert again["a"] is again["b"]


def test_an_array_that_is_not_contiguous_is_written_in_row_major_order(tmp_path):
    array = np.arange(6.0).reshape(2, 3).T
    torchfile.write(tmp_path / "a.pt", [array])
    assert torch.equal(torch.load(tmp_path / "a.pt")[0], torch.from_numpy(array.copy()))


@pytest.mark.slow
def test_records_beyond_four_gigabytes(tmp_path):
    """A file of holes, of which nothing is written."""
    path, numel = tmp_path / "a.pt", (1 << 32) + 5
    big = Pending(np.dtype(np.uint8), (numel,), (Zeros(numel),))
    torchfile.write(path, {"big": big, "after": np.arange(3)})
    assert path.stat().st_blocks * 512 < 1 << 20
    value = torchfile.read(path)
    assert value["big"].nbytes == numel
    assert value["after"].map().tolist() == [0, 1, 2]
    again = torch.load(path, mmap=True)
    assert again["big"].shape == (numel,)
    assert again["after"].tolist() == [0, 1, 2]


def test_neither_torch_nor_the_classes_are_imported(tmp_path):
    torch.save({"w": torch.arange(4), "args": argparse.Namespace(tp=2)}, tmp_path / "a.pt")
    code = (
        "import sys; from ckptlab.formats.torch import torchfile\n"
        f"value = torchfile.read({str(tmp_path / 'a.pt')!r}); value['w'].map()\n"
        f"torchfile.write({str(tmp_path / 'b.pt')!r}, value)\n"
        "print(sorted({'torch', 'xarray', 'jax', 'einx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert torch.load(tmp_path / "b.pt", weights_only=False)["args"] == argparse.Namespace(tp=2)
    assert isinstance(torchfile.read(tmp_path / "b.pt")["args"], Foreign)
    assert pickle_of(tmp_path / "b.pt").count(b"Namespace") == 1
