"""Writes docs/reference.md: every public name with its first sentence and an example, all of which a test runs.

python docs/reference.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import ckptlab

OPENING = """# Reference

Every public name of `ckptlab`, with the first sentence of its docstring (`help(ckptlab.stats)` has the rest)
and an example. The examples run from top to bottom in the checkout (`tests/test_readme.py`).
Written by `docs/reference.py`.

```python
import numpy as np
import xarray as xr
import ckptlab
from ckptlab import Layout, Mesh

ckpt = ckptlab.open("data/gpt_tp2_pp2_dp2")
name = "2.mlp.dense_h_to_4h.weight"
reshaped = ckpt.reshape(tp=4)
```
"""
EXAMPLES = {
    "open": 'ckptlab.open("data/plain_zero2_dp2", strategy="megatron")',
    "Checkpoint": "ckpt[name].shape, ckpt.mesh, ckpt.states, ckpt.full()",
    "Catalog": 'ckpt.catalog.placement(name, "master").holders',
    "Cluster": "reshaped.plan.time(ckptlab.Cluster(ranks_per_node=4)).slowest",
    "Cost": "reshaped.cost().moved",
    "Cut": "Layout('(tp out) in').resolve((8, 4), Mesh(tp=2)).shard_shape((0,))",
    "Diff": "ckptlab.diff(ckpt, ckpt).by_layer('master')",
    "Finding": "[finding.code for finding in reshaped.check()]",
    "Health": "ckptlab.check(ckpt).findings",
    "Layout": 'Layout("((tp q) + k + v) in", totals={"q": 32}, sizes={"k": 8, "v": 8})',
    "Megatron": 'ckptlab.open("data/gpt_tp2_pp2_dp2", strategy=ckptlab.Megatron())',
    "Mesh": 'Mesh(tp=8, dp=2).split("tp", kv=2, rep=4)',
    "ParameterGroup": "ckpt.catalog.groups[0].options",
    "Reshape": "reshaped.shards(), reshaped.cost(), reshaped.plan, reshaped.file_sizes",
    "Rules": 'ckptlab.Rules.of({r".*weight": "(tp out) in"}).layout("a.weight", [(8, 4)])',
    "Run": 'ckptlab.open_run("data/plain_zero1_dp2_steps").steps',
    "Tensor": "ckpt[name].layout, ckpt[name].cut, ckpt[name].states",
    "begin": 'ckptlab.begin(ckpt).reshape(format="universal").check()',
    "check": "ckptlab.check(ckpt).verdict",
    "diff": 'ckptlab.diff(ckpt, "data/gpt_tp2_pp2_dp2/universal").equal',
    "families": 'ckptlab.families.resolve("gpt2", ckpt).onto(ckpt)["transformer.h.0.attn.c_attn.weight"].layout',
    "merge": 'ckptlab.merge(ckpt.shards("master", stack=False)[name], "(tp out) in")',
    "open_run": 'ckptlab.open_run("data/plain_zero1_dp2_steps").full("master")',
    "paper_model": "ckptlab.paper_model(Mesh(tp=8, dp=2), heads=16, hidden=128, kv_heads=2)",
    "plan": "ckptlab.plan.between(Layout('(tp out)').resolve((8,), Mesh(tp=2)), Layout('out').resolve((8,), Mesh()))",
    "reshape": 'ckptlab.reshape(ckpt.shards("master", stack=False)[name], "(tp out) in", Mesh(tp=4))',
    "split": 'ckptlab.split(xr.DataArray(np.zeros((8, 4)), dims=("out", "in")), "(tp out) in", Mesh(tp=4))',
    "stats": 'ckptlab.stats(ckpt, by="stack")["norm"]',
    "to": 'ckptlab.to(ckpt.full("master", stack=False)[name], "numpy")',
    "updates": "ckptlab.updates(ckpt).update_ratio",
    "with_weights": 'ckptlab.with_weights(ckpt, "data/gpt_tp2_pp2_dp2/universal").reshape(tp=4).cost()',
    "viz": "ckptlab.viz.mesh(ckpt.mesh)",
}


def sentence(thing: Any) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s", text)[0].rstrip(":") if text else ""


def entry(name: str) -> str:
    thing = getattr(ckptlab, name)
    call = name
    if inspect.isfunction(thing):
        call += str(inspect.signature(thing)).split(" -> ")[0].replace("'", "")
        call = call.replace(" = ", "=")
        call = re.sub(r": [^=,)]*(?:\[[^\]]*\][^=,)]*)*", "", call)
    lines = [f"### {name}", "", f"`{call}`: {sentence(thing)}" if inspect.isfunction(thing) else sentence(thing)]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        methods = [
            f"`.{key}`: {sentence(value)}"
            for key, value in inspect.getmembers(thing)
            if not key.startswith("_") and (callable(value) or isinstance(value, property)) and sentence(value)
        ]
        lines += ["", *(f"- {line}" for line in methods)]
    if name in EXAMPLES:
        lines += ["", "```python", EXAMPLES[name], "```"]
    return "\n".join(lines) + "\n"


def page() -> str:
    names = sorted([n for n in (*ckptlab.__all__, "open", "Tensor") if not n.startswith("_")], key=str.lower)
    return "\n".join([OPENING, *map(entry, names)])


if __name__ == "__main__":
    Path(__file__).with_name("reference.md").write_text(page())
