"""How the pipeline engine deals layers to stages, and which stages a tensor lives on.

Neither the partition method nor the number of layer specs is in a checkpoint. The method is inferred: the first that
deals the source's layers to the stages they were found on. Source: DeepSpeed 0.19.8,
`PipelineModule._partition_layers`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptlab.catalog import Catalog, Tensor
from ckptlab.errors import ReshapeError
from ckptlab.formats.deepspeed import names
from ckptlab.formats.deepspeed.experts import Experts
from ckptlab.sharding.stages import balanced, stage_of, uniform

METHODS = ("blocks", "parameters", "uniform")


@dataclass(frozen=True)
class Pipeline:
    """The layers of a pipeline, as far as a checkpoint tells.

    `signatures[i]` describes layer i's parameters (empty for a layer without any), `counts[i]` is their number,
    `stages[i]` the pp stage that held it. `tied_stages` are the stages on which tied modules were found beside their
    own layer's.
    """

    signatures: tuple[tuple, ...]
    counts: tuple[int, ...]
    stages: tuple[int, ...]

    def starts(self, pp: int, method: str) -> tuple[int, ...]:
        """The first layer of each of `pp` stages. ReshapeError for an unknown method or too few layers."""
        if method == "uniform":
            return uniform(len(self.counts), pp)
        if method == "parameters":
            return balanced(self.counts, pp)
        if method == "blocks":
            return balanced(self.blocks, pp)
        raise ReshapeError(
            f"pipeline method {method!r}: expected one of {', '.join(METHODS)} or the first layer of each stage"
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        """1 for a repeated block (the most frequent kind of layer), else 0: what `type:transformer` comes to."""
        kinds = Counter(s for s in self.signatures if s)
        block = max(kinds, key=lambda s: kinds[s]) if kinds else ()
        return tuple(int(s == block and bool(s)) for s in self.signatures)

    def infer_method(self, pp: int) -> str | None:
        """The method that deals the layers as they were found on `pp` stages; None if none of ours does."""
        with_parameters = [i for i, s in enumerate(self.signatures) if s]
        for method in METHODS:
            starts = self.starts(pp, method)
            if all(stage_of(i, starts) == self.stages[i] for i in with_parameters):
                return method
        return None


def describe(catalog: Catalog, experts: Experts | None = None) -> Pipeline:
    """The pipeline of a catalog: its layers are those of layer files, or by tensors' names. experts: as a target has
    them, of which each rank counts its own (None: the catalog's)."""
    module, experts = catalog.private.module, catalog.private.folder.experts if experts is None else experts
    prefixes = module.layer_keys
    below = _below(prefixes.values(), catalog)
    by_layer = {layer: below[prefix] for layer, prefix in prefixes.items()}
    tied_later = [p for p in set(prefixes.values()) if p.startswith(names.TIED)]
    last = max(by_layer, default=0)
    tied = [t for p in sorted(tied_later) for t in below[p]]
    total = last + 1 + bool(tied)
    signatures: list[tuple] = [()] * total
    counts, stages = [0] * total, [catalog.private.folder.mesh.pp - 1] * total
    for layer, tensors in by_layer.items():
        prefix = prefixes[layer]
        signatures[layer] = tuple(sorted((t.name.removeprefix(prefix), t.shape) for t in tensors))
        counts[layer] = sum(t.numel // (experts.degree(t.name) or 1) for t in tensors)
        stages[layer] = module.layer_stages[layer]
    if tied:
        signatures[last + 1] = ("tied", *sorted(t.name for t in tied))
        counts[last + 1] = sum(t.numel for t in tied)
    return Pipeline(tuple(signatures), tuple(counts), tuple(stages))


def _below(prefixes: Iterable[str], catalog: Catalog) -> dict[str, list[Tensor]]:
    """The tensors whose names begin with each prefix; prefixes end with a dot."""
    found: dict[str, list[Tensor]] = {prefix: [] for prefix in prefixes}
    for name, tensor in catalog.tensors.items():
        for dot in re.finditer(r"\.", name):
            if (held := found.get(name[: dot.end()])) is not None:
                held.append(tensor)
    return found


def tensor_stages(catalog: Catalog, starts: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The stages that hold each tensor: its layer's, and for a tied module the last one too (its later occurrence)."""
    pp = len(starts)
    found: dict[str, tuple[int, ...]] = {}
    prefixes = catalog.private.module.layer_keys
    below = _below(prefixes.values(), catalog)
    for layer, prefix in prefixes.items():
        stage = stage_of(layer, starts)
        stages = tuple(dict.fromkeys((stage, pp - 1))) if prefix.startswith(names.TIED) else (stage,)
        found |= {tensor.name: stages for tensor in below[prefix]}
    for name, tensor in catalog.tensors.items():
        if name not in found:
            raise ReshapeError(
                f"{catalog.path}: {name} belongs to no layer file, so that its pp stage is unknown (found on "
                f"{tensor.stages}): "
                "keep the number of pp stages"
            )
        middle = [s for s in tensor.stages if s not in (tensor.stages[0], catalog.private.folder.mesh.pp - 1)]
        if middle:
            raise ReshapeError(
                f"{catalog.path}: {name} is tied to a layer on pp stage {middle[0]}, neither the first nor the last "
                "that has it: "
                "ckptlab cannot tell which layer that is; keep the number of pp stages"
            )
    return found
