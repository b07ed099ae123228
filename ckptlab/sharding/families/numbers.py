"""Numbers that lines of notation are about: how many heads, groups and experts, from wherever a checkpoint says them.

`h` attention heads, `kv` key/value heads, `q` query heads for each of those, `d` the size of a head.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ckptlab import paths
from ckptlab.arguments import explained
from ckptlab.catalog import Catalog
from ckptlab.errors import CheckpointError

HEADS = ("heads", "num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("kv_heads", "num_key_value_heads", "num_query_groups", "num_kv_heads", "n_kv_heads")
HEAD_DIM = ("head_dim", "kv_channels")


def told(catalog: Catalog) -> Iterator[Mapping[str, Any]]:
    """What a checkpoint says of its model, the nearest first: the program's `args`, and a config.json in its folder or
    beside it."""
    for key in ("args", "model_args", "config", "hparams"):
        value = catalog.client.get(key)
        found = value if isinstance(value, Mapping) else getattr(value, "attributes", None)
        if isinstance(found, Mapping):
            yield found
    if (beside := said_beside(catalog, "config.json")) is not None:
        yield beside


def said_beside(catalog: Catalog, name: str) -> Mapping[str, Any] | None:
    """What a file of JSON in a checkpoint's folder, or beside it, says; None where there is none. CheckpointError where
    it is no JSON."""
    for folder in dict.fromkeys((catalog.path, paths.parent(paths.real(catalog.path)))):
        path = paths.join(folder, name)
        if not paths.is_folder(folder) or not paths.is_file(path):
            continue
        try:
            found = json.loads(paths.text(path))
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON ({error}): copy it again") from None
        return found if isinstance(found, Mapping) else {}
    return None


def numbers(catalog: Catalog | None, given: Mapping[str, Any]) -> dict[str, int]:
    """All numbers: those given (by any of their usual names, or that of a length), and what the checkpoint says."""
    sources: list[Mapping[str, Any]] = [given]
    if catalog is not None:
        training = catalog.training
        sources += [*told(catalog), {"heads": training.heads, "kv_heads": training.kv_heads}]
    named = {*HEADS, *KV_HEADS, *HEAD_DIM}
    found = {name: int(value) for name, value in given.items() if name not in named and value is not None}
    heads = _first(sources, HEADS)
    kv_heads = next((n for source in sources if (n := _kv_heads(source)) is not None), None) or heads
    if heads is not None:
        found.setdefault("h", heads)
    if kv_heads is not None:
        found.setdefault("kv", kv_heads)
    if "h" in found and "kv" in found:
        found.setdefault("q", found["h"] // found["kv"])
    if (size := _first([given], HEAD_DIM)) is not None:
        found.setdefault("d", size)
    return found


@explained
def told_numbers(catalog: Catalog) -> dict[str, int]:
    """The heads that a checkpoint tells, by the names under which they are given."""
    found = numbers(catalog, {})
    return {name: found[length] for name, length in (("heads", "h"), ("kv_heads", "kv")) if length in found}


def _kv_heads(source: Mapping[str, Any]) -> int | None:
    """Megatron's args always have num_query_groups, and mean it only with group_query_attention."""
    if source.get("group_query_attention") is False:
        return _first([source], HEADS)
    return _first([source], KV_HEADS)


def _first(sources: Iterable[Mapping[str, Any]], names: Iterable[str]) -> int | None:
    names = tuple(names)
    values = (source.get(name) for source in sources for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
