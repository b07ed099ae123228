"""Folders of torch Distributed Checkpoint that are damaged or forged, one value or a few bytes at a time: whatever is
wrong, `open` raises exactly where `check` has an error, in one message that names the file, and nothing runs."""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import DATA
from helpers.costs import cost
from helpers.small import small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from test_check_and_open import held_to_the_law
from test_dcp import Folder, array, dtensor, item, megatron, placed, rows
from test_hostile_files import BOMBS, op

import ckptlab
from ckptlab import Mesh
from ckptlab.errors import CkptlabError
from ckptlab.formats.torch import pickles, torchfile
from ckptlab.formats.torch.pickles import Foreign, Size, foreign, named

FSDP = DATA / "fsdp2_tp2_dp2" / "step-3"
ODD: list[Any] = [
    *(None, True, 3, -1, 10**12, 1 << 62, 1 << 70, 0.5, float("nan"), "", "..", "a\0b", "\ud800", "model.", "x" * 5000),
    *(b"x", [], {}, (), (10**12,), (-1,), (1 << 62, 1 << 62), ("a", None), [[7]], {"a": [None]}, {3: {}}),
    *(Size((3, 3)), foreign("os", "system", "true"), named("os", "system"), named("torch", "float64")),
]

Way = tuple[tuple[str, int], ...]


def ways(value: Any, depth: int = 12) -> Iterator[Way]:
    """The ways to every value in an object that was unpickled; keys of dicts as well."""
    if depth:
        for step, inner in _inside(value):
            yield (step,)
            yield from ((step, *rest) for rest in ways(inner, depth - 1))


def _inside(value: Any) -> list[tuple[tuple[str, int], Any]]:
    if isinstance(value, Foreign):
        state = [] if value.state is None else [(("state", 0), value.state)]
        return [*((("args", i), arg) for i, arg in enumerate(value.args)), *state]
    if isinstance(value, dict):
        return [pair for i, (k, v) in enumerate(value.items()) for pair in ((("key", i), k), (("value", i), v))]
    return [(("at", i), v) for i, v in enumerate(value)] if isinstance(value, list | tuple) else []


def changed(value: Any, way: Way, new: Any) -> Any:
    """A copy in which another value stands at the end of a way."""
    if not way:
        return new
    (kind, i), rest = way[0], way[1:]
    if isinstance(value, Foreign):
        args, state = list(value.args), value.state
        if kind == "args":
            args[i] = changed(args[i], rest, new)
        else:
            state = changed(state, rest, new)
        made = Foreign(value.callee, tuple(args), value.kwargs, value.new, state)
        made.elements, made.items = value.elements, value.items
        return made
    if isinstance(value, dict):
        pairs = [list(pair) for pair in value.items()]
        pairs[i][kind == "value"] = changed(pairs[i][kind == "value"], rest, new)
        return dict(map(tuple, pairs))
    inside = [changed(v, rest, new) if k == i else v for k, v in enumerate(value)]
    return inside if isinstance(value, list) else type(value)(inside)


def told(folder: Path) -> bool:
    """Hold the laws on a folder: open is check; what opens can be read, or is refused. Whether it was."""
    health, opened = held_to_the_law(folder)
    for finding in health.findings:
        assert 0 < len(finding.text) < 3000, finding
    error = opened if isinstance(opened, CkptlabError) else None
    try:
        if not isinstance(opened, CkptlabError):
            shown = [repr(opened), repr(opened.findings), *(repr(value) for value in opened.client_state.values())]
            full = opened.full(opened.states[0], stack=False) if opened.states else {}
            shown += [name for name, array in full.items() if array.values.nbytes < 0]
    except CkptlabError as caught:
        error = caught
    text = "" if error is None else str(error)
    assert error is None or (str(folder) in text and "\n" not in text and len(text) < 3000), text
    return error is not None


# Folders of every kind


def fsdp(path: Path) -> Path:
    """What FSDP2 with tensor parallelism saved."""
    return Path(shutil.copytree(FSDP, path))


def ours(path: Path) -> Path:
    """What ckptlab writes, with its labels."""
    layouts = {".*weight": "(tp out) in", ".*bias": "out"}
    return small(path, format="dcp", dp=3, tp=2, strategy=layouts, keys="torch-flat")


def of_torchtitan(path: Path) -> Path:
    """By hand, with objects, empty chunks, and the state of one tensor."""
    folder = Folder(path)
    folder.tensor("layers.0.w", array(5, 2), [*rows(5, [0, 2, 4], 2), (3, (5, 0), (0, 2))])
    folder.tensor("norm", array(3))
    folder.tensor("optimizer.state.layers.0.w.exp_avg", array(5, 2, seed=1))
    folder.tensor("optimizer.state.layers.0.w.step", np.array(3.0, np.float32))
    folder.object("optimizer.param_groups.layers.0.w.lr", 0.5, ("optimizer", "param_groups.layers.0.w.lr"))
    folder.object("train_state", {"step": 3, "note": [1, "a"]}, ("train_state",))
    return Path(folder.write())


def of_megatron(path: Path) -> Path:
    """0.16's, stacked, with the halves of SwiGLU, experts and a master."""
    folder = megatron(path)
    shape, boxes = (
        (2, 8, 3),
        [(2 * i + tp, (i, 4 * h + 2 * tp, 0), (1, 2, 3)) for i in (0, 1) for tp in (0, 1) for h in (0, 1)],
    )
    key = "decoder.layers.mlp.linear_fc1.weight"
    folder.tensor(key, array(*shape), boxes)
    folder.tensor(f"optimizer.state.param.{key}", array(*shape), boxes)
    folder.tensor("decoder.layers.mlp.experts.experts.linear_fc2.weight", array(2, 2, 3, 2))
    folder.object("decoder.layers.mlp._extra_state/shard_0_2", [None], None)
    folder.planner = {}
    groups = {"param_groups": [{"lr": 0.5, "wd_mult": 1.0, "step": 3, "params": [0]}]}
    torchfile.write(path / "common.pt", torchfile.read(path / "common.pt") | {"optimizer": {"optimizer": groups}})
    return Path(folder.write())


def of_old_megatron(path: Path) -> Path:
    """0.12's flattened ranges."""
    key = "decoder.layers.linear.weight"
    state = f"optimizer.state.exp_avg.{key}"
    folder = megatron(path, mcore_data={state: {"nd_reformulated_orig_global_shape": (2, 4, 6)}})
    values, chunks = array(2, 4, 6), []
    for layer, tp, (a, b) in ((i, t, r) for i in (0, 1) for t in (0, 1) for r in ((0, 5), (5, 12))):
        flat = np.ascontiguousarray(values[layer, :, 3 * tp : 3 * tp + 3]).reshape(-1)
        folder.stored(state, tp, (layer, 0, tp, a), (1, 1, 1, b - a), item(flat[a:b].reshape(1, 1, 1, -1)), chunks)
    folder.entry(state, (2, 1, 2, 12), values.dtype, chunks)
    folder.tensor(key, values, [(2 * i + t, (i, 0, 3 * t), (1, 4, 3)) for i in (0, 1) for t in (0, 1)])
    folder.planner = {}
    return Path(folder.write())


def of_ranks(path: Path, numbered: bool = False) -> Path:
    """FSDP's files of each rank, of pickled DTensors."""
    path.mkdir(parents=True)
    mesh, column, norm = {"dp": 2, "tp": 2}, array(16, 3), array(3)
    strided = [placed("_StridedShard", dim=0, split_factor=2), placed("Shard", dim=0)]
    for rank in range(4):
        dp, tp = divmod(rank, 2)
        mine = column[8 * tp + 4 * dp :][:4]
        model = {
            "column": dtensor(mine, (16, 3), mesh, strided),
            "norm": dtensor(norm, (3,), mesh, [placed("Replicate"), placed("Replicate")]),
        }
        keys = [0, 1] if numbered else list(model)
        state = {keys[0]: {"exp_avg": dtensor(mine + 1, (16, 3), mesh, strided), "step": np.array(9.0, np.float32)}}
        optim = {"state": state, "param_groups": [{"lr": 0.5, "params": keys}]}
        torchfile.write(path / f"model_world_size_4_rank_{rank}.pt", model)
        torchfile.write(path / f"optim_world_size_4_rank_{rank}.pt", optim)
        torchfile.write(
            path / f"extra_state_world_size_4_rank_{rank}.pt", {"lr_scheduler": {"last_epoch": 3}, "rng": [1]}
        )
    return path


def by_number(path: Path) -> Path:
    return of_ranks(path, True)


def of_safetensors(path: Path) -> Path:
    """`.distcp` files that are safetensors, of which `.metadata` says byte 0 and the bytes of each tensor."""
    folder, tensors = Folder(path), {"a": array(4, 2), "b.c": array(3)}
    for key, values in tensors.items():
        folder.tensor(key, values)
    for info in folder.places.values():
        info.state["offset"] = 0
    for index, info in folder.places.items():
        info.state["length"] = tensors[index.fqn].nbytes
    folder.files["__0_0.distcp"] = bytearray(save(tensors))
    return Path(folder.write())


_STEPS = [(op(b"j", i), i + 1) for i in range(60)]
NESTED = {
    "a tuple of 2^60 as a key": b"\x80\x02N\x85q\x00"
    + b"".join(get * 2 + b"\x86q" + bytes([i]) for get, i in _STEPS)
    + b"}"
    + op(b"j", 60)
    + b"Ns.",
    "sizes of 2^60 as a key": b"\x80\x02ctorch\nSize\nq\xff)q\x00"
    + b"".join(b"h\xff" + get * 2 + b"\x86\x85Rq" + bytes([i]) for get, i in _STEPS)
    + b"}"
    + op(b"j", 60)
    + b"Ns.",
}

KINDS: list[tuple[Callable[[Path], Path], str]] = [
    (fsdp, ".metadata"),
    (ours, ".metadata"),
    (of_torchtitan, ".metadata"),
    (of_megatron, ".metadata"),
    (of_megatron, "common.pt"),
    (of_old_megatron, ".metadata"),
    (of_ranks, "model_world_size_4_rank_1.pt"),
    (of_ranks, "optim_world_size_4_rank_0.pt"),
    (by_number, "optim_world_size_4_rank_2.pt"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "name"), KINDS, ids=[f"{make.__name__}-{name}" for make, name in KINDS])
def test_odd_values_are_findings_and_errors_never_tracebacks(
    tmp_path: Path, make: Callable[[Path], Path], name: str
) -> None:
    folder = make(tmp_path / "run")
    assert not told(folder)
    file, old = folder / name, tmp_path / "old.pt"
    raw = file.read_bytes()
    old.write_bytes(raw)
    read = (lambda: pickles.loads(raw, name)) if name == ".metadata" else (lambda: torchfile.read(old))
    chance = random.Random(f"{make.__name__} {name}")
    found, places = 0, list(ways(read()))
    for _ in range(25):
        way, value = chance.choice(places), chance.choice(ODD)
        if way[-1][0] == "key" and isinstance(value, list | dict):
            continue  # no writer of pickles has such keys
        if name == ".metadata":
            file.write_bytes(pickles.dumps(changed(read(), way, value)))
        else:
            torchfile.write(tmp_path / "new.pt", changed(read(), way, value))
            (tmp_path / "new.pt").replace(file)
        try:
            found += told(folder)
        except Exception as error:
            raise AssertionError(f"{name}: {way} = {value!r}") from error
        file.write_bytes(raw)
    assert found > 7 or name == "common.pt"  # of which little is needed


BYTES = [
    (fsdp, ".metadata"),
    (ours, ".metadata"),
    (fsdp, "__1_0.distcp"),
    (of_torchtitan, ".metadata"),
    (of_torchtitan, "__0_0.distcp"),
    (of_megatron, "metadata.json"),
    (of_ranks, "model_world_size_4_rank_0.pt"),
    (of_ranks, "optim_world_size_4_rank_0.pt"),
    (of_safetensors, "__0_0.distcp"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "name"), BYTES, ids=[f"{make.__name__}-{name}" for make, name in BYTES])
def test_other_bytes_end_in_tensors_that_can_be_read_or_in_our_error(
    tmp_path: Path, make: Callable[[Path], Path], name: str
) -> None:
    folder = make(tmp_path / "run")
    raw = (folder / name).read_bytes()

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4),
        cut=st.none() | st.integers(0, 1 << 20),
    )
    def damage(changes: list[tuple[int, int]], cut: int | None) -> None:
        damaged = bytearray(raw)
        for at, byte in changes:
            damaged[at % len(damaged)] = byte
        (folder / name).write_bytes(damaged[: len(raw) if cut is None else cut % len(raw)])
        told(folder)

    damage()


def _flipped(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_what_ranks_keep_beside_goes_to_other_processes(tmp_path: Path) -> None:
    client = ckptlab.open(of_ranks(tmp_path / "run")).catalog.client
    assert dict(pickle.loads(pickle.dumps(client))) == dict(client)
    assert client["rank 3"] == {"lr_scheduler": {"last_epoch": 3}, "rng": [1]}


def test_a_bit_that_flipped_is_found_by_its_checksum(tmp_path: Path) -> None:
    folder = fsdp(tmp_path / "run")
    assert ckptlab.check(folder, checksums=True).healthy
    ckpt = ckptlab.open(folder)
    name = "layers.1.up.weight"
    (stored, *_) = [f.stored for holder, fs in ckpt.catalog.stored.pieces[name, "exp_avg"].items() for f in fs]
    _flipped(Path(stored.path), stored.offset + 5)
    assert ckptlab.check(folder).healthy
    (one,) = ckptlab.check(folder, checksums=True)["checksum"]
    assert (one.where.files, one.where.tensors) == ((Path(stored.path).name,), (name,))
    for form, options in (("dcp", {"mesh": Mesh(dp=1)}), ("deepspeed", {"dp": 2})):
        with pytest.raises(CkptlabError, match=rf"{name}.* has other bytes than were written"):
            ckptlab.open(folder).reshape(format=form, **options).save(tmp_path / form / "step")


@pytest.mark.slow
def test_damage_anywhere_in_items_is_found_and_never_a_traceback(tmp_path: Path) -> None:
    """Bits of an item's own header and pickle too, in tensors and objects."""
    folder, chance, seen = of_torchtitan(tmp_path / "run"), random.Random(0), 0
    file = folder / "__0_0.distcp"
    raw = file.read_bytes()
    for _ in range(80):
        _flipped(file, chance.randrange(len(raw)))
        seen += not ckptlab.check(folder, checksums=True).healthy
        file.write_bytes(raw)
    assert seen > 20  # not in padding, nor in what nobody reads of a zip


# What a stranger may say of boxes, places and counts


def one(path: Path) -> Folder:
    folder = Folder(path)
    folder.tensor("model.w", array(4, 2), rows(4, [0, 2], 2))
    return folder


def chunk(folder: Folder, i: int, **changes: Any) -> None:
    chunks = folder.entries["model.w"].state["chunks"]
    chunks[i] = chunks[i].with_attributes(**changes)


def moved(folder: Folder, i: int, **changes: Any) -> None:
    index = list(folder.places)[i]
    folder.places[index] = folder.places[index].with_attributes(**changes)


def of_size(folder: Folder, *shape: int) -> None:
    folder.entries["model.w"] = folder.entries["model.w"].with_attributes(size=Size(shape))


LIES: dict[str, tuple[Callable[[Folder], Any], str]] = {
    "a tensor of 10^24": (lambda f: of_size(f, 10**12, 10**12), "held by no chunk"),
    "a tensor beyond 64 bits": (lambda f: of_size(f, 1 << 62, 2), "expected lengths of dims"),
    "a chunk of 10^12 rows": (
        lambda f: (of_size(f, 10**12, 2), chunk(f, 0, sizes=Size((10**12, 2)))),
        "which cannot hold it",
    ),
    "a negative chunk": (lambda f: chunk(f, 0, sizes=Size((-2, 2))), "no number of elements"),
    "a chunk beyond the tensor": (lambda f: chunk(f, 1, sizes=Size((3, 2))), "reaches out of the tensor"),
    "an offset of 10^18": (lambda f: moved(f, 0, offset=10**18), "cannot|has .* bytes"),
    "a negative offset": (lambda f: moved(f, 0, offset=-4), "no place in a file"),
    "a file of NUL": (lambda f: moved(f, 0, relative_path="a\0b"), "no place in a file"),
    "a file of a lone surrogate": (lambda f: moved(f, 0, relative_path="\ud800"), "missing"),
    "an item of an item": (lambda f: moved(f, 1, relative_path="__0_0.distcp", offset=0), "in the same bytes"),
    "a folder for a file": (lambda f: moved(f, 0, relative_path="."), "missing"),
    "chunks twice": (lambda f: f.entries["model.w"].state["chunks"].append(f.entries["model.w"].chunks[0]), ""),
    "chunks of what holds them": (
        lambda f: f.entries["model.w"].state["chunks"].append(f.entries["model.w"].state["chunks"]),
        "does not say what",
    ),
    "a name of a megabyte": (lambda f: f.entries.update({"x" * 2**20: f.entries["model.w"]}), "by name"),
    "a class as a size": (
        lambda f: f.entries.update({"model.w": f.entries["model.w"].with_attributes(size=named("builtins", "exec"))}),
        "expected lengths",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_metadata_cannot_say_is_refused_with_one_message(tmp_path: Path, lie: str) -> None:
    tell, says = LIES[lie]
    folder = one(tmp_path / "run")
    tell(folder)
    path = Path(folder.write())
    if not says:  # torch loads it too
        assert not told(path)
        return
    assert told(path)
    with pytest.raises(CkptlabError, match=says) as refused:
        ckptlab.open(path)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["model_world_size_{}_rank_0.pt", "__{}.metadata", "__{}_0.distcp"])
@pytest.mark.parametrize("number", ["999999999", "9" * 200])
def test_names_that_tell_of_a_billion_ranks(tmp_path: Path, name: str, number: str) -> None:
    (tmp_path / name.format(number)).write_bytes(b"")
    with pytest.raises(CkptlabError):
        ckptlab.open(tmp_path)


@pytest.mark.parametrize("axes", [{"tp": 10**12}, {"tp": 1 << 62, "pp": 1 << 62}, {"tp": -1}, {"pp": "x"}])
def test_a_mesh_that_megatrons_args_cannot_mean(tmp_path: Path, axes: dict[str, Any]) -> None:
    folder = of_megatron(tmp_path / "run")
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
    args = foreign("argparse", "Namespace", state={names[axis]: n for axis, n in axes.items()})
    torchfile.write(folder / "common.pt", {"args": args, "iteration": 5})
    told(folder)


@pytest.mark.parametrize("name", ["../../outside", "/etc/x", "a/../../b", "..", "a\0b", "\ud800", "x" * 300, "a/b", ""])
@pytest.mark.parametrize("form", ["universal", "dcp", "safetensors", "deepspeed"])
def test_names_of_tensors_never_lead_out_of_a_destination(tmp_path: Path, name: str, form: str) -> None:
    folder = Folder(tmp_path / "in" / "run")
    weight = array(4, 2)
    folder.tensor("model.w", weight, path=("model", name))
    for state in ("exp_avg", "exp_avg_sq"):
        folder.tensor(f"optimizer.state.w.{state}", weight, path=("optimizer", "state", name, state))
    folder.tensor("optimizer.state.w.step", np.array(3.0, np.float32), path=("optimizer", "state", name, "step"))
    group = [{"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "params": [name]}]
    folder.object("optimizer.param_groups", group, ("optimizer", "param_groups"))
    path = Path(folder.write())
    (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    try:
        ckpt = ckptlab.open(path)
        if form == "safetensors":
            ckptlab.save_weights(ckpt, tmp_path / "out" / "a" / "b")
        else:
            ckpt.reshape(format=form, dp=1).save(tmp_path / "out" / "a" / "b")
    except CkptlabError as error:
        said = str(error)
    else:
        said = ""
    assert len(said) < 3000
    made = set(tmp_path.rglob("*")) - set(before)
    assert all(p.is_relative_to(tmp_path / "out" / "a") for p in made), made


@pytest.mark.slow
@pytest.mark.parametrize("bomb", [*BOMBS, *NESTED])
def test_a_metadata_costs_little_whatever_it_asks_for(tmp_path: Path, bomb: str) -> None:
    (tmp_path / ".metadata").write_bytes((BOMBS | NESTED)[bomb])
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    said, memory = cost("dcp", tmp_path)
    assert said.startswith(str(tmp_path))
    assert len(said) < 1000
    assert memory < 600 << 10
