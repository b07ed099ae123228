"""Kinds of checkpoints that are told by their markers and not read yet, so that an error can name them."""

from __future__ import annotations

import re
import zipfile
from abc import abstractmethod
from typing import ClassVar

from ckptlab import paths
from ckptlab.formats.format import Format, Listing, Match


class _Known(Format):
    reads = False

    def recognise(self, folder: Listing) -> Match | None:
        return Match(folder.path, self.name) if self.marked(folder) else None

    @abstractmethod
    def marked(self, folder: Listing) -> bool:
        """Whether its markers are there."""


class _ByNames(_Known):
    """Told by the names in its folder: each of `markers` matches some entry."""

    markers: ClassVar[tuple[str, ...]]

    def marked(self, folder: Listing) -> bool:
        return all(any(re.fullmatch(marker, name) for name in folder.names) for marker in self.markers)


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
            with paths.open_binary(folder.path) as file, zipfile.ZipFile(file) as records:
                return any(name.split("/", 1)[-1] == "constants.pkl" for name in records.namelist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError):
            return False
