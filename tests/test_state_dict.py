"""A checkpoint as a mapping of names, as a dict of a library's arrays, and in a torch module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compare import DATA, GPT, ZERO2, ZERO3, whole
from devices import BACKENDS, spoken

import ckptlab
from ckptlab import Backend
from ckptlab.errors import BackendError, CheckpointError, InputError

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def gpt() -> Any:
    return ckptlab.open(GPT)


def test_a_checkpoint_is_a_mapping_of_names(gpt: Any) -> None:
    assert list(gpt) == list(gpt.tensors) == list(gpt.keys()) == gpt._ipython_key_completions_()
    assert len(gpt) == len(gpt.tensors) == 52
    assert dict(gpt) == dict(gpt.tensors)
    name = next(iter(gpt))
    assert name in gpt
    assert "nothing" not in gpt
    assert (gpt.get(name), gpt.get("nothing")) == (gpt[name], None)
    tied = ckptlab.open(ZERO2)
    assert "lm_head.weight" in tied
    assert "lm_head.weight" not in list(tied)  # found, and not counted twice
    with pytest.raises(CheckpointError, match="did you mean"):
        gpt[name + "s"]
    assert gpt != ckptlab.open(GPT)  # what differs is said by diff
    assert len({gpt, gpt}) == 1


def test_a_run_is_a_mapping_of_steps() -> None:
    run = ckptlab.open_run(DATA / "plain_zero1_dp2_steps")
    assert list(run) == list(run.keys()) == [2, 4, 5]
    assert (len(run), 4 in run, 3 in run, run.get(3)) == (3, True, False, None)
    assert [ckpt.iteration for ckpt in run.values()] == list(run)
    with pytest.raises(KeyError, match="there are 2, 4, 5"):
        run[3]


@pytest.mark.parametrize("backend", BACKENDS, ids=spoken)
@pytest.mark.parametrize("case", [GPT, ZERO2], ids=lambda c: c.name)
def test_a_state_dict_holds_what_is_stored(case: Path, backend: Backend) -> None:
    ckpt = ckptlab.open(case)
    found = ckpt.state_dict(backend=backend.name, device=backend.device)
    assert set(found) == {name for t in ckpt.values() for name in (t.name, *t.aliases)}
    for tensor in ckpt.values():
        state = "master" if "master" in tensor.states else "param"
        array = found[tensor.name]
        assert backend.is_array(array)
        assert backend.device_of(array) in (None, backend.device)
        assert backend.to_numpy(array).tobytes() == whole(ckpt.catalog, tensor.name, state).tobytes(), tensor.name
        assert backend.to_numpy(array).dtype == tensor.states[state]
        assert all(found[alias] is array for alias in tensor.aliases)


def test_a_state_dict_of_one_state_and_dtype(gpt: Any) -> None:
    moments = gpt.state_dict("exp_avg", dtype=torch.bfloat16)
    assert {n for n in moments if n in gpt.tensors} == {t.name for t in gpt.values() if "exp_avg" in t.states}
    for name, array in moments.items():
        assert array.dtype == torch.bfloat16
        exact = whole(gpt.catalog, gpt[name].name, "exp_avg").astype(ml_dtypes.bfloat16)
        assert array.view(torch.uint16).numpy().tobytes() == exact.tobytes()
    assert gpt.state_dict("exp_avg", "numpy", "float16")[next(iter(moments))].dtype == np.float16
    with pytest.raises(CheckpointError, match="no state 'momentum'"):
        gpt.state_dict("momentum")
    with pytest.raises(BackendError, match="expected one of"):
        gpt.state_dict(backend="tensorflow")


class Module(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A module with the names of a checkpoint, whatever they are: dots are put back by state_dict."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: Any = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            at: Any = self
            for part in path:
                if part not in at._modules:
                    at.add_module(part, torch.nn.Module())
                at = at._modules[part]
            at.register_parameter(last, torch.nn.Parameter(torch.full(shape, 7.0, dtype=dtype, device=device)))


def shapes(ckpt: Any) -> dict[str, tuple[int, ...]]:
    return {t.name: t.shape for t in ckpt.values()}


@pytest.mark.parametrize("device", sorted({b.device for b in BACKENDS if b.name == "torch"}))
@pytest.mark.parametrize("case", [GPT, ZERO3], ids=lambda c: c.name)
def test_a_module_is_loaded(case: Any, device: str) -> None:
    ckpt = ckptlab.open(case)
    module = Module(shapes(ckpt), device=device)
    assert ckpt.load_into(module) == ([], [])
    for name, value in module.state_dict().items():
        state = "master" if "master" in ckpt[name].states else "param"
        np.testing.assert_array_equal(value.cpu().numpy(), whole(ckpt.catalog, name, state).astype(np.float32))


def test_what_is_loaded_is_rounded_and_padded_as_the_module_wants(gpt: Any) -> None:
    padded = next(t for t in gpt.values() if t.layout.padded)
    wanted = {**shapes(gpt), padded.name: (padded.shape[0] + 5, *padded.shape[1:])}
    module = Module(wanted, torch.bfloat16)
    gpt.load_into(module)
    rows = module.state_dict()[padded.name]
    stored = whole(gpt.catalog, padded.name, "master").astype(ml_dtypes.bfloat16)
    assert rows[: padded.shape[0]].view(torch.uint16).numpy().tobytes() == stored.tobytes()
    assert (rows[padded.shape[0] :] == 0).all()


def test_what_does_not_fit_is_refused_before_anything_is_copied(gpt: Any) -> None:
    known = shapes(gpt)
    first, second, *_ = [n for n in known if len(known[n]) == 2 and not gpt[n].layout.padded]
    wrong = {**known, "head.bias": (3,), first: (*known[first][::-1], 1)}
    del wrong[second]
    module = Module(wrong)
    with pytest.raises(CheckpointError) as told:
        gpt.load_into(module)
    for text in ("lacks, head.bias", f"the module lacks, {second}", f"{first} is ", "strict=False"):
        assert text in str(told.value)
    with pytest.raises(CheckpointError, match=f"{first} is "):
        gpt.load_into(module, strict=False)  # a shape is never left out
    assert all((value == 7).all() for value in module.state_dict().values())
    del wrong[first]
    loaded = gpt.load_into(lenient := Module(wrong), strict=False)
    assert loaded == (["head.bias"], [n for n in known if n in (first, second)])
    assert (lenient.state_dict()["head.bias"] == 7).all()
    with pytest.raises(InputError, match="takes a torch.nn.Module, not None"):
        gpt.load_into(None)
    with pytest.raises(CheckpointError, match="to_empty"):
        gpt.load_into(Module(known, device="meta"))
