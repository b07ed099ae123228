"""A transformer described by a few numbers: its tensors' names, shapes, and layouts as Megatron cuts them.

Tensor parallelism: Shoeybi et al. 2019, arXiv:1909.08053.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from ckptlab.catalog import DTYPES
from ckptlab.errors import LayoutError
from ckptlab.layout import Layout
from ckptlab.sharding.strategies import Megatron, Shape, cut, dim_names

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

    def layout(self, name: str, shards: Sequence[Shape], keys_over: str = "tp") -> Layout | None:
        """See `Strategy.layout`: Megatron's, but with q, k and v told apart. keys_over: the mesh axis that cuts k and
        v, a part of tp where kv heads are fewer than its ranks."""
        if name.endswith("query_key_value.weight"):
            return self._attention(len(shards[0]), keys_over)
        return Megatron(swiglu=self.gated).layout(name, shards)

    def _attention(self, ndim: int, keys_over: str) -> Layout:
        """Cut between heads: q, k, v interleaved in a head; with fewer kv heads each by itself; one kv head is
        everyone's."""
        head = self.hidden // self.heads
        if self.keys == self.heads:
            return cut(ndim, 0, "tp head qkv {}", sizes={"qkv": 3, dim_names(ndim)[0]: head})
        q, kv = self.heads * head, self.keys * head
        if self.keys == 1:
            text, sizes, totals = "((tp q) + k + v) in", {"k": kv, "v": kv}, {"q": q}
        else:
            text, sizes, totals = f"((tp q) + ({keys_over} k) + ({keys_over} v)) in", {}, {"q": q, "k": kv, "v": kv}
        units = dict.fromkeys(totals, head)
        return Layout(text, dims=dim_names(ndim), sizes=sizes, totals=totals, units=units)

    def __str__(self) -> str:
        defaults = PaperModel()
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        always = ("layers", "hidden", "heads", "vocab")
        return ", ".join(f"{k}={v!r}" for k, v in said.items() if k in always or v != getattr(defaults, k))
