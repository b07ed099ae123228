"""Each plot is one call on a checkpoint, a run or statistics, and shows the numbers that it says it shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from compare import DATA, GPT

import ckptlab
from ckptlab.errors import CheckpointError

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from ckptlab.analysis import plots  # noqa: E402

STEPS = DATA / "plain_zero1_dp2_steps"
QKV = "self_attention.query_key_value.weight"


@pytest.fixture(autouse=True)
def close_figures() -> None:
    from matplotlib import pyplot

    pyplot.close("all")


def drawn(figure: matplotlib.figure.Figure, path: Path) -> list[matplotlib.axes.Axes]:
    """The axes of a figure that can really be rendered, and says what it shows."""
    figure.savefig(path / "plot.png")
    assert (path / "plot.png").stat().st_size > 5000
    assert figure.get_suptitle()
    return [axis for axis in figure.axes if axis.get_visible()]


@pytest.mark.slow
def test_norms_by_layer(tmp_path: Path) -> None:
    figure = plots.norms(ckptlab.open(GPT))
    axes = drawn(figure, tmp_path)
    assert [axis.get_title() for axis in axes] == ["master", "exp_avg", "exp_avg_sq", "param"]
    assert {(axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) for axis in axes} == {("layer", "norm", "log")}
    lines = {line.get_label(): line for line in axes[1].get_lines()}
    assert len(lines) == plots.LINES
    found = ckptlab.stats(GPT, by="layer")
    line = lines[plots.shorten(QKV, 36)]
    np.testing.assert_array_equal(line.get_xdata(), [2, 3, 4, 5])
    expected = found["norm"].sel(tensor=QKV, state="exp_avg", layer=[2, 3, 4, 5])
    np.testing.assert_allclose(line.get_ydata(), expected)
    again = plots.norms(found, states=["exp_avg"], tensors="query_key_value.weight").axes[0].get_lines()
    np.testing.assert_allclose(again[0].get_ydata(), expected)
    assert len({line.get_color() for line in lines.values()}) == len(lines)


@pytest.mark.slow
def test_norms_of_a_run_are_the_last_steps(tmp_path: Path) -> None:
    run = ckptlab.open_run(STEPS)
    figure = plots.norms(run, states=["master"], tensors="fc1.weight")
    drawn(figure, tmp_path)
    assert figure.get_suptitle().endswith("step 5")
    expected = ckptlab.stats(run[5], by="layer")["norm"].sel(
        tensor="blocks.fc1.weight", state="master", layer=[0, 1, 2]
    )
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_ydata(), expected)


@pytest.mark.slow
def test_norms_over_steps_are_of_all_layers_together(tmp_path: Path) -> None:
    run = ckptlab.open_run(STEPS)
    found = ckptlab.stats(run)  # with histograms, whose coordinates are no norms'
    axes = drawn(plots.norms(found, over="step", tensors="fc1.weight", states=["master", "exp_avg"]), tmp_path)
    [line] = axes[1].get_lines()
    assert (line.get_label(), axes[1].get_xlabel()) == ("blocks.fc1.weight", "step")
    np.testing.assert_array_equal(line.get_xdata(), run.steps)
    whole = [np.sqrt(sum((np.float64(a) ** 2).sum() for a in _layers(run[step]))) for step in run.steps]
    np.testing.assert_allclose(line.get_ydata(), whole)
    again = plots.norms(ckptlab.stats(run, by="layer"), over="step", tensors="fc1.weight", states=["exp_avg"]).axes[0]
    np.testing.assert_allclose(again.get_lines()[0].get_ydata(), whole)
    assert plots.norms(found).get_suptitle() == "Norms by layer, step 5"
    with pytest.raises(CheckpointError, match="take a run"):
        plots.norms(run[5], over="step")
    with pytest.raises(CheckpointError, match="expected 'layer' or 'step'"):
        plots.norms(run, over="tp")


def test_what_is_averaged_over_ranks_is_called_a_mean() -> None:
    figure = plots.norms(ckptlab.open(GPT).shards())
    assert figure.get_suptitle() == "Norms by layer (mean over tp)"
    assert figure.axes[0].get_ylabel() == "norm (mean over tp)"
    assert plots.norms(GPT).axes[0].get_ylabel() == "norm"


def _layers(ckpt: ckptlab.Checkpoint) -> list[np.ndarray]:
    moments = ckpt.full("exp_avg", stack=False)
    return [moments[f"blocks.{i}.fc1.weight"].values for i in range(3)]


def test_norms_need_layers() -> None:
    with pytest.raises(CheckpointError, match="no curve over depth"):
        plots.norms(xr.DataArray(np.ones((3, 3)), dims=("a", "b")))
    with pytest.raises(CheckpointError, match="no tensor's name matches 'qvk'"):
        plots.norms(GPT, tensors="qvk")


def test_histograms_over_steps(tmp_path: Path) -> None:
    run = ckptlab.open_run(STEPS)
    figure = plots.histograms(run)
    axes = drawn(figure, tmp_path)
    assert len(axes) == 4
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["step 2", "step 4", "step 5"]
    for axis in axes:
        shares = [patch.get_data().values for patch in axis.patches]
        assert len(shares) == 3
        np.testing.assert_allclose([share.sum() for share in shares], 1.0)
        assert axis.get_xlabel() == "element"


def test_sparse_octaves_around_zero_are_one_bin(tmp_path: Path) -> None:
    array = np.concatenate([np.full(5000, 0.3), np.full(5000, -0.6), [1e-20, -1e-30, 0.0]]).astype(np.float32)
    figure = plots.histograms(xr.DataArray(array, dims="x"))
    [axis] = drawn(figure, tmp_path)
    [bars] = axis.patches
    np.testing.assert_allclose(bars.get_data().values * len(array), [5000, 0, 3, 5000], atol=1e-6)
    assert "±$2^{-2}$" in [label.get_text() for label in axis.get_xticklabels()]


def test_histograms_between_given_edges(tmp_path: Path) -> None:
    found = ckptlab.stats(GPT, histogram=np.linspace(-0.1, 0.1, 41), states=["master"])
    [axis] = drawn(plots.histograms(found, tensors="dense_h_to_4h.weight"), tmp_path)
    share = axis.patches[0].get_data().values
    counts = found["histogram"].sel(state="master")
    counts = counts[[("dense_h_to_4h.weight" in n) for n in counts["tensor"].values]].sum("tensor")
    np.testing.assert_allclose(share, counts / counts.sum())
    with pytest.raises(CheckpointError, match="no 'histogram'"):
        plots.histograms(ckptlab.stats(GPT, histogram=False))
    with pytest.raises(CheckpointError, match="over='step'"):
        plots.histograms(found, over="step")


@pytest.mark.slow
def test_drift_over_tp(tmp_path: Path) -> None:
    ckpt = ckptlab.open(GPT)
    figure = plots.drift(ckpt)
    axis = drawn(figure, tmp_path)[0]
    found = ckptlab.stats(ckpt.shards("master"))["norm"].sel(state="master")
    image = axis.get_images()[0].get_array()
    names = [label.get_text() for label in axis.get_yticklabels()]
    row = names.index("2.self_attention.query_key_value.bias")
    one = found.sel(tensor=names[row])
    np.testing.assert_allclose(image[row], np.log2(one / one.median()))
    assert row == 0, "what drifts most stands on top"
    replicated = names.index("3.input_layernorm.weight")
    np.testing.assert_array_equal(image[replicated], 0)


@pytest.mark.slow
def test_drift_of_replicas_alone(tmp_path: Path) -> None:
    ckpt = ckptlab.open(GPT)
    figure = plots.drift(ckpt, replicas=True)
    axis = drawn(figure, tmp_path)[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert "3.input_layernorm.weight" in names
    assert not [name for name in names if "query_key_value" in name or "h_to_4h" in name]
    np.testing.assert_array_equal(axis.get_images()[0].get_array(), 0)
    assert axis.get_title() == "no drift"
    with pytest.raises(CheckpointError, match="every tensor here is cut over tp"):
        plots.drift(ckpt, replicas=True, tensors="h_to_4h")
    with pytest.raises(CheckpointError, match="do not tell layouts"):
        plots.drift(ckptlab.stats(ckpt.shards(), by="kind"), replicas=True)


def test_drift_over_steps(tmp_path: Path) -> None:
    run = ckptlab.open_run(STEPS)
    figure = plots.drift(run, state="exp_avg_sq", statistic="max")
    axis = drawn(figure, tmp_path)[0]
    image = axis.get_images()[0].get_array()
    np.testing.assert_array_equal(image[:, 0], 0)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["2", "4", "5"]
    assert "step 2" in figure.axes[-1].get_ylabel()
    with pytest.raises(CheckpointError, match="over='tp'"):
        plots.drift(run, over="tp")


def test_a_rank_that_holds_nothing_stands_out(tmp_path: Path) -> None:
    node = xr.Dataset({"master": (("tp", "x"), np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]))}, {"tp": [0, 1, 2]})
    axis = drawn(plots.drift(node), tmp_path)[0]
    np.testing.assert_array_equal(axis.get_images()[0].get_array(), [[0, 0, -plots.FARTHEST]])


def test_spectrum(tmp_path: Path) -> None:
    figure = plots.spectrum(GPT, tensors=QKV)
    [axis] = drawn(figure, tmp_path)
    assert len(axis.get_lines()) == 4
    found = ckptlab.stats(GPT, spectrum=64)
    top = found["singular_values"].sel(tensor=f"2.{QKV}", state="master").dropna("rank")
    line = next(one for one in axis.get_lines() if one.get_label() == plots.shorten(f"2.{QKV}", 36))
    np.testing.assert_allclose(line.get_ydata(), top / top[0])
    assert len(plots.spectrum(found).axes[0].get_lines()) == plots.LINES
    with pytest.raises(CheckpointError, match="no tensor here is a matrix"):
        plots.spectrum(GPT, tensors="bias")


@pytest.mark.slow
def test_matplotlib_is_loaded_when_a_plot_is_made() -> None:
    code = "import sys, ckptlab.analysis.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plots.norms(STEPS)
