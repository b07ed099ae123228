"""What a plan is good for: the best numbering of ranks, an estimate of time, and running it between live ranks."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from compare import DATA, GPT
from hypothesis import given
from hypothesis import strategies as st

import ckptlab
from ckptlab import Cluster, Layout, Mesh, ReshapeError
from ckptlab.plan import between
from ckptlab.plan.ranks import best_ranks
from ckptlab.plan.time import time

pytest.importorskip("scipy")

MESHES = [Mesh(tp=8), Mesh(tp=4, dp=2), Mesh(tp=2, pp=2, dp=2), Mesh(dp=8), Mesh(tp=1, pp=4, dp=2)]


def moved(matrix: np.ndarray, order: tuple[int, ...]) -> int:
    """Bytes that change process where `order[k]` is rank k of the target."""
    return int(matrix.sum()) - sum(int(matrix[s, k]) for k, s in enumerate(order) if s < len(matrix))


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_the_numbering_is_the_best_of_all(sources: int, targets: int, data: st.DataObject) -> None:
    rows = st.lists(st.integers(0, 9), min_size=targets, max_size=targets)
    matrix = np.array(data.draw(st.lists(rows, min_size=sources, max_size=sources)), np.int64)
    found = best_ranks(matrix)
    every = [moved(matrix, p) for p in itertools.permutations(range(max(sources, targets)), targets)]
    assert found.moved == moved(matrix, found.order) == min(every)
    assert found.bound <= found.moved <= found.moved_before == moved(matrix, tuple(range(targets)))


@given(st.data())
def test_groups_stay_together_and_are_the_best_of_those_that_do(data: st.DataObject) -> None:
    row = st.lists(st.integers(0, 9), min_size=4, max_size=4)
    matrix = np.array(data.draw(st.lists(row, min_size=4, max_size=4)), np.int64)
    groups = data.draw(st.sampled_from([[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3, 0], [2, 1]]]))
    found = best_ranks(matrix, groups)
    alike = [p for p in itertools.permutations(range(4)) if all(p[a] // 2 == p[b] // 2 for a, b in groups)]
    kept = (0, 1, 2, 3)
    assert found.moved == min(moved(matrix, p) for p in [*alike, kept])
    assert found.order in [*alike, kept]


def test_twenty_pairs_of_meshes_move_no_more_than_before() -> None:
    saved = 0
    for before, after in itertools.permutations(MESHES, 2):
        plan = ckptlab.paper_model(before, 1).reshape(after, zero_stage=1).plan
        best = plan.best_ranks()
        assert plan.renumbered(best).moved == best.moved <= best.moved_before == plan.moved
        assert plan.renumbered(best).sent == plan.sent
        saved += best.saved
    assert saved > 0
    with pytest.raises(ReshapeError, match="8 ranks are not divisible into groups of 3"):
        plan.best_ranks(together=3)
    with pytest.raises(ReshapeError, match="each of the 8 ranks stands once"):
        plan.best_ranks([[0, 1], [2, 3]])
    with pytest.raises(ReshapeError, match="run the plan itself"):
        plan.renumbered(best).run({})


def test_times_are_those_of_the_slowest_link() -> None:
    matrix = np.zeros((4, 4), np.int64)
    matrix[0, 0], matrix[0, 1], matrix[0, 2], matrix[1, 3] = 10**12, 8_000, 3_000, 1_000
    found = time(matrix, Cluster(ranks_per_node=2, inside=1e3, between=1e3, latency=0.5))
    assert found.seconds == 8.5  # rank 0 to rank 1; what stays costs nothing
    assert found.slowest == "rank 0 sends 8 kB to its node"
    np.testing.assert_allclose(found.ranks, [8.5, 8.5, 0, 0])
    np.testing.assert_allclose(found.nodes, [4.5, 4.5])
    slow = time(matrix, Cluster(ranks_per_node=2, inside=1e3, between=100, latency=0))
    assert (slow.seconds, slow.slowest) == (40, "node 0 sends 4 kB to other nodes")
    with pytest.raises(ReshapeError, match="ranks_per_node is a number"):
        Cluster(ranks_per_node=0)


# ------------------------------------------------------------------------------------------------ between live ranks

CASES = """
import numpy as np, ckptlab
from ckptlab import Mesh
CASES = [
    ("gpt_tp2_pp2_dp2", Mesh(tp=4, dp=2), {}),
    ("gpt_tp2_pp2_dp2", Mesh(dp=5), {}),
    ("plain_zero3_dp2", Mesh(dp=3), {"zero_stage": 1}),
    ("plain_zero2_dp2", Mesh(tp=2, dp=2), {"strategy": None}),
]
def reshaped(case, mesh, options):
    ckpt = ckptlab.open(f"{DATA}/{case}")
    if "strategy" in options:
        tensor = ckpt["blocks.0.fc2.weight"]
        options = {"strategy": {r".*fc2\\\\.weight": f"(dp out) in" if tensor.shape[0] % 2 == 0 else "out in"}}
    return ckpt, ckpt.reshape(mesh, **options)
def same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        mine = found[key]
        mine = mine.view(__import__("torch").uint8).numpy() if hasattr(mine, "numpy") else np.asarray(mine)
        assert mine.tobytes() == array.tobytes(), key
        assert tuple(found[key].shape) == array.shape
"""

TORCH = """
import os, sys, torch, torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=8)
sent = np.zeros(8, np.int64)
plain = dist.all_to_all_single
def counted(out, into, receives, sends, group=None):
    sent[:] += sends
    assert sum(sends) <= LIMIT and sum(receives) <= LIMIT
    return plain(out, into, receives, sends, group=group)
dist.all_to_all_single = counted
LIMIT = 1 << 16
for case in CASES:
    ckpt, target = reshaped(*case)
    mine = ckpt.of_rank(rank) if rank < ckpt.mesh.size else {}
    if rank % 2:
        mine = {key: ckptlab.to(__import__("xarray").DataArray(a), "torch") for key, a in mine.items()}
    sent[:] = 0
    found = target.plan.run(mine, limit=LIMIT)
    same(found, target.of_rank(rank) if rank < target.mesh.size else {})
    matrix = np.zeros((8, 8), np.int64)
    matrix[:target.plan.sources, :target.plan.targets] = target.plan.matrix()
    np.fill_diagonal(matrix, 0)
    assert sent.tolist() == matrix[rank].tolist(), (sent, matrix[rank])
for wrong in ({}, {"w": np.zeros(3, np.float32)}):  # all ranks hear of it: none waits for another
    plan = ckptlab.plan.between(
        ckptlab.Layout("(tp out)").resolve((8,), Mesh(tp=2)), ckptlab.Layout("out").resolve((8,), Mesh()), name="w"
    )
    try:
        plan.run(wrong if rank == 1 else {"w": np.zeros(4, np.float32)})
    except ckptlab.ReshapeError as error:
        assert "rank 1" in str(error)
    else:
        raise AssertionError
dist.barrier()
dist.destroy_process_group()
"""

JAX = """
import os
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
mesh = jax.make_mesh((8,), ("rank",))
for case in CASES:
    ckpt, target = reshaped(*case)
    found = target.plan.run([ckpt.of_rank(k) for k in range(ckpt.mesh.size)], mesh, limit=1 << 17)
    for rank in range(8):
        same(found[rank], target.of_rank(rank) if rank < target.mesh.size else {})
        for array in found[rank].values():
            assert list(array.devices()) == [jax.devices()[rank]]
try:
    target.plan.run([{}] * 8, mesh)
except ckptlab.ReshapeError as error:
    assert "rank 0 gives no" in str(error)
else:
    raise AssertionError
"""


def script(tmp_path: Path, code: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(f"DATA = {str(DATA)!r}\n" + textwrap.dedent(CASES + code))
    return path


@pytest.mark.slow
def test_torch_ranks_hold_what_the_files_would_say(tmp_path: Path) -> None:
    ranks = pytest.importorskip("torch_ranks")
    ranks.run(script(tmp_path, TORCH), 8)


@pytest.mark.slow
def test_jax_devices_hold_what_the_files_would_say(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    done = subprocess.run([sys.executable, str(script(tmp_path, JAX))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_what_no_rank_gives_and_what_has_no_elements(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    code = """
import os
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
from ckptlab import Layout
mesh = jax.make_mesh((2,), ("rank",))
def plan(rows):
    cuts = [Layout(text).resolve((rows, 2), Mesh(tp=2)) for text in ("(tp out) in", "out (tp in)")]
    return ckptlab.plan.between(*cuts, name="w")
assert plan(0).run([{}, {}], mesh) == [{}, {}]
try:
    plan(4).run([{}, {}], mesh)
except ckptlab.ReshapeError as error:
    assert "no rank gives w" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, str(script(tmp_path, code))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_one_layout_to_another_without_a_checkpoint() -> None:
    a, b = Layout("(tp out) in").resolve((8, 4), Mesh(tp=2)), Layout("out (tp in)").resolve((8, 4), Mesh(tp=4))
    plan = between(a, b, name="w")
    with pytest.raises(ckptlab.BackendError, match="not initialised"):
        plan.run({"w": np.zeros((4, 4), np.float32)})
    with pytest.raises(ReshapeError, match="limit is a number of bytes"):
        plan.run({}, limit=0)


@pytest.mark.parametrize(("replicas", "says"), [("mean", "averaged"), ("sum", "summed")])
def test_replicas_that_make_the_whole_together_are_not_moved(replicas: str, says: str) -> None:
    """A rank would be given one of them for the whole."""
    rule = {"layout": "out", "replicas": replicas}
    ckpt = ckptlab.open(GPT, strategy={r"2\.input_layernorm\.weight": rule})
    moves = {move.key: move for move in ckpt.reshape(tp=4).plan.moves}
    with pytest.raises(ReshapeError, match=f"replicas that are to be {says} cannot be moved"):
        list(moves["2.input_layernorm.weight", "master"].pieces())
    assert list(moves["3.input_layernorm.weight", "master"].pieces())
