"""The format without files: models on paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckptlab.catalog import Catalog
from ckptlab.formats.format import Format, Listing, Match
from ckptlab.formats.paper.drawn import drawn
from ckptlab.formats.paper.model import laid_out
from ckptlab.mesh import Mesh
from ckptlab.sharding.transformer import PaperModel


@dataclass(frozen=True)
class PaperOptions:
    """What a user may say of a target; None keeps the source's (0 where it has none). `zero_stage`: 0 to 3."""

    zero_stage: int | None = None


class Paper(Format):
    name = "paper"
    title = "on paper: layouts of a model, with nothing stored"
    options = PaperOptions
    home = "paper"
    reads = False

    def recognise(self, folder: Listing) -> Match | None:
        return None

    def target(self, source: Catalog, mesh: Mesh, options: Any) -> Catalog:
        """A model of these numbers on another mesh; of any other source, what its layouts say."""
        stage = (source.zero_stage if options.zero_stage is None else options.zero_stage) or 0
        if source.training.numbers:
            return laid_out(PaperModel(**source.training.numbers), mesh, stage)
        return drawn(source, mesh, stage)
