"""A folder that transformers opens: safetensors under its names, each tied weight once, and a config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptlab.arrays import Tally
from ckptlab.catalog import Catalog
from ckptlab.errors import ReshapeError
from ckptlab.findings import Finding, Where
from ckptlab.formats.fileplan import FilePlan, Literal
from ckptlab.formats.format import Listing, Match
from ckptlab.formats.safetensors.format import Safetensors
from ckptlab.formats.weights import WeightOptions, entries
from ckptlab.mesh import Mesh
from ckptlab.words import some

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class HuggingFaceOptions(WeightOptions):
    """What a user may say of a folder for transformers, beside what may be said of weights. `config`: what config.json
    is to say, instead of what is found (`heads`, `kv_heads`: of that); `model_type`: transformers' word for the model;
    `adapter`: the weights are those of an adapter, and this is what adapter_config.json says."""

    config: Mapping[str, Any] | None = None
    model_type: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    adapter: Mapping[str, Any] | None = None


class HuggingFace(Safetensors):
    name = "huggingface"
    title = "a Hugging Face folder: safetensors under transformers' names, with its config.json"
    options = HuggingFaceOptions
    reads = False

    def recognise(self, folder: Listing) -> Match | None:
        """Nothing: such folders are read as safetensors."""
        return None

    def target(self, source: Catalog, mesh: Mesh, options: Any) -> Catalog:
        """Whole tensors, their names being transformers' already, and what config.json will say."""
        made = super().target(source, mesh, options)
        said, findings = _config(source, made, options)
        made = replace(made, tensors={n: replace(t, aliases=()) for n, t in made.tensors.items()})
        return replace(made, format=self.name, private=(options, said), findings=tuple(findings))

    def files(self, source: Catalog, target: Catalog, tally: Tally | None = None) -> Iterator[FilePlan]:
        from ckptlab.formats.safetensors.write import SINGLE, files

        options, said = target.private
        alone = options.adapter is not None
        single = ADAPTER if alone else SINGLE
        yield from files(source, options.wanted, options.max_shard_bytes, aliases=False, single=single)
        if said is not None:
            yield FilePlan(
                ADAPTER_CONFIG if alone else CONFIG,
                (Literal(json.dumps(said, indent=2, sort_keys=True).encode() + b"\n"),),
            )

    def payload(self, source: Catalog, target: Catalog) -> int:
        return sum(entry.nbytes for entry in entries(target, None, aliases=False))


def _config(
    source: Catalog, target: Catalog, options: HuggingFaceOptions
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """What config.json says, None where it cannot be made; and what the user must hear of it."""
    from ckptlab.sharding.families.config import CLASSES, config, model_type
    from ckptlab.sharding.families.numbers import numbers, told

    dtypes = {str(next(iter(t.states.values()))) for t in target.tensors.values() if t.kind != "buffer"}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else "float32"
    if options.adapter is not None:
        return dict(options.adapter), []
    if options.config is not None:
        return {**options.config, "dtype": dtype}, []
    sources = list(told(source))
    kind = model_type(source.tensors, options.model_type, sources)
    if (
        there := next((s for s in sources if s.get("model_type") in CLASSES and "architectures" in s), None)
    ) is not None:
        return {**{k: v for k, v in there.items() if k != "torch_dtype"}, "dtype": dtype}, []
    if kind is None:
        expected = f"names of one of {', '.join(CLASSES)}"
        return None, [_finding("config-missing", expected, "of no class that ckptlab knows: no config.json is written")]
    given = {"heads": options.heads, "kv_heads": options.kv_heads}
    try:
        made = config(kind, source.tensors, numbers(source, given), sources, dtype)
    except KeyError as error:
        raise ReshapeError(
            f"{source.path}: {CLASSES[kind]} needs a tensor {error}: there are {some([*source.tensors], 4)}"
        ) from None
    if made.missing:
        found = f"nobody says its {', '.join(made.missing)}: no config.json is written"
        return None, [_finding("config-missing", f"what {CLASSES[kind]} is made of", found)]
    if made.assumed:
        found = f"nobody says {', '.join(made.assumed)}: config.json leaves them to transformers' defaults"
        return made.values, [_finding("config-assumed", f"what {CLASSES[kind]} is made of", found)]
    return made.values, []


def _finding(code: str, expected: str, found: str) -> Finding:
    todo = "give a config (--config FILE), or write into config.json what the run was trained with"
    return Finding(code, "warning", Where((CONFIG,)), expected, found, todo, "target")
