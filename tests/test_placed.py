"""Whole tensors over several devices: each device holds what the run's rank held. In processes of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from compare import GPT, ZERO2

import ckptlab
from ckptlab import Layout, LayoutError, Mesh
from ckptlab.arrays.sharding import Sharding

pytest.importorskip("torch")
pytest.importorskip("jax")


def script(tmp_path: Path, code: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(f"GPT = {str(GPT)!r}\n" + textwrap.dedent(code))
    return path


def test_the_sharding_of_a_layout() -> None:
    mesh = Mesh(tp=4)
    row = Sharding.of(Layout("out (tp in)").resolve((6, 8), mesh), ("out", "in"))
    assert (row.dims, row.shape, row.axes, row.local) == (("out", "in"), (6, 8), (None, "tp"), (6, 2))
    fused = Sharding.of(Layout("(3 tp out) in").resolve((24, 8), mesh), ("out", "in"))
    assert (fused.dims, fused.shape) == (("out_part", "out", "in"), (3, 8, 8))
    assert (fused.axes, fused.local) == ((None, "tp", None), (3, 2, 8))
    assert Sharding.of(Layout("").resolve((), mesh), ()).shape == ()


@pytest.mark.parametrize(
    ("layout", "shape", "says"),
    [
        (Layout("(tp out) in", sizes={"out": (3, 2)}), (5, 3), "unevenly"),
        (Layout("((tp q) + (tp k)) in", totals={"q": 8, "k": 4}), (12, 3), "parts of unequal size"),
        (Layout("((tp q) + k) in", totals={"k": 4}), (12, 3), "leaves parts replicated"),
    ],
)
def test_what_no_sharding_says_is_refused_with_the_reason(layout: Layout, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        Sharding.of(layout.resolve(shape, Mesh(tp=2)), layout.dims)


@pytest.mark.slow
def test_jax_devices_hold_what_the_ranks_held(tmp_path: Path) -> None:
    code = """
        import os
        os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax, numpy as np, ckptlab
        from jax.sharding import Mesh

        ckpt = ckptlab.open(GPT)
        devices = np.array(jax.devices()).reshape(2, 2, 2)
        mesh = Mesh(devices, ("pp", "dp", "tp"))
        tree, held = ckpt.shards(backend="jax", mesh=mesh), ckpt.shards(stack=False)
        checked = 0
        for leaf in tree.leaves:
            for state, array in leaf.data_vars.items():
                whole = array.data.array
                stage = int(leaf.pp)
                assert set(whole.sharding.device_set) == set(devices[stage].ravel())
                layers = leaf.layer.values.tolist() if "layer" in leaf.coords else [None]
                for piece in whole.addressable_shards:
                    _, dp, tp = (int(k[0]) for k in np.where(devices == piece.device))
                    for i, layer in enumerate(layers):
                        name = leaf.attrs["name"].format(layer=layer)
                        expected = held[name][state].sel(tp=tp)
                        expected = expected.sel(pp=stage) if "pp" in expected.dims else expected
                        mine = np.asarray(piece.data)[i] if layer is not None else np.asarray(piece.data)
                        assert mine.dtype == expected.values.dtype
                        assert mine.tobytes() == expected.values.tobytes(), (name, state, piece.device)
                        checked += 1
        assert checked > 500, checked

        # parts of a sum make one whole, which every device has
        biased = ckptlab.open(GPT, strategy={r"2\\.input_layernorm\\.weight": {"layout": "out", "replicas": "sum"}})
        summed = biased.full("master", stack=False)["2.input_layernorm.weight"].values
        for one in (biased, biased.reshape(biased.mesh)):
            placed = one.shards("master", backend="jax", mesh=mesh, stack=False)["2.input_layernorm.weight"]
            assert {np.asarray(p.data).tobytes() for p in placed.data.array.addressable_shards} == {summed.tobytes()}

        # another mesh: from device to device, and what the new ranks hold
        there = ckpt.reshape(ckptlab.Mesh(tp=4, dp=2))
        wide = Mesh(devices.reshape(2, 4), ("dp", "tp"))
        name = "mlp.dense_4h_to_h.weight"
        placed = there.shards("exp_avg", backend="jax", mesh=wide)[name].exp_avg
        assert placed.data.array.sharding.spec == jax.sharding.PartitionSpec(None, None, "tp")
        one = Mesh(devices.reshape(4, 2)[:1], ("dp", "tp"))
        before = ckpt.reshape(ckptlab.Mesh(tp=2, dp=1)).shards("exp_avg", backend="jax", mesh=one)[name].exp_avg
        moved = jax.device_put(before.data.array, placed.data.array.sharding)
        assert np.asarray(moved).tobytes() == placed.values.tobytes()
        assert abs(float(placed.sum()) - float(before.sum())) < 1e-6

        try:
            ckpt.shards(backend="jax", mesh=wide)
        except ckptlab.BackendError as e:
            assert "tp(4)" in str(e) and "ckpt.reshape(ckptlab.Mesh(dp=2, tp=4))" in str(e), e
        else:
            raise AssertionError("a mesh of other degrees was taken")
        try:
            ckpt.shards(backend="numpy", mesh=mesh)
        except ckptlab.BackendError as e:
            assert "mesh= is for jax and torch" in str(e)
        else:
            raise AssertionError("numpy has no mesh")
        """
    done = subprocess.run([sys.executable, str(script(tmp_path, code))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_torch_dtensors_hold_what_the_ranks_held(tmp_path: Path) -> None:
    ranks = pytest.importorskip("torch_ranks")
    code = """
        import sys, torch, torch.distributed as dist, numpy as np, ckptlab
        from torch.distributed.device_mesh import init_device_mesh

        rank, store = int(sys.argv[1]), sys.argv[2]
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        ckpt = ckptlab.open(GPT).reshape(ckptlab.Mesh(tp=2, dp=1))
        tp = mesh.get_coordinate()[1]
        tree, held = ckpt.shards("param", backend="torch", mesh=mesh), ckpt.shards("param")
        for name in ("mlp.dense_4h_to_h.weight", "self_attention.query_key_value.weight", "input_layernorm.bias"):
            placed, expected = tree[name].param, held[name].param
            local = placed.data.array.to_local()
            assert local.dtype == torch.bfloat16
            mine = local.view(torch.uint16).numpy().tobytes()
            assert mine == expected.sel(tp=tp).values.tobytes(), name
            assert placed.values.tobytes() == ckptlab.open(GPT).full("param")[name].param.values.tobytes()
        dist.destroy_process_group()
        """
    ranks.run(script(tmp_path, code), 2)


@pytest.mark.slow
def test_ranks_hold_the_same_states_on_devices_as_in_memory() -> None:
    """A target at ZeRO-3 stores no weights that the model computes with; on devices they were once shown."""
    import jax

    there = ckptlab.open(ZERO2).reshape(Mesh(), zero_stage=3)
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("pp", "dp", "tp"))
    shown = {n: list(node.data_vars) for n, node in there.shards().children.items()}
    placed = there.shards(backend="jax", mesh=one)["pp0"].children
    assert {n: list(node.data_vars) for n, node in placed.items()} == shown
    assert not any("param" in states and "exp_avg" in states for states in shown.values())
