"""Who may import whom, read from every import: those within functions and those for types alone count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import ckptlab

PACKAGE = Path(ckptlab.__file__).parent
PARTS = """
aliases lazily errors plain words arguments paths far stored shown registry pool findings draw
mesh
layout
plan
catalog
sharding
arrays
formats
convert
views
viewed state_dict reshaping checkpoint
analysis adapters beginning pretrained
describe viz
testing widgets deepspeed cli
"""  # from the ground up, as CONTRIBUTING.md tells them


def modules(package: Path) -> dict[str, Path]:
    """Dotted name → file of every module of a package."""
    found = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


@cache
def imports(package: Path) -> dict[str, set[str]]:
    """Module → the modules of the same package that it imports anywhere in its text."""
    known = modules(package)
    return {name: {m for m in _named(path) if m in known} - {name} for name, path in known.items()}


def _named(path: Path) -> Iterator[str]:
    """What import statements name: of `from a import b` a.b where that is a module, else a."""
    known = path.parent
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{known}: relative imports are not used here"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if _is_module(inside) else str(node.module)


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of modules each of which imports, by way of others, every other (strongly connected components)."""
    reached = {name: _reached(graph, name) for name in graph}
    together = (frozenset(m for m in reached[name] if name in reached[m]) for name in graph)
    return {found for found in together if found}


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    left = list(graph[start])
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left.extend(graph[name])
    return seen


def test_the_reading_finds_a_circle_wherever_the_import_stands() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {frozenset("bc")}
    found = imports(PACKAGE)
    assert "ckptlab.sharding.strategies" in found["ckptlab"]  # for types alone
    assert "ckptlab.views" in found["ckptlab.viewed"]  # within a function
    assert "ckptlab.errors" in found["ckptlab.mesh"]


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(imports(PACKAGE)) == set()


def test_a_part_imports_only_those_before_it() -> None:
    floor = {part: i for i, line in enumerate(PARTS.strip().splitlines()) for part in line.split()}
    graph = {name: wanted for name, wanted in imports(PACKAGE).items() if name not in ("ckptlab", "ckptlab.__main__")}
    up = {
        f"{name} → {above}"
        for name, wanted in graph.items()
        for above in wanted
        if floor[above.split(".")[1]] > floor[name.split(".")[1]]
    }
    assert up == set()


def test_nobody_outside_a_formats_folder_imports_from_it() -> None:
    formats = [path.name for path in (PACKAGE / "formats").iterdir() if (path / "__init__.py").exists()]
    assert {"deepspeed", "paper", "safetensors", "torch"} <= set(formats)
    formats.remove("torch")  # what formats are written in, and no format
    graph = imports(PACKAGE)
    for name in formats:
        inside = f"ckptlab.formats.{name}"
        theirs = (inside, "ckptlab.deepspeed", "ckptlab.testing")
        looks = {
            module.removeprefix("ckptlab.")
            for module, wanted in graph.items()
            if not any(module == own or module.startswith(f"{own}.") for own in theirs)
            and any(m == inside or m.startswith(f"{inside}.") for m in wanted)
        }
        assert looks == set(), name


def test_who_imports_by_name_is_known() -> None:
    """A circle may not hide in a text: registries and what shows things import by name, and packages' faces."""
    texts = {path.relative_to(PACKAGE): path.read_text() for path in PACKAGE.rglob("*.py")}
    by_name = {str(path) for path, text in texts.items() if "import_module" in text or "__import__(" in text}
    assert by_name == {"registry.py", "shown.py", "lazily.py", "__init__.py"}
