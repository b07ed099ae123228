"""The labelled views: what they hold is the truth, what they read is what was asked for."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
import pytest
import xarray as xr
from compare import GPT, ZERO2, ZERO3
from helpers.arrays import EXPERTS, cut, mixture, store
from helpers.files import refuse_reading
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ckptlab import views
from ckptlab.arrays import gather, reader
from ckptlab.arrays.lazy import Gathered, Padded, Stacked, variable
from ckptlab.catalog import Catalog, Extents, Fragment, Tensor, placements_of
from ckptlab.catalog.stacks import stacks
from ckptlab.errors import CheckpointError, UnknownNameError
from ckptlab.formats import read
from ckptlab.layout import Cut, Layout
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder, Placement
from ckptlab.reshaping import Reshape

EMBEDDING = "tied_modules.embed.word_embeddings.weight"
POSITIONS = "tied_modules.embed.position_embeddings.weight"
QKV = "self_attention.query_key_value.weight"


@pytest.fixture(scope="module")
def gpt() -> Catalog:
    return read(GPT)


@pytest.fixture(scope="module")
def truth() -> dict[str, np.ndarray]:
    return load_file(GPT / "truth.safetensors")


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """(tensor, sizes) of every box that is gathered."""
    seen = []
    real = Gathered.read_into, Gathered.read

    def read_into(self: Gathered, out: np.ndarray, index: Any) -> None:
        note(self, index)
        real[0](self, out, index)

    def read(self: Gathered, index: Any) -> np.ndarray:
        note(self, index)
        return real[1](self, index)

    def note(self: Gathered, index: Any) -> None:
        sizes = (len(np.atleast_1d(np.arange(n)[k])) for k, n in zip(index, self.shape, strict=True))
        seen.append((self.reader.name, tuple(sizes)))

    monkeypatch.setattr(Gathered, "read_into", read_into)
    monkeypatch.setattr(Gathered, "read", read)
    return seen


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_reading(monkeypatch)


def bits(array: xr.DataArray) -> bytes:
    return array.values.tobytes()


def assert_same(a: xr.Dataset, b: xr.Dataset) -> None:
    """Bit for bit (xarray finds no bfloat16 array equal to another)."""
    assert a.drop_vars(a.data_vars).identical(b.drop_vars(b.data_vars))
    assert {n: (v.dims, v.dtype, bits(v)) for n, v in a.items()} == {
        n: (v.dims, v.dtype, bits(v)) for n, v in b.items()
    }


# -------------------------------------------------------------------------------- full


@pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3], ids=lambda c: c.name)
def test_by_name_every_state_is_the_truth(case: Path) -> None:
    catalog = read(case)
    found = {s: views.Full(catalog).by_name(s) for s in catalog.states}
    checked = 0
    for key, expected in load_file(case / "truth.safetensors").items():
        state, name = key.split("/", 1)
        state = "param" if state in ("frozen", "buffer") else state
        if name not in found.get(state, ()):
            assert case == ZERO3  # which stores no module weights of its parameters
            assert state == "param"
            continue
        array = found[state][name]
        assert (array.shape, bits(array)) == (expected.shape, expected.tobytes()), key
        assert (array.name, array.dims) == (name, catalog[name].dims)
        checked += 1
    assert checked > 100


def test_layers_stand_in_one_node_with_their_stages(gpt: Catalog, truth: dict[str, np.ndarray]) -> None:
    tree = views.Full(gpt).tree()
    assert len(tree.children) == 16  # 2 embeddings, 12 tensors of a layer, weight and bias of the last norm
    node = tree[QKV]
    assert node.dims == {"layer": 4, "out": 48, "in": 16}
    assert node["layer"].values.tolist() == [2, 3, 4, 5]
    assert node["pp"].values.tolist() == [0, 0, 1, 1]
    assert (tree["6.weight"].dims, int(tree["6.weight"]["pp"])) == ({"out": 16}, 1)
    assert node.attrs == {
        "name": f"{{layer}}.{QKV}",
        "kind": "parameter",
        "layout": "(tp out) in",
        "group": "decay",
    }
    for layer in range(2, 6):
        for state in gpt.states:
            assert bits(node[state].sel(layer=layer)) == truth[f"{state}/{layer}.{QKV}"].tobytes()
    assert tree[EMBEDDING].master.shape == (101, 16)


def test_a_curve_over_depth_in_one_line(gpt: Catalog, truth: dict[str, np.ndarray]) -> None:
    curve = views.Full(gpt, None, ["master", "param"], "float32").tree().std(["out", "in"])[QKV]
    for state in ("master", "param"):
        expected = [truth[f"{state}/{layer}.{QKV}"].astype(float).std() for layer in range(2, 6)]
        np.testing.assert_allclose(curve[state], expected, rtol=1e-5)


def test_states_are_chosen_and_aliases_found(gpt: Catalog) -> None:
    assert set(views.Full(gpt, None, ["exp_avg"]).tree()[QKV].data_vars) == {"exp_avg"}
    tied = read(ZERO2)
    by_name = views.Full(tied).by_name("master")
    assert by_name["lm_head.weight"].identical(by_name["wte.weight"])
    assert "lm_head.weight" in by_name
    assert by_name.get("nothing") is None
    with pytest.raises(UnknownNameError, match=r"did you mean wte\.weight"):
        by_name["wte.wight"]
    frozen = next(t.name for t in tied.tensors.values() if t.kind == "frozen")
    assert frozen not in by_name
    with pytest.raises(KeyError, match="it has param"):
        by_name[frozen]
    assert list(views.Full(tied).by_name()[frozen].data_vars) == ["param"]


def test_stacks_keep_apart_what_is_not_alike() -> None:
    def tensor(name: str, shape: tuple[int, ...] = (4, 2), **fields: Any) -> Tensor:
        layout = Layout("out in")
        states = {"master": np.dtype(np.float32)}
        return replace(Tensor(name, shape, layout, layout.resolve(shape, Mesh()), "parameter", states, 0), **fields)

    found = stacks(
        [
            tensor("a.0.w"),
            tensor("a.10.w"),
            tensor("a.2.w"),
            tensor("a.3.w", (6, 2)),
            tensor("a.4.w", (6, 2)),
            tensor("a.5.w", kind="frozen"),
            tensor("b.0.e.0.w"),
            tensor("b.0.e.1.w"),
            tensor("b.1.e.0.w"),
            tensor("b.1.e.1.w"),
            tensor("c.0.w", stages=(0, 1)),
            tensor("c.1.w", stages=(0, 1)),
            tensor("7"),
            tensor("8"),
            tensor("d.01.w"),
            tensor("d.1.w"),
        ]
    )
    assert [(s.name, s.numbers) for s in found] == [
        ("a.w[0…]", (0, 2, 10)),
        ("a.w[3…]", (3, 4)),
        ("a.5.w", None),
        ("b.e.0.w", (0, 1)),
        ("b.e.1.w", (0, 1)),
        *((name, None) for name in ("c.0.w", "c.1.w", "7", "8", "d.01.w", "d.1.w")),
    ]


# -------------------------------------------------------------------------------- what is read


def test_opening_selecting_and_drawing_read_nothing(gpt: Catalog, no_reading: None) -> None:
    for tree in (views.Full(gpt).tree(), views.Shards(gpt).tree(), views.Flat(gpt).tree()):
        repr(tree)
        tree._repr_html_()
        again = pickle.loads(pickle.dumps(tree))
        for node in again.subtree:
            for array in node.data_vars.values():
                if not array.name.endswith("_numel"):
                    some = {dim: [0] for dim in array.dims[1:]}
                    repr(array.transpose().isel(dict.fromkeys(array.dims[:1], 0)).isel(some))
        with pytest.raises(AssertionError, match="is read"):
            next(n for n in again.leaves).load()


def test_a_layer_and_rows_are_read_alone(gpt: Catalog, boxes: list[Any]) -> None:
    node = views.Full(gpt).tree()[QKV]
    node.master.sel(layer=3).load()
    assert boxes == [(f"3.{QKV}", (48, 16))]
    boxes.clear()
    node.master.isel(layer=[3, 0], out=slice(5, 9)).transpose("in", "out", "layer").load()
    assert sorted(boxes) == [(f"2.{QKV}", (4, 16)), (f"5.{QKV}", (4, 16))]
    boxes.clear()
    views.Shards(gpt).tree()[QKV].master.sel(tp=1, layer=4, drop=True).load()
    assert boxes == [(f"4.{QKV}", (24, 16))]


def test_of_a_stack_the_layers_that_are_looked_at_are_made(gpt: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def noted(catalog: Catalog, name: str, state: str) -> Any:
        made.append(name)
        return reader(catalog, name, state)

    monkeypatch.setattr("ckptlab.views.tensors.reader", noted)
    node = views.Full(gpt, states=("master",)).tree()[QKV]
    layers = node.layer.values.tolist()
    assert [name for name in made if name.endswith(QKV)] == [f"{layers[0]}.{QKV}"]
    made.clear()
    for _ in range(2):
        node.master.sel(layer=layers[-1]).load()
    assert made == [f"{layers[-1]}.{QKV}"]


def test_pickles_hold_paths_not_catalogs_nor_data(gpt: Catalog) -> None:
    for view in (views.Full(gpt).tree(), views.Shards(gpt).tree(), views.Flat(gpt).tree()):
        assert b"Catalog" not in pickle.dumps(view)
    whole = views.Full(gpt).by_name("master")[EMBEDDING]
    before = len(pickle.dumps(whole))
    again = pickle.loads(pickle.dumps(whole))
    assert bits(again) == bits(whole)
    assert before < whole.nbytes
    target = Reshape.of(gpt, Mesh(tp=4, dp=2)).target
    buffer = views.Flat(gpt, target).tree()["pp0/group0"].exp_avg
    again = pickle.loads(pickle.dumps(buffer))
    assert b"Catalog" not in pickle.dumps(buffer)
    assert bits(again) == bits(buffer)


def test_dask_reads_a_layer_at_a_time(gpt: Catalog, boxes: list[Any]) -> None:
    pytest.importorskip("dask")
    node = views.Full(gpt, dtype="float32").tree()[QKV].to_dataset()
    chunked = node.chunk({"layer": 1})
    assert chunked.param.chunks == ((1, 1, 1, 1), (48,), (16,))
    assert boxes == []
    assert len(pickle.dumps(chunked.param.data.dask)) < 10_000
    total = chunked.param.isel(layer=[1, 2]).sum(["out", "in"]).compute(scheduler="synchronous")
    assert sorted(name for name, _ in boxes) == [f"3.{QKV}", f"4.{QKV}"]
    np.testing.assert_allclose(total, node.param.isel(layer=[1, 2]).sum(["out", "in"]), rtol=1e-6)


def test_ten_thousand_tensors_by_name_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, states = Layout("(tp out) in"), {"master": np.dtype(np.float32)}
    cut = layout.resolve((8, 2), Mesh(tp=2))
    names = [f"{i}.{j}.weight" for i in range(1000) for j in "abcdefghij"]
    pieces = {(n, "master"): {Holder(pp=0, tp=tp): () for tp in range(2)} for n in names}
    tensors = {n: Tensor(n, (8, 2), layout, cut, "parameter", states) for n in names}
    outside = dict.fromkeys(pieces, (0,))
    catalog = Catalog("", "test", Mesh(tp=2), tensors, placements_of(tensors, [], outside), Extents(pieces))
    made = []
    monkeypatch.setattr(views.tensors, "reader", lambda *a: made.append(a) or reader(*a))
    by_name = views.Full(catalog).by_name("master")
    assert (len(by_name), list(by_name) == names, made) == (10_000, True, [])
    assert by_name["999.j.weight"].shape == (8, 2)
    assert len(made) == 1


# -------------------------------------------------------------------------------- any index, any layout


@pytest.mark.slow
@given(cut(), st.booleans(), st.booleans(), st.data())
@settings(max_examples=100)
def test_any_index_of_any_view_is_that_of_the_whole(
    layout: Cut, zero3: bool, mapped: bool, data: st.DataObject
) -> None:
    whole = np.arange(np.prod(layout.shape), dtype=np.float32).reshape(layout.shape) + 1
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(gather, "MAPPED", 1 if mapped else gather.MAPPED)  # bytes: whatever lies in one piece is mapped
        catalog = store(Path(folder), layout, whole, zero3, 3)
        full = views.Full(catalog).by_name("master")["w"]
        shards = views.Shards(catalog).by_name("master")["w"]
        rows, columns = layout.logical
        for lazy, expected in (
            (full, whole[:rows, :columns]),
            (shards, _padded_shards(layout, whole)),
        ):
            reference = xr.DataArray(expected, dims=lazy.dims)
            order = data.draw(st.permutations(lazy.dims))
            index = {d: data.draw(_index(n)) for d, n in lazy.sizes.items() if n and data.draw(st.booleans())}
            found = lazy.drop_vars(list(lazy.coords)).transpose(*order).isel(index)
            rest = [d for d in order if d in found.dims]
            found = found.transpose(*reversed(rest))
            wanted = reference.transpose(*order).isel(index).transpose(*reversed(rest))
            assert found.dims == wanted.dims
            np.testing.assert_array_equal(found.values, wanted.values)
            assert found.shape == found.values.shape


def _index(n: int) -> st.SearchStrategy[Any]:
    """Negative steps go through the whole dim: of other such slices xarray itself gets the empty ones wrong."""
    places, ends = st.integers(-n, n - 1), st.none() | st.integers(-n - 1, n + 1)
    forwards = st.builds(slice, ends, ends, st.sampled_from([None, 1, 2, 3]))
    backwards = st.builds(slice, st.none(), st.none(), st.sampled_from([-1, -2]))
    return places | forwards | backwards | st.lists(places, max_size=4)


def _padded_shards(layout: Cut, whole: np.ndarray) -> np.ndarray:
    parts = [layout.take(whole, layout.coordinate({"tp": tp})) for tp in range(layout.mesh.tp)]
    out = np.zeros((len(parts), *np.max([p.shape for p in parts], axis=0)), whole.dtype)
    for slot, part in zip(out, parts, strict=True):
        slot[: part.shape[0], : part.shape[1]] = part
    return out


def test_vectorised_and_boolean_selection(gpt: Catalog) -> None:
    lazy = views.Full(gpt).tree()[QKV].master
    loaded = lazy.copy(data=lazy.values)
    points = {"layer": xr.DataArray([0, 3, 3], dims="p"), "in": xr.DataArray([1, 0, 15], dims="p")}
    np.testing.assert_array_equal(lazy.isel(points), loaded.isel(points))
    np.testing.assert_array_equal(lazy.transpose("in", ...).isel(points), loaded.transpose("in", ...).isel(points))
    late = lazy.pp == 1
    np.testing.assert_array_equal(lazy.isel(layer=late.values), loaded.isel(layer=late.values))


def test_padding_of_a_child_is_zero() -> None:
    rows = np.arange(1, 7, dtype=np.float32).reshape(2, 3)

    class Held(Gathered):
        def __init__(self) -> None:
            self.shape, self.dtype = rows.shape, rows.dtype

        def read(self, index: Any, empty: Any = np.empty) -> np.ndarray:
            return rows[np.ix_(*index)] if all(isinstance(k, np.ndarray) for k in index) else rows[index]

    lazy = variable(("n", "a", "b"), Stacked([Padded(Held(), (4, 5))] * 2))
    expected = np.zeros((2, 4, 5), np.float32)
    expected[:, :2, :3] = rows
    for index in [{}, {"a": 3}, {"a": 1, "b": slice(None, None, -2)}, {"n": [1], "b": [4, 0]}, {"a": slice(3, 1)}]:
        np.testing.assert_array_equal(lazy.isel(index).values, xr.Variable(lazy.dims, expected).isel(index).values)


# -------------------------------------------------------------------------------- shards


def test_shards_are_what_each_rank_stored(gpt: Catalog, truth: dict[str, np.ndarray]) -> None:
    tree = views.Shards(gpt).tree()
    for node in tree.children.values():
        layers = node["layer"].values.tolist() if "layer" in node.coords else [None]
        for layer in layers:
            name = node.attrs["name"].format(layer=layer)
            held = node.to_dataset() if layer is None else node.to_dataset().sel(layer=layer)
            tensor = gpt[name]
            for state in gpt.states:
                array = held[state] if "pp" not in held[state].dims else held[state].sel(pp=0)
                assert array.dims == ("tp", *tensor.dims)
                whole = np.zeros(tensor.cut.shape, truth[f"{state}/{name}"].dtype)
                whole[tuple(map(slice, tensor.shape))] = truth[f"{state}/{name}"]
                for tp in range(2):
                    at = tensor.cut.coordinate({"tp": tp})
                    mine, expected = array.sel(tp=tp), tensor.cut.take(whole, at)
                    if tensor.layout.padded:  # what padding holds is the ranks' own affair
                        true = [min(56, 101 - 56 * tp), 16]
                        mine, expected = mine[: true[0]], expected[: true[0]]
                    assert bits(mine) == np.ascontiguousarray(expected).tobytes(), (name, state, tp)
    assert tree[QKV]["pp"].dims == ("layer",)


def test_vocabulary_padding_is_shown_in_shards_alone(gpt: Catalog) -> None:
    padded = views.Shards(gpt).tree()[EMBEDDING].master
    assert padded.shape == (2, 2, 56, 16)
    assert (padded.sel(pp=0, tp=1)[45:] != 0).any()  # DeepSpeed trains it too


def test_stages_that_hold_copies_have_a_dim(gpt: Catalog) -> None:
    node = views.Shards(gpt).tree()[POSITIONS].to_dataset()
    assert node["pp"].values.tolist() == [0, 1]
    assert node.exp_avg.dims == ("pp", "tp", "out", "in")
    assert node.param.dims == ("tp", "out", "in")  # stored by the first stage alone
    assert not node.exp_avg.sel(pp=0).equals(node.exp_avg.sel(pp=1))  # the last stage does not train its copy
    for stage in (0, 1):
        own = np.concatenate([f.stored.flat for f in gpt.fragments(POSITIONS, "exp_avg", Holder(pp=stage, tp=1))])
        assert bits(node.exp_avg.sel(pp=stage, tp=1)) == own.tobytes()
    first = views.Shards(gpt, None, ["param"]).tree()[POSITIONS]
    assert int(first["pp"]) == 0


def test_a_state_that_some_stages_lack_is_shown_once() -> None:
    layout, states = Layout("out"), dict.fromkeys(("all", "some"), np.dtype(np.float32))
    outside = {("w", "all"): (0, 1, 2), ("w", "some"): (0, 1)}
    pieces = {key: {Holder(pp=stage, tp=0): () for stage in stages} for key, stages in outside.items()}
    tensor = Tensor("w", (4,), layout, layout.resolve((4,), Mesh(pp=3)), "frozen", states, stages=(0, 1, 2))
    tensors = {"w": tensor}
    catalog = Catalog("", "test", Mesh(pp=3), tensors, placements_of(tensors, [], outside), Extents(pieces))
    node = views.Shards(catalog).by_name()["w"]
    assert (node["all"].dims, node["some"].dims) == (("pp", "tp", "out"), ("tp", "out"))


@pytest.mark.parametrize("text", ["out in", "((tp q) + k) in"])
def test_each_rank_shows_its_own_copy(text: str, tmp_path: Path) -> None:
    layout = Layout(text, totals={"k": 12} if "k" in text else {})
    cut = layout.resolve((24, 6), Mesh(tp=2))
    catalog = store(tmp_path, cut, np.ones(cut.shape, np.float32), False, 0)
    file = Path(catalog.fragments("w", "master", Holder(pp=0, tp=1))[0].stored.path)
    size = file.stat().st_size - 4
    file.write_bytes(b"head" + np.full(size // 4, 2, np.float32).tobytes())
    held = views.Shards(catalog).by_name("master")["w"]
    assert held.sel(tp=0).values.tolist() == np.ones(held.shape[1:]).tolist()
    assert held.sel(tp=1).values.tolist() == np.full(held.shape[1:], 2).tolist()


def test_shards_of_unequal_width_say_their_extents(tmp_path: Path) -> None:
    cut = Layout("(tp out) in", sizes={"out": (3, 2)}).resolve((5, 4), Mesh(tp=2))
    whole = np.arange(1, 21, dtype=np.float32).reshape(5, 4)
    catalog = store(tmp_path, cut, whole, False, 1)
    held = views.Shards(catalog).by_name("master")["w"]
    assert held["out_extent"].values.tolist() == [3, 2]
    assert "in_extent" not in held.coords
    np.testing.assert_array_equal(held.sel(tp=1), np.vstack([whole[3:], np.zeros((1, 4))]))


# -------------------------------------------------------------------------------- buffers and targets


@pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3], ids=lambda c: c.name)
def test_buffers_are_what_the_files_hold(case: Path) -> None:
    catalog = read(case)
    tree = views.Flat(catalog).tree()
    assert len(tree.leaves) == len(catalog.flat_groups)
    seen: dict[tuple[int, int], int] = {}
    for group in catalog.flat_groups:
        place = seen[group.stage, group.group] = seen.get((group.stage, group.group), -1) + 1
        path = f"pp{group.stage}/group{group.group}"
        several = sum((g.stage, g.group) == (group.stage, group.group) for g in catalog.flat_groups) > 1
        node = tree[f"{path}/sub{place}" if several else path].to_dataset()
        for state in group.dtypes:
            for holder, row in catalog.stored.partitions[group.key, state].items():
                tp = holder["tp"]
                for dp, stored in enumerate(row):
                    array = node[state].sel(tp=tp, dp=dp)
                    assert int(node[f"{state}_numel"].sel(tp=tp, dp=dp)) == stored.numel
                    assert bits(array[: stored.numel]) == stored.flat.tobytes()
                    assert not array[stored.numel :].any()
                    middle = array[stored.numel // 3 : stored.numel : 2]
                    np.testing.assert_array_equal(middle, stored.flat[stored.numel // 3 :: 2])
    if case == ZERO2:  # whose last partition is stored without its padding
        lengths = tree["pp0/group0"].to_dataset()
        assert int(lengths.master_numel.min()) < lengths.sizes["flat"]


# -------------------------------------------------------------------------------- other axes than pp, dp and tp


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_experts_have_a_dim_ep_and_are_cut_over_edp(zero_stage: int, tmp_path: Path) -> None:
    catalog, wholes = mixture(tmp_path, zero_stage=zero_stage, apart=0.5)
    full = views.Full(catalog).tree()
    assert all(np.array_equal(full[name].fp32, whole) for name, whole in wholes.items())

    shards = views.Shards(catalog).tree()
    assert {n: shards[n].fp32.dims for n in wholes} == {
        "gate": ("tp", "out", "in"),
        "expert.1": ("tp", "out", "in"),
        "experts": ("ep", "tp", *catalog["experts"].dims),
    }
    assert shards["expert.1"].fp32.coords["ep"] == 1
    for tp in range(2):
        assert np.array_equal(shards["gate"].fp32.sel(tp=tp), wholes["gate"][4 * tp :][:4])
        assert np.array_equal(shards["expert.1"].fp32.sel(tp=tp), wholes["expert.1"][:, 3 * tp :][:, :3])
        for ep in range(2):  # each tp rank's copy is its own
            mine = shards["experts"].fp32.sel(ep=ep, tp=tp)
            assert np.array_equal(mine, wholes["experts"][2 * ep :][:2] + 0.5 * tp)

    buffers = views.Flat(catalog).tree()
    paths = {"gate": "pp0/group0", "expert.1": "pp0/group1/ep1", "experts": "pp0/group2"}
    assert {name: buffers[path].fp32.shape[:-1] for name, path in paths.items()} == {
        "gate": (2, 4),
        "expert.1": (2, 2),
        "experts": (2, 2, 2),
    }
    assert [buffers[path].fp32.dims for path in paths.values()] == [
        ("tp", "dp", "flat"),
        ("tp", "edp", "flat"),
        ("ep", "tp", "edp", "flat"),
    ]
    for group, path in zip(catalog.flat_groups, paths.values(), strict=True):
        for holder, row in catalog.stored.partitions[group.key, "fp32"].items():
            for d, stored in enumerate(row):
                at = {axis: holder[axis] for axis in group.axes}
                assert bits(buffers[path].fp32.sel({**at, group.over: d})) == stored.flat.tobytes()


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_experts_on_another_mesh_are_gathered_from_here(zero_stage: int, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    source, _ = mixture(tmp_path / "here")
    mesh = Mesh(dp=12, tp=1).split("dp", edp=3, ep=4)
    there, _ = mixture(tmp_path / "there", mesh, zero_stage=zero_stage)
    target = replace(there, extents=None)
    for view in (views.Shards, views.Flat):
        xr.testing.assert_identical(view(source, target).tree().load(), view(there).tree().load())


def test_who_reads_a_rank_of_a_split_axis() -> None:
    """A flat buffer that all of dp share is cut over its parts run together; one of experts over edp alone."""
    catalog = Catalog("", "", EXPERTS, {}, {})
    gate = Placement(Cut.whole((8,), catalog.mesh))
    assert [p.tolist() for p in map(gate.ranks, gate.holders)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    expert = Placement(Cut.whole((8,), catalog.mesh), at={"ep": 1})
    assert [p.tolist() for p in map(expert.ranks, expert.holders)] == [[2, 6], [3, 7]]


TARGETS = [
    (GPT, Mesh(tp=4, dp=1), {}),
    (GPT, Mesh(pp=2, dp=3), {}),
    (GPT, Mesh(tp=2, pp=4, dp=2), {"dtype": "fp16"}),
    (ZERO2, Mesh(dp=3), {"zero_stage": 3}),
    (ZERO3, Mesh(dp=3), {"zero_stage": 1}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mesh", "options"), TARGETS, ids=[f"{c.name} {m}" for c, m, _ in TARGETS])
def test_views_of_a_target_are_those_of_what_is_then_saved(
    case: Path, mesh: Mesh, options: dict[str, Any], tmp_path: Path
) -> None:
    source = read(case)
    reshape = Reshape.of(source, mesh, **options)
    reshape.save(tmp_path / "global_step3")
    saved = read(tmp_path / "global_step3")
    foreseen, found = views.Shards(source, reshape.target).tree(), views.Shards(saved).tree()
    assert foreseen.children.keys() == found.children.keys()
    for name, node in found.children.items():
        assert_same(foreseen[name].to_dataset(), node.to_dataset())
    foreseen, found = views.Flat(source, reshape.target).tree(), views.Flat(saved).tree()
    for node in found.leaves:
        expected = foreseen[node.path].to_dataset()
        for state in reshape.target.flat_groups[0].dtypes:
            assert bits(expected[state]) == bits(node[state]), (node.path, state)


# -------------------------------------------------------------------------------- xarray's engine


def test_the_engine_opens_trees_and_single_tensors(gpt: Catalog) -> None:
    tree = xr.open_datatree(GPT, engine="ckptlab", drop_variables="exp_avg")
    assert set(tree[QKV].data_vars) == {"master", "exp_avg_sq", "param"}
    assert xr.open_datatree(str(GPT)).children.keys() == tree.children.keys()  # the engine is guessed
    shards = xr.open_datatree(GPT, engine="ckptlab", view="shards")
    assert shards[EMBEDDING].master.dims == ("pp", "tp", "out", "in")
    groups = xr.open_datatree(GPT, engine="ckptlab", view="flat", drop_variables=["master"])
    assert "master" not in groups["pp1/group0"].data_vars
    one = xr.open_dataset(GPT, engine="ckptlab", tensor=f"4.{QKV}")
    assert one.master.shape == (48, 16)
    np.testing.assert_array_equal(one.master, tree[QKV].master.sel(layer=4))
    several = xr.open_dataset(GPT, engine="ckptlab", tensor=QKV, view="shards", drop_variables=["master"])
    assert several.param.dims == ("layer", "tp", "out", "in")
    assert "master" not in several
    assert xr.open_dataset(GPT, engine="ckptlab", tensor="pp0/group1", view="flat").sizes["dp"] == 2


def test_the_engine_takes_xarrays_own_words() -> None:
    """A group is a node; what is asked of files with CF conventions has nothing to do here."""
    one = xr.open_dataset(GPT, engine="ckptlab", group=f"4.{QKV}")
    assert one.identical(xr.open_dataset(GPT, engine="ckptlab", tensor=f"4.{QKV}"))
    assert one.identical(xr.open_dataset(GPT, engine="deepspeed", group=f"/4.{QKV}"))
    assert list(xr.open_datatree(GPT, engine="ckptlab", group=QKV).data_vars) == list(one.data_vars)
    conventions = ("mask_and_scale", "decode_times", "decode_timedelta", "concat_characters", "decode_coords")
    for options in ({"decode_cf": False}, {"decode_cf": True}, dict.fromkeys(conventions, False)):
        assert xr.open_dataset(GPT, engine="ckptlab", group=f"4.{QKV}", **options).identical(one)
    assert "master" in xr.open_groups(GPT, engine="ckptlab", decode_cf=False)[f"/{QKV}"]
    with pytest.raises(TypeError, match="no option 'tensr': it has drop_variables, group"):
        xr.open_dataset(GPT, engine="ckptlab", tensr=QKV)
    with pytest.raises(CheckpointError, match="path of its folder, not by list"):
        xr.open_dataset([GPT, GPT], engine="ckptlab", group=QKV)


def test_the_engine_cuts_by_layers_for_dask() -> None:
    pytest.importorskip("dask")
    opened = xr.open_dataset(GPT, engine="ckptlab", tensor=QKV, chunks={}, dtype="float32")
    assert opened.param.chunks == ((1, 1, 1, 1), (48,), (16,))
    np.testing.assert_array_equal(opened.param, xr.open_dataset(GPT, engine="ckptlab", tensor=QKV).param)


def test_the_engine_refuses_with_what_there_is(tmp_path: Path) -> None:
    for options, message in [
        ({}, "holds 52 tensors"),
        ({"tensor": f"4.{QKV}s"}, "did you mean"),
        ({"tensor": "pp7/group0", "view": "flat"}, "pp0/group0, pp0/group1"),
        ({"tensor": QKV, "view": "whole"}, "expected one of full, shards, flat"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            xr.open_dataset(GPT, engine="ckptlab", **options)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        xr.open_datatree(tmp_path, engine="ckptlab")


def test_the_engine_guesses_its_own_folders_alone(tmp_path: Path) -> None:
    from ckptlab.views.engine import CkptlabBackend

    guess = CkptlabBackend().guess_can_open
    assert all(guess(p) for p in (GPT, str(GPT), GPT / "global_step3", GPT / "universal"))
    (tmp_path / "latest").write_text("nowhere")
    (tmp_path / "zarr.zarr").mkdir()
    wrong = (tmp_path, tmp_path / "zarr.zarr", GPT / "truth.safetensors", tmp_path / "none", b"bytes", None)
    assert not any(guess(p) for p in wrong)


def test_what_is_outside_flat_buffers_is_pickled_too(gpt: Catalog) -> None:
    assert isinstance(gpt.fragments(QKV.join(["3.", ""]), "param", Holder(pp=0, tp=0))[0], Fragment)
    held = views.Shards(gpt).by_name("param")[f"3.{QKV}"]
    assert bits(pickle.loads(pickle.dumps(held))) == bits(held)
