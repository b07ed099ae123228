"""What goes by a name: ours and other people's, loaded when it is asked for."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from compare import GPT

from ckptlab import formats
from ckptlab.errors import CheckpointError, LayoutError, UnsupportedError
from ckptlab.registry import Registry
from ckptlab.sharding import families
from ckptlab.sharding import strategies as strategy
from ckptlab.sharding.strategies import Megatron

GROUP = "ckptlab.tests"


class Theirs(formats.Format):
    """A format that tells its folders and reads none."""

    name, title = "theirs", "a format of theirs"

    def recognise(self, folder: formats.Listing) -> formats.Match | None:
        return formats.Match(folder.path, self.name) if "theirs.data" in folder.names else None


class Unable(Theirs):
    """One that cannot be made."""

    name = "unable"

    def __init__(self) -> None:
        raise RuntimeError("no licence")


class Careless(Theirs):
    """One that fails at whatever folder it looks at."""

    name = "careless"

    def recognise(self, folder: formats.Listing) -> formats.Match | None:
        raise KeyError("theirs")


@pytest.fixture
def made() -> Registry[object]:
    return Registry("number", GROUP, LayoutError, {"pi": "math:pi", "one": 1})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that bring `tau`, a `pi` of their own, and one whose module is not there."""
    found = [("tau", "math:tau"), ("pi", "math:tau"), ("broken", "no_such_module:x")]
    entries = EntryPoints(EntryPoint(name, value, GROUP) for name, value in found)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **wanted: entries.select(**wanted))


@pytest.mark.slow
def test_ours_are_imported_when_they_are_asked_for(made: Registry[object]) -> None:
    assert made.names() == ("pi", "one")
    assert (made.get("pi"), made.get("one")) == (pytest.approx(3.14159), 1)
    code = (
        "import sys; from ckptlab.arrays.backends import BACKENDS; BACKENDS.names(), BACKENDS.get('numpy')\n"
        "assert not (loaded := {'torch', 'jax'} & set(sys.modules)), loaded\n"
        "BACKENDS.get('torch'); assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("installed")
def test_installed_packages_add_theirs_and_ours_go_first(made: Registry[object]) -> None:
    assert made.names() == ("pi", "one", "broken", "tau")  # names alone load nothing
    assert made.get("tau") == 2 * float(str(made.get("pi")))
    assert made.is_own("pi")
    assert not made.is_own("tau")
    with pytest.raises(LayoutError, match=r"number 'broken' of .*no_such_module.*uninstall"):
        made.get("broken")


def test_a_name_that_two_packages_bring_is_nobodys(made: Registry[object], monkeypatch: pytest.MonkeyPatch) -> None:
    same = [EntryPoint("tau", "math:tau", GROUP)] * 2
    monkeypatch.setattr(made, "_installed", EntryPoints([*same, EntryPoint("e", "math:e", GROUP)]))
    assert made.get("tau") == pytest.approx(6.28318)
    monkeypatch.setattr(made, "_installed", EntryPoints([*same, EntryPoint("tau", "math:e", GROUP)]))
    with pytest.raises(LayoutError, match="'tau' is registered by the packages math:e, math:tau: uninstall"):
        made.get("tau")


@pytest.mark.usefixtures("installed")
def test_an_unknown_name_is_refused_with_the_nearest_first(made: Registry[object]) -> None:
    with pytest.raises(LayoutError, match=r"^no number is called 'taus': expected one of tau, pi, one, broken$"):
        made.get("taus")


def test_what_is_registered_is_found_and_may_take_anothers_place(made: Registry[object]) -> None:
    made.register("two", 2)
    made.register("one", "math:e")
    assert made.names() == ("pi", "one", "two")
    assert (made.get("two"), made.get("one")) == (2, pytest.approx(2.71828))


def test_a_strategy_may_come_from_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    brought = {"theirs": "GPT_NEOX", "classy": "Megatron"}
    entries = EntryPoints(
        EntryPoint(name, f"ckptlab.sharding.strategies:{value}", "ckptlab.strategies")
        for name, value in brought.items()
    )
    monkeypatch.setattr(strategy.REGISTRY, "_installed", entries)
    assert strategy.resolve("theirs") is strategy.GPT_NEOX
    with pytest.raises(LayoutError, match=r"'classy' .* expected an object with layout, found <class .*Megatron"):
        strategy.resolve("classy")
    assert strategy.resolve("megatron-swiglu") == Megatron(swiglu=True)
    with pytest.raises(LayoutError, match=r"expected one of megatron, .*theirs, a \.json file"):
        strategy.resolve("megatorn")


def test_formats_come_by_entry_point_and_ours_go_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [("theirs", "test_registry:Theirs"), ("safetensors", "test_registry:Theirs")]
    entries = EntryPoints(EntryPoint(name, value, "ckptlab.formats") for name, value in found)
    monkeypatch.setattr(formats.FORMATS, "_installed", entries)
    assert formats.FORMATS.names()[-1] == "theirs"
    assert formats.get("safetensors").title != Theirs.title
    (tmp_path / "theirs.data").write_bytes(b"")
    assert formats.locate(tmp_path).format == "theirs"
    with pytest.raises(CheckpointError, match="a single file that no format knows"):
        formats.locate(tmp_path / "theirs.data")
    with pytest.raises(UnsupportedError, match="this is a format of theirs, which ckptlab cannot open yet"):
        formats.read(tmp_path)
    with pytest.raises(CheckpointError, match="^no format is called 'their': expected one of theirs, "):
        formats.get("their")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("theirs", "no_such_module:Theirs", "cannot be loaded .ModuleNotFoundError: No module named 'no_such_module'"),
        ("theirs", "test_registry:GROUP", "expected a subclass of ckptlab.formats.Format, found 'ckptlab.tests'"),
        ("others", "test_registry:Theirs", "its `name` is 'theirs', and it is registered as 'others'"),
        ("unable", "test_registry:Unable", "cannot be used: RuntimeError: no licence"),
        (
            "careless",
            "test_registry:Careless",
            "'careless' cannot say whether .* .KeyError: 'theirs'., and is",
        ),
    ],
)
def test_a_broken_format_of_others_is_warned_of_and_keeps_nobody_from_opening(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setattr(formats.FORMATS, "_installed", EntryPoints([EntryPoint(name, value, "ckptlab.formats")]))
    with pytest.warns(UserWarning, match=says):
        assert formats.locate(GPT).format == "deepspeed"


def test_a_broken_family_of_others_keeps_nobody_from_finding_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = EntryPoints([EntryPoint("theirs", "test_registry:GROUP", "ckptlab.families")])
    monkeypatch.setattr(families.FAMILIES, "_installed", entries)
    with pytest.warns(UserWarning, match="family 'theirs' of the package .* expected a Family, found 'ckptlab.tests'"):
        assert families.resolve("llama").name == "llama-torchtitan"
