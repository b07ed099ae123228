"""Every public name of `deepspeed.checkpoint` (DeepSpeed 0.19.8), on the parts of ckptlab: replace the import.

Neither DeepSpeed nor a class that a file names is imported; torch is when a function hands out tensors. What each
name does, and where it goes further than DeepSpeed's, is in docs/deepspeed_names.md.
"""

from ckptlab.deepspeed import constants
from ckptlab.deepspeed.constants import *  # noqa: F403
from ckptlab.deepspeed.deepspeed_checkpoint import DeepSpeedCheckpoint
from ckptlab.deepspeed.files import (
    get_files_with_prefix,
    get_layer_ckpt_name_for_rank,
    get_model_ckpt_name_for_rank,
    get_zero_ckpt_name_for_rank,
    get_zero_files,
)
from ckptlab.deepspeed.merge import merge_state
from ckptlab.deepspeed.reshape_3d import (
    flatten_dp_dimension,
    get_model_3d_descriptor,
    model_3d_desc,
    unflatten_dp_dimension,
)
from ckptlab.deepspeed.reshape_meg_2d import (
    get_mpu_ranks,
    meg_2d_parallel_map,
    partition_data,
    reshape_meg_2d_parallel,
)
from ckptlab.deepspeed.sub_parameters import SubparamShape
from ckptlab.deepspeed.universal_checkpoint import enable_universal_checkpoint
from ckptlab.deepspeed.zero_checkpoint import ZeROCheckpoint

__all__ = [
    "DeepSpeedCheckpoint",
    "SubparamShape",
    "ZeROCheckpoint",
    "constants",
    "enable_universal_checkpoint",
    "flatten_dp_dimension",
    "get_files_with_prefix",
    "get_layer_ckpt_name_for_rank",
    "get_model_3d_descriptor",
    "get_model_ckpt_name_for_rank",
    "get_mpu_ranks",
    "get_zero_ckpt_name_for_rank",
    "get_zero_files",
    "meg_2d_parallel_map",
    "merge_state",
    "model_3d_desc",
    "partition_data",
    "reshape_meg_2d_parallel",
    "unflatten_dp_dimension",
    *constants.__all__,
]


def __dir__() -> list[str]:
    return sorted(__all__)
