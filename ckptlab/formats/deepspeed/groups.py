"""Parameter groups: put together out of what pipeline stages have of them, and dealt anew where experts are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any

from ckptlab.catalog import ParameterGroup
from ckptlab.errors import CheckpointError
from ckptlab.formats.deepspeed.experts import Experts, layer_of, natural, number_of

LARGEST = 178_956_971  # elements of an expert group on a rank: DeepSpeed's own limit
GROUP = "ep_size_{}"  # what DeepSpeed calls the parameter groups of experts that are spread over so many ranks
Groups = Sequence[tuple[Mapping[str, Any] | None, tuple[str, ...]]]  # (hyperparameters, tensors) of those of one stage


def match_groups(path: str, stages: Sequence[Groups]) -> tuple[tuple[ParameterGroup, ...], list[list[int]]]:
    """The run's parameter groups out of what each pp stage has of them.

    DeepSpeed drops a group that is empty on a stage, so that an index means nothing across stages: groups are matched
    by their hyperparameters, and where those repeat by what their tensors are called in whatever layer, then by order.
    Returns the groups (tensors in stage order) and, for each stage, the global index of each local group.
    """
    merged: list[tuple[str, Mapping[str, Any] | None, list[str]]] = []
    index: list[list[int]] = []
    for local in stages:
        used: list[int | None] = []  # None: a group that no stage before has
        for position, (options, names) in enumerate(local):
            free = [i for i, (key, _, _) in enumerate(merged) if key == _key(options) and i not in used]
            if options is None:
                free = [position] if position < len(merged) else []
                if index and len(local) != len(index[0]):
                    raise CheckpointError(
                        f"{path}: pp stages have {len(index[0])} and {len(local)} parameter groups and no "
                        "hyperparameters to match them by (elastic checkpoint): resave it without elastic_checkpoint"
                    )
            if len(free) > 1:
                alike = {
                    i: (len(set(names) & set(merged[i][2])), len(kinds(names) & kinds(merged[i][2]))) for i in free
                }
                free.sort(key=lambda i: (*alike[i], -i), reverse=True)
            used.append(free[0] if free else None)
        chosen, before = [0] * len(local), len(merged)
        for position, (options, names) in reversed(list(enumerate(local))):
            found = used[position]
            if found is None:  # behind those of the stages before, unless one that comes next is among them
                found = before
                merged.insert(found, (_key(options), options, []))
                index = [[i + (i >= found) for i in row] for row in index]
                chosen = [i + (i >= found) if k > position else i for k, i in enumerate(chosen)]
            chosen[position] = before = found
            known = set(merged[found][2])
            merged[found][2].extend(n for n in names if n not in known)
        index.append(chosen)
    return tuple(ParameterGroup(options or {}, tuple(names)) for _, options, names in merged), index


def kinds(names: Iterable[str]) -> set[str]:
    """What tensors are called in whatever layer they are."""
    return {re.sub(r"\d+", "#", name) for name in names}


def _key(options: Mapping[str, Any] | None) -> str:
    return repr(sorted((options or {}).items(), key=lambda kv: str(kv[0])))


# ---------------------------------------------------------------- of experts


def degree_named(name: Any) -> int | None:
    """Over how many ranks experts are spread whose parameter group is called so; None where that does not tell."""
    found = re.fullmatch(GROUP.format(r"([1-9]\d{0,8})"), name) if isinstance(name, str) else None
    return int(found[1]) if found else None


def degrees_named(options: Iterable[Mapping[str, Any]]) -> list[int | None]:
    """The same of each of these parameter groups; None for one that is not of experts, too."""
    return [degree_named(group.get("name")) if group.get("moe") else None for group in options]


def regrouped(
    groups: Sequence[ParameterGroup],
    source: Experts,
    target: Experts,
    sizes: Mapping[str, int],
    own: Mapping[str, int],
    new: Mapping[str, int],
) -> tuple[ParameterGroup, ...]:
    """The parameter groups of a target. Those of experts are called by their degree, and hold at most LARGEST elements
    on a rank: more are several groups (`split_params_into_different_moe_groups_for_optimizer`). `sizes`: elements of
    each tensor; `own` and `new`: its pp stage in source and target. CheckpointError where the source's are not dealt
    so."""
    if (source.local, source.fused, own) == (target.local, target.fused, new):
        return tuple(groups)
    found: list[ParameterGroup] = []
    for group in groups:
        layer = layer_of(next(iter(group.tensors), ""))
        if layer is None:
            degree = target.degree(next(iter(group.tensors), ""))
            found.append(replace(group, options=_called(group, degree)) if degree else group)
            continue
        alike = [g for g in groups if _unnamed(g) == _unnamed(group) and target.has(g, target.ep(layer))]
        if group is not alike[0]:
            continue
        for degree in source.sizes:
            same = [g for g in alike if source.has(g, degree)]
            held = [n for g in same for n in g.tensors]
            if [list(g.tensors) for g in same] != [source.everywhere(one) for one in _dealt(source, held, sizes, own)]:
                raise CheckpointError(
                    f"parameter group {group.name}: experts in {len(same)} groups that are not dealt as DeepSpeed does "
                    f"by itself (by at most {LARGEST:,} elements each): keep the ep degree"
                )
        names = [n for g in alike for n in g.tensors]
        options = _called(group, target.ep(layer))
        for one in _dealt(target, names, sizes, new):
            found.append(replace(group, options=options, tensors=tuple(target.everywhere(one))))
    return tuple(found)


def _called(group: ParameterGroup, degree: int) -> Mapping[str, Any]:
    """The hyperparameters of a group of experts of another degree."""
    return {**group.options, "name": GROUP.format(degree)} if "name" in group.options else group.options


def _unnamed(group: ParameterGroup) -> dict[str, Any]:
    """The hyperparameters: DeepSpeed calls a group of experts by their degree alone."""
    return {key: value for key, value in group.options.items() if key != "name"}


def _dealt(
    experts: Experts, names: Sequence[str], sizes: Mapping[str, int], stage_of: Mapping[str, int]
) -> list[list[str]]:
    """What the first ep ranks have of an expert group, in as many groups as DeepSpeed makes of it: each pp stage by
    itself."""
    stages: dict[int, list[str]] = {}
    for name in names:
        if experts.locally(name) == name:
            stages.setdefault(stage_of[name], []).append(name)
    dealt = (_dealt_on_stage(stages[stage], sizes) for stage in sorted(stages))
    return [list(chain(*of_stages)) for of_stages in zip_longest(*dealt, fillvalue=())]


def _dealt_on_stage(names: Sequence[str], sizes: Mapping[str, int]) -> list[list[str]]:
    dealt: list[list[str]] = [[]]
    held = 0
    for name in sorted(names, key=lambda n: (natural(layer_of(n) or ""), number_of(n))):
        if dealt[-1] and held + sizes[name] > LARGEST:
            dealt.append([])
            held = 0
        dealt[-1].append(name)
        held += sizes[name]
    return dealt
