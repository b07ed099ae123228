"""Kinds of checkpoints that are recognised by their markers and not read, so that an error can name them."""

from __future__ import annotations

import re
import zipfile
from abc import abstractmethod
from dataclasses import dataclass

from ckptlab import paths
from ckptlab.catalog import Catalog
from ckptlab.findings import Faults, not_read_yet
from ckptlab.formats.format import Format, Listing, Match
from ckptlab.sharding.strategies import Strategy


class _Known(Format):
    reads = False

    def recognise(self, folder: Listing) -> Match | None:
        return Match(folder.path, self.name) if self.marked(folder) else None

    @abstractmethod
    def marked(self, folder: Listing) -> bool:
        """Whether its markers are there."""


class Megatron(_Known):
    name = "megatron"
    title = "a Megatron-LM checkpoint of the kind torch (mp_rank_* folders with model_optim_rng.pt)"

    def marked(self, folder: Listing) -> bool:
        found = [folder.below(name) for name in folder.folders if re.fullmatch(r"mp_rank_\d+(_\d+)*", name)]
        if "latest_checkpointed_iteration.txt" in folder.names:
            if "latest" in folder.names:
                return False  # Megatron-DeepSpeed writes both, and DeepSpeed's step folders
            return any(self.marked(folder.below(n)) for n in folder.folders if re.fullmatch(r"iter_\d+|release", n))
        return any(rank.names & {"model_optim_rng.pt", "model_rng.pt"} for rank in found)


class TorchScript(_Known):
    name = "torchscript"
    title = "a TorchScript file, which is a program"

    def marked(self, folder: Listing) -> bool:
        if not folder.is_file or folder.head(4) != b"PK\x03\x04":
            return False
        try:
            with paths.open_binary(folder.path) as file, zipfile.ZipFile(file) as records:
                return any(name.split("/", 1)[-1] == "constants.pkl" for name in records.namelist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError):
            return False


@dataclass(frozen=True)
class Kind:
    """What other programs leave. `markers`: each is the whole name of some entry of the folder; one alone may be a
    file's by itself. `several`: entries of the first marker are of different ranks, by the number that it catches, and
    there must be two. `trains`: it holds a training state, and goes before weights beside it. `says`: what stands at
    the beginning of the file that is its first marker."""

    title: str
    todo: str
    markers: tuple[str, ...]
    several: bool = False
    trains: bool = False
    says: bytes = b""

    def marks(self, folder: Listing) -> bool:
        """Whether a folder, or a file, is of this kind."""
        names = [folder.path.rpartition("/")[2]] if folder.is_file else sorted(folder.names)
        found = [[m for name in names if (m := re.fullmatch(marker, name))] for marker in self.markers]
        if not all(found):
            return False
        if self.several and len({m[1] for m in found[0]}) < 2:
            return False
        file = folder if folder.is_file else folder.below(found[0][0][0])
        return not self.says or (file.is_file and self.says in file.head(4096))


_HF = "convert it to safetensors with the program that wrote it, and open these"
_JAX = "restore it with the program that wrote it, and save its weights as safetensors"
_OF_RANKS = "each file is what one rank held: join them with the program that wrote them, and open what it makes"
_EXPORTED = "it is made to run a model, not to train it: open the checkpoint that it was exported from"

KINDS: tuple[Kind, ...] = (
    Kind(
        "a nanotron checkpoint (checkpoint_metadata.json beside model/)",
        _HF,
        (r"checkpoint_metadata\.json", "model"),
        trains=True,
    ),
    Kind(
        "a checkpoint of Levanter's, of jax (metadata.json beside arrays)",
        _JAX,
        (r"metadata\.json",),
        trains=True,
        says=b'"is_temporary"',
    ),
    Kind(
        "an Orbax checkpoint of jax, as MaxText's",
        _JAX,
        (r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt",),
        trains=True,
    ),
    Kind("a T5X checkpoint of jax", _JAX, ("checkpoint", r"(?:target|state)\..*"), trains=True),
    Kind("a stream of EasyLM's, of jax", _JAX, (r"streaming_(?:params|train_state)(?:_\d+)?",), trains=True),
    Kind("a checkpoint of mesh-transformer-jax (shard_*/*.npz)", _JAX, (r"shard_(\d+)",), several=True, trains=True),
    Kind("a NeMo archive", "unpack it (it is a tar), or convert it with NeMo", (r".*\.nemo",)),
    Kind(
        "a NeMo checkpoint (model_config.yaml beside the ranks' folders)",
        _OF_RANKS,
        (r"(?:tp_rank_\d+_pp|mp)_rank_\d+(?:_\d+)*", r"model_config\.yaml"),
    ),
    Kind("a NeMo checkpoint (a folder for each tp and pp rank)", _OF_RANKS, (r"tp_rank_\d+_pp_rank_\d+",)),
    Kind(
        "a checkpoint of NeMo's or Megatron's, a folder for each rank",
        _OF_RANKS,
        (r"mp_rank_(\d+)(?:_\d+)*",),
        several=True,
    ),
    Kind(
        "a checkpoint of neuronx-distributed (dp_rank_*_tp_rank_*_pp_rank_*)",
        _OF_RANKS,
        (r"dp_rank_\d+(?:_ep_rank_\d+)?_tp_rank_\d+_pp_rank_\d+.*",),
    ),
    Kind(
        "an optimizer that ColossalAI saved in shards",
        "open the folder of the model beside it for the weights",
        (r"pytorch_optim.*\.(?:bin|index\.json)",),
    ),
    Kind(
        "shards of DeepSpeed-Inference (ds_inference_config.json, tp_*.pt)",
        _EXPORTED,
        (r"ds_inference_config\.json|tp_\d+_\d+\.pt",),
    ),
    Kind(
        "weights that vLLM saved for each tensor-parallel rank (sharded_state)",
        _EXPORTED,
        (r"model-rank-(\d+)-part-\d+\.safetensors",),
        several=True,
    ),
    Kind("a checkpoint of TensorRT-LLM, a file for each rank", _EXPORTED, (r"rank(\d+)\.safetensors",), several=True),
    Kind("engines of TensorRT", _EXPORTED, (r".*\.(?:engine|plan|trt)",)),
    Kind(
        "weights as Meta publishes them, a file for each tensor-parallel rank (consolidated.*.pth)",
        "convert it with transformers' convert_llama_weights_to_hf.py",
        (r"consolidated\.(\d+)\.pth",),
        several=True,
    ),
    Kind(
        "files of fairseq's or metaseq's, one for each rank",
        _OF_RANKS,
        (r".*?(?:shard|model_part-)(\d.*)\.pt",),
        several=True,
    ),
    Kind(
        "files that single ranks wrote",
        _OF_RANKS,
        (r"(?:.*[-_.])?rank[-_.]?(\d+).*\.(?:pt|pth|bin|ckpt)",),
        several=True,
    ),
    Kind("a GGUF file of llama.cpp's, with quantised weights", _EXPORTED, (r".*\.gguf",)),
    Kind("a GGML file, GGUF's forerunner", _EXPORTED, (r"ggml-.*\.bin",)),
    Kind(
        "weights of TensorFlow or Keras",
        _HF,
        (r"tf_model(?:-\d+-of-\d+)?\.h5|.*\.keras|.*\.ckpt(?:-\d+)?\.index|saved_model\.pb",),
    ),
    Kind("weights of Flax, in msgpack", _HF, (r"flax_model(?:-\d+-of-\d+)?\.msgpack",)),
    Kind("weights of Paddle's", _HF, (r".*\.pdparams",)),
    Kind("an ONNX model", _EXPORTED, (r".*\.onnx",)),
    Kind("an OpenVINO model", _EXPORTED, (r"openvino_model.*\.xml",)),
    Kind("a Core ML model", _EXPORTED, (r".*\.(?:mlpackage|mlmodel)",)),
    Kind("weights of MLX, in npz", "save them as safetensors with mlx", (r"weights(?:\.\d+)?\.npz",)),
    Kind("a program that torch.export wrote", _EXPORTED, (r".*\.pt2",)),
)
"""The first that fits names a folder; those of training stand first, and what may be any program's stands last."""

_MAGIC = (b"GGUF", b"tjgg", b"lmgg", b"fmgg")  # of files that need not have such a name


class Unread(Format):
    """All of `KINDS`, by one format, so that a folder is looked at once."""

    name = "unread"
    title = "kinds that ckptlab knows by their names and does not read"
    reads = False

    def recognise(self, folder: Listing) -> Match | None:
        kind = self.kind(folder)
        return None if kind is None else Match(folder.path, self.name, weights_only=not kind.trains)

    def read(self, path: str, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        kind = self.kind(Listing(path))
        assert kind is not None, "it was recognised"
        faults.report(not_read_yet(f"{path}: found {kind.title}, which ckptlab does not read: {kind.todo}"))
        return None

    @classmethod
    def of_ranks(cls, folder: Listing, file: str | None = None) -> Kind | None:
        """The kind of a folder whose files are those of several ranks, so that none of them (that file, if one is
        given) is what it seems to be."""
        kind = cls.kind(folder)
        several = kind is not None and kind.several and (file is None or re.fullmatch(kind.markers[0], file))
        return kind if several else None

    @staticmethod
    def kind(folder: Listing) -> Kind | None:
        """Which of them a folder or a file is."""
        if folder.is_file and folder.head(4) in _MAGIC:
            return next(kind for kind in KINDS if "GGUF" in kind.title)
        kinds = (kind for kind in KINDS if len(kind.markers) == 1 and not kind.several) if folder.is_file else KINDS
        return next((kind for kind in kinds if kind.marks(folder)), None)
