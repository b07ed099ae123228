"""Meshes: DeepSpeed's rank order, groups, sub-axes."""

import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptlab.errors import InputError, MeshError
from ckptlab.mesh import Mesh

degrees = st.integers(1, 4)


@settings(deadline=None)
@given(degrees, degrees, degrees)
def test_rank_is_deepspeeds(pp, dp, tp):
    mesh = Mesh(pp=pp, dp=dp, tp=tp)
    for p in range(pp):
        for d in range(dp):
            for t in range(tp):
                rank = (p * dp + d) * tp + t
                assert mesh.rank(pp=p, dp=d, tp=t) == rank
                assert mesh.coordinate(rank) == {"pp": p, "dp": d, "tp": t}


def test_axes_always_exist_and_others_come_first():
    assert Mesh(tp=2).degrees == {"pp": 1, "dp": 1, "tp": 2}
    mesh = Mesh(tp=2, cp=3, pp=2)
    assert mesh.axes == ("cp", "pp", "dp", "tp")
    assert (mesh.pp, mesh.dp, mesh.tp, mesh["cp"], mesh.size) == (2, 1, 2, 3, 12)
    assert mesh.rank(cp=1, pp=0, tp=0) == 4


def test_a_value():
    mesh = Mesh(pp=2, dp=4, tp=2)
    assert mesh == Mesh(tp=2, dp=4, pp=2)
    assert hash(mesh) == hash(Mesh(tp=2, dp=4, pp=2))
    assert pickle.loads(pickle.dumps(mesh)) == mesh
    assert mesh != mesh.split("dp", edp=2, ep=2)
    with pytest.raises(AttributeError):
        mesh.other = 1


def test_repr_and_str():
    assert repr(Mesh(pp=2, dp=2, tp=2)) == "Mesh(pp=2, dp=2, tp=2)"
    assert str(Mesh(pp=3, dp=4, tp=2)) == "tp 2 · pp 3 · dp 4"
    split = Mesh(cp=3, dp=4, tp=6).split("dp", edp=2, ep=2).split("tp", kv=2, rep=3)
    assert eval(repr(split)) == split
    assert str(split) == "tp 6 · pp 1 · dp 4 · cp 3 · edp 2 · ep 2 · kv 2 · rep 3"


def test_ranks_and_groups():
    mesh = Mesh(pp=2, dp=2, tp=2)
    assert mesh.ranks(pp=1, tp=0) == [4, 6]
    assert mesh.ranks() == list(range(8))
    assert mesh.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]


@settings(deadline=None)
@given(degrees, degrees, degrees)
def test_groups_partition_the_ranks(pp, dp, tp):
    mesh = Mesh(pp=pp, dp=dp, tp=tp)
    for axis in mesh.axes:
        groups = mesh.groups(axis)
        assert sorted(rank for group in groups for rank in group) == mesh.ranks()
        for group in groups:
            others = [{a: k for a, k in mesh.coordinate(rank).items() if a != axis} for rank in group]
            assert all(other == others[0] for other in others)


def test_split_keeps_ranks_and_the_whole_axis():
    mesh = Mesh(pp=2, dp=6, tp=2)
    split = mesh.split("dp", edp=3, ep=2)
    assert split.axes == ("pp", "edp", "ep", "tp")
    assert split.dp == split["dp"] == 6
    for rank in mesh.ranks():
        whole, parts = mesh.coordinate(rank), split.coordinate(rank)
        assert parts["edp"] * 2 + parts["ep"] == whole["dp"] == split.index("dp", parts)
        assert split.rank(**whole) == split.rank(**parts) == rank
    assert split.groups("dp") == mesh.groups("dp")
    assert split.ranks(dp=4) == mesh.ranks(dp=4)


def test_replace():
    assert Mesh(pp=2, dp=2).replace(dp=4, tp=2) == Mesh(pp=2, dp=4, tp=2)
    split = Mesh(dp=4).split("dp", edp=2, ep=2)
    assert split.replace(edp=4).dp == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: m.split("dp", edp=3, ep=2), r"edp\(3\) \* ep\(2\) != dp\(4\)"),
        (lambda m: m.split("dp", tp=2, ep=2), "already has 'tp'"),
        (lambda m: m["cp"], "no axis 'cp'; its axes are pp, dp, tp"),
        (lambda m: m.rank(tp=2, dp=0, pp=0), r"tp 2 is outside tp\(2\)"),
        (lambda m: m.rank(tp=1), r"needs a coordinate on pp\(2\), dp\(4\)"),
        (lambda m: m.coordinate(16), "rank 16 .* 16 ranks"),
        (lambda m: m.replace(tp=0), "degree of mesh axis tp .* not 0"),
        (lambda m: m.replace(tp=1.5), "not 1.5"),
        (lambda m: m.split("dp", edp=2, ep=2).replace(dp=2), r"dp\(4\) is split into edp\(2\) \* ep\(2\)"),
        (lambda m: m.split("dp", edp=2, ep=2).rank(pp=0, dp=1, ep=0, tp=0), "ep is given twice"),
    ],
)
def test_errors_spell_the_numbers(wrong, message):
    with pytest.raises(MeshError, match=message):
        wrong(Mesh(pp=2, dp=4, tp=2))


def test_a_coordinate_is_a_whole_number():
    with pytest.raises(InputError, match="expected a whole number, not None"):
        Mesh(tp=2).rank(tp=None)


def test_a_mapping_of_degrees():
    """Once {'p': 'p', 'd': 'p', 't': 'p'}: pairs were made of the letters."""
    mesh = Mesh(tp=2, cp=3)
    assert dict(mesh) == {**mesh} == mesh.degrees == {"cp": 3, "pp": 1, "dp": 1, "tp": 2}
    assert (list(mesh.items()), len(mesh), list(mesh)) == (list(mesh.degrees.items()), 4, list(mesh.axes))
    parted = mesh.split("tp", kv=1, rep=2)
    assert (parted["tp"], dict(parted)["rep"], parted.get("tp"), parted.get("ep", 1)) == (2, 2, 2, 1)
    assert mesh != dict(mesh)  # a mesh has an order
    assert len({mesh, Mesh(cp=3, tp=2)}) == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Mesh(4, 1, 2), "Mesh(4, 1, 2) does not say whose degrees: name the axes, Mesh(tp=4)"),
        (lambda: Mesh(pt=4), "Mesh(tp=4)"),
        (lambda: Mesh(DP=2), "Mesh(dp=2)"),
    ],
)
def test_what_is_not_named_right_is_said(make, says):
    with pytest.raises(MeshError, match=re.escape(says)):
        make()
    assert Mesh(edp=2, x=3)["x"] == 3  # a checkpoint has whatever axes it has


def test_a_mesh_of_devices():
    class Theirs:
        def __init__(self, **told):
            vars(self).update(told)

    torchs = Theirs(mesh_dim_names=("dp_shard", "cp", "tp"), shape=(4, 1, 2))
    jaxs = Theirs(axis_names=("tp", "dp"), shape={"tp": 2, "dp": 4})
    assert Mesh.from_device_mesh(torchs) == Mesh(dp_shard=4, cp=1, tp=2)
    assert Mesh.from_device_mesh(jaxs) == Mesh(tp=2, dp=4)
    with pytest.raises(MeshError, match="mesh_dim_names"):
        Mesh.from_device_mesh(Theirs(mesh_dim_names=None, shape=(2,)))
