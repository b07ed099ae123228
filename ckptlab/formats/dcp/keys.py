"""What the keys of a checkpoint name: weights, states of an optimizer, its groups, and what the program put in.

`planner_data` gives a key as the program nested it, ("optimizer", "state", "layers.0.wq.weight", "exp_avg"), or flat,
("optimizer", "state.layers.0.wq.weight.exp_avg"); without it the key's own dots are all there is. A part that speaks of
an optimizer (`optimizer`, `optim`) before `state` or `param_groups` marks what is the optimizer's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Path = tuple[str | int, ...]

_OPTIMIZER = re.compile(r"(?:^|.*\.)\w*optim\w*$", re.IGNORECASE)
_IN_KEY = re.compile(r"(?:^|.*?\.)\w*optim\w*\.(state|param_groups)(?:\.(.*))?$", re.IGNORECASE | re.DOTALL)
_MODEL = re.compile(r"(^|.*\.)(model|module|net|network|policy|actor|critic|state_dict)$", re.IGNORECASE)


@dataclass
class Keys:
    """Keys by what they are. `weights`: model's name → key. `states`: name → state → key, tensors alone; `others`: the
    same of objects. `listed`: group → option → key, in the list form; `whole_groups`: the keys of entire lists.
    `flat`: name → option → key. `client`: the rest, key → its path."""

    weights: dict[str, str] = field(default_factory=dict)
    states: dict[str, dict[str, str]] = field(default_factory=dict)
    others: dict[str, dict[str, str]] = field(default_factory=dict)
    listed: dict[int, dict[str, str]] = field(default_factory=dict)
    whole_groups: list[str] = field(default_factory=list)
    flat: dict[str, dict[str, str]] = field(default_factory=dict)
    client: dict[str, Path] = field(default_factory=dict)


def sort_keys(tensors: Mapping[str, Path | None], objects: Mapping[str, Path | None]) -> Keys:
    """What each key is. Values: the paths that `planner_data` gives."""
    found = Keys()
    optimizer: dict[str, tuple[str, Path | str]] = {}
    rest: dict[str, Path] = {}
    for key, path in (*tensors.items(), *objects.items()):
        its = _optimizers(key, path)
        if its is None:
            rest[key] = path or (key,)
        else:
            optimizer[key] = its
    _models(found, {key: path for key, path in rest.items() if key in tensors}, optimizer)
    known = set(found.weights)
    nested = {str(r[0]) for kind, r in optimizer.values() if kind == "state" and isinstance(r, tuple) and r}
    listed = {r.split(".")[0] for _, r in optimizer.values() if isinstance(r, str) and re.fullmatch(r"\d+\.params", r)}
    for key, (kind, its_rest) in optimizer.items():
        if kind == "state":
            name, state = _state(its_rest, known | nested)
            (found.states if key in tensors else found.others).setdefault(name, {})[state] = key
        else:
            _group(found, key, its_rest, listed)
    sorted_out = {*found.weights.values(), *optimizer}
    found.client = {key: path for key, path in rest.items() if key not in sorted_out}
    return found


def _optimizers(key: str, path: Path | None) -> tuple[str, Path | str] | None:
    """("state" or "param_groups", what comes behind it) of a key of an optimizer; None of another."""
    if path is not None and len(path) > 1:
        for i in range(1, len(path)):
            part = path[i]
            if isinstance(part, str) and _OPTIMIZER.match(str(path[i - 1])):
                kind, dot, flat = part.partition(".")
                if kind in ("state", "param_groups"):
                    if dot:
                        return kind, ".".join([flat, *map(str, path[i + 1 :])])
                    return kind, path[i + 1 :]
        if not any(isinstance(part, str) and _IN_KEY.match(part) for part in path):
            return None
    match = _IN_KEY.match(key)
    return None if match is None else (match[1].lower(), match[2] or ())


def _models(found: Keys, tensors: Mapping[str, Path], optimizer: Mapping[str, tuple[str, Path | str]]) -> None:
    """The weights: the container whose names the optimizer knows; else one that is called a model, else the top."""
    containers: dict[Path, dict[str, str]] = {}
    for key, path in tensors.items():
        containers.setdefault(path[:-1], {})[str(path[-1])] = key
    if () in containers and all(name.startswith("model.") for name in containers[()]) and _prefixed(optimizer):
        known = _names(optimizer)
        bare = {name.removeprefix("model."): key for name, key in containers[()].items()}
        if sum(name in known for name in bare) > sum(name in known for name in containers[()]):
            containers[()] = bare
    if not containers:
        return
    names = _names(optimizer)
    matched = Counter({at: sum(name in names for name in its) for at, its in containers.items()})
    best, count = matched.most_common(1)[0]
    if not count:
        called = [at for at in containers if at and _MODEL.match(str(at[-1]))]
        plain = [at for at in containers if at == ()]
        if not called and not plain:
            return
        best = max(called or plain, key=lambda at: len(containers[at]))
    found.weights.update(containers.pop(best))
    for at, its in containers.items():  # another copy of the model: an average, a reference
        if at and sum(name in found.weights for name in its) * 2 > len(its):
            found.weights.update({".".join(map(str, (*at, name))): key for name, key in its.items()})


def _prefixed(optimizer: Mapping[str, tuple[str, Path | str]]) -> bool:
    return any(kind == "state" for kind, _ in optimizer.values())


def _names(optimizer: Mapping[str, tuple[str, Path | str]]) -> set[str]:
    """Every name that may be a parameter's: what is before the last dot, where a key is flat."""
    found = set()
    for kind, rest in optimizer.values():
        if isinstance(rest, tuple):
            if kind == "state" and rest:
                found.add(str(rest[0]))
        else:
            found.add(rest.rpartition(".")[0])
    return found


def _state(rest: Path | str, known: Iterable[str]) -> tuple[str, str]:
    """(parameter, state) of what is behind `state`."""
    if isinstance(rest, tuple):
        return str(rest[0]) if rest else "", ".".join(map(str, rest[1:])) or "state"
    parts = rest.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if name in known:
            return name, ".".join(parts[end:])
    name, _, state = rest.rpartition(".")
    return name, state


def _group(found: Keys, key: str, rest: Path | str, listed: set[str]) -> None:
    parts = list(map(str, rest)) if isinstance(rest, tuple) else rest.split(".")
    if not rest:
        found.whole_groups.append(key)
    elif parts[0].isdigit() and (isinstance(rest, tuple) or parts[0] in listed):
        found.listed.setdefault(int(parts[0]), {})[".".join(parts[1:])] = key
    else:
        found.flat.setdefault(".".join(parts[:-1]), {})[parts[-1]] = key
