"""The tensor- and pipeline-parallel transformer.

Layers are named and numbered as in the GPTModelPipe of Megatron-DeepSpeed (`2.mlp.dense_h_to_4h.weight` is in
the first transformer layer); q, k and v are interleaved within a head unless the configuration has
`sub_params`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foundry.models import ModelConfig, TensorParallel
from foundry.plain import attend, experts


def gather_tokens_on_gloo(tp: TensorParallel) -> None:
    """Have DeepSpeed's MoE gather what tp ranks have of the tokens in a way that gloo knows too."""
    from deepspeed.moe import mappings

    def gathered(x: Tensor, dim: int = 0) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(tp.size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=tp.group)
        return torch.cat(parts, dim)

    mappings._gather_tokens = gathered


class _IntoParallel(torch.autograd.Function):
    """Identity forward, sum over the ranks backward: in front of a column-parallel layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_over_ranks(grad, ctx.tp), None


class _OutOfParallel(torch.autograd.Function):
    """Sum over the ranks forward, identity backward: behind a row-parallel layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        return _sum_over_ranks(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherLast(torch.autograd.Function):
    """Concatenate the ranks' last dims forward, keep one's own part backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        if tp.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(tp.size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=tp.group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.tp.size, -1)[ctx.tp.rank].contiguous(), None


def _sum_over_ranks(x: Tensor, tp: TensorParallel) -> Tensor:
    if tp.size == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(x, group=tp.group)
    return x


def _parallel(*shape: int) -> nn.Parameter:
    """A parameter that every tensor-parallel rank counts when DeepSpeed takes the gradient's norm."""
    parameter = nn.Parameter(torch.empty(shape))
    parameter.tensor_model_parallel = parameter.model_parallel = True  # type: ignore[attr-defined]
    return parameter


class ColumnParallelLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = _parallel(outputs // tp.size, inputs)
        self.bias = _parallel(outputs // tp.size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(_IntoParallel.apply(x, self.tp), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = _parallel(outputs, inputs // tp.size)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        # The partial sums are added in fp32, so that another tp degree moves the loss little.
        y = _OutOfParallel.apply(functional.linear(x, self.weight).float(), self.tp).to(x.dtype)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.rows = config.padded_vocab(tp.size) // tp.size
        self.weight = _parallel(self.rows, config.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.tp.rank * self.rows
        elsewhere = (local < 0) | (local >= self.rows)
        found = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return _OutOfParallel.apply(found.masked_fill(elsewhere.unsqueeze(-1), 0), self.tp)

    def logits(self, x: Tensor) -> Tensor:
        """This rank's columns of the logits."""
        return functional.linear(_IntoParallel.apply(x, self.tp), self.weight)


def _norm(config: ModelConfig) -> nn.Module:
    return nn.RMSNorm(config.hidden) if config.rms_norm else nn.LayerNorm(config.hidden)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions on (batch, seq, head, d)."""
    seq, d = x.shape[1], x.shape[-1]
    angle = torch.outer(torch.arange(seq), 10000.0 ** (-torch.arange(0, d, 2) / d)).unsqueeze(1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class ParallelAttention(nn.Module):
    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.config, self.tp = config, tp
        self.query_key_value = ColumnParallelLinear(config.hidden, sum(config.qkv_widths), config.bias, tp)
        self.dense = RowParallelLinear(config.hidden, config.hidden, config.bias, tp)

    def forward(self, x: Tensor) -> Tensor:
        fused, d = self.query_key_value(x), self.config.head_dim
        if self.config.sub_params:
            parts = fused.split([width // self.tp.size for width in self.config.qkv_widths], -1)
            q, k, v = (part.unflatten(-1, (-1, d)) for part in parts)
        else:
            q, k, v = fused.unflatten(-1, (-1, 3, d)).unbind(3)
        if self.config.rotary:
            q, k = rotate(q), rotate(k)
        return self.dense(attend(q, k, v))


class ParallelMLP(nn.Module):
    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.swiglu = config.swiglu
        width = config.ffn * (2 if config.swiglu else 1)
        self.dense_h_to_4h = ColumnParallelLinear(config.hidden, width, config.bias, tp)
        self.dense_4h_to_h = RowParallelLinear(config.ffn, config.hidden, config.bias, tp)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense_h_to_4h(x)
        if self.swiglu:
            gate, up = y.chunk(2, -1)
            return self.dense_4h_to_h(functional.silu(gate) * up)
        return self.dense_4h_to_h(functional.gelu(y))


class ParallelTransformerLayer(nn.Module):
    """`ep`: over how many ranks its experts are spread; 0: it has none."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, ep: int = 0):
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attention = ParallelAttention(config, tp)
        self.post_attention_layernorm = _norm(config)
        self.ep = ep
        self.mlp = experts(config, ep) if ep else ParallelMLP(config, tp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        y = self.mlp(self.post_attention_layernorm(x))
        return x + (y[0] if self.ep else y)


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(config, tp)
        self.position_embeddings = None if config.rotary else nn.Embedding(config.seq, config.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word_embeddings(tokens)
        if self.position_embeddings is None:
            return x
        return x + self.position_embeddings(torch.arange(tokens.shape[1]))


class Head(nn.Module):
    """The untied output layer."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.lm_head = VocabParallelEmbedding(config, tp)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head.logits(x)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _to_float(x: Tensor) -> Tensor:
    return x.float()


def _tied_logits(embedding: Embedding, x: Tensor) -> Tensor:
    return embedding.word_embeddings.logits(x)


def pipeline_layers(config: ModelConfig, tp: TensorParallel, ep: int = 1) -> list[Any]:
    """The layer specs of the parallel model, for DeepSpeed's PipelineModule; where there are experts, every second
    layer's are spread over `ep` ranks (on one tp rank).

    Megatron's steps without parameters at both ends are kept: they count in the layer numbers and in the
    division into stages.
    """
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    spread = [ep if config.experts and i % 2 else 0 for i in range(config.layers)]
    body = [LayerSpec(ParallelTransformerLayer, config, tp, of_layer) for of_layer in spread]
    norm = LayerSpec(nn.RMSNorm if config.rms_norm else nn.LayerNorm, config.hidden)
    if config.untied:
        first, last = LayerSpec(Embedding, config, tp), LayerSpec(Head, config, tp)
    else:
        tie = {"tied_weight_attr": "word_embeddings.weight"}
        first = TiedLayerSpec("embed", Embedding, config, tp, **tie)
        last = TiedLayerSpec("embed", Embedding, config, tp, forward_fn=_tied_logits, **tie)
    return [_unchanged, first, *body, norm, last, _to_float]


class ParallelLoss:
    """Cross entropy of vocabulary-parallel logits (batch, seq, local vocab), its padding masked."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        self.config, self.tp = config, tp

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        whole = _GatherLast.apply(logits, self.tp)[..., : self.config.vocab]
        return functional.cross_entropy(whole.flatten(0, 1), labels.flatten())
