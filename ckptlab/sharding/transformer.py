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

    `head_dim` None: hidden / heads. `experts`: how many each layer has, each `ffn` wide (0: none, the layers are
    dense), and beside them one of `shared_ffn` for every token (0: none); `dense_layers`: the first so many have no
    experts but a feed-forward network of `dense_ffn`. `latent`: multi-head latent attention, as (rank of the queries'
    projection, rank of keys and values, rotary part of a head, a head's values), `head_dim` then being a head's other
    part (DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.1).
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
    head_dim: int | None = None
    experts: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    dense_ffn: int = 0
    latent: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise LayoutError(f"{field} is at least 1, not {value}")
        if self.latent is not None:
            object.__setattr__(self, "latent", tuple(self.latent))
        if self.head_dim is None and self.hidden % self.heads:
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

    @property
    def head(self) -> int:
        """Length of a head."""
        return self.head_dim or self.hidden // self.heads

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Every tensor's name and shape (out, in), in the model's order."""
        found: dict[str, Shape] = {EMBEDDING: (self.vocab, self.hidden)}
        dense, sparse = self._layer(experts=False), self._layer(experts=True)
        for i in range(self.layers):
            layer = sparse if self.experts and i >= self.dense_layers else dense
            found |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        found[NORM] = (self.hidden,)
        return found if self.tied else {**found, HEAD: (self.vocab, self.hidden)}

    def _layer(self, experts: bool) -> dict[str, Shape]:
        """The tensors of one layer, with experts or without."""
        norms = {"input_layernorm.weight": (self.hidden,)}
        after = {"post_attention_layernorm.weight": (self.hidden,)}
        return norms | self._attention_shapes() | after | (self._experts() if experts else self._network(self.dense))

    @property
    def dense(self) -> int:
        """Width of the feed-forward network in a layer without experts."""
        return self.dense_ffn if self.experts and self.dense_ffn else self.width

    def _attention_shapes(self) -> dict[str, Shape]:
        if self.latent is None:
            qkv = (self.heads + 2 * self.keys) * self.head
            return {
                "self_attention.query_key_value.weight": (qkv, self.hidden),
                "self_attention.dense.weight": (self.hidden, self.heads * self.head),
            }
        query, key_value, rotary, value = self.latent
        return {
            "self_attention.linear_q_down_proj.weight": (query, self.hidden),
            "self_attention.linear_q_up_proj.weight": (self.heads * (self.head + rotary), query),
            "self_attention.linear_kv_down_proj.weight": (key_value + rotary, self.hidden),
            "self_attention.linear_kv_up_proj.weight": (self.heads * (self.head + value), key_value),
            "self_attention.dense.weight": (self.hidden, self.heads * value),
        }

    def _network(self, width: int, where: str = "mlp") -> dict[str, Shape]:
        return {
            f"{where}.dense_h_to_4h.weight": (width * (1 + self.gated), self.hidden),
            f"{where}.dense_4h_to_h.weight": (self.hidden, width),
        }

    def _experts(self) -> dict[str, Shape]:
        """All experts of a layer as one tensor, the router, and the expert for every token."""
        each = self._network(self.width, "mlp.experts")
        shared = self._network(self.shared_ffn, "mlp.shared_expert") if self.shared_ffn else {}
        router = {"mlp.router.weight": (self.experts, self.hidden)}
        return router | {name: (self.experts, *shape) for name, shape in each.items()} | shared

    def layout(
        self, name: str, shards: Sequence[Shape], keys_over: str = "tp", experts_over: str = ""
    ) -> Layout | None:
        """See `Strategy.layout`: Megatron's, but with q, k and v told apart. keys_over: the mesh axis that cuts k and
        v, a part of tp where kv heads are fewer than its ranks. experts_over: that which deals experts out (empty:
        every rank has a part of each)."""
        if ".mlp.experts." in name:
            expert = f"({experts_over} expert)" if experts_over else "expert"
            inner = "out (tp in)" if name.endswith("4h_to_h.weight") else f"({'2 ' * self.gated}tp out) in"
            return Layout(f"{expert} {inner}", dims=("expert", "out", "in"))
        if name.endswith("query_key_value.weight"):
            return self._attention(len(shards[0]), keys_over)
        return Megatron(swiglu=self.gated).layout(name, shards)

    def _attention(self, ndim: int, keys_over: str) -> Layout:
        """Cut between heads: q, k, v interleaved in a head; with fewer kv heads each by itself; one kv head is
        everyone's."""
        head = self.head
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
