"""transformers' models, line by line, against the names that training programs give the same tensors.

Sources: transformers 5.24 (`models/*/modeling_*.py`), Megatron-core's `attention.py` for how q, k and v interleave: for
each key/value head its queries, then its key, then its value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ckptlab.sharding.families.family import Family
from ckptlab.sharding.families.lines import Join, Line, Permute, Rename, Stack
from ckptlab.sharding.families.programs import PIPELINE, PROGRAMS, TIED_PIPELINE, Program

GROUPED = "(kv (q {d} + {d} + {d}))"  # Megatron's: heads of one key/value head together
APART = "(kv q {d} + kv {d} + kv {d})"  # first all queries, then all keys, then all values

_ATTENTION = (
    "model.layers.{i}.self_attn.q_proj",
    "model.layers.{i}.self_attn.k_proj",
    "model.layers.{i}.self_attn.v_proj",
)
_GLU = ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj")
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")


def _of(parts: tuple[str, ...], kind: str) -> tuple[str, ...]:
    return tuple(f"{part}.{kind}" for part in parts)


def _around(program: Program) -> Iterator[Line]:
    """What a Llama has around and between attention and feed-forward network."""
    yield Rename(f"{program.embed}.weight", "model.embed_tokens.weight")
    for norms, other in ((program.norm1, "input_layernorm"), (program.norm2, "post_attention_layernorm")):
        for norm in norms:
            yield Rename(f"{program.at(norm)}weight", f"model.layers.{{i}}.{other}.weight")
    for final in program.final:
        yield Rename(f"{final}.weight", "model.norm.weight")
    yield Rename(f"{program.head}.weight", "lm_head.weight")


def _attention(program: Program, qkv: str = GROUPED, neighbours: bool = False) -> Iterator[Line]:
    """neighbours: rotary turns rows 2 p and 2 p + 1 of a head of q and k there, transformers' p and p + d/2."""
    head = "p two" if neighbours else "d"
    turned = ("(kv q two p)", "(kv two p)", "(kv p two)") if neighbours else (None, None, None)
    text, two = qkv.format(d=head), (("two", 2),) if neighbours else ()
    for kind, rest in (("weight", " in"), ("bias", "")):
        parts = zip(_of(_ATTENTION, kind), (None if t is None else t + rest for t in turned), strict=True)
        yield Line(f"{program.at(program.qkv)}.{kind}", tuple(parts), text + rest, lengths=two)
        yield Rename(f"{program.at(program.dense)}.{kind}", f"model.layers.{{i}}.self_attn.o_proj.{kind}")
    for norm, other in ((program.q_norm, "q_norm"), (program.k_norm, "k_norm")):
        if norm is None:
            continue
        names = f"{program.at(norm)}.weight", f"model.layers.{{i}}.self_attn.{other}.weight"
        yield Permute(*names, "(p two) -> (two p)", two=2) if neighbours else Rename(*names)


def _network(program: Program) -> Iterator[Line]:
    yield Join(f"{program.at(program.up)}.weight", "(ffn + ffn) in", _of(_GLU, "weight"))
    yield Join(f"{program.at(program.up)}.bias", "(ffn + ffn)", _of(_GLU, "bias"))
    yield _narrow(f"{program.at(program.down)}.weight", "model.layers.{i}.mlp.down_proj.weight")
    yield Rename(f"{program.at(program.down)}.bias", "model.layers.{i}.mlp.down_proj.bias")


def _narrow(left: str, right: str) -> Line:
    """The layer behind one that widens, whose width is `ffn` there: this tells a gated network from one without."""
    return Permute(left, right, "out ffn -> out ffn")


def _experts(program: Program, moe: str, gate: str, up: str, down: str) -> Iterator[Line]:
    """Experts, each by itself, and what chooses among them. gate, up, down: what transformers calls their layers."""
    yield Rename(f"{program.at(str(program.router))}.weight", f"{moe}.gate.weight")
    for wide, narrow in program.experts:
        parts = (f"{moe}.experts.{{e}}.{gate}.weight", f"{moe}.experts.{{e}}.{up}.weight")
        yield Join(program.at(wide), "(ffn + ffn) in", parts)
        yield _narrow(program.at(narrow), f"{moe}.experts.{{e}}.{down}.weight")


def llama(program: Program, apart: bool = False, neighbours: bool = False) -> Family:
    """Llama 2 and 3, Mistral, Qwen 2 and 3, with the biases and the norms of q and k that some of them have. apart: q,
    k and v are joined one after the other; neighbours: rotary over neighbours (Megatron's --rotary-interleaved)."""
    lines = (*_around(program), *_attention(program, APART if apart else GROUPED, neighbours), *_network(program))
    variant = "-apart" * apart + "-interleaved" * neighbours
    title = f"{program.name}{', q, k, v apart' * apart}{', rotary interleaved' * neighbours} ↔ transformers' Llamas"
    strategy = "megatron-swiglu" if program.strategy == "megatron" else program.strategy
    told = (("rotary_interleaved", neighbours),)
    return Family(f"llama{variant}-{program.name}", title, lines, program.defaults, LLAMAS, strategy, told)


def mixtral(program: Program) -> Family:
    """Mixtral, each expert by itself, as its files have them: without norms of q and k, and shares of the experts that
    are chosen sum to one."""
    moe = "model.layers.{i}.block_sparse_moe"
    program = replace(program, q_norm=None, k_norm=None)
    lines: list[Line] = [*_around(program), *_attention(program)]
    lines += _experts(program, moe, "w1", "w3", "w2")
    title, told = f"{program.name} ↔ transformers' Mixtral", (("moe_router_pre_softmax", False),)
    return Family(f"mixtral-{program.name}", title, tuple(lines), program.defaults, ("mixtral",), told=told)


def qwen_moe(program: Program) -> Family:
    """Qwen 2 and 3 with experts, each by itself, and with those that all tokens share."""
    moe = "model.layers.{i}.mlp"
    lines: list[Line] = [*_around(program), *_attention(program), *_network(program)]
    lines += _experts(program, moe, "gate_proj", "up_proj", "down_proj")
    if program.shared is not None:
        up, down, gate = map(program.at, program.shared)
        parts = (f"{moe}.shared_expert.gate_proj.weight", f"{moe}.shared_expert.up_proj.weight")
        lines.append(Join(f"{up}.weight", "(ffn + ffn) in", parts))
        lines.append(Rename(f"{down}.weight", f"{moe}.shared_expert.down_proj.weight"))
        lines.append(Rename(gate, f"{moe}.shared_expert_gate.weight"))
    title = f"{program.name} ↔ transformers' Qwen2Moe, Qwen3Moe"
    return Family(f"qwen-moe-{program.name}", title, tuple(lines), program.defaults, ("qwen2_moe", "qwen3_moe"))


def stacked(model: str, there: str, names: tuple[str, str, str]) -> Family:
    """Experts as transformers 5 holds them in memory, stacked, and as its files have them, each by itself.

    there: under what; names: of gate, up and down projection."""
    here, apart = "model.layers.{i}.mlp.experts", f"model.layers.{{i}}.{there}.{{e}}"
    gate, up, down = (f"{apart}.{name}.weight" for name in names)
    lines = (
        Stack(f"{here}.gate_up_proj", "e (ffn + ffn) in", (gate, up)),
        Stack(f"{here}.down_proj", "e out ffn", (down,)),
    )
    return Family(f"{model}-stacked", "transformers' experts stacked in memory ↔ as its files have them", lines)


def autoep(
    model: str, there: str, names: tuple[str, str, str], same: tuple[str, ...], types: tuple[str, ...]
) -> Family:
    """What DeepSpeed's AutoEP makes of transformers' experts, three tensors a layer and a router, and each expert by
    itself, as files have them.

    there: under what; names: of gate, down and up projection; same: tensors of a layer that have one name in both,
    beside those that every model has."""
    layer = "model.layers.{i}"
    here, apart = f"{layer}.mlp.experts", f"{layer}.{there}.experts.{{e}}"
    lines: list[Line] = [
        Stack(f"{here}.{weight}", text, (f"{apart}.{name}.weight",))
        for weight, text, name in zip(("w1", "w2", "w3"), ("e ffn in", "e out ffn", "e ffn in"), names, strict=True)
    ]
    lines.append(Rename(f"{layer}.mlp.router.gate.weight", f"{layer}.{there}.gate.weight"))
    every = ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{part}_proj" for part in "qkvo"))
    lines += [Rename(f"{layer}.{name}", f"{layer}.{name}") for name in (*(f"{n}.weight" for n in every), *same)]
    lines += [Rename(f"{name}.weight", f"{name}.weight") for name in ("model.embed_tokens", "model.norm", "lm_head")]
    return Family(f"{model}-autoep", f"AutoEP's experts ↔ transformers' {model}", tuple(lines), {}, types)


def gpt2(program: Program) -> Family:
    """GPT-2: q, k and v joined one after the other, and linear layers the other way round (`Conv1D`: in × out)."""
    layer = "transformer.h.{i}"
    lines: list[Line] = [Rename(f"{program.embed}.weight", "transformer.wte.weight")]
    if program.positions is not None:
        lines.append(Rename(f"{program.positions}.weight", "transformer.wpe.weight"))
    for kind in ("weight", "bias"):
        for norms, other in ((program.norm1, "ln_1"), (program.norm2, "ln_2")):
            lines += [Rename(f"{program.at(norm)}{kind}", f"{layer}.{other}.{kind}") for norm in norms]
        lines += [Rename(f"{final}.{kind}", f"transformer.ln_f.{kind}") for final in program.final]
    qkv = program.at(program.qkv)
    lines.append(Permute(f"{qkv}.weight", f"{layer}.attn.c_attn.weight", "(h qkv d) in -> in (qkv h d)", qkv=3))
    lines.append(Permute(f"{qkv}.bias", f"{layer}.attn.c_attn.bias", "(h qkv d) -> (qkv h d)", qkv=3))
    for ours, other, text in (
        (program.dense, "attn.c_proj", "out in -> in out"),
        (program.up, "mlp.c_fc", "ffn in -> in ffn"),
        (program.down, "mlp.c_proj", "out ffn -> ffn out"),
    ):
        lines.append(Permute(f"{program.at(ours)}.weight", f"{layer}.{other}.weight", text))
        lines.append(Rename(f"{program.at(ours)}.bias", f"{layer}.{other}.bias"))
    lines.append(Rename(f"{program.head}.weight", "lm_head.weight"))
    title = f"{program.name} ↔ transformers' GPT2"
    return Family(f"gpt2-{program.name}", title, tuple(lines), program.defaults, ("gpt2",), program.strategy)


def conv1d() -> Family:
    """GPT-2 with linear layers (nanoGPT and the like) under the names that transformers' Conv1D has."""
    names = [f"transformer.h.{{i}}.{m}.weight" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    lines = (*(Permute(name, name, "out in -> in out") for name in names), Rename("{*}", "{*}"))
    return Family("conv1d", "GPT-2's names with linear layers, as in nanoGPT ↔ transformers' GPT2", lines)


def _fused(program: Program, layer: str, attention: str) -> Iterator[Line]:
    """A model whose layers have Megatron's own names and joins."""
    for kind in ("weight", "bias"):
        for norms, other in ((program.norm1, "input_layernorm"), (program.norm2, "post_attention_layernorm")):
            for norm in norms:
                yield Rename(f"{program.at(norm)}{kind}", f"{layer}.{other}.{kind}")
        yield Rename(f"{program.at(program.qkv)}.{kind}", f"{layer}.{attention}.query_key_value.{kind}")
        yield Rename(f"{program.at(program.dense)}.{kind}", f"{layer}.{attention}.dense.{kind}")
    yield Permute(f"{program.at(program.up)}.weight", f"{layer}.mlp.dense_h_to_4h.weight", "ffn in -> ffn in")
    yield Rename(f"{program.at(program.up)}.bias", f"{layer}.mlp.dense_h_to_4h.bias")
    yield _narrow(f"{program.at(program.down)}.weight", f"{layer}.mlp.dense_4h_to_h.weight")
    yield Rename(f"{program.at(program.down)}.bias", f"{layer}.mlp.dense_4h_to_h.bias")


def bloom(program: Program) -> Family:
    """BLOOM: q, k and v interleaved as in Megatron, so that only names differ."""
    lines: list[Line] = [Rename(f"{program.embed}.weight", "transformer.word_embeddings.weight")]
    for kind in ("weight", "bias"):
        if program.embed_norm is not None:
            lines.append(Rename(f"{program.embed_norm}.{kind}", f"transformer.word_embeddings_layernorm.{kind}"))
        lines += [Rename(f"{final}.{kind}", f"transformer.ln_f.{kind}") for final in program.final]
    lines += _fused(program, "transformer.h.{i}", "self_attention")
    title = f"{program.name} ↔ transformers' Bloom"
    return Family(f"bloom-{program.name}", title, tuple(lines), program.defaults, ("bloom",), program.strategy)


_NEOX = Program(
    name="gpt-neox",
    embed="0.word_embeddings",
    layer="{i+2}",
    norm1=("input_layernorm.",),
    norm2=("post_attention_layernorm.",),
    qkv="attention.query_key_value",
    dense="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    final=("{final}.norm",),
    head="{head}.final_linear",
    defaults={"final": "layers+3", "head": "layers+4"},
    strategy="gpt-neox",
)


def gpt_neox(prefix: str = "") -> Family:
    """GPT-NeoX, whose layers a pipeline numbers from 2. prefix: what stands before the number."""
    lines: list[Line] = [Rename(f"{_NEOX.embed}.weight", "gpt_neox.embed_in.weight")]
    lines += [Rename(f"{_NEOX.final[0]}.{kind}", f"gpt_neox.final_layer_norm.{kind}") for kind in ("weight", "bias")]
    lines.append(Rename(f"{_NEOX.head}.weight", "embed_out.weight"))
    lines += _fused(_NEOX, "gpt_neox.layers.{i}", "attention")
    named = tuple(replace(line, whole=f"{prefix}{line.whole}") for line in lines)
    name = "gpt-neox" if not prefix else "gpt-neox-sequential"
    return Family(
        name,
        f"GPT-NeoX, {prefix or 'a pipeline'} ↔ transformers' GPTNeoX",
        named,
        _NEOX.defaults,
        ("gpt_neox",),
        "gpt-neox",
    )


def torchtitan() -> Family:
    """Meta's and torchtitan's Llama: q and k turn neighbours 2 p and 2 p + 1, transformers' turn p and p + d/2."""
    names = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "layers.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.attention.wv.weight": "model.layers.{i}.self_attn.v_proj.weight",
        "layers.{i}.attention.wo.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "layers.{i}.feed_forward.w1.weight": "model.layers.{i}.mlp.gate_proj.weight",
        "layers.{i}.feed_forward.w3.weight": "model.layers.{i}.mlp.up_proj.weight",
        "layers.{i}.feed_forward.w2.weight": "model.layers.{i}.mlp.down_proj.weight",
    }
    lines = [Rename(left, right) for left, right in names.items()]
    for left, right, heads in (("wq", "q_proj", "h"), ("wk", "k_proj", "kv")):
        text = f"({heads} p two) in -> ({heads} two p) in"
        lines.append(
            Permute(
                f"layers.{{i}}.attention.{left}.weight", f"model.layers.{{i}}.self_attn.{right}.weight", text, two=2
            )
        )
    return Family(
        "llama-torchtitan", "torchtitan's and Meta's Llama ↔ transformers' Llama", tuple(lines), {}, ("llama",)
    )


WRAPPERS = ("module.", "_forward_module.", "_orig_mod.", "base_model.model.", "model.module.", "_fsdp_wrapped_module.")


def wrapper(prefix: str) -> Family:
    """What a wrapper puts before every name: `module.` (DDP, Megatron), `_forward_module.` (Lightning's),
    `_orig_mod.` (torch.compile), `base_model.model.` (PEFT)."""
    return Family(f"wrapper {prefix}", f"names with {prefix} before them ↔ without", (Rename(f"{prefix}{{*}}", "{*}"),))


def wrappers() -> Family:
    """All of them, to be taken away; back it puts the first of them, `module.`."""
    lines = tuple(Rename(f"{prefix}{{*}}", "{*}") for prefix in WRAPPERS)
    return Family("wrappers", "names with what wrappers put before them ↔ without", lines)


def families() -> dict[str, Family]:
    """All that are known here, by name."""
    moe = PROGRAMS[0]
    found = [wrappers(), torchtitan(), gpt_neox(), gpt_neox("sequential."), conv1d()]
    found.append(stacked("mixtral", "block_sparse_moe.experts", ("w1", "w3", "w2")))
    found.append(stacked("qwen-moe", "mlp.experts", ("gate_proj", "up_proj", "down_proj")))
    found += [llama(p, neighbours=neighbours) for neighbours in (False, True) for p in PROGRAMS]
    for neighbours in (False, True):
        found += [llama(p, apart=True, neighbours=neighbours) for p in (PIPELINE, TIED_PIPELINE)]
    found += [make(p) for make in (gpt2, bloom) for p in PROGRAMS]
    found += [mixtral(moe), qwen_moe(moe)]
    found.append(autoep("mixtral", "block_sparse_moe", ("w1", "w2", "w3"), (), ("mixtral",)))
    more = tuple(f"self_attn.{part}" for part in ("q_proj.bias", "k_proj.bias", "v_proj.bias"))
    more += tuple(f"self_attn.{part}_norm.weight" for part in "qk")
    more += tuple(f"mlp.{of}{part}_proj.weight" for of in ("", "shared_expert.") for part in ("gate", "up", "down"))
    more += ("mlp.shared_expert_gate.weight",)
    projections = ("gate_proj", "down_proj", "up_proj")
    found.append(autoep("qwen-moe", "mlp", projections, more, ("qwen2_moe", "qwen3_moe")))
    return {family.name: family for family in found}
