"""Shardings of torch and jax, drawn: every piece of a picture is what they say of it themselves."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from drawn import cells, paths, texts

from ckptlab import LayoutError, Mesh, MeshError, viz
from ckptlab.errors import InputError
from ckptlab.viz.neighbours import sharded


class Placed(SimpleNamespace):
    """A placement of torch's by what it has: no torch is needed to draw it."""

    def is_partial(self) -> bool:
        return hasattr(self, "reduce_op")


def devices(**degrees: int) -> Any:
    grid = np.arange(int(np.prod(list(degrees.values())))).reshape(tuple(degrees.values()))
    return SimpleNamespace(mesh_dim_names=tuple(degrees), mesh=grid, shape=grid.shape)


def spec(placements: list[Placed], shape: tuple[int, ...], **degrees: int) -> Any:
    return SimpleNamespace(placements=placements, mesh=devices(**degrees), tensor_meta=SimpleNamespace(shape=shape))


def test_strided_and_partial_axes_are_said() -> None:
    two = spec([Placed(dim=0, split_factor=2), Placed(dim=0)], (16, 8), dp=2, tp=2)  # FSDP2 over tensor parallelism
    assert sharded(two, None, None).notation == "(tp dp dim0) dim1"
    plain = spec([Placed(dim=0), Placed(dim=0)], (16, 8), dp=2, tp=2)
    assert sharded(plain, None, None).notation == "(dp tp dim0) dim1"
    part = spec([Placed(reduce_op="sum"), Placed(dim=1)], (16, 8), dp=2, tp=2)
    drawing = viz.tensor(part)
    assert "partial over dp: what its 2 ranks hold is put together by sum" in texts(drawing, "note")
    assert not paths(drawing, "copy")
    assert len(paths(viz.tensor(spec([Placed(), Placed(dim=1)], (16, 8), dp=2, tp=2)), "copy")) == 1
    with pytest.raises(LayoutError, match="strided by 3"):
        viz.tensor(spec([Placed(dim=0, split_factor=3), Placed(dim=0)], (16, 8), dp=2, tp=2))


def test_a_mesh_has_its_own_ranks() -> None:
    mine = devices(tp=2, dp=4)
    mine.mesh = mine.mesh * 10
    drawing = viz.mesh(mine, group="dp", highlight={"tp": 1})
    assert [cell.get("data-rank") for cell in cells(drawing, "rank")] == [str(n) for n in range(0, 80, 10)]
    assert len(cells(drawing, "rank", "marked")) == 4
    assert len(cells(drawing, "group")) == 2
    with pytest.raises(MeshError, match="rank 5 is not on this mesh"):
        viz.mesh(mine, highlight=5)
    with pytest.raises(MeshError, match="no axis 'pp'"):
        viz.mesh(mine, group="pp")


def test_what_is_nobodys_is_refused() -> None:
    with pytest.raises(InputError, match="a DTensor, a jax array"):
        viz.tensor(3.5, (4, 4), Mesh(tp=2))
    with pytest.raises(InputError, match="a layout, a shape and a mesh"):
        viz.tensor("(tp out) in")


@pytest.mark.slow
def test_pieces_are_where_torch_says() -> None:
    """Of a process group that sends nothing."""
    torch, dist = pytest.importorskip("torch"), pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as local
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
        for shape in ((16, 8), (10, 6), (7, 5)):
            for placements in itertools.product((Shard(0), Shard(1), Replicate()), repeat=2):
                size, _ = local(shape, mesh.shape, lambda k: 0, list(placements))
                kind = {"shape": torch.Size(shape), "stride": (shape[1], 1)}
                tensor = DTensor.from_local(torch.zeros(size), mesh, placements, run_check=False, **kind)
                cut = sharded(tensor, None, None).cut
                for at in itertools.product(range(2), range(4)):
                    size, offset = local(shape, mesh.shape, lambda k, at=at: at[k], list(placements))
                    here = cut.coordinate({axis: at[("dp", "tp").index(axis)] for axis in cut.axes})
                    assert cut.shard_shape(here) == tuple(size), (shape, placements, at)
                    if all(size):
                        assert tuple(int(i.min()) for i in cut.index(here)) == tuple(offset), (shape, placements, at)
                assert viz.tensor(tensor).svg
                assert viz.tensor(tensor._spec).svg
        assert viz.mesh(mesh).svg
    finally:
        dist.destroy_process_group()


JAX = """
import itertools
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from ckptlab import Mesh, viz
from ckptlab.viz.neighbours import sharded
mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
for spec in (P("x", "y"), P(("x", "y"), None), P(("y", "x")), P(None, "y"), P(), P("y", None)):
    array = jax.device_put(np.zeros((16, 8)), NamedSharding(mesh, spec))
    found = sharded(array, None, None)
    cut = found.cut
    for device, index in array.sharding.devices_indices_map((16, 8)).items():
        at = np.argwhere(mesh.devices == device)[0]
        here = cut.index(cut.coordinate(dict(zip(("x", "y"), map(int, at)))))
        want = [np.arange(n)[s] for n, s in zip((16, 8), index)]
        assert all(np.array_equal(a.ravel(), b) for a, b in zip(here, want)), (spec, device)
    assert viz.tensor(array).svg == viz.tensor(array.sharding, (16, 8)).svg == viz.tensor(spec, (16, 8), mesh).svg
    assert viz.tensor(spec, (16, 8), Mesh(x=2, y=4)).svg == viz.tensor(array).svg
assert "whole" in viz.tensor(jax.numpy.zeros((4, 4))).svg
viz.mesh(mesh, group="y")
"""


@pytest.mark.slow
def test_pieces_are_where_jax_says() -> None:
    pytest.importorskip("jax")
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", JAX], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
