"""What ranks keep of a model's activations until the backward pass, on paper.

Counted tensor by tensor, as Korthikanti et al. 2022 do (arXiv:2205.05198, section 4): of a GPT with dropout this gives
their table 2. Beside it: grouped and latent attention, gates, experts. Left out: what FlashAttention keeps (a number
for each row, Dao et al. 2022, arXiv:2205.14135), a router's choices, buffers of the communication.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptlab.arguments import explained
from ckptlab.catalog import DTYPES
from ckptlab.errors import LayoutError
from ckptlab.mesh import Mesh
from ckptlab.sharding.transformer import PaperModel

RECOMPUTED = ("nothing", "attention", "layers")

ATTENTION, SOFTMAX, NETWORK, NORMS = "attention", "softmax", "feed-forward", "norms"
MASKS, INPUTS, ENDS = "dropout masks", "layers' inputs", "logits"
KINDS = (ATTENTION, SOFTMAX, NETWORK, NORMS, MASKS, INPUTS, ENDS)
"""Kinds of activations: see `Activations.of_layer` and `Activations.by_stage`."""


@explained
@dataclass(frozen=True)
class Activations:
    """One micro-batch, and what is kept of it: `sequence` tokens each of `micro_batch` sequences.

    `flash`: FlashAttention, which does not keep the matrix of attention (heads * sequence * sequence).
    `sequence_parallel`: what tp does not cut (norms, what goes into a layer's halves) is cut along the sequence,
    between the tp ranks. `recompute`: what is computed anew in the backward pass: "nothing", "attention" (its matrix,
    which is then not kept), "layers" (of each only what goes in is kept, and one layer at a time is whole). `dropout`:
    its masks, a byte an element. `active`: to how many of its experts a layer sends each token (None: as the
    checkpoint says, else one). `facts`: of a checkpoint's model what neither its shapes nor a config.json or arguments
    beside it tell, by the names of `paper_model`'s numbers: `{"heads": 32}`. LayoutError for what cannot be.
    """

    sequence: int = 4096
    micro_batch: int = 1
    flash: bool = True
    sequence_parallel: bool = True
    recompute: str = "nothing"
    dropout: bool = False
    active: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("sequence", "micro_batch", "active"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LayoutError(f"{name} is at least 1, not {value}")
        if self.recompute not in RECOMPUTED:
            raise LayoutError(f"recompute {self.recompute!r}: expected one of {', '.join(RECOMPUTED)}")

    def of_layer(self, model: PaperModel, mesh: Mesh, layer: int = 0) -> dict[str, int]:
        """Kind → bytes that a rank keeps of one micro-batch for one layer, all of whose activations are kept.

        Of a GPT in 16 bits, by Korthikanti et al.'s section 4.1, in s * b * h (s tokens, b sequences, hidden size h, a
        heads): attention 10 (what goes in 2, q and k 4, v 2, what goes into its last matrix 2), softmax 4as/h (with
        its dropout's output; without dropout 2as/h), feed-forward 18 (2 + 8 + 8), norms 4, dropout masks 2 + as/h.
        """
        item, heads = DTYPES[model.dtype].itemsize, model.heads
        sparse = bool(model.experts) and layer >= model.dense_layers
        active = min(self.active or 1, model.experts) if sparse else 0
        tokens, tp, vector = self._tokens(mesh), mesh.tp, model.hidden * item / self._apart(mesh)
        # of a token, in bytes: what tp does not cut is `vector` long, the rest is cut, but keys and values, which
        # several ranks may share
        attention = vector
        if model.latent is None:
            attention += 2 * heads * model.head * item / tp + 2 * model.keys * model.head * item / min(tp, model.keys)
        else:
            query, key_value, rotary, value = model.latent
            attention += 2 * heads * (model.head + rotary + value) * item / tp
            attention += (2 * (query + key_value) + rotary) * item / self._apart(mesh)
        width = active * model.width + model.shared_ffn if sparse else model.dense
        network = (1 + active) * vector + width * (3 if model.gated else 2) * item / tp
        matrix = 0.0 if self.flash or self.recompute != "nothing" else heads * self.sequence / tp
        kept = {
            ATTENTION: attention,
            SOFTMAX: matrix * item * (1 + self.dropout),
            NETWORK: network,
            NORMS: 2 * vector,
            MASKS: (2 * vector / item + matrix) * self.dropout,
        }
        return {kind: round(amount * tokens) for kind, amount in kept.items()}

    def by_stage(self, model: PaperModel, mesh: Mesh, stages: Mapping[int, int]) -> list[dict[str, int]]:
        """Kind → bytes that a rank of each pp stage keeps at most: under 1F1B the first stage has pp micro-batches
        under way, the last one (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

        The first stage has the mask of the embedding's dropout, the last what goes into its norm and its output matrix,
        and the logits, in float32 (Korthikanti et al. 2022, section 4.3). stages: the stage of each layer.
        """
        tokens, vector = self._tokens(mesh), model.hidden * DTYPES[model.dtype].itemsize / self._apart(mesh)
        found = []
        for stage in range(mesh.pp):
            layers = [self.of_layer(model, mesh, i) for i, at in stages.items() if at == stage]
            under_way = mesh.pp - stage
            kept = Counter[str]()
            if self.recompute == "layers":
                kept[INPUTS] = round(len(layers) * vector * tokens) * under_way
                kept.update(max(layers, key=lambda layer: sum(layer.values()), default={}))
            else:
                for layer in layers:
                    kept.update({kind: nbytes * under_way for kind, nbytes in layer.items()})
            if stage == 0 and self.dropout:
                kept[MASKS] += round(model.hidden / self._apart(mesh) * tokens) * under_way
            if stage == mesh.pp - 1:
                kept[NORMS] += round(vector * tokens)
                kept[ENDS] += round((vector + 4 * model.vocab / mesh.tp) * tokens)
            found.append({kind: kept[kind] for kind in KINDS})
        return found

    def _tokens(self, mesh: Mesh) -> float:
        """Of a micro-batch, on a rank."""
        return self.sequence * self.micro_batch / mesh.get("cp", 1)

    def _apart(self, mesh: Mesh) -> int:
        """How many ranks have what tp does not cut between them."""
        return mesh.tp if self.sequence_parallel else 1

    def __str__(self) -> str:
        """`1 × 4,096 tokens, FlashAttention, sequence parallelism, layers recomputed`."""
        said = [f"{self.micro_batch} × {self.sequence:,} tokens"]
        said += ["FlashAttention"] if self.flash else []
        said += ["sequence parallelism"] if self.sequence_parallel else []
        said += ["dropout"] if self.dropout else []
        said += [] if self.recompute == "nothing" else [f"{self.recompute} recomputed"]
        return ", ".join(said)
