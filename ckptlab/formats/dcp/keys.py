"""What the keys of a checkpoint name: weights, states of an optimizer, its groups, and what the program put in.

`planner_data` gives a key as the program nested it, ("optimizer", "state", "layers.0.wq.weight", "exp_avg"), or flat,
("optimizer", "state.layers.0.wq.weight.exp_avg"); without it the key's own dots are all there is. A part that speaks of
an optimizer (`optimizer`, `optim`) before `state` or `param_groups` marks what is the optimizer's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Path = tuple[str | int, ...]
Part = tuple[str, Path | str]  # "state" or "param_groups" of an optimizer, and what comes behind it

_OPTIMIZER = re.compile(r"(?:^|.*\.)\w*optim\w*$", re.IGNORECASE)
_IN_KEY = re.compile(r"(?:^|.*?\.)\w*optim\w*\.(state|param_groups)(?:\.(.*))?$", re.IGNORECASE | re.DOTALL)
_MODEL = re.compile(r"(^|.*\.)(model|module|net|network|policy|actor|critic|state_dict)$", re.IGNORECASE)
_COPY = re.compile(r"ema|averag|avg|swa|shadow|target|teacher|ref|old|best|prev", re.IGNORECASE)


@dataclass
class Keys:
    """Keys by what they are. `weights`: model's name → key. `states`: name → state → key, tensors alone; `others`: the
    same of objects. `listed`: (optimizer, group) → option → key, in the list form; `whole_groups`: the keys of entire
    lists. `flat`: name → option → key. `client`: the rest, key → its path. `above`: what is before the names of a
    list's parameters, by optimizer, and by key of an entire list. `untold`: optimizers, of several, of which nothing
    tells whose they are: they are among the rest. `alike`: models of which nothing tells which is the one that is
    trained; the first is taken."""

    weights: dict[str, str] = field(default_factory=dict)
    states: dict[str, dict[str, str]] = field(default_factory=dict)
    others: dict[str, dict[str, str]] = field(default_factory=dict)
    listed: dict[tuple[int, int], dict[str, str]] = field(default_factory=dict)
    whole_groups: list[str] = field(default_factory=list)
    flat: dict[str, dict[str, str]] = field(default_factory=dict)
    client: dict[str, Path] = field(default_factory=dict)
    above: dict[int | str, str] = field(default_factory=dict)
    untold: list[str] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)


def sort_keys(tensors: Mapping[str, Path | None], objects: Mapping[str, Path | None]) -> Keys:
    """What each key is. Values: the paths that `planner_data` gives."""
    found = Keys()
    optimizers: dict[Path, dict[str, Part]] = {}
    rest: dict[str, Path] = {}
    for key, path in (*tensors.items(), *objects.items()):
        its = _optimizers(key, path)
        if its is None:
            rest[key] = path or (key,)
        else:
            root, kind, inside = its
            optimizers.setdefault(root, {})[key] = kind, inside
    containers: dict[Path, dict[str, str]] = {}
    for key in (key for key in rest if key in tensors):
        containers.setdefault(rest[key][:-1], {})[str(rest[key][-1])] = key
    whose = _whose(optimizers, containers) if len(optimizers) > 1 else {}
    told = {root: keys for root, keys in optimizers.items() if root in whose or len(optimizers) == 1}
    found.untold = [".".join(map(str, root)) for root in optimizers if root not in told]
    best = _models(found, containers, told, list(whose.values()))
    for number, (root, keys) in enumerate(told.items()):
        at = whose.get(root, best)
        above = "" if at == best or not at else ".".join(map(str, at)) + "."
        found.above[number] = above
        _sort(found, number, above, keys, tensors)
    sorted_out = {*found.weights.values(), *(key for keys in told.values() for key in keys)}
    rest |= {key: path or (key,) for key, path in (*tensors.items(), *objects.items()) if key not in rest}
    found.client = {key: path for key, path in rest.items() if key not in sorted_out}
    return found


def _sort(found: Keys, number: int, above: str, keys: Mapping[str, Part], tensors: Mapping[str, Path | None]) -> None:
    """The keys of one optimizer."""
    known = {name.removeprefix(above) for name in found.weights if name.startswith(above)}
    nested = {str(r[0]) for kind, r in keys.values() if kind == "state" and isinstance(r, tuple) and r}
    listed = {r.split(".")[0] for _, r in keys.values() if isinstance(r, str) and re.fullmatch(r"\d+\.params", r)}
    for key, (kind, its_rest) in keys.items():
        if kind == "state":
            name, state = _state(its_rest, known | nested)
            (found.states if key in tensors else found.others).setdefault(above + name, {})[state] = key
        else:
            _group(found, key, its_rest, listed, number, above)


def _whose(
    optimizers: Mapping[Path, Mapping[str, Part]], containers: Mapping[Path, Mapping[str, str]]
) -> dict[Path, Path]:
    """Of several optimizers, which model each one's parameters are in: the one beside it, the one that it is called by
    (`optimizer_g`, `generator`), or the only one that has such names. No parameter is in two."""
    names = {root: _names(keys) for root, keys in optimizers.items()}
    found: dict[Path, Path] = {}
    taken: dict[Path, set[str]] = {at: set() for at in containers}

    def left(root: Path) -> list[Path]:
        mine = {name for name in names[root] if any(name in its for its in containers.values())}
        return [at for at, its in containers.items() if mine and mine <= its.keys() and not mine & taken[at]]

    rules: tuple[Callable[[Path, Path], bool], ...] = (
        lambda root, at: bool(root[:-1]) and at[: len(root) - 1] == root[:-1],
        _called_alike,
        lambda root, at: True,
    )
    for rule in rules:
        for root in optimizers:
            fits = [at for at in left(root) if rule(root, at)] if root not in found else []
            if len(fits) == 1:
                found[root] = fits[0]
                taken[fits[0]] |= names[root]
    return found


def _called_alike(root: Path, at: Path) -> bool:
    """Whether an optimizer's name, without what says that it is one, begins a model's, or contains it."""
    stem, model = (str(path[-1]).lower() if path else "" for path in (root, at))
    stem = re.sub(r"optim[a-z]*", "", stem).strip("_-. ")
    return bool(stem and model) and (model.startswith(stem) or model in stem)


def _optimizers(key: str, path: Path | None) -> tuple[Path, str, Path | str] | None:
    """(where an optimizer is, "state" or "param_groups", what comes behind it) of one of its keys; None of another."""
    if path is not None and len(path) > 1:
        for i in range(1, len(path)):
            part = path[i]
            if isinstance(part, str) and _OPTIMIZER.match(str(path[i - 1])):
                kind, dot, flat = part.partition(".")
                if kind in ("state", "param_groups"):
                    if dot:
                        return path[:i], kind, ".".join([flat, *map(str, path[i + 1 :])])
                    return path[:i], kind, path[i + 1 :]
        if not any(isinstance(part, str) and _IN_KEY.match(part) for part in path):
            return None
    match = _IN_KEY.match(key)
    return None if match is None else ((key[: match.start(1) - 1],), match[1].lower(), match[2] or ())


def _models(
    found: Keys,
    containers: dict[Path, dict[str, str]],
    optimizers: Mapping[Path, Mapping[str, Part]],
    stepped: Sequence[Path],
) -> Path | None:
    """The weights: the container whose names the optimizer knows; else one that is called a model, else the top; and
    others that optimizers step, by where they are. Where the first is, if there is one."""
    names = {name for keys in optimizers.values() for name in _names(keys)}
    stated = any(kind == "state" for keys in optimizers.values() for kind, _ in keys.values())
    if stated and () in containers and all(name.startswith("model.") for name in containers[()]):
        bare = {name.removeprefix("model."): key for name, key in containers[()].items()}
        if sum(name in names for name in bare) > sum(name in names for name in containers[()]):
            containers[()] = bare
    if not containers:
        return None
    matched = {at: sum(name in names for name in its) for at, its in containers.items()}
    likely = {at: (n, *_likelihood(at, optimizers)) for at, n in matched.items()}
    best = max(likely, key=lambda at: likely[at])
    if matched[best] and not stepped and list(likely.values()).count(likely[best]) > 1:
        found.alike = [".".join(map(str, at)) for at in likely if likely[at] == likely[best]]
    if not matched[best]:
        called = [at for at in containers if at and _MODEL.match(str(at[-1]))]
        plain = [at for at in containers if at == ()]
        if not called and not plain:
            return None
        best = max(called or plain, key=lambda at: len(containers[at]))
    found.weights.update(containers.pop(best))
    for at, its in containers.items():  # another copy of the model: an average, a reference
        if at in stepped or (at and sum(name in found.weights for name in its) * 2 > len(its)):
            found.weights.update({".".join(map(str, (*at, name))): key for name, key in its.items()})
    return best


def _likelihood(at: Path, optimizers: Iterable[Path]) -> tuple[bool, bool, bool]:
    """What speaks for a container, of several with the names that an optimizer knows, being what it steps, and not a
    copy: that it is called as the optimizer is, as a model, and not as an average of one."""
    name = str(at[-1]).lower() if at else ""
    called = any(_called_alike(root, at) for root in optimizers)
    return called, not at or bool(_MODEL.match(name)), not _COPY.search(name)


def _names(optimizer: Mapping[str, Part]) -> set[str]:
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


def _group(found: Keys, key: str, rest: Path | str, listed: set[str], number: int, above: str) -> None:
    parts = list(map(str, rest)) if isinstance(rest, tuple) else rest.split(".")
    if not rest:
        found.whole_groups.append(key)
        found.above[key] = above
    elif parts[0].isdigit() and (isinstance(rest, tuple) or parts[0] in listed):
        found.listed.setdefault((number, int(parts[0])), {})[".".join(parts[1:])] = key
    else:
        found.flat.setdefault(above + ".".join(parts[:-1]), {})[parts[-1]] = key
