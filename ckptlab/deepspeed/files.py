"""The files of a step folder, listed and named as `deepspeed.checkpoint` does (reshape_utils and utils of 0.19.8)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from ckptlab.arguments import explained
from ckptlab.deepspeed.constants import (
    BF16_ZERO_FILE_PREFIX,
    FP16_ZERO_FILE_PREFIX,
    MODEL_FILE_PREFIX,
    MODEL_FILE_SUFFIX,
    ZERO_FILE_PREFIX,
)
from ckptlab.errors import ArgumentError, MismatchError
from ckptlab.formats.deepspeed.names import FileName


def basic_folder_validation(dir: str) -> None:
    """ArgumentError (an AssertionError) unless it is an existing folder."""
    if not os.path.isdir(dir):
        raise ArgumentError(f"{dir}: {'is not a folder' if os.path.exists(dir) else 'no such folder'}")


def get_files(dir: str) -> list[str]:
    """Every file in the folder and below."""
    return [os.path.join(root, name) for root, _, files in os.walk(dir) for name in files]


@explained
def get_files_with_prefix(all_files: Iterable[str], prefix: str) -> list[str]:
    """The paths whose file name begins so, sorted."""
    return sorted(path for path in all_files if os.path.basename(path).startswith(prefix))


def get_model_files(all_files: Sequence[str]) -> list[str]:
    """The `mp_rank_*` files, sorted; at ZeRO-3, which has none, those of dp rank 0 that stand for them."""
    return get_files_with_prefix(all_files, MODEL_FILE_PREFIX) or [
        path for path in get_files_with_prefix(all_files, f"{ZERO_FILE_PREFIX}0_") if path.endswith(MODEL_FILE_SUFFIX)
    ]


@explained
def get_zero_files(dir: str) -> list[str]:
    """The ZeRO optimizer files of the folder by dp rank, then mp rank.

    Of `zero_*`, `fp16_zero_*` and `bf16_zero_*` the first kind that there is. ZeRO-3's model files, which DeepSpeed
    takes for optimizer files by their prefix, are left out. MismatchError (a ValueError) for a name without the two
    ranks.
    """
    files = [path for path in get_files(dir) if not path.endswith(MODEL_FILE_SUFFIX)]
    for prefix in (ZERO_FILE_PREFIX, FP16_ZERO_FILE_PREFIX, BF16_ZERO_FILE_PREFIX):
        if found := get_files_with_prefix(files, prefix):
            return sorted(found, key=lambda path: _ranks(path, prefix))
    return []


def _ranks(path: str, prefix: str) -> tuple[int, int]:
    found = re.match(rf"{prefix}(\d+)_{MODEL_FILE_PREFIX}(\d+)", os.path.basename(path))
    if found is None:
        raise MismatchError(
            f"{path}: cannot tell dp rank and mp rank from this name; expected {prefix}D_{MODEL_FILE_PREFIX}XX"
        )
    return int(found[1]), int(found[2])


@explained
def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """Path of a model file; the rank is given as text ("03")."""
    return os.path.join(base_folder, f"{MODEL_FILE_PREFIX}{mp_rank_str}{MODEL_FILE_SUFFIX}")


@explained
def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """Path of a ZeRO optimizer file without a dtype's prefix."""
    return os.path.join(base_folder, FileName("optim", mp_rank, dp_rank).text)


@explained
def get_layer_ckpt_name_for_rank(base_folder: str, layer_id: str, tp_rank: int) -> str:
    """DeepSpeed's path of a layer file, `layer_id` being "layer_03": with `_model_states.pt`, where the pipeline
    engine's own files end in `-model_states.pt`."""
    return os.path.join(base_folder, f"{layer_id}-model_{tp_rank:02d}{MODEL_FILE_SUFFIX}")
