"""What ranks keep of a model's activations until the backward pass, on paper.

Counted tensor by tensor, as Korthikanti et al. 2022 do (arXiv:2205.05198, section 4): of a GPT with dropout this gives
their table 2. Beside it: grouped and latent attention, gates, experts. Left out: what FlashAttention keeps (a number
for each row, Dao et al. 2022, arXiv:2205.14135), a router's choices, buffers of the communication.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptlab.arguments import explained
from ckptlab.catalog import DTYPES
from ckptlab.errors import LayoutError
from ckptlab.mesh import Mesh
from ckptlab.sharding.transformer import PaperModel

RECOMPUTED = ("nothing", "attention", "layers")


@explained
@dataclass(frozen=True)
class Activations:
    """One micro-batch, and what is kept of it: `sequence` tokens each of `micro_batch` sequences.

    `flash`: FlashAttention, which does not keep the matrix of attention (heads * sequence * sequence).
    `sequence_parallel`: what tp does not cut (norms, what goes into a layer's halves) is cut along the sequence,
    between the tp ranks. `recompute`: what is computed anew in the backward pass: "nothing", "attention" (its matrix,
    which is then not kept), "layers" (of each only what goes in is kept, and one layer at a time is whole). `dropout`:
    its masks, a byte an element. `active`: to how many of its experts a layer sends each token. LayoutError for what
    cannot be.
    """

    sequence: int = 4096
    micro_batch: int = 1
    flash: bool = True
    sequence_parallel: bool = True
    recompute: str = "nothing"
    dropout: bool = False
    active: int = 1

    def __post_init__(self) -> None:
        for name in ("sequence", "micro_batch", "active"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.recompute not in RECOMPUTED:
            raise LayoutError(f"recompute {self.recompute!r}: expected one of {', '.join(RECOMPUTED)}")

    def of_layer(self, model: PaperModel, mesh: Mesh, layer: int = 0) -> int:
        """Bytes that a rank keeps of one micro-batch for one layer, all of whose activations are kept."""
        item, heads = DTYPES[model.dtype].itemsize, model.heads
        sparse = bool(model.experts) and layer >= model.dense_layers
        active = min(self.active, model.experts) if sparse else 0
        # of a token, in bytes: what tp does not cut, what it cuts, and keys and values, which several ranks may share
        beside = (4 + active) * model.hidden * item + 2 * model.hidden * self.dropout
        if model.latent is None:
            keys = 2 * model.keys * model.head * item
            cut = 2 * heads * model.head * item
        else:
            query, key_value, rotary, value = model.latent
            keys, cut = 0, 2 * heads * (model.head + rotary + value) * item
            beside += (2 * (query + key_value) + rotary) * item
        width = active * model.width + model.shared_ffn if sparse else model.dense
        cut += width * (3 if model.gated else 2) * item
        if not self.flash and self.recompute == "nothing":
            cut += heads * self.sequence * (item + (1 + item) * self.dropout)
        token = beside / self._apart(mesh) + cut / mesh.tp + keys / min(mesh.tp, model.keys)
        return round(token * self._tokens(mesh))

    def by_stage(self, model: PaperModel, mesh: Mesh, stages: Mapping[int, int]) -> list[int]:
        """Bytes that a rank of each pp stage keeps at most: under 1F1B the first stage has pp micro-batches under way,
        the last one (Narayanan et al. 2021, arXiv:2104.04473, section 2.2), and there the logits, in float32.

        stages: the stage of each layer.
        """
        tokens, vector = self._tokens(mesh), model.hidden * DTYPES[model.dtype].itemsize / self._apart(mesh)
        found = []
        for stage in range(mesh.pp):
            layers = [self.of_layer(model, mesh, i) for i, at in stages.items() if at == stage]
            kept = sum(layers)
            if self.recompute == "layers":
                kept = round(len(layers) * vector * tokens)
            total = kept * (mesh.pp - stage)
            if self.recompute == "layers":
                total += max(layers, default=0)
            if stage == mesh.pp - 1:
                total += round((2 * vector + 4 * model.vocab / mesh.tp) * tokens)
            found.append(total)
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
        said += [] if self.recompute == "nothing" else [f"{self.recompute} recomputed"]
        return ", ".join(said)
