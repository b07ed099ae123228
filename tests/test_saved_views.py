"""Views in netCDF files and zarr stores: what comes back has the dtypes and the bits that were saved."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from compare import DATA, GPT

import ckptlab
from ckptlab.errors import CheckpointError, DestinationError
from ckptlab.stored import reading

pytest.importorskip("h5netcdf")
pytest.importorskip("zarr")
ENDS = [".nc", ".zarr"]
STATES = ["master", "param"]  # one of float32, one of bfloat16


def same(a: xr.DataTree, b: xr.DataTree) -> None:
    assert [n.path for n in a.subtree] == [n.path for n in b.subtree]
    for node in a.subtree:
        there = b[node.path]
        assert {k: v for k, v in node.attrs.items() if v != []} == dict(there.attrs)
        assert set(node.coords) == set(there.coords)
        for name, array in node.data_vars.items():
            assert (array.dims, array.dtype, array.attrs) == (there[name].dims, there[name].dtype, there[name].attrs)
            assert array.values.tobytes() == there[name].values.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("view", "asked"), [("full", [STATES]), ("shards", [STATES]), ("flat", [])])
def test_a_tree_comes_back(view: str, asked: list[list[str]], end: str, tmp_path: Path) -> None:
    tree = getattr(ckptlab.open(GPT), view)(*asked)
    ckptlab.save_view(tree, tmp_path / f"a{end}")
    same(tree, ckptlab.open_view(tmp_path / f"a{end}"))
    with pytest.raises(DestinationError, match="exists already"):
        ckptlab.save_view(tree, tmp_path / f"a{end}")


@pytest.mark.parametrize("end", ENDS)
def test_arrays_and_nodes_come_back(end: str, tmp_path: Path) -> None:
    node = ckptlab.open(DATA / "moe_ep2_dp4").full(stack=False)["wte.weight"]
    ckptlab.save_view(node, tmp_path / f"node{end}")
    again = ckptlab.open_view(tmp_path / f"node{end}")
    assert isinstance(again, xr.Dataset)
    assert again.attrs == node.attrs
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16, np.int64, np.bool_):
        array = xr.DataArray(np.arange(6).reshape(2, 3).astype(dtype), dims=("out", "in"), name="w")
        ckptlab.save_view(array, tmp_path / f"{np.dtype(dtype).name}{end}")
        back = ckptlab.open_view(tmp_path / f"{np.dtype(dtype).name}{end}")
        assert isinstance(back, xr.DataArray)
        assert (back.name, back.dtype) == ("w", array.dtype)
        assert back.values.tobytes() == array.values.tobytes()
        assert back[1, ::2].values.tobytes() == array[1, ::2].values.tobytes()


def test_values_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    with reading() as read:
        tree = ckptlab.open(GPT).full("param")
        assert read.bytes == 0
        ckptlab.save_view(tree, tmp_path / "a.nc")
        assert read.bytes == sum(array.nbytes for node in tree.subtree for array in node.data_vars.values())


def test_what_others_wrote_is_no_view(tmp_path: Path) -> None:
    xr.Dataset({"w": ("x", np.zeros(3))}).to_netcdf(tmp_path / "theirs.nc", engine="h5netcdf")
    with pytest.raises(CheckpointError, match="no view that ckptlab saved"):
        ckptlab.open_view(tmp_path / "theirs.nc")
