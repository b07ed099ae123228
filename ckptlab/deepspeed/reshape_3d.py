"""Degrees (pp, tp, dp) of a checkpoint, and which of its optimizer files each rank of other degrees needs.

As `deepspeed.checkpoint.reshape_3d_utils` (DeepSpeed 0.19.8). A file's index is dp * (PP * TP) + pp * TP + tp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptlab.arguments import explained
from ckptlab.deepspeed.constants import (
    CHECKPOINT_PARALLEL_DIMS,
    CHECKPOINT_PP_DEGREE,
    CHECKPOINT_TP_DEGREE,
    LAYER_FILE_PREFIX,
)
from ckptlab.deepspeed.files import get_files, get_files_with_prefix, get_model_files, get_zero_files
from ckptlab.deepspeed.reshape_meg_2d import meg_2d_parallel_map, reshape_meg_2d_parallel, spread
from ckptlab.errors import ArgumentError, DescriptorError
from ckptlab.formats.torch import torchfile

PP_DIM, TP_DIM, DP_DIM = "PP", "TP", "DP"


@explained
@dataclass(eq=False)
class model_3d_desc:  # noqa: N801 - DeepSpeed's name
    """Degrees of pipeline, tensor and data parallelism."""

    pp_degree: int = 1
    tp_degree: int = 1
    dp_degree: int = 1

    def reshape(self, target_3d_desc: model_3d_desc, verbose: bool = False) -> list[meg_2d_parallel_map]:
        """For each dp rank of the target a map from its (pp, tp) to the indices of our files that it needs.

        Where every file goes to one rank, the files of a model-parallel rank are dealt to its dp ranks in order.
        Where a file is cut up (pp or tp grows, or does not divide ours), each dp rank of that model-parallel rank has
        all of them: which part of a flat buffer it needs depends on the tensors in it.
        """
        possible, reasons = self.can_reshape(target_3d_desc)
        if not possible:
            raise ArgumentError("; ".join(reasons))
        ranks = reshape_meg_2d_parallel(
            self.pp_degree, self.tp_degree, target_3d_desc.pp_degree, target_3d_desc.tp_degree, verbose
        )
        files = flatten_dp_dimension(ranks, self.pp_degree * self.tp_degree, self.dp_degree)
        if max(Counter(ranks.get_data()).values()) > 1:
            return [files] * target_3d_desc.dp_degree
        return unflatten_dp_dimension(files, target_3d_desc.dp_degree)

    def joins_whole_files(self, target_3d_desc: model_3d_desc) -> bool:
        """Whether every rank of the target is made of whole files of ours, each used once: what DeepSpeed can do."""
        maps = self.reshape(target_3d_desc)
        return sum(len(one.get_data()) for one in maps) == self.world_size()

    def get_desc(self) -> str:
        return f"{PP_DIM},{TP_DIM},{DP_DIM} = ({self.pp_degree}, {self.tp_degree}, {self.dp_degree})"

    def world_size(self) -> int:
        """Number of ranks."""
        return self.pp_degree * self.tp_degree * self.dp_degree

    def is_valid(self, pp_index: int, tp_index: int, dp_index: int) -> tuple[bool, list[str]]:
        """Whether such a rank exists, and why not."""
        given = (
            (pp_index, self.pp_degree, PP_DIM),
            (tp_index, self.tp_degree, TP_DIM),
            (dp_index, self.dp_degree, DP_DIM),
        )
        reasons = [f"{axis} indexing error: index {i} >= degree {degree}" for i, degree, axis in given if i >= degree]
        return not reasons, reasons

    def can_reshape(self, target_3d_desc: model_3d_desc) -> tuple[bool, list[str]]:
        """Whether there is a map to the target, and why not: DeepSpeed refuses every degree that grows, this none."""
        degrees = (
            (target_3d_desc.pp_degree, PP_DIM),
            (target_3d_desc.tp_degree, TP_DIM),
            (target_3d_desc.dp_degree, DP_DIM),
        )
        reasons = [f"{axis}: the degree must be at least 1, not {degree}" for degree, axis in degrees if degree < 1]
        return not reasons, reasons


@explained
def flatten_dp_dimension(meg_2d_map: meg_2d_parallel_map, src_2d_size: int, dp_degree: int) -> meg_2d_parallel_map:
    """Each rank of the map replaced by its files, one a dp rank: rank, rank + src_2d_size, …"""
    flat = meg_2d_parallel_map(meg_2d_map.pp_degree, meg_2d_map.tp_degree)
    for pp in range(flat.pp_degree):
        for tp in range(flat.tp_degree):
            ranks = meg_2d_map.get_data(pp, tp)
            flat.add_data(pp, tp, [rank + dp * src_2d_size for rank in ranks for dp in range(dp_degree)])
    return flat


@explained
def unflatten_dp_dimension(meg_2d_map: meg_2d_parallel_map, dp_degree: int) -> list[meg_2d_parallel_map]:
    """The lists of a map dealt to `dp_degree` ranks (see `spread`): one map for each dp rank."""
    pp_degree, tp_degree = meg_2d_map.pp_degree, meg_2d_map.tp_degree
    maps = [meg_2d_parallel_map(pp_degree, tp_degree) for _ in range(dp_degree)]
    for pp in range(pp_degree):
        for tp in range(tp_degree):
            for one, files in zip(maps, spread(meg_2d_map.get_data(pp, tp), dp_degree), strict=True):
                one.add_data(pp, tp, files)
    return maps


@explained
def get_model_3d_descriptor(dir: str) -> model_3d_desc:
    """The degrees of the checkpoint in a step folder: recorded in its model files, else told from the number of
    files.

    DescriptorError (a RuntimeError) if the files contradict each other or the degrees.
    """
    model_files = get_model_files(get_files(dir))
    metadata = [
        (file, {CHECKPOINT_PARALLEL_DIMS: torchfile.read(file).get(CHECKPOINT_PARALLEL_DIMS)}) for file in model_files
    ]
    return descriptor_from_metadata(dir, get_files(dir), metadata)


def descriptor_from_metadata(
    dir: str, file_list: Sequence[str], metadata: Sequence[tuple[str, Mapping[str, Any]]]
) -> model_3d_desc:
    """As `get_model_3d_descriptor`, of what is known already of each model file."""
    zero_files = len(get_zero_files(dir))
    recorded = {file: said.get(CHECKPOINT_PARALLEL_DIMS) for file, said in metadata}
    if any(degrees is not None for degrees in recorded.values()):
        pp, tp = _recorded_degrees(dir, recorded)
        if zero_files % (pp * tp):
            raise DescriptorError(
                f"{dir}: {zero_files} ZeRO files, which is no multiple of pp({pp}) * tp({tp}): some are missing. "
                "Copy them from the run's storage"
            )
    else:
        of_first_layer = get_files_with_prefix(file_list, f"{LAYER_FILE_PREFIX}01")
        tp = len(of_first_layer) or max(len(metadata), 1)
        pp = max(len(metadata) // tp, 1)
    return model_3d_desc(pp, tp, max(1, zero_files // (pp * tp)))


def _recorded_degrees(dir: str, recorded: Mapping[str, Any]) -> tuple[int, int]:
    """(pp, tp) that all model files agree on and that their number fits."""
    key = CHECKPOINT_PARALLEL_DIMS
    missing = [file for file, degrees in recorded.items() if degrees is None]
    if missing:
        raise DescriptorError(
            f"{dir}: {key} is missing from model-state files that should have it: {', '.join(missing)}"
        )
    found: dict[str, tuple[int, int]] = {}
    for file, degrees in recorded.items():
        wanted = (CHECKPOINT_PP_DEGREE, CHECKPOINT_TP_DEGREE)
        pp, tp = (degrees.get(k) for k in wanted) if isinstance(degrees, dict) else (None, None)
        if type(pp) is not int or type(tp) is not int or min(pp, tp) < 1:
            raise DescriptorError(f"{file}: {key}: expected a dictionary of positive degrees, found {degrees!r}")
        found[file] = (pp, tp)
    if len(set(found.values())) > 1:
        raise DescriptorError(
            f"{dir}: {key} disagrees across model-state files: {found}; put back the files of one checkpoint"
        )
    pp, tp = next(iter(found.values()))
    if pp * tp != len(found):
        raise DescriptorError(f"{dir}: {len(found)} model files, expected pp({pp}) * tp({tp}) = {pp * tp}")
    return pp, tp
