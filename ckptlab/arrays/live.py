"""A plan carried out between live ranks, without files: everybody sends what others need, in rounds of a bounded size.

    torch.distributed   each rank calls `plan.run` with its own arrays and a process group (gloo, NCCL)
    jax                 one process calls it with the arrays of all ranks and a mesh of devices, rank by rank

Both sides of a pair of ranks know the order of what goes between them, so that nothing but elements is sent. In a round
a rank sends at most limit / ranks bytes to each other; source and target ranks of one number are one process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptlab.arrays.backends import Backend, of, resolve
from ckptlab.errors import BackendError, ReshapeError
from ckptlab.plan.moves import Move, Piece, held_by

Held = Mapping[Hashable, Any]


class Rank:
    """One rank's side: what it has, what it is to have, and the pieces between it and every other."""

    def __init__(self, number: int, ranks: int, moves: Sequence[Move], held: Held, dtypes: Mapping[Hashable, np.dtype]):
        self.number, self.ranks = number, ranks
        self.held: dict[Hashable, np.ndarray] = {}
        self.made: dict[Hashable, np.ndarray] = {}
        self.shapes: dict[Hashable, tuple[int, ...]] = {}
        self.sends: list[list[Piece]] = [[] for _ in range(ranks)]
        self.receives: list[list[Piece]] = [[] for _ in range(ranks)]
        self.dtypes: dict[Hashable, np.dtype] = {}
        for move in moves:
            told = move.dtype or dtypes.get(move.of)
            if told is None:
                if math.prod(move.source.cut.shape):
                    raise ReshapeError(f"no rank gives {move.of}")
                continue  # of no elements, of which nobody knows the dtype
            dtype = self.dtypes[move.of] = np.dtype(told)
            if (mine := held_by(move.source, number)) is not None and move.of not in self.held:
                self.held[move.of] = _flattened(held, move.of, number, mine, dtype)
            if (mine := held_by(move.target, number)) is not None:
                shape, lo, hi = mine
                self.made[move.key] = np.zeros(hi - lo, move.becomes or dtype)
                self.shapes[move.key] = shape if (lo, hi) == (0, int(np.prod(shape))) else (hi - lo,)
            for piece in move.pieces():
                if piece.source == number:
                    self.sends[piece.target].append(piece)
                if piece.target == number:
                    self.receives[piece.source].append(piece)

    def rounds(self, pieces: Sequence[Piece], room: int) -> list[list[tuple[Piece, int, int]]]:
        """Pieces in rounds of at most `room` bytes; the same on both sides."""
        found: list[list[tuple[Piece, int, int]]] = [[]]
        left = room
        for piece in pieces:
            width, lo = self.dtypes[piece.move.of].itemsize, 0
            while lo < piece.count:
                taken = min(piece.count - lo, left // width)
                if not taken:
                    found.append([])
                    left = room
                    continue
                found[-1].append((piece, lo, lo + taken))
                lo, left = lo + taken, left - taken * width
        return found

    def draw(self, parts: Sequence[tuple[Piece, int, int]]) -> np.ndarray:
        """The bytes of some parts of pieces, one after the other."""
        drawn = [self.held[p.move.of][p.drawn(lo, hi)].view(np.uint8) for p, lo, hi in parts]
        return np.concatenate(drawn) if drawn else np.zeros(0, np.uint8)

    def put(self, parts: Sequence[tuple[Piece, int, int]], sent: np.ndarray) -> None:
        """Write what came of some parts where it belongs."""
        done = 0
        for piece, lo, hi in parts:
            dtype = self.dtypes[piece.move.of]
            size = (hi - lo) * dtype.itemsize
            elements = np.frombuffer(sent[done : done + size].tobytes(), dtype)
            self.made[piece.move.key][piece.put(lo, hi)] = elements.astype(self.made[piece.move.key].dtype)
            done += size

    def result(self, backend: Backend) -> dict[Hashable, Any]:
        return {key: backend.from_numpy(flat.reshape(self.shapes[key])) for key, flat in self.made.items()}


@dataclass
class Exchange(ABC):
    """How bytes get from rank to rank: everybody at once."""

    ranks: int

    @abstractmethod
    def all_to_all(self, sends: Sequence[Sequence[np.ndarray]], sizes: Sequence[Sequence[int]]) -> list[list[Any]]:
        """For each rank of this process what it sends to each rank, and how many bytes come from each → what came."""


def _exchange(workers: Sequence[Rank], exchange: Exchange, limit: int, longest: int) -> None:
    """All rounds. longest: bytes of the pair of ranks that has most between it."""
    count = exchange.ranks
    widest = max((d.itemsize for d in workers[0].dtypes.values()), default=1)
    room = max(limit // count, widest)
    out = [[w.rounds(w.sends[t], room) for t in range(count)] for w in workers]
    into = [[w.rounds(w.receives[s], room) for s in range(count)] for w in workers]
    for turn in range(-(-longest // max(room - widest + 1, 1))):  # a round may end a part of an element early
        parts = [[r[turn] if turn < len(r) else [] for r in rounds] for rounds in out]
        comes = [[r[turn] if turn < len(r) else [] for r in rounds] for rounds in into]
        kept = [w.draw(parts[i][w.number]) for i, w in enumerate(workers)]
        sends = [
            [w.draw(p) if t != w.number else np.zeros(0, np.uint8) for t, p in enumerate(parts[i])]
            for i, w in enumerate(workers)
        ]
        sizes = [[0 if s == w.number else _size(w, p) for s, p in enumerate(comes[i])] for i, w in enumerate(workers)]
        for i, (w, came) in enumerate(zip(workers, exchange.all_to_all(sends, sizes), strict=True)):
            for s, part in enumerate(comes[i]):
                w.put(part, kept[i] if s == w.number else came[s])


def _size(worker: Rank, parts: Sequence[tuple[Piece, int, int]]) -> int:
    return sum((hi - lo) * worker.dtypes[piece.move.of].itemsize for piece, lo, hi in parts)


def _longest(worker: Rank) -> int:
    both = (*worker.sends, *worker.receives)
    return max((sum(p.count * worker.dtypes[p.move.of].itemsize for p in pieces) for pieces in both), default=0)


def _flattened(
    held: Held, key: Hashable, rank: int, mine: tuple[tuple[int, ...], int, int], dtype: np.dtype
) -> np.ndarray:
    """This rank's array of a tensor as numpy's, flat. ReshapeError where it is not what the plan says."""
    shape, lo, hi = mine
    if key not in held:
        raise ReshapeError(f"rank {rank} gives no {key}: it has elements {lo} to {hi} of a shard of shape {shape}")
    array = _raw(held[key])
    found = np.ascontiguousarray(of(array).to_numpy(array)).reshape(-1)
    if found.size != hi - lo or found.dtype != dtype:
        raise ReshapeError(
            f"rank {rank}: {key} has {found.size} elements of {found.dtype}, expected {hi - lo} of {dtype}: elements "
            f"{lo} to {hi} of a shard of shape {shape}"
        )
    return found


def _dtypes(held: Held) -> dict[Hashable, str]:
    return {key: str(of(array := _raw(a)).dtype_of(array)) for key, a in held.items()}


def _raw(array: Any) -> Any:
    """The library's own array inside a DataArray or a Duck, or itself."""
    data = array.data if hasattr(array, "dims") else array
    return getattr(data, "array", data)


# ------------------------------------------------------------------------------------------------ torch


class _Torch(Exchange):
    def __init__(self, group: Any, device: str, ranks: int) -> None:
        super().__init__(ranks)
        self.group, self.device = group, device

    def all_to_all(self, sends: Sequence[Sequence[np.ndarray]], sizes: Sequence[Sequence[int]]) -> list[list[Any]]:
        import torch
        import torch.distributed as dist

        ((mine,), (lengths,)) = (sends, sizes)
        sent = torch.from_numpy(np.concatenate(mine)).to(self.device)
        came = torch.empty(sum(lengths), dtype=torch.uint8, device=self.device)
        dist.all_to_all_single(came, sent, list(lengths), [len(part) for part in mine], group=self.group)
        return [np.split(came.cpu().numpy(), np.cumsum(lengths)[:-1])]


def run_torch(moves: Sequence[Move], held: Held, group: Any, limit: int, ranks: int) -> dict[Hashable, Any]:
    try:
        import torch.distributed as dist
    except ImportError:
        raise BackendError("a process group needs torch, which is not installed: pip install torch") from None
    if not dist.is_initialized():
        raise BackendError("torch.distributed is not initialised: init_process_group first, or give a jax mesh")
    count, number = dist.get_world_size(group), dist.get_rank(group)
    _check(held, count, ranks, Mapping)
    told: list[dict[Hashable, str]] = [{} for _ in range(count)]
    dist.all_gather_object(told, _dtypes(held), group=group)
    worker, wrong = None, None
    try:
        worker = Rank(number, count, moves, held, _agreed(told))
    except ReshapeError as error:  # which all hear of: they would wait for this rank
        wrong = str(error)
    said: list[tuple[int, str | None]] = [(0, None)] * count
    dist.all_gather_object(said, (_longest(worker) if worker else 0, wrong), group=group)
    if worker is None or any(text for _, text in said):
        raise ReshapeError(next(text for _, text in said if text))
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    _exchange([worker], _Torch(group, device, count), limit, max(longest for longest, _ in said))
    return worker.result(resolve("torch", device))


# ------------------------------------------------------------------------------------------------ jax


class _Jax(Exchange):
    def __init__(self, devices: Sequence[Any]) -> None:
        import jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        super().__init__(len(devices))
        mesh, spec = Mesh(np.array(devices), ("rank",)), PartitionSpec("rank")
        self.sharding = NamedSharding(mesh, spec)
        swap = jax.shard_map(
            lambda x: jax.lax.all_to_all(x, "rank", 1, 0).reshape(1, self.ranks, -1),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
        )
        self.swap = jax.jit(swap)

    def all_to_all(self, sends: Sequence[Sequence[np.ndarray]], sizes: Sequence[Sequence[int]]) -> list[list[Any]]:
        import jax

        longest = max(len(part) for row in sends for part in row)
        widest = 1 << max(longest - 1, 0).bit_length()  # few widths: each is compiled
        padded = np.zeros((self.ranks, self.ranks, widest), np.uint8)
        for s, row in enumerate(sends):
            for t, part in enumerate(row):
                padded[s, t, : len(part)] = part
        came = np.asarray(self.swap(jax.device_put(padded, self.sharding)))
        return [[came[t, s, : sizes[t][s]] for s in range(self.ranks)] for t in range(self.ranks)]


def run_jax(moves: Sequence[Move], held: Any, mesh: Any, limit: int, ranks: int) -> list[dict[Hashable, Any]]:
    devices = list(mesh.devices.flat)
    _check(held, len(devices), ranks, Sequence)
    dtypes = _agreed([_dtypes(one) for one in held])
    every = [*held, *({} for _ in range(len(devices) - len(held)))]
    workers = [Rank(k, len(devices), moves, one, dtypes) for k, one in enumerate(every)]
    _exchange(workers, _Jax(devices), limit, max(map(_longest, workers)))
    return [w.result(resolve("jax", f"{d.platform}:{d.id}")) for w, d in zip(workers, devices, strict=True)]


def _check(held: Any, count: int, ranks: int, kind: Any) -> None:
    if count < ranks:
        raise ReshapeError(f"the plan is between {ranks} ranks, the group has {count}")
    if not isinstance(held, kind):
        what = "a mapping of names to this rank's arrays" if kind is Mapping else "a list of such mappings, one a rank"
        raise ReshapeError(f"run takes {what}, not a {type(held).__name__}")


def _agreed(told: Sequence[Mapping[Hashable, str]]) -> dict[Hashable, np.dtype]:
    """The dtype of every array that some rank has. ReshapeError where ranks differ."""
    found: dict[Hashable, str] = {}
    for rank, one in enumerate(told):
        for key, dtype in one.items():
            if found.setdefault(key, dtype) != dtype:
                raise ReshapeError(f"{key}: rank {rank} has {dtype}, others {found[key]}")
    return {key: np.dtype(dtype) for key, dtype in found.items()}
