"""What Megatron-core's `torch_dist` leaves of a run, made with torch alone: `python data/foundry/make.py megatron_tp2`.

Megatron-core wants CUDA, and is not needed here: a GPT of its kind (RMS norms, grouped queries, SwiGLU, rotary
positions, a padded vocabulary) trains on one process in bf16 beside float32 masters, and torch.distributed.checkpoint
saves it under the keys and in the chunks that Megatron-core 0.16.1 was seen to leave on tp 2 with its distributed
optimizer (`fully_reshardable`): layers stacked along a leading axis, gate and up projection each cut on their own,
masters as `optimizer.state.param`, hyperparameters in `common.pt`. Names of tensors are those keys'.
"""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foundry.gradients import CLIP, clipped
from foundry.models import initial_value
from foundry.truth import MOMENTS, Truth, save

CASE = "megatron_tp2"
TP, STEPS, BATCH, LR = 2, 3, 12, 1e-2


@dataclass(frozen=True)
class GPT:
    """Sizes; `padded`: rows of the vocabulary, of which `vocab` are used."""

    layers: int = 3
    hidden: int = 16
    heads: int = 4
    groups: int = 2
    ffn: int = 24
    vocab: int = 53
    padded: int = 64
    seq: int = 10


class NormedLinear(nn.Module):
    """A column-parallel layer that norms what comes in."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.empty(inputs))
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(_norm(x, self.layer_norm_weight), self.weight)


class Attention(nn.Module):
    def __init__(self, config: GPT) -> None:
        super().__init__()
        self.config = config
        d = config.hidden // config.heads
        self.linear_qkv = NormedLinear(config.hidden, (config.heads + 2 * config.groups) * d)
        self.linear_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        each, d = c.heads // c.groups, c.hidden // c.heads
        of_group = self.linear_qkv(x).unflatten(-1, (c.groups, each + 2, d))
        q, k, v = of_group.split((each, 1, 1), dim=3)
        q, k = _rotate(q.flatten(2, 3)), _rotate(k.squeeze(3))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v.squeeze(3)))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.linear_proj(seen.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPT) -> None:
        super().__init__()
        self.linear_fc1 = NormedLinear(config.hidden, 2 * config.ffn)
        self.linear_fc2 = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear_fc1(x).chunk(2, -1)
        return self.linear_fc2(functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: GPT) -> None:
        super().__init__()
        self.self_attention, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(x)
        return x + self.mlp(x)


class Decoder(nn.Module):
    def __init__(self, config: GPT) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_layernorm = nn.RMSNorm(config.hidden, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.final_layernorm(x)


class Embedding(nn.Module):
    def __init__(self, config: GPT) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded, config.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.word_embeddings(tokens)


class Model(nn.Module):
    def __init__(self, config: GPT, salt: int = 0) -> None:
        super().__init__()
        self.embedding, self.decoder = Embedding(config), Decoder(config)
        self.output_layer = nn.Linear(config.hidden, config.padded, bias=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(initial_value(name, tuple(parameter.shape), salt))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss of (batch, seq) tokens, over all rows of the padded vocabulary."""
        logits = self.output_layer(self.decoder(self.embedding(tokens)))
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps=1e-5)


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions on (batch, seq, head, d), of halves."""
    seq, d = x.shape[1], x.shape[-1]
    angle = torch.outer(torch.arange(seq), 10000.0 ** (-torch.arange(0, d, 2) / d)).repeat(1, 2).unsqueeze(1)
    first, second = x.chunk(2, -1)
    return x * angle.cos().to(x.dtype) + torch.cat((-second, first), -1) * angle.sin().to(x.dtype)


def batch(config: GPT, step: int) -> tuple[Tensor, Tensor]:
    """(tokens, labels) of a step: a noisy sequence that can be learnt."""
    generator = torch.Generator().manual_seed(step)
    columns = [torch.randint(config.vocab, (BATCH,), generator=generator)]
    for _ in range(config.seq):
        columns.append((5 * columns[-1] + torch.randint(3, (BATCH,), generator=generator)) % config.vocab)
    text = torch.stack(columns, 1)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


@dataclass(frozen=True)
class MegatronRun:
    """What `onward` asks of a run: `batch` gives the whole batch of the step that follows."""

    config: GPT
    truth: Truth
    expected: dict[str, Tensor]
    batch: Callable[[], tuple[Tensor, Tensor]]
    low: torch.dtype | None = torch.bfloat16
    """What the model computes in, beside float32 masters."""

    def model(self, tp: int, salt: int) -> nn.Module:
        if tp > 1:
            raise ValueError(f"tp {tp}: this model is cut by no tensor parallelism here")
        return Model(self.config, salt)

    def blocks(self, model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        yield from ((layer, {}) for layer in model.decoder.layers)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """As Megatron deals parameters."""
        return groups_of(model)

    def losses(self, model: nn.Module, dp_rank: int, dp: int) -> Iterator[Tensor]:
        tokens, labels = (t[dp_rank::dp] for t in self.batch())
        for its in zip(tokens.chunk(2), labels.chunk(2), strict=True):
            yield model(*its) * (len(its[0]) / len(tokens))  # parts may be uneven

    def same(self, name: str, tensor: Tensor) -> Tensor:
        return tensor


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim < 2]}]


def run_of(folder: Path) -> MegatronRun:
    """The run that `make` left."""
    from safetensors.torch import load_file

    from foundry.truth import load

    truth, told = load(folder)
    config = GPT(**told["config"])
    return MegatronRun(config, truth, load_file(folder / "next.safetensors"), lambda: batch(config, STEPS + 1))


# What is saved -------------------------------------------------------------------------------------------------


class Chunked(Tensor):
    """A whole tensor that torch saves in the chunks `boxes`, (start, size) each, as several ranks would."""

    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]

    @staticmethod
    def of(tensor: Tensor, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Chunked:
        made = tensor.detach().as_subclass(Chunked)
        made.boxes = boxes
        return made

    def __create_write_items__(self, fqn: str, _object: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        plain = self.as_subclass(Tensor)
        properties, shape = TensorProperties.create_from_tensor(plain), plain.size()
        return [
            WriteItem(
                MetadataIndex(fqn, torch.Size(start), i),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(start), torch.Size(size)), properties, shape
                ),
            )
            for i, (start, size) in enumerate(self.boxes)
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        start, size = self.boxes[index.index]
        window = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        return self.as_subclass(Tensor)[window].contiguous()


def _chunked(name: str, tensor: Tensor) -> Chunked:
    """On tp 2; a stacked tensor in a chunk for each layer as well."""
    stacked = ".layers." in name
    first = int(stacked)
    dim = 1 if re.search(r"linear_(proj|fc2)\.weight", name) else 0
    cut = tensor.ndim - first > 1
    halves = 2 if "linear_fc1.weight" in name else 1
    pieces = TP * halves if cut else 1
    boxes = []
    for layer in range(tensor.shape[0] if stacked else 1):
        for piece in range(pieces):
            start, size = [0] * tensor.ndim, list(tensor.shape)
            if stacked:
                start[0], size[0] = layer, 1
            if cut:
                size[first + dim] //= pieces
                start[first + dim] = size[first + dim] * piece
            boxes.append((tuple(start), tuple(size)))
    return Chunked.of(tensor, boxes)


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of all layers under one key."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.", name), []).append(tensor)
    return {key: torch.stack(its) if ".layers." in key else its[0] for key, its in found.items()}


def write(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: GPT, step: int) -> None:
    """A `torch_dist` folder of a model in float32, whose weights are then those masters rounded."""
    import torch.distributed.checkpoint as dcp

    masters = {name: p.detach() for name, p in model.named_parameters()}
    moments = {m: {n: optimizer.state[p][m] for n, p in model.named_parameters()} for m in MOMENTS}
    content: dict[str, Any] = {k: _chunked(k, t.to(torch.bfloat16)) for k, t in _stacked(masters).items()}
    for state, tensors in {"param": masters, **moments}.items():
        content |= {f"optimizer.state.{state}.{k}": _chunked(k, t) for k, t in _stacked(tensors).items()}
    for layer in range(config.layers):
        content[f"decoder.layers.mlp.linear_fc1._extra_state/shard_{layer}_{config.layers}"] = [None]
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(content, checkpoint_id=str(folder), planner=planner, no_dist=True)
    about = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps({**about, "common_backend": "torch", "common_backend_version": 1}))
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    more = {"lr_mult": 1.0, "is_expert_parallel": False, "step": float(step)}
    groups = [{**own, **more, "wd_mult": float(i == 0)} for i, own in enumerate(options)]
    args = Namespace(
        tensor_model_parallel_size=TP,
        pipeline_model_parallel_size=1,
        world_size=TP,
        num_layers=config.layers,
        hidden_size=config.hidden,
        num_attention_heads=config.heads,
        num_query_groups=config.groups,
        padded_vocab_size=config.padded,
        swiglu=True,
    )
    sharding = {"param_state_sharding_type": "fully_reshardable", "optimizer": {"param_groups": groups}}
    torch.save(
        {"args": args, "checkpoint_version": 3.0, "iteration": step, "optimizer": sharding}, folder / "common.pt"
    )


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, config: GPT, step: int) -> None:
    """A step in bf16: of masters in float32, whose gradients are summed in float32."""
    tokens, labels = batch(config, step)
    for its in zip(tokens.chunk(2), labels.chunk(2), strict=True):
        low = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
        (torch.func.functional_call(model, low, its) / 2).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    clipped(grads, CLIP)
    optimizer.step()
    optimizer.zero_grad()


def make(out: Path) -> Path:
    """Train, and leave the checkpoint with its truth in a folder in `out`: its weights at the next step too."""
    import safetensors.torch

    folder, config = out / CASE, GPT()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = Model(config)
    optimizer = torch.optim.AdamW(groups_of(model), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, STEPS + 1):
        _train(model, optimizer, config, step)
    write(folder / f"iter_{STEPS:07}", model, optimizer, config, STEPS)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(STEPS))
    tensors = {f"master/{name}": p.detach().clone() for name, p in model.named_parameters()}
    tensors |= {f"{m}/{n}": optimizer.state[p][m].clone() for n, p in model.named_parameters() for m in MOMENTS}
    save(Truth(tensors), folder, {"name": CASE, "kind": "megatron", "config": asdict(config)})
    _train(model, optimizer, config, STEPS + 1)
    after = {f"master/{name}": p.detach().clone() for name, p in model.named_parameters()}
    safetensors.torch.save_file(after, folder / "next.safetensors")
    return folder
