"""Kinds of checkpoints that are told by their markers and not read yet, so that an error can name them."""

from __future__ import annotations

import re
import zipfile
from typing import ClassVar

from ckptlab.formats.format import Format, Listing, Match


class _Known(Format):
    reads = False

    def recognise(self, folder: Listing) -> Match | None:
        return Match(folder.path, self.name) if self.marked(folder) else None

    def marked(self, folder: Listing) -> bool:
        raise NotImplementedError


class _ByNames(_Known):
    """Told by the names in its folder: each of `markers` matches some entry."""

    markers: ClassVar[tuple[str, ...]]

    def marked(self, folder: Listing) -> bool:
        return all(any(re.fullmatch(marker, name) for name in folder.names) for marker in self.markers)


class TorchDCP(_ByNames):
    name = "dcp"
    title = "a torch DCP checkpoint (.metadata beside *.distcp)"
    markers = (r"\.metadata|__\d+\.metadata|metadata\.json", r".*\.distcp")


class Megatron(_ByNames):
    name = "megatron"
    title = "a Megatron-LM checkpoint (mp_rank_* folders with model_optim_rng.pt, or latest_checkpointed_iteration.txt)"
    markers = (r"mp_rank_\d+(_\d+)*",)

    def marked(self, folder: Listing) -> bool:
        if "latest_checkpointed_iteration.txt" in folder.names:
            return "latest" not in folder.names  # Megatron-DeepSpeed writes both, and DeepSpeed's step folders
        return any(
            re.fullmatch(self.markers[0], name) and folder.below(name).names & {"model_optim_rng.pt", "model_rng.pt"}
            for name in folder.folders
        )


class FSDP(_ByNames):
    name = "fsdp"
    title = "FSDP's files of each rank (model_world_size_*_rank_*.pt)"
    markers = (r"model_world_size_\d+_rank_\d+\.pt",)


class Nanotron(_ByNames):
    name = "nanotron"
    title = "a nanotron checkpoint (checkpoint_metadata.json beside model/)"
    markers = (r"checkpoint_metadata\.json", r"model")


class Orbax(_ByNames):
    name = "orbax"
    title = "an Orbax checkpoint of jax (_CHECKPOINT_METADATA or _METADATA)"
    markers = (r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt",)


class TorchScript(_Known):
    name = "torchscript"
    title = "a TorchScript file, which is a program"

    def marked(self, folder: Listing) -> bool:
        if not folder.is_file or folder.head(4) != b"PK\x03\x04":
            return False
        try:
            with zipfile.ZipFile(folder.path) as records:
                return any(name.split("/", 1)[-1] == "constants.pkl" for name in records.namelist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError):
            return False
