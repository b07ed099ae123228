"""Whole weights in files of torch.save, as a format: `pytorch_model.bin`, and any single file of a state dict."""

from __future__ import annotations

import re

from ckptlab.catalog import Catalog
from ckptlab.findings import Faults
from ckptlab.formats.format import Format, Listing, Match
from ckptlab.formats.known import TorchScript, Unread
from ckptlab.sharding.strategies import Strategy

_SUFFIXES = (".pt", ".pth", ".ckpt", ".pt.tar", ".pth.tar")
_HEADS = (b"PK\x03\x04", b"\x80")  # of what torch.save writes, and wrote before 1.6: any program has .bin files
_WEIGHTS = re.compile(
    r"(?:diffusion_)?pytorch_model(?:-\d+-of-\d+|_fsdp(?:_\d+)?)?\.bin|(?:adapter_|lit_)?model\.(?:bin|pt|pth)"
    r"|consolidated(?:\.00)?\.pth|(?:hf|meta)_model_\d+(?:_\d+)?\.pt"
)
_INDEX = re.compile(r"(?!pytorch_optim).*\.bin\.index\.json")
_OF_RANKS = re.compile(r".*_states\.pt")  # DeepSpeed's, which say nothing by themselves


class Torch(Format):
    name = "torch"
    title = "weights in files of torch.save, without an optimizer"
    sharded = False

    def recognise(self, folder: Listing) -> Match | None:
        if folder.is_file:
            name = folder.path.rpartition("/")[2]
            ours = name.endswith(_SUFFIXES) and not _OF_RANKS.fullmatch(name)
            ours = ours or _WEIGHTS.fullmatch(name) is not None
            ours = ours or (name.endswith(".bin") and folder.head(4).startswith(_HEADS))
            other = ours and (TorchScript().recognise(folder) is not None or Unread.kind(folder) is not None)
            return Match(folder.path, self.name, weights_only=True) if ours and not other else None
        if any(name.endswith(".safetensors") for name in folder.names):  # the same weights, as a rule
            return None
        ours = any(_WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name) for name in folder.names)
        ours = ours and not Unread.of_ranks(folder)
        return Match(folder.path, self.name, weights_only=True) if ours else None

    def read(self, path: str, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        from ckptlab.formats.torch.read import read_weights

        return read_weights(path, faults, _WEIGHTS, _INDEX)
