"""Files made to do harm: each is opened with nothing executed, or refused with an error that names it."""

import contextlib
import functools
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from compare import ZERO2
from helpers.costs import cost
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckptlab
from ckptlab import convert
from ckptlab.cli import main
from ckptlab.errors import CheckpointError, CkptlabError, DestinationError, UnsafeFileError, UnsupportedError
from ckptlab.formats import fileplan
from ckptlab.formats.fileplan import FilePlan, Literal
from ckptlab.formats.torch import pickles, torchfile, torchzip
from ckptlab.formats.torch.pickles import Foreign, foreign, named
from ckptlab.stored import Stored
from ckptlab.words import escaped

DATA = np.arange(8, dtype=np.float32).tobytes()
UNTYPED = named("torch.storage", "UntypedStorage")


class Persistent(tuple):
    """A persistent id to be written as such."""


class _Forger(pickles.Pickler):
    def persistent_id(self, obj):
        return tuple(obj) if type(obj) is Persistent else None


def storage(key="0", numel=8, kind="FloatStorage"):
    return Persistent(("storage", named("torch", kind), key, "cpu", numel))


def tensor(*args, of=None):
    """A tensor as torch.save puts it, of whatever arguments: start, shape, strides."""
    return foreign("torch._utils", "_rebuild_tensor_v2", of or storage(), *args, False, OrderedDict())


def forge(path: Path, obj=None, data: bytes | None = None, records=(("archive/data/0", DATA),), **info) -> Path:
    """A `.pt` file with that object (or pickle) and those records."""
    data = pickles.dumps(obj, _Forger) if data is None else data
    with zipfile.ZipFile(path, "w") as out:
        for name, content in (("archive/data.pkl", data), ("archive/version", b"3\n"), *records):
            out.writestr(zipfile.ZipInfo(name), content, **info)
    return path


def refused(path: Path, error: type[CkptlabError] = UnsafeFileError, match: str | None = None) -> None:
    with pytest.raises(error, match=match) as caught:
        torchfile.read(path)
    assert str(path) in str(caught.value)


# Code


class Made:
    """Pickles as a call of `callee(*args)`."""

    def __init__(self, callee, *args):
        self.call = callee, args

    def __reduce__(self):
        return self.call


def nested_load(command: str) -> Made:
    inner = io.BytesIO()
    torch.save({"w": Made(os.system, command)}, inner, _use_new_zipfile_serialization=False)
    return Made(torch.storage._load_from_bytes, inner.getvalue())


# Each takes a command line, and gives an object that runs it when an ordinary unpickler makes it.
HOSTILE = {
    "os.system": lambda command: Made(os.system, command),
    "subprocess": lambda command: Made(subprocess.getoutput, command),
    "eval": lambda command: Made(eval, f"__import__('os').system({command!r})"),
    "exec": lambda command: Made(exec, f"import os; os.system({command!r})"),
    "partial": lambda command: Made(functools.partial(os.system, command)),
    "in a dict key": lambda command: {Made(os.system, command): 1},
    "in a set": lambda command: {Made(os.system, command)},
    "in arguments": lambda command: Made(OrderedDict, [("a", Made(os.system, command))]),
    "in a list": lambda command: [[[Made(os.system, command)]]],
    "in a namespace": lambda command: Made(str, Made(os.system, command)),
    "map": lambda command: Made(list, Made(map, os.system, [command])),
    "tensor made by it": lambda command: Made(
        torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (command,), {}
    ),
    "nested storage": nested_load,
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("how", HOSTILE)
def test_nothing_in_a_pickle_is_called(tmp_path, how, protocol):
    sentinel = tmp_path / "executed"
    data = pickle.dumps({"state": HOSTILE[how](f"touch {sentinel}")}, protocol)
    value = torchfile.read(forge(tmp_path / "hostile.pt", data=data))
    assert not sentinel.exists()
    torchfile.write(tmp_path / "again.pt", value)
    assert not sentinel.exists()


@pytest.mark.parametrize("how", HOSTILE)
def test_the_hostile_pickles_do_run_in_an_ordinary_unpickler(tmp_path, how):
    sentinel = tmp_path / "executed"
    data = pickle.dumps(HOSTILE[how](f"touch {sentinel}"), 2)
    with contextlib.suppress(Exception):  # once run, some give what cannot be used
        pickle.loads(data)
    assert sentinel.exists()


def raw(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def test_a_dotted_name_does_not_walk_through_a_module(tmp_path):
    sentinel = tmp_path / "executed"
    call = raw(text("torch"), text("os.system"), b"\x93", text(f"touch {sentinel}"), b"\x85R")
    contents = torchfile.read_contents(forge(tmp_path / "a.pt", data=call))
    assert contents.value == foreign("torch", "os.system", f"touch {sentinel}")
    assert contents.globals_seen == {("torch", "os.system")}
    assert not sentinel.exists()
    pickle.loads(call)  # torch is imported here: an ordinary loader walks
    assert sentinel.exists()


def test_a_chain_of_import_and_getattr_calls_nothing(tmp_path):
    sentinel = tmp_path / "executed"
    module = b"c__builtin__\n__import__\n" + text("os") + b"\x85R"
    function = b"c__builtin__\ngetattr\n" + module + text("system") + b"\x86R"
    call = b"\x80\x02" + function + text(f"touch {sentinel}") + b"\x85R."
    value = torchfile.read(forge(tmp_path / "a.pt", data=call))
    assert isinstance(value, Foreign)
    assert not sentinel.exists()
    pickle.loads(call)
    assert sentinel.exists()


def test_getattr_of_what_is_known_stays_a_name(tmp_path):
    chain = foreign("builtins", "getattr", named("collections", "OrderedDict"), "__init__")
    chain = foreign("builtins", "getattr", chain, "__globals__")
    value = torchfile.read(forge(tmp_path / "a.pt", chain))
    assert isinstance(value, pickles.Global)
    assert value() == Foreign(value)


def test_a_name_cannot_smuggle_opcodes_into_what_we_write(tmp_path):
    hidden = raw(text("collections"), text("OrderedDict\ncos\nsystem"), b"\x93")
    refused(forge(tmp_path / "a.pt", data=hidden), match="no writer does")
    with pytest.raises(UnsafeFileError):
        named("os", "system\n(S'id'\ntR.")


@pytest.mark.parametrize("where", ["0", "2"])
def test_persistent_ids_name_storages_and_nothing_else(tmp_path, where):
    sentinel = tmp_path / "executed"
    call = foreign("os", "system", f"touch {sentinel}")
    pid = list(storage())
    pid[int(where)] = call
    refused(forge(tmp_path / "a.pt", {"w": tensor(0, (2,), (1,), of=Persistent(pid))}), match="no storage")
    refused(forge(tmp_path / "b.pt", Persistent(("module", "x"))), match="no storage")
    assert not sentinel.exists()


def built(obj, state) -> Foreign:
    """An object that a BUILD opcode is to be aimed at: see `_Builder`."""
    return Foreign(named("build", "build"), (obj, state))


class _Builder(_Forger):
    """Gives state to objects that do not ask for any."""

    dispatch = dict(_Forger.dispatch)  # noqa: RUF012

    def save_foreign(self, obj):
        if obj.callee != named("build", "build"):
            return super().save_foreign(obj)
        self.save(obj.args[0])
        self.save(obj.args[1])
        return self.write(pickle.BUILD)

    dispatch[Foreign] = save_foreign


@pytest.mark.parametrize(
    "state",
    [
        {"path": "/etc/passwd"},
        ["/etc/passwd", 0, None, (1,), (1,)],
        (None, {"path": "/etc/passwd"}),
        (None, {"_build": None, "module": "os"}),
    ],
)
@pytest.mark.parametrize(
    "target",
    [
        lambda: tensor(0, (2,), (1,)),
        storage,
        lambda: named("torch._utils", "_rebuild_tensor_v2"),
        lambda: named("collections", "OrderedDict"),
        lambda: named("any", "thing"),
        lambda: pickles.Size((1, 2)),
    ],
)
def test_what_was_checked_cannot_be_changed(tmp_path, target, state):
    data = pickles.dumps({"a": built(target(), state)}, _Builder)
    refused(forge(tmp_path / "a.pt", data=data), CheckpointError)
    good = torchfile.read(forge(tmp_path / "b.pt", {"w": tensor(0, (2,), (1,)), "o": OrderedDict(a=1)}))
    assert good["w"].path == str(tmp_path / "b.pt")
    assert good["o"] == OrderedDict(a=1)


def test_a_placeholder_offers_no_hooks_to_other_libraries(tmp_path):
    memory = {"data": (id(DATA), False), "shape": (64,), "typestr": "|u1", "version": 3}
    state = {"__array_interface__": memory, "_repr_html_": "<script>", "__len__": 3, "__dict__": 1}
    value = torchfile.read(forge(tmp_path / "a.pt", foreign("a", "b", state=state, new=True)))
    assert np.asarray(value).dtype == object
    assert not hasattr(value, "_repr_html_")


def test_known_values_are_made_of_what_pickle_makes_them_of_only(tmp_path):
    huge = foreign("builtins", "range", 10**6)
    bombs = [
        foreign("builtins", "bytearray", 10**6),
        foreign("builtins", "bytes", 10**6),
        foreign("builtins", "list", huge),
        foreign("builtins", "set", huge),
        foreign("builtins", "frozenset", huge),
        foreign("collections", "OrderedDict", huge),
        foreign("torch", "Size", huge),
        foreign("_codecs", "encode", "a", "zlib_codec"),
    ]
    assert all(isinstance(value, Foreign) for value in torchfile.read(forge(tmp_path / "a.pt", bombs)))


# Pickles that are too long, too deep, or cut


@pytest.mark.slow
def test_deep_nesting_ends_in_an_error_or_a_value_and_never_the_process(tmp_path):
    depth = 400_000
    deep = {
        "list": raw(b"]" * depth, b"a" * (depth - 1)),
        "tuple": raw(b")", b"\x85" * depth),
        "key": raw(b"}", b")", b"\x85" * depth, b"N", b"s"),
        "called": raw(text("a"), text("b"), b"\x93", b")R" * depth),
    }
    paths = [str(forge(tmp_path / f"{name}.pt", data=data)) for name, data in deep.items()]
    code = (
        "import sys; from ckptlab.formats.torch import torchfile; from ckptlab.errors import CheckpointError\n"
        "for path in sys.argv[1:]:\n"
        "    try: torchfile.write(path + '2', torchfile.read(path))\n"
        "    except CheckpointError as error: print(error, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(paths)
    assert all("too deep" in line for line in said), "\n".join(said)


def test_many_shallow_tuples_are_no_deep_one(tmp_path):
    pairs = [(n, (n,)) for n in range(60_000)]
    assert torchfile.read(forge(tmp_path / "a.pt", data=pickle.dumps(pairs, 2))) == pairs


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x7f.",
        b"\xff.",
        raw(b"h\x05"),
        raw(b"R"),
        raw(b"0"),
        raw(b"X\xff\xff\xff\x7fabc"),
        raw(b"\x8e" + b"\xff" * 8),
        raw(b"\x82\x01"),
        raw(b"N", b")\x81"),
        raw(b"\x97"),
        b"Pabc\n.",
    ],
)
def test_broken_pickles_are_refused_with_the_files_name(tmp_path, data):
    refused(forge(tmp_path / "a.pt", data=data), CheckpointError)


def test_an_object_that_holds_itself_is_read():
    value = pickles.loads(raw(b"]\x94h\x00a"), "x")
    assert value[0] is value


# Extents


@pytest.mark.parametrize(
    "view",
    [
        (0, (9,), (1,)),
        (1, (8,), (1,)),
        (0, (2, 2), (7, 2)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (-2, -2), (1, 1)),
        (0, (2, 2), (1,)),
        (0, (1 << 62, 4), (1, 1)),
        (0, (1 << 40, 1 << 40), (0, 0)),
        (0, (1 << 29,), (0,)),
        (0, (2.0,), (1,)),
        (True, (2,), (1,)),
        (0, [2], [1]),
        (0, (1,) * 40, (1,) * 40),
        (None, None, None),
        (10**400, (1,), (1,)),
        (0, (10**30, 0), (1, 1)),
    ],
)
def test_views_beyond_their_storage_are_refused(tmp_path, view):
    refused(forge(tmp_path / "a.pt", {"w": tensor(*view)}))


def test_views_within_their_storage_are_read(tmp_path):
    views = [(0, (8,), (1,)), (7, (1,), (5,)), (0, (3, 2), (0, 7)), (99, (0, 3), (3, 1)), (0, (), ())]
    value = torchfile.read(forge(tmp_path / "a.pt", [tensor(*view) for view in views]))
    assert [stored.map().ravel().tolist() for stored in value] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [7],
        [0, 7, 0, 7, 0, 7],
        [],
        [0],
    ]


@pytest.mark.parametrize("numel", [9, 1 << 61, 1 << 62, 1 << 63, -1, -8])
def test_storages_beyond_their_record_are_refused(tmp_path, numel):
    refused(forge(tmp_path / "a.pt", {"w": tensor(0, (1,), (1,), of=storage(numel=numel))}), match="forged")


def test_a_storage_that_lies_the_second_time_is_refused_too(tmp_path):
    refused(forge(tmp_path / "a.pt", [tensor(0, (8,), (1,)), tensor(8, (1,), (1,), of=storage(numel=9))]))


@pytest.mark.parametrize("key", ["1", "../data.pkl", "../../../etc/passwd", "/etc/passwd", ""])
def test_a_storage_without_a_record_is_refused(tmp_path, key):
    refused(forge(tmp_path / "a.pt", {"w": tensor(0, (1,), (1,), of=storage(key))}), CheckpointError, "no record")


def test_a_function_on_what_is_no_storage_is_refused(tmp_path):
    for of in (tensor(0, (1,), (1,)), "0", foreign("os", "getcwd")):
        refused(forge(tmp_path / "a.pt", {"w": tensor(0, (1,), (1,), of=of)}))
    untyped = foreign("torch._utils", "_rebuild_tensor_v3", "x", 0, (1,), (1,), False, None, named("torch", "uint16"))
    refused(forge(tmp_path / "a.pt", {"w": untyped}))


def test_an_untyped_storage_is_measured_in_bytes(tmp_path):
    pid = Persistent(("storage", UNTYPED, "0", "cpu", 32))

    def view(numel):
        of = named("torch", "uint16")
        return foreign("torch._utils", "_rebuild_tensor_v3", pid, 0, (numel,), (1,), False, OrderedDict(), of)

    assert torchfile.read(forge(tmp_path / "a.pt", [view(16)]))[0].nbytes == 32
    refused(forge(tmp_path / "b.pt", [view(17)]))


# The zip


def patched(path: Path, find: bytes, offset: int, new: bytes) -> Path:
    """The file with bytes changed at an offset from the last place where `find` stands."""
    content = bytearray(path.read_bytes())
    at = content.rindex(find) + offset
    content[at : at + len(new)] = new
    path.write_bytes(content)
    return path


def directory_entry(path: Path, name: str, field: int, value: int) -> Path:
    """Changes a 32-bit field of a record's entry in the zip's directory (its name is at byte 46)."""
    return patched(path, name.encode(), field - 46, struct.pack("<I", value))


def good(path: Path) -> Path:
    torch.save({"w": torch.arange(8.0)}, path)
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [(42, 1 << 30), (42, 0xFFFFFFF0), (42, 5), (20, 1 << 30), (24, 1 << 30), (20, 0), (42, 0)],
    ids=["far", "farther", "between", "packed long", "long", "packed to nothing", "another record"],
)
def test_records_that_lie_about_their_place_are_refused(tmp_path, field, value):
    path = directory_entry(good(tmp_path / "a.pt"), "a/data/0", field, value)
    if (field, value) == (20, 0):
        path = directory_entry(path, "a/data/0", 24, 1)
    refused(path, CheckpointError)


def test_both_sizes_lying_together_are_refused(tmp_path):
    path = good(tmp_path / "a.pt")
    for field in (20, 24):
        directory_entry(path, "a/data/0", field, 1 << 20)
    refused(path, match="get it again")


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0"])
def test_two_records_of_one_name_are_refused(tmp_path, name):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = forge(tmp_path / "a.pt", {"w": tensor(0, (8,), (1,))}, records=[("archive/data/0", DATA), (name, DATA)])
    refused(path, match="two records")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "archive/../../evil", "archive/data/../../x"])
def test_records_named_with_paths_go_nowhere(tmp_path, name):
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    obj = {"w": tensor(0, (8,), (1,))}
    path = forge(folder / "a.pt", obj, records=[("archive/data/0", DATA), (name, b"evil")])
    assert torchfile.read(path)["w"].map()[7] == 7
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["a.pt"]


def test_compressed_records_are_refused_before_they_are_unpacked(tmp_path):
    bomb = pickle.dumps(b"\0" * (1 << 26), 4)
    path = forge(tmp_path / "a.pt", data=bomb, compress_type=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 18
    refused(path, match="compressed")
    path = tmp_path / "b.pt"
    forge(path, {"w": tensor(0, (8,), (1,))}, records=())
    with zipfile.ZipFile(path, "a") as out:
        out.writestr("archive/data/0", DATA, zipfile.ZIP_DEFLATED)
    refused(path, match="compressed")


@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
def test_records_said_to_be_packed_are_refused_whatever_their_size(tmp_path, record):
    path = good(tmp_path / "a.pt")
    refused(patched(path, f"a/{record}".encode(), 10 - 46, b"\x08"), match="compressed")
    path = good(tmp_path / "b.pt")
    content = path.read_bytes()
    local = content.index(f"b/{record}".encode()) - 30
    path.write_bytes(content[: local + 8] + b"\x08" + content[local + 9 :])
    refused(path, match="compressed")


def test_torchscript_is_refused(tmp_path):
    path = forge(tmp_path / "a.pt", {"w": 1}, records=[("archive/constants.pkl", b"\x80\x02).")])
    refused(path, match="TorchScript")
    refused(forge(tmp_path / "b.pt", {}, records=[("other/constants.pkl", b"")]), match="TorchScript")


def test_the_oldest_format_is_refused(tmp_path):
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as out:
        out.add(good(tmp_path / "a.pt"))
    refused(tar, UnsupportedError, "tar")


def test_a_legacy_pickle_in_front_of_a_zip_is_not_read_as_a_zip(tmp_path):
    path = good(tmp_path / "a.pt")
    path.write_bytes(pickle.dumps(1) + path.read_bytes())
    refused(path, CheckpointError)


@pytest.mark.parametrize("content", [b"", b"P", b"hello", b"\x80\x02.", bytes(100), b"PK\x05\x06" + bytes(18)])
def test_what_is_no_zip_is_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt", CheckpointError)


def test_every_truncation_is_refused(tmp_path):
    content = good(tmp_path / "a.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        refused(cut, CheckpointError)


def test_big_endian_numbers_are_refused(tmp_path):
    refused(forge(tmp_path / "a.pt", {}, records=[("archive/byteorder", b"big")]), UnsupportedError, "little")


def test_lazy_views_are_refused_with_a_way_out(tmp_path):
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", UnsupportedError, "resolve_conj")


@pytest.mark.parametrize("kind", ["QInt8Storage", "NoStorage", "FloatStorage.__init__"])
def test_storages_of_unknown_dtype_are_refused(tmp_path, kind):
    pid = storage(kind=kind)
    refused(forge(tmp_path / "a.pt", {"w": tensor(0, (1,), (1,), of=pid)}), UnsupportedError, kind)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    state = {
        "w": torch.arange(40.0).reshape(5, 8).T,
        "n": torch.nn.Linear(2, 2).state_dict(),
        "x": [1, (2, "a")],
    }
    torch.save(state, folder / "a.pt")
    return folder / "b.pt", (folder / "a.pt").read_bytes()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_ends_in_a_tensor_that_can_be_read_or_in_our_error(fuzzed, changes):
    path, content = fuzzed
    damaged = bytearray(content)
    for at, byte in changes:
        damaged[at % len(damaged)] = byte
    path.write_bytes(damaged)
    try:
        value = torchfile.read(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        for stored in value.values() if isinstance(value, dict) else ():
            if isinstance(stored, Stored):
                stored.map().tobytes()


def test_threads_read_and_map_at_once(tmp_path):
    paths = [tmp_path / f"{n}.pt" for n in range(80)]  # more than are kept mapped
    for n, path in enumerate(paths):
        torchfile.write(path, {"w": np.full(1000, n)})
    wrong: list[object] = []

    def read_all(shift: int) -> None:
        for n in range(len(paths)):
            at = (n + shift) % len(paths)
            if not (torchfile.read(paths[at])["w"].map() == at).all():
                wrong.append(at)

    threads = [threading.Thread(target=read_all, args=(shift,)) for shift in range(0, 80, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Names that would become paths


BAD_NAMES = {
    "../../../outside/x": "lead elsewhere",
    "a/../../../../outside/y": "lead elsewhere",
    "/etc/x": "lead elsewhere",
    "..": "lead elsewhere",
    "a//b": "lead elsewhere",
    "a/": "lead elsewhere",
    "": "lead elsewhere",
    "nul\0nul": "holds a NUL",
    "lone\ud800": "lone surrogates",
    "x" * 300: "too long",
    "/".join(["deep"] * 1500): "too long",
    "ckptlab-journal.json": "ckptlab keeps",
    "a.tmp": "ckptlab keeps",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_inside_of_a_file_never_lead_out_of_the_destination(tmp_path, name):
    plan = FilePlan(name, (Literal(b"x"),))
    with pytest.raises(DestinationError, match=BAD_NAMES[name]) as caught:
        convert.run([FilePlan("fine", (Literal(b"x"),)), plan], str(tmp_path / "deep" / "out"), {})
    assert len(str(caught.value)) < 600
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "names", [("a", "a"), ("a", "a/b"), ("a/b/c", "a/b"), ("optimizer_state.pt/x", "optimizer_state.pt")]
)
def test_names_that_collide_are_refused(tmp_path, names):
    with pytest.raises(DestinationError, match=r"collide|two files"):
        convert.run([FilePlan(name, (Literal(b"x"),)) for name in names], str(tmp_path / "out"), {})


@pytest.mark.parametrize(
    "state", ["../../../../outside/x", "../../../global_step3/mp_rank_", "nul\0", "exp\ud800", "x" * 300]
)
def test_states_never_lead_out(tmp_path, state):
    folder = Path(shutil.copytree(ZERO2, tmp_path / "run")) / "global_step3"
    for file in folder.glob("*optim_states.pt"):
        content = torchfile.read(file)
        for held in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            held[state] = held.pop("exp_avg")
        torchfile.write(tmp_path / "forged", content)
        os.replace(tmp_path / "forged", file)
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(DestinationError, match="cannot be the name of a file") as caught:
        ckptlab.open(folder).reshape(format="universal").save(tmp_path / "out" / "universal")
    assert len(str(caught.value)) < 1000
    assert sorted(p for p in tmp_path.rglob("*")) == before


# Memory and time


def op(name: bytes, index: int) -> bytes:
    return name + struct.pack("<I", index)


def large(number: int) -> bytes:
    """An integer of any size."""
    data = pickle.encode_long(number)
    return b"\x8a" + bytes([len(data)]) + data


def doubled(last: bytes, kind: bytes = b"\x86") -> bytes:
    """2^60 of something by reference, then used."""
    steps = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + kind + b"q" + bytes([i + 1]) for i in range(60))
    return raw(b"}", b"N\x85q\x00", steps, last)


@pytest.mark.slow
def test_placeholders_as_keys_are_told_apart_by_what_they_hold():
    def keys(kind):
        return {foreign("m", "Index", state={"fqn": f"layers.{i}", "of": kind(i)}, new=True): i for i in range(20_000)}

    found = pickles.loads(pickles.dumps(keys(lambda i: None)), "a.pt")
    assert list(found.values()) == list(range(20_000))
    assert found == keys(lambda i: None)


def test_placeholders_that_are_alike_on_their_surface_are_compared_so_often_and_no_more(monkeypatch):
    monkeypatch.setattr(pickles, "COMPARISONS", 1000)
    data = pickles.dumps({foreign("m", "n", [[[i]]]): i for i in range(100)})
    with pytest.raises(UnsafeFileError, match="more objects of unknown classes as keys, alike on their surface"):
        pickles.loads(data, "a.pt")


def alike(one: bytes, other: bytes, empty: bytes = b"}", fill: bytes = b"u", before: bytes = b"") -> bytes:
    """A pickle of a dict (or set) whose keys are 30,000 tuples of fifteen elements, each one of two."""
    keys = (
        b"(" + b"".join(each) + b"t" for each in itertools.islice(itertools.product((one, other), repeat=15), 30_000)
    )
    value = b"N" if fill == b"u" else b""
    return raw(before + empty + b"(", value.join(keys) + value + fill)


REMEMBERED = op(b"J", -1 & 0xFFFFFFFF) + b"q\x000" + op(b"J", -2 & 0xFFFFFFFF) + b"q\x010"
REMEMBERED_TUPLES = op(b"J", -1 & 0xFFFFFFFF) + b"\x85q\x000" + op(b"J", -2 & 0xFFFFFFFF) + b"\x85q\x010"
REMEMBERED_SIZES = b"".join(
    b"ctorch\nSize\n" + op(b"J", n & 0xFFFFFFFF) + b"\x85\x85Rq" + bytes([i]) + b"0" for i, n in enumerate((-1, -2))
)

BOMBS = {
    "a memo of 3 GB": raw(b"N", op(b"r", 200_000_000)),
    "a memo of 5 GB": raw(b"N", b"p1000000000\n"),
    "doubled 50 million times": raw(b"]", b"2" * 50_000_000),
    "5 million dicts": raw(b"}" * 5_000_000),
    "5 million lists": raw(b"]" * 5_000_000),
    "5 million marks": raw(b"(" * 5_000_000),
    "100,000 names": raw(b"".join(b"cm\nn%d\n" % i for i in range(100_000))),
    "2 million calls": raw(b"cm\nn\n", b")R" * 2_000_000),
    "30,000 placeholders as keys": raw(b"}", b"cm\nn\nq\x00", b"".join(b"h\x00)RN}" + b"bNs" for _ in range(30_000))),
    "60,000 integers of one hash": raw(b"}(", b"".join(large(i * (2**61 - 1)) + b"N" for i in range(1, 60_000)), b"u"),
    "30,000 tuples of -1 and -2, which have one hash": alike(op(b"J", -1 & 0xFFFFFFFF), op(b"J", -2 & 0xFFFFFFFF)),
    "the same of floats in a set": alike(b"G" + struct.pack(">d", -1), b"G" + struct.pack(">d", -2), b"\x8f", b"\x90"),
    "the same of numbers that are remembered": alike(b"h\x00", b"h\x01", before=REMEMBERED),
    "the same of tuples that are remembered": alike(b"h\x00", b"h\x01", before=REMEMBERED_TUPLES),
    "the same of sizes that are remembered": alike(b"h\x00", b"h\x01", before=REMEMBERED_SIZES),
    "30,000 numbers of one hash, as floats": alike(b"G" + struct.pack(">d", 1), b"G" + struct.pack(">d", 2.0**61)),
    "30,000 frozensets by calls": raw(
        b"]", b"".join(b"c__builtin__\nfrozenset\n]K%ca\x85Ra" % (i % 256) for i in range(30_000))
    ),
    "30,000 frozensets": raw(b"]", b"".join(b"(" + b"K%c" % (i % 256) + b"\x91a" for i in range(30_000))),
    "tuples of 2^60 as a key": doubled(b"Ns"),
    "tuples and None of 2^60 as a key": doubled(b"Ns", b"N\x87"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_costs_little_whatever_it_asks_for(tmp_path, bomb):
    path = forge(tmp_path / "a.pt", data=BOMBS[bomb])
    said, memory = cost("pt", path)
    assert said.startswith(str(path))
    assert len(said) < 1000
    assert memory < 600 << 10


@pytest.mark.slow
def test_more_storages_than_16_bits_count_are_opened(tmp_path):
    content = {"weight": np.arange(3, dtype=np.float32)}
    torchfile.write(tmp_path / "few.pt", content)
    records = torchzip.RecordPlanner()
    for i in range(1, 66_000):
        records.add(f"data/{i}", [Literal(bytes(4))])
    with zipfile.ZipFile(tmp_path / "few.pt") as few:
        for name in few.namelist():
            records.add(name.partition("/")[2], [Literal(few.read(name))])
    fileplan.write(records.plan("many.pt", 0), tmp_path / "many.pt")
    with zipfile.ZipFile(tmp_path / "many.pt") as many:
        assert len(many.namelist()) > 66_000
    for read in (torchfile.read(tmp_path / "many.pt")["weight"].map(), torch.load(tmp_path / "many.pt")["weight"]):
        assert read.tolist() == content["weight"].tolist()


def test_what_is_shown_of_a_placeholder_is_a_line():
    deep = foreign("m", "n", "x" * 1000)
    for _ in range(100):
        deep = foreign("m", "n", deep, deep)
    assert len(repr(deep)) < 5000


def holed(path: Path, name: str, size: int) -> Path:
    """A file whose record `name` is so many bytes of holes."""
    end = _end(path, name, size)
    with open(path, "r+b") as file:
        file.seek(0, 2)
        file.truncate(file.tell() + size)
        file.seek(0, 2)
        file.write(end)
    return path


def _end(path: Path, name: str, size: int) -> bytes:
    entry = torchzip._Entry(name.encode(), 0, size, 0)
    path.write_bytes(entry.local_header())
    directory = entry.central_header()
    return directory + torchzip._end_of_directory(1, len(directory), path.stat().st_size + size)


@pytest.mark.parametrize("size", [3 << 30, 20 << 30])
def test_a_pickle_of_holes_is_refused_unread(tmp_path, size):
    refused(holed(tmp_path / "a.pt", "archive/data.pkl", size), UnsafeFileError, "more than the")


def test_a_terabyte_of_holes_is_no_zip(tmp_path):
    with open(tmp_path / "a.pt", "wb") as file:
        file.truncate(1 << 40)
    refused(tmp_path / "a.pt", CheckpointError, "is not a file of torch.save")


def test_a_directory_of_200_gb_is_refused_unread(tmp_path):
    path = forge(tmp_path / "a.pt", {})
    data = path.read_bytes()
    at = data.rindex(b"PK\5\6")
    path.write_bytes(data[: at + 12] + struct.pack("<I", 0xF0000000) + data[at + 16 :])
    refused(path, UnsafeFileError, "directory is said to have")


def test_what_is_no_ordinary_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    refused(tmp_path / "a.pt", CheckpointError, "no ordinary file")
    (tmp_path / "b.pt").symlink_to("/dev/zero")
    refused(tmp_path / "b.pt", CheckpointError, "no ordinary file")


def test_names_do_not_command_the_terminal(tmp_path):
    assert escaped("a\x1b[31m\x1b]0;title\x07\u202eb\ud800\nc") == "a\\x1b[31m\\x1b]0;title\\x07\\u202eb\\ud800\nc"
    result = CliRunner().invoke(main, ["info", str(tmp_path / "x\x1b[31m")])
    assert "\x1b" not in result.stderr
    assert "\\x1b[31m" in result.stderr


def safetensors_of(path: Path, header: bytes, data: bytes = bytes(64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[%d,0],"data_offsets":[0,0]}}' % 10**30,
        b'{"%s":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}' % (b"n" * 1_000_000),
        b'{"%s":{"dtype":"F32","shape":"5"}}' % (b"n" * 1_000_000),
        b'{"%s":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}'
        % (b"n" * 1_000_000),
    ],
    ids=["a size beyond 64 bits", "a name of a million", "and no offsets", "and shared bytes"],
)
def test_a_header_that_lies_is_refused_in_a_line(tmp_path, header):
    path = safetensors_of(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match="^" + str(path)) as error:
        ckptlab.open(path)
    assert len(str(error.value)) < 1000
    assert not ckptlab.check(path).healthy


def test_an_index_of_names_that_no_file_has_is_refused_in_a_line(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    safetensors_of(tmp_path / "m.safetensors", b"{}")
    for files in (["x" * 100_000], [f"{i:09}.safetensors" for i in range(10_000)]):
        index.write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(files)}}))
        with pytest.raises(CheckpointError, match="no weight_map|missing") as error:
            ckptlab.open(tmp_path)
        assert len(str(error.value)) < 1000
        assert all(len(f.found) < 1000 for f in ckptlab.check(tmp_path).findings)


@pytest.mark.parametrize("size", ["1e400", "NaN", "-1e400", "[]", '"x"'])
def test_a_manifest_that_is_none_is_a_finding(tmp_path, size):
    safetensors_of(tmp_path / "model.safetensors", b'{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}')
    manifest = tmp_path / convert.MANIFEST
    manifest.write_text(f'{{"files": {{"model.safetensors": {{"size": {size}, "crc32": "0"}}}}}}')
    assert not ckptlab.check(tmp_path).healthy
    manifest.write_text(json.dumps({"files": {"x" * 10_000: {"size": 1, "crc32": "0"}}}))
    found = ckptlab.check(tmp_path).findings
    assert found
    assert all(len(f.found) < 1000 for f in found)


def test_a_pipe_or_a_device_is_no_file(tmp_path: Path) -> None:
    """In a process of its own: a pipe that is opened waits for whoever writes into it."""
    folder = Path(shutil.copytree(ZERO2, tmp_path / "run"))
    (folder / "latest").unlink()
    os.mkfifo(folder / "latest")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "zeros")
    program = """
import sys
from ckptlab import paths
from ckptlab.cli import main
for name in ("pipe", "zeros"):
    for read in (paths.open_binary, paths.text, lambda path: paths.copy(path, path + ".copy")):
        try:
            read(f"{sys.argv[1]}/{name}")
        except OSError as error:
            assert error.strerror == "it is no file, but a pipe or a device", error
        else:
            raise AssertionError(name)
main(["info", f"{sys.argv[1]}/run"])"""
    ran = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60)
    assert ran.returncode in (0, 2), ran.stderr
    assert "Traceback" not in ran.stderr
