"""A Megatron-style step folder read for other degrees: `deepspeed.checkpoint.DeepSpeedCheckpoint`."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ckptlab.arguments import explained
from ckptlab.arrays import reader
from ckptlab.catalog import PARAM, Catalog, Tensor
from ckptlab.deepspeed.constants import (
    AUTOEP_LAYERS_KEY,
    AUTOEP_LAYERS_KEY_LEGACY,
    CHECKPOINT_PARALLEL_DIMS,
    LAYER_FILE_PREFIX,
    MODEL_FILE_PREFIX,
    PARAM_SHAPES,
)
from ckptlab.deepspeed.files import (
    basic_folder_validation,
    get_files,
    get_files_with_prefix,
    get_model_files,
)
from ckptlab.deepspeed.merge import merge_state
from ckptlab.deepspeed.reading import ReshapedCheckpoint
from ckptlab.deepspeed.reshape_3d import descriptor_from_metadata, model_3d_desc
from ckptlab.deepspeed.reshape_meg_2d import meg_2d_parallel_map, reshape_meg_2d_parallel, spread
from ckptlab.deepspeed.tensors import as_torch, load, tensor_of
from ckptlab.deepspeed.zero_checkpoint import ZeROCheckpoint
from ckptlab.errors import ArgumentError
from ckptlab.formats.deepspeed.write import NativeWriter
from ckptlab.formats.torch import torchfile
from ckptlab.layout import Cut, Layout, on_degree
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder
from ckptlab.sharding.strategies import Strategy
from ckptlab.stored import Stored

EMBEDDING_LAYER_INDEX = 0
FINAL_LAYER_NORM_INDEX = -1
ARGS_KEY = "args"
CHECKPOINT_INFO_KEY = "checkpoint_info"
ITERATION_KEY = "iteration"
_CLIENT_KEYS = (ARGS_KEY, CHECKPOINT_INFO_KEY, "universal_checkpoint_info")
DATA_BEFORE_EXPERTS = "use_data_before_expert_parallelism"

_LAYER_FILE = re.compile(r"layer_(\d+)-model_.*")


@explained
class DeepSpeedCheckpoint(ReshapedCheckpoint):
    """A step folder whose first layer file holds the embedding, and one near the end the final norm.

    dir: the step folder. tp_degree, pp_degree, dp_degree: the target's (None: the folder's own).
    final_layer_norm_idx: which layer file, from the end, holds the final norm; those between it and the embedding are
    transformer layers. strategy: layouts where the checkpoint does not tell them (see `ckptlab.open`).

    Beyond DeepSpeed's: degrees may grow, or not divide the old ones; tensors are merged as the checkpoint says that
    they are cut, where DeepSpeed puts shards one after the other; `save` and `load`; client state of classes that are
    not installed. ArgumentError (an AssertionError) if the folder lacks the files, DescriptorError (a RuntimeError)
    if they disagree.
    """

    def __init__(
        self,
        dir: str,
        tp_degree: int | None = None,
        pp_degree: int | None = None,
        dp_degree: int | None = None,
        final_layer_norm_idx: int = FINAL_LAYER_NORM_INDEX,
        strategy: Strategy | Mapping[str, str | Layout] | str | None = None,
    ) -> None:
        basic_folder_validation(dir)
        self.dir, self.strategy = dir, strategy
        self.final_layer_norm_idx = final_layer_norm_idx
        self.file_list = get_files(dir)
        self.layer_files = sorted(f for f in self.file_list if _LAYER_FILE.fullmatch(os.path.basename(f)))
        self.mp_rank_files = get_model_files(self.file_list)
        if not self.mp_rank_files:
            raise ArgumentError(
                f"{dir}: Cannot find {MODEL_FILE_PREFIX}* files in there: it is no DeepSpeed step folder"
            )
        self.model_state_metadata, self.global_state = self._read_model_files()
        source = descriptor_from_metadata(dir, self.file_list, self.model_state_metadata)
        self.zero_checkpoint = ZeROCheckpoint(dir, source, strategy)
        self.layer_keys = self._layer_keys()
        self.layer_count = len(self.layer_keys)
        self.tp_degree = source.tp_degree if tp_degree is None else tp_degree
        self.pp_degree = source.pp_degree if pp_degree is None else pp_degree
        self.dp_degree = source.dp_degree if dp_degree is None else dp_degree
        self.original_world_size = source.world_size()
        self.world_size = self.tp_degree * self.pp_degree * self.dp_degree
        self.old_2d_map = meg_2d_parallel_map(source.pp_degree, source.tp_degree)
        self.old_2d_map.simple_init()
        self.zero_checkpoint.reshape(self.target_degrees())
        self.new_2d_map = reshape_meg_2d_parallel(source.pp_degree, source.tp_degree, self.pp_degree, self.tp_degree)
        self.pp_to_transformer_map = self._deal_layers()
        self.transformer_file_map = self._deal_layer_files()
        self.tp_to_embedding_map = self._files_by_tp(EMBEDDING_LAYER_INDEX)
        self.tp_to_final_norm_map = self._files_by_tp(final_layer_norm_idx)

    def target_degrees(self) -> model_3d_desc:
        return model_3d_desc(self.pp_degree, self.tp_degree, self.dp_degree)

    # ---------------------------------------------------------------- what the files say

    def _read_model_files(self) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
        """(file, what it says of degrees, shapes and configuration) of each model file, and the iteration."""
        models = [torchfile.read(file) for file in self.mp_rank_files]
        metadata = [(file, _described(model)) for file, model in zip(self.mp_rank_files, models, strict=True)]
        told = {key: as_torch(models[0].get(key)) for key in _CLIENT_KEYS}
        return metadata, {ITERATION_KEY: models[0].get(ITERATION_KEY, 0), **told}

    def get_iteration(self) -> int:
        """The training step that the client recorded, 0 if it did not."""
        return self.global_state[ITERATION_KEY]

    def get_args(self) -> Any:
        """The client's `args` (an argparse.Namespace, as a rule), None if there are none."""
        return self._checkpoint_value(ARGS_KEY)

    def get_checkpoint_info(self, info_key: str = CHECKPOINT_INFO_KEY) -> Any:
        """What the client stored under that key, None if nothing."""
        return self._checkpoint_value(info_key)

    def _checkpoint_value(self, key: str) -> Any:
        if key not in self.global_state:
            self.global_state[key] = as_torch(torchfile.read(self.mp_rank_files[0]).get(key))
        return self.global_state[key]

    def validate_files(self) -> None:
        """Print which of the files are gone."""
        for file in self.file_list:
            if not os.path.isfile(file):
                print(f"Error: {file} is not existent")

    def is_change_tp_degree(self) -> bool:
        return self.tp_degree != self.zero_checkpoint.get_src_tp_degree()

    def is_change_pp_degree(self) -> bool:
        return self.pp_degree != self.zero_checkpoint.get_src_pp_degree()

    def is_change_dp_degree(self) -> bool:
        return self.dp_degree != self.zero_checkpoint.get_src_dp_degree()

    # ---------------------------------------------------------------- which files and layers go where

    def _layer_keys(self) -> list[str]:
        """ "layer_01", … in the order of their numbers."""
        found = {m[1] for file in self.layer_files if (m := _LAYER_FILE.fullmatch(os.path.basename(file)))}
        return [f"{LAYER_FILE_PREFIX}{number}" for number in sorted(found, key=int)]

    @property
    def _transformer_layers(self) -> list[str]:
        return self.layer_keys[1 : self.final_layer_norm_idx]

    def _deal_layers(self) -> dict[int, list[str]]:
        """Transformer layers of each stage of the target: as many each.

        Where they do not come out even and pp shrinks, DeepSpeed's map is kept, which leaves out the last ones.
        """
        layers, degree = self._transformer_layers, self.pp_degree
        each, left = divmod(len(layers), degree)
        if not left or degree <= self.zero_checkpoint.get_src_pp_degree():
            if left:
                warnings.warn(
                    f"{self.dir}: {len(layers)} transformer layers on pp {degree}: {', '.join(layers[-left:])} "
                    "are on no stage of this map, as in DeepSpeed; save() and load() leave none out",
                    stacklevel=3,
                )
            return {pp: layers[pp * each : (pp + 1) * each] for pp in range(degree)}
        starts = [-(-pp * len(layers) // degree) for pp in range(degree + 1)]
        return {pp: layers[starts[pp] : starts[pp + 1]] for pp in range(degree)}

    def _deal_layer_files(self) -> dict[tuple[int, int], list[list[str]]]:
        """(tp, pp) of the target → for each of its transformer layers the files that hold its part."""
        stage_of = {layer: pp for pp, layers in self.pp_to_transformer_map.items() for layer in layers}
        each = max(len(self._transformer_layers) // self.pp_degree, 1)
        dealt: dict[tuple[int, int], list[list[str]]] = {}
        for number, layer in enumerate(self._transformer_layers):
            stage = stage_of.get(layer, number // each)
            for tp, files in enumerate(spread(self._files_of(layer), self.tp_degree)):
                dealt.setdefault((tp, stage), []).append(files)
        return dealt

    def _files_by_tp(self, layer_index: int) -> dict[int, list[str]]:
        """tp of the target → the files of one layer that hold its part."""
        if not self.layer_files:
            return {}
        return dict(enumerate(spread(self._files_of(self.layer_keys[layer_index]), self.tp_degree)))

    def _files_of(self, layer_key: str) -> list[str]:
        return get_files_with_prefix(self.layer_files, f"{layer_key}-")

    def get_zero_files(self, pp_index: int, tp_index: int, dp_index: int) -> list[str]:
        """The ZeRO files that hold what a rank of the target needs."""
        return self.zero_checkpoint.get_files_for_rank(pp_index, tp_index, dp_index)

    def get_embedding_layer_id(self) -> str:
        return self.layer_keys[EMBEDDING_LAYER_INDEX]

    def get_final_norm_layer_id(self) -> str:
        return self.layer_keys[self.final_layer_norm_idx]

    def get_pp_transformer_map(self, pp_index: int) -> list[str]:
        """The transformer layers ("layer_03", …) of a stage of the target."""
        self._check(pp_index=pp_index)
        return self.pp_to_transformer_map[pp_index]

    def get_embedding_files(self, tp_index: int) -> list[str]:
        self._check(tp_index, of=self.tp_to_embedding_map)
        return self.tp_to_embedding_map[tp_index]

    def get_final_norm_files(self, tp_index: int) -> list[str]:
        self._check(tp_index, of=self.tp_to_final_norm_map)
        return self.tp_to_final_norm_map[tp_index]

    def get_2d_parallel_files(self, tp_index: int, pp_index: int) -> list[str]:
        """The model files that hold what a model-parallel rank of the target needs."""
        self._check(tp_index, pp_index)
        return [self.mp_rank_files[i] for i in self.new_2d_map.get_data(pp_index=pp_index, tp_index=tp_index)]

    def _check(self, tp_index: int = 0, pp_index: int = 0, of: Mapping[int, Any] | None = None) -> None:
        if not (0 <= tp_index < self.tp_degree and 0 <= pp_index < self.pp_degree):
            raise ArgumentError(f"tp {tp_index}, pp {pp_index}: outside tp({self.tp_degree}) * pp({self.pp_degree})")
        if of is not None and tp_index not in of:
            raise ArgumentError(f"{self.dir}: has no layer files to take this of tp {tp_index} from")

    # ---------------------------------------------------------------- states

    def get_zero_checkpoint_state(
        self, pp_index: int, tp_index: int, dp_index: int, strip_tensor_paddings: bool = True
    ) -> dict[str, Any]:
        """The optimizer file of a rank of the target: see `ZeROCheckpoint.get_state_for_rank`."""
        return self.zero_checkpoint.get_state_for_rank(
            pp_index, tp_index, dp_index, [PARAM_SHAPES], strip_tensor_paddings
        )

    def get_embedding_state(self, tp_index: int) -> dict[str, Any]:
        """The embedding layer of a tp rank of the target, vocabulary padding included: name in the layer → tensor."""
        return self._layer_state(self.get_embedding_files(tp_index), tp_index)

    def get_transformer_state(self, tp_index: int, pp_index: int) -> list[dict[str, Any]]:
        """The transformer layers of a model-parallel rank of the target: for each, name in the layer → tensor.

        DeepSpeed puts every tensor's shards one after the other, along dim 0 or, for two names, dim 1. Here each is
        merged, or cut, as its layout says: gate and up projection of SwiGLU apart, q, k and v of unequal sizes apart,
        norms once.
        """
        self._check(tp_index, pp_index)
        return [self._layer_state(files, tp_index) for files in self.transformer_file_map.get((tp_index, pp_index), [])]

    def get_final_norm_state(self, tp_index: int) -> dict[str, Any]:
        """The final norm's layer, of which every tp rank has a copy: name in the layer → tensor."""
        return load(self.get_final_norm_files(tp_index)[0])

    def get_2d_parallel_state(self, tp_index: int, pp_index: int) -> dict[str, Any]:
        """The model file of a model-parallel rank of the target, tensors being torch's.

        Downwards the old ranks' files merged by their structure (`merge_state`), but the module's tensors by their
        layouts, where DeepSpeed puts them all one after the other. Upwards what `save` writes for the rank.
        """
        files = self.get_2d_parallel_files(tp_index=tp_index, pp_index=pp_index)
        if len(self.new_2d_map.get_data()) > len(self.mp_rank_files):  # ranks are cut up
            return as_torch(self.writer.model_file(pp_index, tp_index, 0))
        states = [load(file) for file in files]
        merged = states[0]
        for state in states[1:]:
            merged = merge_state(merged, state)
        if merged.get("module") is not None and self.is_change_tp_degree():
            merged["module"] = self._recut(torchfile.read(files[0])["module"], "", tp_index)
        return merged

    def _layer_state(self, files: Sequence[str], tp_index: int) -> dict[str, Any]:
        """One layer on a tp rank of the target, out of those of its files that the rank needs."""
        content = torchfile.read(files[0])
        if not self.is_change_tp_degree():
            return dict(as_torch(content))
        number = _LAYER_FILE.fullmatch(os.path.basename(files[0]))
        assert number is not None  # how it was found
        return self._recut(content, self.catalog.private.module.layer_keys[int(number[1])], tp_index)

    def _recut(self, content: Mapping[str, Any], prefix: str, tp_index: int) -> dict[str, Any]:
        """The tensors that `content` names, as a tp rank of the target holds them; all else as it is."""
        return {
            key: self._shard(self.catalog[prefix + key], tp_index) if isinstance(value, Stored) else as_torch(value)
            for key, value in content.items()
        }

    def _shard(self, tensor: Tensor, tp_index: int) -> Any:
        """A tensor on a tp rank of the target; of replicas the first that the rank is made of."""
        cut = self._target_cut(tensor)
        first = tp_index * self.zero_checkpoint.get_src_tp_degree() // self.tp_degree
        stage = self.catalog.placement(tensor.name, PARAM).stages[0]
        one = None if tensor.cut.axes else Holder(pp=stage, tp=first)
        shard = reader(self.catalog, tensor.name, PARAM, holder=one).shard(cut, cut.coordinate({"tp": tp_index}))
        return tensor_of(shard)

    def _target_cut(self, tensor: Tensor) -> Cut:
        """Downwards the padding of a vocabulary stays, as in DeepSpeed; otherwise the cut is that of what `save`
        writes."""
        if self.zero_checkpoint.get_src_tp_degree() % self.tp_degree:
            return self.writer.target[tensor.name].cut
        return on_degree(tensor.layout, "tp", self.tp_degree).resolve(tensor.shape, Mesh(tp=self.tp_degree))

    @cached_property
    def catalog(self) -> Catalog:
        return self.zero_checkpoint.catalog

    @cached_property
    def writer(self) -> NativeWriter:
        return self.zero_checkpoint.writer

    # ---------------------------------------------------------------- printers

    def show_2d_mapping(self) -> None:
        """Print the model files of every model-parallel rank of the target."""
        print("reshaped 2d map ---- begin")
        for pp in range(self.pp_degree):
            for tp in range(self.tp_degree):
                print(f"[{pp}, {tp}] = {self.get_2d_parallel_files(pp_index=pp, tp_index=tp)}")
        print("reshaped 2d map ---- end")

    def show_tp_embedding_map(self) -> None:
        _show(self.tp_to_embedding_map, "tp_to_embedding_layers")

    def show_tp_final_norm_map(self) -> None:
        _show(self.tp_to_final_norm_map, "tp_to_final_norm_layers")

    def show_pp_transformer_map(self) -> None:
        _show(self.pp_to_transformer_map, "pp_to_transformer_layers")

    def show_transformer_file_map(self) -> None:
        _show(self.transformer_file_map, "rank_to_transformer_files")


def _described(model: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's converter asks of a model file."""
    groups = model.get(PARAM_SHAPES)
    groups = [groups] if isinstance(groups, Mapping) else groups
    return {
        CHECKPOINT_PARALLEL_DIMS: model.get(CHECKPOINT_PARALLEL_DIMS),
        PARAM_SHAPES: None if groups is None else {name: shape for group in groups for name, shape in group.items()},
        AUTOEP_LAYERS_KEY: model.get(AUTOEP_LAYERS_KEY, model.get(AUTOEP_LAYERS_KEY_LEGACY)),
        "ds_config": {DATA_BEFORE_EXPERTS: (model.get("ds_config") or {}).get(DATA_BEFORE_EXPERTS, False)},
    }


def _show(mapping: Mapping[Any, Any], title: str) -> None:
    print(f"Dump mapping: {title}")
    for key, value in mapping.items():
        print(f"{key} = {value}")
