"""DeepSpeed's two formats: step folders, and universal ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ckptlab import paths
from ckptlab.arrays import Tally
from ckptlab.catalog import Catalog
from ckptlab.errors import CheckpointError, ReshapeError
from ckptlab.findings import Faults, Strict
from ckptlab.formats.deepspeed import names
from ckptlab.formats.deepspeed.options import TargetOptions
from ckptlab.formats.fileplan import FilePlan
from ckptlab.formats.format import Beside, Format, Listing, Match
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import LayoutsOf, Strategy

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
ZERO = "zero"  # the folder of a universal checkpoint that holds the tensors


def _alike(found: Cut, written: Cut) -> bool:
    """Whether two cuts are the same; on one tp rank, where nothing is cut, whether they have the same padding."""
    return found.dims == written.dims or (
        written.mesh.get("tp", 1) == 1 and [d.size for d in found.dims] == [d.size for d in written.dims]
    )


class DeepSpeed(Format):
    name = "deepspeed"
    title = "a step folder that DeepSpeed's engine saved"
    options = TargetOptions
    home = "deepspeed"
    writes = True
    cuts = ("tp",)
    pointed = True

    def recognise(self, folder: Listing) -> Match | None:
        kinds = {n.kind for name in folder.names if (n := names.parse(name)) is not None}
        heads = kinds & {"model", "zero3_model"}
        if kinds & {"optim", "layer", "expert"} or (heads and ZERO not in folder.folders):
            return Match(folder.path, self.name)
        pointed = folder.pointed(LATEST) if not heads else None
        return None if pointed is None else self.recognise(Listing(pointed)) or Match(pointed, self.name)

    def read(self, path: str, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        from ckptlab.formats.deepspeed.read import read_native

        return read_native(path, faults, strategy)

    def read_parts(self, match: Match, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        """A step whose files each node kept on a disk of its own."""
        from ckptlab.formats.deepspeed.read import read_native

        if self.name != DeepSpeed.name:
            return super().read_parts(match, faults, strategy)
        return read_native(match.path, faults, strategy, match.also)

    def target(self, source: Catalog, mesh: Mesh, options: Any) -> Catalog:
        from ckptlab.formats.deepspeed.adopted import adopted
        from ckptlab.formats.deepspeed.cautions import assumed
        from ckptlab.formats.deepspeed.target import reshape

        if self.name == DeepSpeed.name and any(f.code == "order-unknown" for f in source.findings):
            raise ReshapeError(
                f"{source.path}: DeepSpeed's native files hold parameters in the model's own order, which nothing says "
                "here: give the module, ckptlab.begin(weights, module), or write --to universal, which goes by names"
            )
        native = adopted(source, pipeline=mesh.pp > 1 or options.pipeline is not None)
        if native is not source and mesh.tp == 1 and options.padded_vocab is None:  # nobody would say what is padding
            true = next((t.shape[0] for t in source.tensors.values() if t.layout.padded), None)
            options = replace(options, padded_vocab=true)
        made = reshape(native, mesh, options)
        return replace(made, format=self.name, findings=(*made.findings, *assumed(source, options)))

    def files(self, source: Catalog, target: Catalog, tally: Tally | None = None) -> Iterator[FilePlan]:
        from ckptlab.formats.deepspeed.adopted import adopted
        from ckptlab.formats.deepspeed.write import files

        return files(adopted(source, pipeline=bool(target.training.layer_stages)), target, tally)

    def payload(self, source: Catalog, target: Catalog) -> int:
        from ckptlab.formats.deepspeed.write import payload

        return payload(target)

    def verify(self, folder: str, source: Catalog, target: Catalog) -> None:
        """The folder must open, and say of every tensor what the target says."""
        from ckptlab.formats.deepspeed.adopted import adopted

        native = adopted(source, pipeline=bool(target.training.layer_stages)).private
        silent = native.autotp and target.mesh.tp == 1  # AutoTP says nothing there
        told = target.training.layouts_told and not silent
        layouts = LayoutsOf({name: tensor.layout for name, tensor in target.tensors.items()})
        found = self.read(folder, Strict(), None if not silent and (told or target.mesh.tp == 1) else layouts)
        for name, tensor in target.tensors.items():
            again = found.tensors.get(name) if found else None
            alike = again is not None and again.shape == tensor.shape and _alike(again.cut, tensor.cut)
            if not alike or (told and again and again.layout.text != tensor.layout.text):
                raise CheckpointError(
                    f"{folder}: {name} was written as {again and (again.layout, again.cut)}, expected "
                    f"{(tensor.layout, tensor.cut)}: this is a fault of ckptlab; please report it"
                )

    def beside(self, source: Catalog, target: Catalog) -> Beside:
        """What a Trainer, accelerate or Lightning left there."""
        from ckptlab.formats.deepspeed.beside import beside

        return beside(source, target) if paths.is_folder(source.path) else Beside()

    def pointer(self, destination: str, source: Catalog) -> str | None:
        """`latest`; none in the source's own folder, whose `latest` stays."""
        parent = paths.parent(paths.absolute(destination))
        is_sources = parent == paths.parent(source.path) and paths.exists(os.path.join(parent, LATEST))
        return None if is_sources else LATEST


class Universal(DeepSpeed):
    name = "universal"
    title = "a universal folder of DeepSpeed's: whole tensors and states"
    sharded = False

    def recognise(self, folder: Listing) -> Match | None:
        kinds = {n.kind for name in folder.names if (n := names.parse(name)) is not None}
        if ZERO in folder.folders and not kinds & {"optim", "layer", "expert"}:
            return Match(folder.path, self.name)
        if kinds or LATEST in folder.names:
            return None
        pointed = folder.pointed(LATEST_UNIVERSAL)
        return None if pointed is None else Match(pointed, self.name)

    def read(self, path: str, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        from ckptlab.formats.deepspeed.universal.read import read_universal

        return read_universal(path, faults, strategy)

    def target(self, source: Catalog, mesh: Mesh, options: Any) -> Catalog:
        """What a step folder would hold on the mesh, which the model files beside whole tensors are made for; of a run
        without ZeRO what it would hold at stage 1, since DeepSpeed reads no universal folder without ZeRO."""
        from ckptlab.formats.deepspeed.cautions import not_loaded
        from ckptlab.formats.deepspeed.optimfile import Wrapper

        target = super().target(source, mesh, options)
        if target.private.wrapper is not Wrapper.WHOLE:
            return replace(target, findings=(*target.findings, *not_loaded(target)))
        if options.zero_stage == 0:
            raise ReshapeError(
                f"{source.path}: a universal folder for training without ZeRO (zero_stage 0): DeepSpeed reads none "
                "there: leave zero_stage out, or write deepspeed files"
            )
        return self.target(source, mesh, replace(options, zero_stage=1))

    def files(self, source: Catalog, target: Catalog, tally: Tally | None = None) -> Iterator[FilePlan]:
        from ckptlab.formats.deepspeed.adopted import adopted
        from ckptlab.formats.deepspeed.universal.write import files

        return files(adopted(source, target.tensors, bool(target.training.layer_stages)), target, tally)

    def payload(self, source: Catalog, target: Catalog) -> int:
        return sum(plan.nbytes for plan in self.files(source, target))

    def verify(self, folder: str, source: Catalog, target: Catalog) -> None:
        """Its model files are those of a step folder; its tensors are read back by whoever opens it."""

    def pointer(self, destination: str, source: Catalog) -> str | None:
        return LATEST_UNIVERSAL
