"""ckptlab: checkpoints of 3D-parallel training runs, opened with their labels, reshaped and looked into.

`ckptlab.open("run/global_step1000")` reads headers only. Names are loaded when they are first used: `import ckptlab`
takes neither torch nor xarray, jax or einx with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ckptlab.lazily import loader

if TYPE_CHECKING:
    from ckptlab import analysis, plan, viz
    from ckptlab.analysis import Diff, Health, Run, check, diff, open_run, plots, stats, updates
    from ckptlab.arrays.backends import Backend
    from ckptlab.arrays.flat_operations import merge_flat, split_flat
    from ckptlab.arrays.operations import ReplicaWarning, merge, reshape, split, to
    from ckptlab.beginning import begin
    from ckptlab.catalog import Catalog, ParameterGroup
    from ckptlab.catalog import Tensor as Tensor
    from ckptlab.checkpoint import Checkpoint, paper_model, save_weights
    from ckptlab.checkpoint import open as open
    from ckptlab.convert import Report
    from ckptlab.errors import (
        BackendError,
        CheckpointError,
        CkptlabError,
        DestinationError,
        LayoutError,
        MeshError,
        NotationError,
        ReshapeError,
        UnsafeFileError,
        UnsupportedError,
    )
    from ckptlab.findings import Finding
    from ckptlab.layout import Cut, Layout
    from ckptlab.mesh import Mesh
    from ckptlab.plan import Cluster
    from ckptlab.pretrained import save_pretrained, with_weights
    from ckptlab.reshaping import Cost, Reshape
    from ckptlab.sharding import families
    from ckptlab.sharding.strategies import Megatron, Rules, Strategy
    from ckptlab.stored import reading
    from ckptlab.views.saved import open_view, save_view
    from ckptlab.widgets import explore, playground

    __version__: str

__all__ = [
    "Backend",
    "BackendError",
    "Catalog",
    "Checkpoint",
    "CheckpointError",
    "CkptlabError",
    "Cluster",
    "Cost",
    "Cut",
    "DestinationError",
    "Diff",
    "Finding",
    "Health",
    "Layout",
    "LayoutError",
    "Megatron",
    "Mesh",
    "MeshError",
    "NotationError",
    "ParameterGroup",
    "ReplicaWarning",
    "Report",
    "Reshape",
    "ReshapeError",
    "Rules",
    "Run",
    "Strategy",
    "UnsafeFileError",
    "UnsupportedError",
    "__version__",
    "analysis",
    "begin",
    "check",
    "deepspeed",
    "diff",
    "explore",
    "families",
    "merge",
    "merge_flat",
    "open_run",
    "open_view",
    "paper_model",
    "plan",
    "playground",
    "plots",
    "reading",
    "reshape",
    "save_pretrained",
    "save_view",
    "save_weights",
    "sharding",
    "split",
    "split_flat",
    "stats",
    "testing",
    "to",
    "updates",
    "viz",
    "with_weights",
]

_HOMES = {
    "analysis": "Diff Health Run check diff open_run plots stats updates",
    "arrays.backends": "Backend",
    "arrays.flat_operations": "merge_flat split_flat",
    "arrays.operations": "ReplicaWarning merge reshape split to",
    "beginning": "begin",
    "catalog": "Catalog ParameterGroup Tensor",
    "checkpoint": "Checkpoint open paper_model save_weights",
    "convert": "Report",
    "deepspeed": "DeepSpeedCheckpoint SubparamShape ZeROCheckpoint constants enable_universal_checkpoint "
    "flatten_dp_dimension get_files_with_prefix get_layer_ckpt_name_for_rank get_model_3d_descriptor "
    "get_model_ckpt_name_for_rank get_mpu_ranks get_zero_ckpt_name_for_rank get_zero_files meg_2d_parallel_map "
    "merge_state model_3d_desc partition_data reshape_meg_2d_parallel unflatten_dp_dimension",
    "errors": "BackendError CheckpointError CkptlabError DestinationError LayoutError MeshError NotationError "
    "ReshapeError UnsafeFileError UnsupportedError",
    "findings": "Finding",
    "layout": "Cut Layout",
    "mesh": "Mesh",
    "plan": "Cluster",
    "pretrained": "save_pretrained with_weights",
    "reshaping": "Cost Reshape",
    "stored": "reading",
    "sharding": "families",
    "sharding.strategies": "Megatron Rules Strategy",
    "views.saved": "open_view save_view",
    "widgets": "explore playground",
}
_, _load = loader(__name__, _HOMES, ("analysis", "deepspeed", "plan", "sharding", "testing", "viz"))


def __getattr__(name: str) -> Any:
    """Load a public name from its module, once; DeepSpeed's own names from `ckptlab.deepspeed`."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ckptlab")
    if name.isupper() and hasattr(constants := import_module("ckptlab.deepspeed.constants"), name):
        return getattr(constants, name)
    return _load(name)


def __dir__() -> list[str]:
    return sorted([*__all__, "Tensor", "open"])  # these two are not starred: `open` is a builtin, Tensor torch's
