"""The ZeRO optimizer files of a step folder, read for other degrees: `deepspeed.checkpoint.ZeROCheckpoint`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptlab.arguments import explained
from ckptlab.deepspeed.constants import (
    BASE_OPTIMIZER_STATE,
    GROUP_PADDINGS,
    OPTIMIZER_STATE_DICT,
    PARTITION_COUNT,
)
from ckptlab.deepspeed.files import basic_folder_validation, get_zero_files
from ckptlab.deepspeed.merge import merge_state
from ckptlab.deepspeed.reading import ReshapedCheckpoint
from ckptlab.deepspeed.reshape_3d import get_model_3d_descriptor, model_3d_desc
from ckptlab.deepspeed.tensors import as_torch, load
from ckptlab.errors import ArgumentError
from ckptlab.layout import Layout
from ckptlab.sharding.strategies import Strategy


@explained
class ZeROCheckpoint(ReshapedCheckpoint):
    """The ZeRO optimizer files of a step folder, at their own degrees until `reshape` says others.

    dir: the step folder. source_3d: its degrees, if known. strategy: layouts where the checkpoint does not tell them
    (see `ckptlab.open`). ArgumentError (an AssertionError) if it is no folder or has no such files.

    Beyond DeepSpeed's: degrees may grow, or not divide the old ones; `save` and `load`.
    """

    def __init__(
        self,
        dir: str,
        source_3d: model_3d_desc | None = None,
        strategy: Strategy | Mapping[str, str | Layout] | str | None = None,
    ) -> None:
        basic_folder_validation(dir)
        self.dir, self.strategy = dir, strategy
        self.file_list = get_zero_files(dir)
        self.num_files = len(self.file_list)
        if not self.num_files:
            raise ArgumentError(f"{dir}: No ZeRO files found: expected *zero_pp_rank_*_optim_states.pt in it")
        self.src_3d = get_model_3d_descriptor(dir) if source_3d is None else source_3d
        self.reshape(model_3d_desc(self.src_3d.pp_degree, self.src_3d.tp_degree, self.src_3d.dp_degree))

    def target_degrees(self) -> model_3d_desc:
        return self.target_3d

    def get_src_world_size(self) -> int:
        """Number of ranks that wrote the checkpoint."""
        return self.src_3d.world_size()

    def get_src_tp_degree(self) -> int:
        return self.src_3d.tp_degree

    def get_src_pp_degree(self) -> int:
        return self.src_3d.pp_degree

    def get_src_dp_degree(self) -> int:
        return self.src_3d.dp_degree

    def reshape(self, target_3d_desc: model_3d_desc) -> None:
        """Answer for these degrees from now on."""
        self._3d_file_map = self.src_3d.reshape(target_3d_desc)
        self.target_3d = target_3d_desc
        self.__dict__.pop("writer", None)  # made for the former target

    def get_file_indices_for_rank(self, pp_index: int, tp_index: int, dp_index: int) -> list[int]:
        """Indices in `file_list` of the files that hold what a rank of the target needs."""
        if dp_index >= len(self._3d_file_map):
            raise ArgumentError(f"DP index {dp_index} >= DP degree {len(self._3d_file_map)}")
        return self._3d_file_map[dp_index].get_data(pp_index, tp_index)

    def get_files_for_rank(self, pp_index: int, tp_index: int, dp_index: int) -> list[str]:
        """Paths of the files that hold what a rank of the target needs."""
        return [self.file_list[index] for index in self.get_file_indices_for_rank(pp_index, tp_index, dp_index)]

    def get_state_for_rank(
        self,
        pp_index: int,
        tp_index: int,
        dp_index: int,
        keys_to_ignore: Sequence[str] = (),
        strip_tensor_paddings: bool = True,
    ) -> dict[str, Any]:
        """The content of the optimizer file of a rank of the target, tensors being torch's.

        Where the rank is made of whole files, these one after the other (`merge_state`), as DeepSpeed has it; across
        tp ranks that is no order that an engine knows: `save` writes that. Where files are cut up, what `save` writes
        for the rank. keys_to_ignore: left out. strip_tensor_paddings: cut the optimizer's states to their true
        lengths.
        """
        files = self.get_files_for_rank(pp_index, tp_index, dp_index)
        if self.src_3d.joins_whole_files(self.target_3d):
            states = [load(file) for file in files]
        else:
            states = [as_torch(self.writer.optim_file(pp_index, tp_index, dp_index))]
        merged: dict[str, Any] | None = None
        for state in states:
            for key in keys_to_ignore:
                state.pop(key, None)
            if strip_tensor_paddings:
                _strip_paddings(state)
            merged = state if merged is None else merge_state(merged, state)
            optimizer = merged.get(OPTIMIZER_STATE_DICT) or {}
            if isinstance(counts := optimizer.get(PARTITION_COUNT), list):
                optimizer[PARTITION_COUNT] = [self.target_3d.dp_degree] * len(counts)
            if strip_tensor_paddings and (paddings := optimizer.get(GROUP_PADDINGS)):
                optimizer[GROUP_PADDINGS] = [0] * len(paddings)
        assert merged is not None  # a rank has files
        return merged

    def print_3d_index_map(self, tag: str | None = None) -> None:
        """Print the file indices of every rank of the target."""
        if tag:
            print(f"3D index map: {tag}")
        for dp_index, one in enumerate(self._3d_file_map):
            one.print_data(f"dp = {dp_index}")

    def print_3d_file_map(self, tag: str | None = None) -> None:
        """Print the files of every rank of the target (DeepSpeed's own stops with a TypeError)."""
        if tag:
            print(f"3D file map: {tag}")
        for dp_index, one in enumerate(self._3d_file_map):
            for pp_index in range(one.pp_degree):
                for tp_index in range(one.tp_degree):
                    files = self.get_files_for_rank(pp_index, tp_index, dp_index)
                    print(f"{pp_index}, {tp_index}, {dp_index} => {files}")


def _strip_paddings(state: dict[str, Any]) -> None:
    """Cut the padding off the optimizer's flat states, in place; the master weights keep theirs, as in DeepSpeed."""
    optimizer = state.get(OPTIMIZER_STATE_DICT) or {}
    base, paddings = optimizer.get(BASE_OPTIMIZER_STATE), optimizer.get(GROUP_PADDINGS)
    groups = base.get("state") if isinstance(base, dict) else dict(enumerate(base or ()))  # a list: elastic
    if not groups or not paddings:
        return
    for key, group in groups.items():
        for name, value in group.items():
            if paddings[key] and name != "step" and getattr(value, "ndim", 0):
                group[name] = value[: max(value.numel() - paddings[key], 0)].clone()
