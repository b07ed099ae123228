"""Writes docs/reference.md: every public name with its first sentence and an example, all of which a test runs;
those of the modules `families`, `plan`, `plots`, `testing` and `viz` behind the module.

python docs/reference.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import ckptlab

OPENING = """# Reference

Every public name of `ckptlab` and of its modules, with the first sentence of its docstring (`help(ckptlab.stats)` has
the rest) and an example. The examples run from top to bottom in the checkout (`tests/test_readme.py`).
Written by `docs/reference.py`.

```python
import tempfile
import numpy as np
import xarray as xr
import ckptlab
from ckptlab import Layout, Mesh, families, plan, plots, testing, viz

ckpt = ckptlab.open("data/gpt_tp2_pp2_dp2")
name = "2.mlp.dense_h_to_4h.weight"
reshaped = ckpt.reshape(tp=4)
shards = ckpt.shards("master", stack=False)[name]
out = tempfile.mkdtemp() + "/"
line = families.Join("qkv.weight", "(kv (q d + d + d)) in", ("q.weight", "k.weight", "v.weight"))
```
"""
MODULES = ("families", "plan", "plots", "testing", "viz")
EXAMPLES = {
    "analysis": "ckptlab.analysis.check(ckpt).verdict == ckptlab.check(ckpt).verdict",
    "Backend": 'ckptlab.to(shards, "torch").data.backend.name',
    "BackendError": (
        'try:\n    ckpt.full(backend="tensorflow")\nexcept ckptlab.BackendError as error:\n    print(error)'
    ),
    "begin": 'ckptlab.begin(ckpt).reshape(format="universal").check()',
    "Catalog": 'ckpt.catalog.placement(name, "master").holders',
    "check": "ckptlab.check(ckpt).verdict",
    "Checkpoint": "ckpt[name].shape, ckpt.mesh, ckpt.states, ckpt.full()",
    "CheckpointError": (
        'try:\n    ckptlab.open("nowhere")\nexcept ckptlab.CheckpointError as error:\n    print(error)'
    ),
    "CkptlabError": (
        "try:\n"
        '    ckptlab.stats(ckpt, by="colour")\n'
        "except ckptlab.CkptlabError as error:  # all of ours\n"
        "    print(error)"
    ),
    "Cluster": "reshaped.plan.time(ckptlab.Cluster(ranks_per_node=4)).slowest",
    "Cost": "reshaped.cost().moved",
    "Cut": "Layout('(tp out) in').resolve((8, 4), Mesh(tp=2)).shard_shape((0,))",
    "deepspeed": 'ckptlab.deepspeed.DeepSpeedCheckpoint("data/gpt_tp2_pp2_dp2/global_step3", tp_degree=1, pp_degree=1)',
    "DestinationError": (
        'try:\n    reshaped.save("data")\nexcept ckptlab.DestinationError as error:\n    print(error)'
    ),
    "Diff": "ckptlab.diff(ckpt, ckpt).by_layer('master')",
    "diff": 'ckptlab.diff(ckpt, "data/gpt_tp2_pp2_dp2/universal").equal',
    "explore": (
        "widget = ckptlab.explore(ckpt)\n"
        "widget.tensor = name\n"
        'widget.to_html(out + "page.html", meshes=[Mesh(tp=4)], tensors=[name])'
    ),
    "families": 'ckptlab.families.resolve("gpt2", ckpt).onto(ckpt)["transformer.h.0.attn.c_attn.weight"].layout',
    "families.Bound": (
        'family = families.resolve("gpt2", ckpt)\ntaken = family.take(ckpt, "left", {})\ntaken.bound[0].names'
    ),
    "families.FAMILIES": "families.FAMILIES.names()",
    "families.Family": 'families.Family("mine", "A program of mine", (families.Rename("a.weight", "b.weight"), line))',
    "families.found": "families.found(ckpt)",
    "families.Join": "line",
    "families.like": (
        'seen = families.resolve("gpt2", ckpt).onto(ckpt)\n'
        'families.like(seen.catalog, ckpt.catalog, "gpt2", first=2, final=6).tensors[name].shape'
    ),
    "families.Line": "line.whole, line.text",
    "families.Permute": 'families.Permute("wq.weight", "q.weight", "(h p two) in -> (h two p) in", two=2)',
    "families.Rename": 'families.Rename("final_layernorm.weight", "norm.weight")',
    "families.resolve": 'families.resolve("llama-megatron-core").lines[0]',
    "families.Side": 'families.resolve("gpt2", ckpt).side_of(ckpt)',
    "families.Stack": 'families.Stack("experts.w1", "e out in", ("experts.{e}.w1",))',
    "families.Start": 'families.start(families.resolve("llama-megatron-core"), 2, {"heads": 4, "kv_heads": 2})',
    "families.start": 'families.start(families.resolve("llama-megatron-core"), 2, {"heads": 4, "kv_heads": 2})',
    "families.Taken": 'taken.left, taken.numbers["layers"]',
    "families.told_numbers": "families.told_numbers(ckpt.catalog)",
    "families.towards": 'list(families.towards(ckpt.catalog, "right", "gpt2").tensors)[:2]',
    "Finding": "[finding.code for finding in reshaped.check()]",
    "Health": "ckptlab.check(ckpt).findings",
    "Layout": 'Layout("((tp q) + k + v) in", totals={"q": 32}, sizes={"k": 8, "v": 8})',
    "LayoutError": (
        "try:\n"
        '    Layout("(tp out) in").resolve((9, 4), Mesh(tp=2))\n'
        "except ckptlab.LayoutError as error:\n"
        "    print(error)"
    ),
    "Megatron": 'ckptlab.open("data/gpt_tp2_pp2_dp2", strategy=ckptlab.Megatron())',
    "merge": 'ckptlab.merge(ckpt.shards("master", stack=False)[name], "(tp out) in")',
    "merge_flat": (
        "group = ckpt.catalog.flat_groups[0]\n"
        'whole = ckptlab.merge_flat(ckpt.flat()["pp0/group0"].master, group, ckpt.catalog.tensors)\n'
        "whole[group.names[0]].dims"
    ),
    "Mesh": 'Mesh(tp=8, dp=2).split("tp", kv=2, rep=4)',
    "MeshError": ("try:\n    Mesh(4, 1, 2)\nexcept ckptlab.MeshError as error:\n    print(error)"),
    "NotationError": ('try:\n    Layout("(tp out in")\nexcept ckptlab.NotationError as error:\n    print(error)'),
    "open": 'ckptlab.open("data/plain_zero2_dp2", strategy="megatron")',
    "open_run": 'ckptlab.open_run("data/plain_zero1_dp2_steps").full("master")',
    "open_view": ('ckptlab.save_view(ckpt.full("param"), out + "param.nc")\nckptlab.open_view(out + "param.nc")'),
    "paper_model": "ckptlab.paper_model(Mesh(tp=8, dp=2), heads=16, hidden=128, kv_heads=2)",
    "ParameterGroup": "ckpt.catalog.groups[0].options",
    "plan": "ckptlab.plan.between(Layout('(tp out)').resolve((8,), Mesh(tp=2)), Layout('out').resolve((8,), Mesh()))",
    "plan.between": 'plan.between(Layout("(tp out)").resolve((8,), Mesh(tp=2)), Layout("out").resolve((8,), Mesh()))',
    "plan.Cluster": "plan.Cluster(ranks_per_node=4, between=50e9)",
    "plan.compose": (
        'a, b = (plan.Placement(Layout("(tp out)").resolve((8,), Mesh(tp=n))) for n in (2, 4))\n'
        'plan.compose([("bias", 4, 4, a, b)]).moved'
    ),
    "plan.FlatBuffer": 'plan.FlatBuffer.contiguous(("a", "b"), (6, 3), dp=2)',
    "plan.held_by": 'plan.held_by(ckpt.catalog.placement(name, "master"), 0)',
    "plan.Holder": 'plan.Holder(pp=1, tp=0)["tp"]',
    "plan.Made": "plan.Made((4, 4), ())",
    "plan.Move": "list(reshaped.plan.moves)[0].key",
    "plan.Placement": 'plan.Placement(Layout("(tp out) in").resolve((8, 4), Mesh(tp=2))).holders',
    "plan.Plan": "reshaped.plan.matrix()",
    "plan.plan_tensor": "plan.plan_tensor(a, b)",
    "plan.Ranks": "reshaped.plan.best_ranks().order",
    "plan.Shard": ('placement = ckpt.catalog.placement(name, "master")\nplacement.shard(placement.holders[0]).ranks'),
    "plan.Times": "reshaped.plan.time(ckptlab.Cluster()).seconds",
    "playground": "ckptlab.playground(hidden=1024, heads=16).mesh",
    "plots": "ckptlab.plots.norms(ckpt)",
    "plots.drift": 'plots.drift(ckptlab.open_run("data/plain_zero1_dp2_steps"))',
    "plots.histograms": 'plots.histograms(ckpt, tensors="dense_h_to_4h")',
    "plots.norms": "plots.norms(ckpt)",
    "plots.spectrum": 'plots.spectrum(ckpt, tensors="dense_h_to_4h.weight")',
    "reading": ("with ckptlab.reading() as read:\n    shards.sel(tp=0).load()\nread.bytes"),
    "ReplicaWarning": (
        "import warnings\n"
        "\n"
        'with warnings.catch_warnings(category=ckptlab.ReplicaWarning, action="error"):\n'
        '    ckptlab.merge(shards, "(tp out) in")'
    ),
    "Report": ('report = reshaped.save(out + "global_step3")\nreport.files, report.bytes_written'),
    "Reshape": "reshaped.shards(), reshaped.cost(), reshaped.plan, reshaped.file_sizes",
    "reshape": 'ckptlab.reshape(ckpt.shards("master", stack=False)[name], "(tp out) in", Mesh(tp=4))',
    "ReshapeError": ("try:\n    ckpt.reshape(tp=3)\nexcept ckptlab.ReshapeError as error:\n    print(error)"),
    "Rules": 'ckptlab.Rules.of({r".*weight": "(tp out) in"}).layout("a.weight", [(8, 4)])',
    "Run": 'ckptlab.open_run("data/plain_zero1_dp2_steps").steps',
    "save_pretrained": 'ckptlab.save_pretrained(ckpt, out + "hf", family="gpt2", dtype="bf16")',
    "save_view": 'ckptlab.save_view(shards, out + "shards.nc")',
    "save_weights": 'ckptlab.save_weights(ckpt, out + "weights", max_shard_bytes=100_000).files',
    "sharding": "ckptlab.sharding.families is families",
    "split": 'ckptlab.split(xr.DataArray(np.zeros((8, 4)), dims=("out", "in")), "(tp out) in", Mesh(tp=4))',
    "split_flat": "ckptlab.split_flat(whole, group).sizes",
    "stats": 'ckptlab.stats(ckpt, by="stack")["norm"]',
    "Strategy": (
        "class Rows(ckptlab.Strategy):\n"
        "    def layout(self, name, shards):\n"
        '        return Layout("(tp out) in") if len(shards[0]) == 2 else Layout("out")\n'
        "\n"
        "\n"
        'ckpt.reshape(Mesh(tp=2), strategy=Rows(), format="dcp").check()'
    ),
    "Tensor": "ckpt[name].layout, ckpt[name].cut, ckpt[name].states",
    "testing": 'testing.check_strategy("megatron", {"mlp.dense_h_to_4h.weight": (64, 16)})',
    "testing.check_family": 'testing.check_family("gpt2-megatron-core", heads=4)',
    "testing.check_format": 'testing.check_format("deepspeed", "data/plain_zero2_dp2")',
    "testing.check_strategy": 'testing.check_strategy("megatron", {"mlp.dense_h_to_4h.weight": (64, 16)})',
    "to": 'ckptlab.to(ckpt.full("master", stack=False)[name], "numpy")',
    "UnsafeFileError": "issubclass(ckptlab.UnsafeFileError, ckptlab.CheckpointError)  # it would run code, or lies",
    "UnsupportedError": "issubclass(ckptlab.UnsupportedError, ckptlab.CheckpointError)  # known, and not read",
    "updates": "ckptlab.updates(ckpt).update_ratio",
    "viz": "ckptlab.viz.mesh(ckpt.mesh)",
    "viz.Activations": (
        "model = ckptlab.paper_model(Mesh(tp=8), heads=16, hidden=128)\n"
        "viz.memory(model, activations=viz.Activations(sequence=2048))"
    ),
    "viz.Drawing": 'viz.mesh(ckpt.mesh).save(out + "mesh.svg")',
    "viz.family": "viz.family(line)",
    "viz.flat": "viz.flat(ckpt.catalog.flat_groups[0], tp=1)",
    "viz.flow": "viz.flow(reshaped)",
    "viz.fullest": "viz.fullest(ckpt)",
    "viz.ACTIVATIONS": "viz.ACTIVATIONS",
    "viz.KINDS": "viz.KINDS",
    "viz.memory": "viz.memory(ckpt)",
    "viz.memory_by_rank": "viz.memory_by_rank(reshaped)",
    "viz.mesh": 'viz.mesh(Mesh(tp=4, dp=2), highlight={"tp": 1})',
    "viz.placed": 'viz.placed(ckpt.catalog, name, "master")',
    "viz.plan": "viz.plan(reshaped)",
    "viz.plot_memory": "viz.plot_memory(ckpt)",
    "viz.plot_plan": "viz.plot_plan(reshaped)",
    "viz.stages": "viz.stages(ckpt)",
    "viz.tensor": 'viz.tensor("(tp out) in", (8, 4), Mesh(tp=2))',
    "viz.values": 'viz.values(ckpt, name, "master")',
    "with_weights": 'ckptlab.with_weights(ckpt, "data/gpt_tp2_pp2_dp2/universal").reshape(tp=4).cost()',
}


def sentence(thing: Any) -> str:
    """The first sentence of a docstring; of a constant its values."""
    if isinstance(thing, tuple):
        return ", ".join(f"`{value}`" for value in thing) + "."
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)(?<!et al\.)\s", text)[0].rstrip(":")


def _parameters(function: Any) -> Iterator[str]:
    """What a function takes, without types."""
    starred = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            yield "*"
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        yield f"{stars}{parameter.name}{default}"


def entry(name: str) -> str:
    thing = attrgetter(name)(ckptlab)
    call = f"{name}({', '.join(_parameters(thing))})" if inspect.isfunction(thing) else name
    lines = [f"### {name}", "", f"`{call}`: {sentence(thing)}" if inspect.isfunction(thing) else sentence(thing)]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        methods = [
            f"`.{key}`: {sentence(value)}"
            for key, value in inspect.getmembers(thing)
            if not key.startswith("_")
            and getattr(Mapping, key, None) is not value
            and (callable(value) or isinstance(value, property | cached_property))
            and sentence(value)
        ]
        lines += ["", *(f"- {line}" for line in methods)]
    lines += ["", "```python", EXAMPLES[name], "```"]
    return "\n".join(lines) + "\n"


def page() -> str:
    own = [n for n in (*ckptlab.__all__, "open", "Tensor") if not n.startswith("_")]
    theirs = [f"{module}.{name}" for module in MODULES for name in getattr(ckptlab, module).__all__]
    return "\n".join([OPENING, *map(entry, sorted([*own, *theirs], key=str.lower))])


if __name__ == "__main__":
    Path(__file__).with_name("reference.md").write_text(page())
