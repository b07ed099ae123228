"""Models on paper: a transformer described by a few numbers, laid out on a mesh as Megatron and ZeRO do, without files.

The catalog that comes of it is like that of a checkpoint with nothing stored behind it: its layouts, flat buffers and
plans are worked out by the same code. ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054; tensor parallelism: Shoeybi et
al. 2019, arXiv:1909.08053.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from ckptlab.catalog import (
    DTYPES,
    MASTER,
    MODULE,
    Catalog,
    FlatGroup,
    Gradients,
    ParameterGroup,
    Tensor,
    Training,
    placements_of,
)
from ckptlab.errors import LayoutError, ReshapeError
from ckptlab.findings import Finding
from ckptlab.formats.deepspeed.pipeline import balanced, stage_of
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder
from ckptlab.strategy import Megatron, Shape, cut, dim_names

FORMAT = "paper"
STAGES = (0, 1, 2, 3)
OPTIMIZER = (MASTER, "exp_avg", "exp_avg_sq")  # Adam's
EMBEDDING, HEAD, NORM = "word_embeddings.weight", "lm_head.weight", "final_layernorm.weight"


@dataclass(frozen=True)
class PaperModel:
    """A decoder-only transformer: sizes in elements, no biases.

    `kv_heads` None: as many as `heads`; `ffn` None: 4 * hidden; `tied`: the output layer is the embedding; `gated`: the
    feed-forward network has a gate beside its up projection (SwiGLU), each `ffn` wide; `dtype`: "bf16", "fp16" or
    "fp32", what it computes with. Raises LayoutError where the numbers do not fit each other.
    """

    layers: int = 4
    hidden: int = 64
    heads: int = 8
    kv_heads: int | None = None
    ffn: int | None = None
    vocab: int = 1000
    tied: bool = True
    gated: bool = False
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise LayoutError(f"{field} is at least 1, not {value}")
        if self.hidden % self.heads:
            raise LayoutError(f"hidden({self.hidden}) is not divisible by heads({self.heads})")
        if self.heads % self.keys:
            raise LayoutError(f"heads({self.heads}) is not divisible by kv_heads({self.keys})")
        if self.dtype not in DTYPES:
            raise LayoutError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")

    @property
    def keys(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads

    @property
    def width(self) -> int:
        """Of the feed-forward network."""
        return self.ffn or 4 * self.hidden

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Every tensor's name and shape (out, in), in the model's order."""
        found: dict[str, Shape] = {EMBEDDING: (self.vocab, self.hidden)}
        qkv = (self.heads + 2 * self.keys) * (self.hidden // self.heads)
        for i in range(self.layers):
            found |= {
                f"layers.{i}.input_layernorm.weight": (self.hidden,),
                f"layers.{i}.self_attention.query_key_value.weight": (qkv, self.hidden),
                f"layers.{i}.self_attention.dense.weight": (self.hidden, self.hidden),
                f"layers.{i}.post_attention_layernorm.weight": (self.hidden,),
                f"layers.{i}.mlp.dense_h_to_4h.weight": (self.width * (1 + self.gated), self.hidden),
                f"layers.{i}.mlp.dense_4h_to_h.weight": (self.hidden, self.width),
            }
        found[NORM] = (self.hidden,)
        return found if self.tied else {**found, HEAD: (self.vocab, self.hidden)}

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        """See `Strategy.layout`: Megatron's, but with q, k and v told apart."""
        if name.endswith("query_key_value.weight"):
            return self._attention(len(shards[0]))
        return Megatron(swiglu=self.gated).layout(name, shards)

    def _attention(self, ndim: int) -> Layout:
        """Cut between heads: q, k, v interleaved in a head; with fewer kv heads each by itself; one kv head is
        everyone's."""
        head = self.hidden // self.heads
        if self.keys == self.heads:
            return cut(ndim, 0, "tp head qkv {}", sizes={"qkv": 3, dim_names(ndim)[0]: head})
        q, kv = self.heads * head, self.keys * head
        if self.keys == 1:
            text, sizes, totals = "((tp q) + k + v) in", {"k": kv, "v": kv}, {"q": q}
        else:
            text, sizes, totals = "((tp q) + (tp k) + (tp v)) in", {}, {"q": q, "k": kv, "v": kv}
        units = dict.fromkeys(totals, head)
        return Layout(text, dims=dim_names(ndim), sizes=sizes, totals=totals, units=units)

    def on(self, mesh: Mesh, zero_stage: int = 1) -> Catalog:
        """The model laid out on a mesh (pp, dp, tp) under a ZeRO stage: 0, all dp ranks hold everything, to 3, each
        tensor cut over dp. ReshapeError, with every reason, where it cannot be."""
        if reasons := list(self._problems(mesh, zero_stage)):
            raise ReshapeError(f"this model cannot be laid out on {mesh}:\n" + "\n".join(f"  - {r}" for r in reasons))
        starts = balanced([0, *[1] * self.layers, 0, 0], mesh.pp)
        try:
            tensors = {n: self._tensor(n, self._stages(n, starts), mesh, zero_stage) for n in self.shapes}
        except LayoutError as error:
            raise ReshapeError(str(error)) from None
        flat_groups = tuple(_flat_groups(tensors, mesh, zero_stage)) if zero_stage else ()
        return Catalog(
            path=f"paper model ({self})",
            format=FORMAT,
            mesh=mesh,
            tensors=tensors,
            placements=placements_of(tensors, flat_groups, _outside(tensors, zero_stage)),
            flat_groups=flat_groups,
            training=Training(
                mesh=mesh,
                zero_stage=zero_stage,
                dtype=self.dtype,
                groups=(ParameterGroup({}, tuple(tensors)),),
                layer_stages={i: stage_of(1 + i, starts) for i in range(self.layers)},
                heads=self.heads,
                kv_heads=self.keys,
                gradients=Gradients(DTYPES[self.dtype], cut=zero_stage >= 2, flat=zero_stage >= 2),
                layouts_told=True,
                numbers={f.name: getattr(self, f.name) for f in fields(self)},
            ),
            findings=tuple(_findings(mesh, zero_stage)),
        )

    def _problems(self, mesh: Mesh, zero_stage: int) -> Iterator[str]:
        if zero_stage not in STAGES:
            yield f"ZeRO stage {zero_stage}: expected 0, 1, 2 or 3"
        if mesh.pp > self.layers:
            yield f"pp {mesh.pp}: more stages than the {self.layers} transformer layers"
        for count, what in ((self.heads, "attention heads"), (self.keys, "key/value heads")):
            if count % mesh.tp and count > 1:
                yield f"tp {mesh.tp}: {count} {what} are not divisible by it"
        if self.heads == 1 and mesh.tp > 1:
            yield f"tp {mesh.tp}: one attention head cannot be cut"

    def _stages(self, name: str, starts: Sequence[int]) -> tuple[int, ...]:
        """The pp stages that hold a tensor: the tied embedding is on the first and on the last."""
        last = len(starts) - 1
        if name == EMBEDDING:
            return tuple(dict.fromkeys((0, last))) if self.tied else (0,)
        return (last,) if name in (NORM, HEAD) else (stage_of(1 + int(name.split(".")[1]), starts),)

    def _tensor(self, name: str, stages: tuple[int, ...], mesh: Mesh, zero_stage: int) -> Tensor:
        """ZeRO-3 keeps no module weight: it is made from the master's fragments."""
        shape = self.shapes[name]
        layout = self.layout(name, [shape])
        assert layout is not None  # Megatron has a layout for every name
        layout = layout.replace(stages=stages)
        if name in (EMBEDDING, HEAD) and shape[0] % mesh.tp:
            layout = layout.replace(padded={0: -(-shape[0] // mesh.tp) * mesh.tp})
        states = {s: np.dtype(np.float32) for s in OPTIMIZER} | {MODULE: DTYPES[self.dtype]}
        if zero_stage == 3:
            del states[MODULE]
        aliases = (HEAD,) if name == EMBEDDING and self.tied else ()
        return Tensor(name, shape, layout, layout.resolve(shape, mesh), "parameter", states, 0, stages, aliases)

    def __str__(self) -> str:
        defaults = PaperModel()
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        always = ("layers", "hidden", "heads", "vocab")
        return ", ".join(f"{k}={v!r}" for k, v in said.items() if k in always or v != getattr(defaults, k))


def reshape(source: Catalog, mesh: Mesh, options: Any) -> Catalog:
    """The same model on another mesh; of the options only `zero_stage` means something. Raises ReshapeError."""
    stage = source.zero_stage if options.zero_stage is None else options.zero_stage
    return PaperModel(**source.training.numbers).on(mesh, stage or 0)


def _flat_groups(tensors: Mapping[str, Tensor], mesh: Mesh, zero_stage: int) -> Iterator[FlatGroup]:
    for stage in range(mesh.pp):
        names = [t.name for t in tensors.values() if stage in t.stages]
        yield FlatGroup.laid_out(Holder(pp=stage), 0, names, tensors, mesh, zero_stage)


def _outside(tensors: Mapping[str, Tensor], zero_stage: int) -> dict[tuple[str, str], tuple[int, ...]]:
    """The stages of what lies outside flat buffers: at stage 0 everything, at 1 and 2 the module weights, at 3
    nothing."""
    states = () if zero_stage == 3 else (MODULE,) if zero_stage else (*OPTIMIZER, MODULE)
    return {(t.name, state): t.stages for t in tensors.values() for state in states}


def _findings(mesh: Mesh, zero_stage: int) -> Iterator[Finding]:
    if zero_stage >= 2 and mesh.pp > 1:
        found = f"DeepSpeed's pipeline engine trains with ZeRO-1 only, not with ZeRO-{zero_stage}"
        yield Finding("pipeline-zero", "warning", found=found, about="target")
