"""What the optimizer files of a step folder hold: parameter groups, and where every tensor lies in their flat buffers.

The order of tensors in memory is that of `param_shapes` in the model file; the stored `param_slice_mappings` are only
checked against it, since DeepSpeed writes wrong ones under `round_robin_gradients`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

from ckptlab.catalog import DTYPES, MASTER, FlatGroup, Fragment, Gradients, ParameterGroup
from ckptlab.errors import CheckpointError
from ckptlab.findings import Faults, Finding, Where, contradiction, not_read_yet
from ckptlab.formats.deepspeed import muon
from ckptlab.formats.deepspeed.checks import noted
from ckptlab.formats.deepspeed.experts import Experts, Share
from ckptlab.formats.deepspeed.files import Rank, StepFolder
from ckptlab.formats.deepspeed.groups import Groups, match_groups
from ckptlab.formats.deepspeed.header import Shapes
from ckptlab.formats.deepspeed.optimfile import EXTRAS, OptimizerFile, Wrapper
from ckptlab.plan import FlatBuffer, Holder
from ckptlab.stored import Stored

T = TypeVar("T")
Pieces = dict[tuple[str, str], dict[Holder, tuple[Fragment, ...]]]
Partitions = Mapping[tuple[tuple[Holder, int, int], str], Mapping[Holder, tuple[Stored, ...]]]
Place = tuple[Rank, int]  # whose optimizer file: of a (pp, tp) rank, that of one of its dp ranks
Spans = Mapping[str, tuple[int, int]]  # tensor → (start, count) in a partition


def gradients(wrapper: Wrapper, dtype: str, stage: int | None) -> Gradients:
    """How DeepSpeed 0.19 keeps gradients. BF16_Optimizer adds them up in float32 in flat buffers that dp does not cut
    (runtime/bf16_optimizer.py, `fp32_groups_gradients_flat`). Otherwise they have the weights' dtype, and dp cuts them
    from ZeRO-2 on (runtime/zero/stage_1_and_2.py, `partition_grads`; stage3.py, `grad_partitions_flat_buffer`), unless
    the run's config says `grad_accum_dtype`, which is not looked at.
    """
    if wrapper is Wrapper.BF16:
        return Gradients(DTYPES["fp32"], cut=False, flat=True)
    cut = (stage or 0) >= 2
    return Gradients(DTYPES[dtype], cut=cut, flat=cut)


@dataclass(frozen=True)
class OptimizerFiles:
    """The optimizer's side of a checkpoint.

    `elastic`: no hyperparameters were stored; `extras`: what else the files say (`clip_grad`, `loss_scaler`, …);
    `pieces`: what lies outside of flat buffers, as in `Extents`.
    """

    wrapper: Wrapper
    zero_stage: int
    groups: tuple[ParameterGroup, ...]
    flat_groups: tuple[FlatGroup, ...]
    partitions: Partitions
    elastic: bool
    extras: Mapping[str, Any]
    pieces: Mapping[tuple[str, str], Mapping[Holder, tuple[Fragment, ...]]] = field(default_factory=dict)


def read_optimizer(folder: StepFolder, faults: Faults) -> OptimizerFiles | None:
    """Parameter groups and flat buffers of every rank; None where `faults` was told that they contradict the shapes."""
    first = folder.optims[0, 0][0]
    round_robin = first.wrapper is Wrapper.ZERO12 and folder.config.round_robin and folder.mesh.dp > 1
    for finding in _unlike(folder):
        faults.report(finding)
    if faults.failed:
        return None
    pieces: Pieces = {}
    buffers = _buffers(folder, round_robin, pieces, faults)
    groups: tuple[ParameterGroup, ...] = ()
    with faults.caught():
        groups, index = match_groups(
            folder.path, [_stage_groups(folder, p, round_robin) for p in range(folder.mesh.pp)]
        )
    if faults.failed:
        return None
    scalars: dict[int, Mapping[str, Any]] = {}
    flat_groups: list[FlatGroup] = []
    subs: Counter[tuple[Holder, int]] = Counter()  # of those of a group, how many there are already
    partitions: dict[tuple[tuple[Holder, int, int], str], Mapping[Holder, tuple[Stored, ...]]] = {}
    for p in range(folder.mesh.pp):
        leader = folder.optims[p, 0][0]
        for b, local_group in enumerate(leader.group_of):
            group = index[p][local_group]
            scalars.setdefault(group, leader.scalars[b])
            if (buffer := buffers.get((p, b))) is None:  # in pieces
                continue
            dtypes = {s: stored.dtype for s, stored in leader.states[b].items() if s not in buffer.apart}
            for at, over, holders in buffer.together(folder.experts):
                flats = {holder: buffer.flats[holder] for holder in holders}
                flat_groups.append(one := FlatGroup(at, group, flats, dtypes, subs[at, group], over))
                subs[at, group] += 1
                for state in dtypes:
                    partitions[one.key, state] = {
                        holder: tuple(folder.optims[of][d].states[b][state] for of, d in buffer.places[holder])
                        for holder in holders
                    }
    bf16 = 0 if folder.config.stage == 0 else 1  # pipelines without ZeRO have BF16_Optimizer too
    stage = 3 if first.wrapper is Wrapper.ZERO3 else bf16 if first.wrapper is Wrapper.BF16 else None
    return OptimizerFiles(
        first.wrapper,
        stage if stage is not None else first.stage or folder.config.stage or 1,
        tuple(replace(g, scalars=scalars.get(i, {})) for i, g in enumerate(groups)),
        tuple(flat_groups),
        partitions,
        first.elastic,
        {k: first.state_dict[k] for k in EXTRAS if k in first.state_dict},
        pieces,
    )


@dataclass
class _Buffer:
    """A flat buffer of a pp stage.

    `shares`: who has the same tensors of it; `tps`: the tp ranks that have one of their own. Of each of these `flats`
    is the geometry, under the tensors' names in all of the model, and `places` whose files have its parts. `apart`: the
    states that dp does not cut.
    """

    stage: int
    shares: tuple[Share, ...]
    tps: range
    flats: dict[Holder, FlatBuffer] = field(default_factory=dict)
    places: dict[Holder, list[Place]] = field(default_factory=dict)
    apart: tuple[str, ...] = ()

    def holder(self, share: Share, tp: int) -> Holder:
        return Holder(pp=self.stage, **share.at, tp=tp)

    def together(self, experts: Experts) -> Iterator[tuple[Holder, str, list[Holder]]]:
        """(where, the axis that cuts them, holders) of those that are one group of buffers: each share by itself, but
        all of experts that ep cuts."""
        named = next(iter(self.flats[self.holder(self.shares[0], 0)].names), "")
        if experts.fused_of(named):
            holders = [self.holder(share, tp) for share in self.shares for tp in self.tps]
            yield Holder(pp=self.stage), self.shares[0].over, holders
            return
        for share in self.shares:
            yield Holder(pp=self.stage, **share.at), share.over, [self.holder(share, tp) for tp in self.tps]


def _buffers(folder: StepFolder, round_robin: bool, pieces: Pieces, faults: Faults) -> dict[tuple[int, int], _Buffer]:
    """(pp stage, number) → flat buffer. What lies outside of them comes into `pieces`: what is dealt to ranks in turn,
    and what ranks have of whole tensors."""
    experts = folder.experts
    found: dict[tuple[int, int], _Buffer] = {}
    for (p, t), files in folder.optims.items():
        for b, shapes in enumerate(folder.heads[p, t][0].shapes or ()):
            with faults.caught("contradiction", *(f.name for f in files)):
                if any(len(file.parts[b]) > 1 for file in files if file.parts):
                    for state_of, fragments in _of_parts(files, Holder(pp=p, tp=t), b, shapes).items():
                        pieces.setdefault(state_of, {}).update(fragments)
                    continue
                over_tp = experts.over_tp and experts.degree(next(iter(shapes), "")) is not None
                if over_tp and t:
                    continue
                shares = experts.shares(shapes, folder.mesh)
                buffer = found.setdefault((p, b), _Buffer(p, shares, range(1 if over_tp else folder.mesh.tp)))
                for rank, share in enumerate(shares):
                    places = [((p, t), d) for d in share.ranks]
                    if over_tp:  # of all ranks of the stage
                        places = [((p, r % folder.mesh.tp), r // folder.mesh.tp) for r in share.ranks]
                    sharing = [folder.optims[of][d] for of, d in places]
                    wrong = (f for file in sharing if share.at for f in _spread_otherwise(file, b, len(sharing)))
                    for finding in itertools.islice(wrong, 1):
                        faults.report(finding)
                    flat = _flat_buffer(sharing, b, experts.shapes_on(shapes, rank))
                    named = replace(flat, names=experts.globally(flat.names, rank))
                    holder = buffer.holder(share, t)
                    buffer.flats[holder], buffer.places[holder] = named, places
                    if apart := muon.kept_whole(sharing, b, flat):
                        buffer.apart = apart
                        for name, d, fragment in muon.pieces(sharing, [d for _, d in places], b, named):
                            of_rank = holder if experts else holder.with_(dp=d)
                            pieces.setdefault((name, muon.MOMENTUM), {})[of_rank] = (fragment,)
                    for finding in _lengths_and_mappings(folder, places, b, flat, round_robin, apart):
                        faults.report(finding)
    return found


def _of_parts(files: Sequence[OptimizerFile], holder: Holder, b: int, shapes: Shapes) -> Pieces:
    """What the dp ranks have of a buffer of which each has several pieces, dealt in turn. CheckpointError where these
    do not make up the tensors."""
    parts = [(d, part) for row in zip(*(f.parts[b] for f in files), strict=False) for d, part in enumerate(row)]
    counts = tuple(math.prod(s) for s in shapes.values())
    flat = FlatBuffer.contiguous(tuple(shapes), counts, len(parts), None, max(p[MASTER].numel for _, p in parts))
    for i, (d, part) in enumerate(parts):
        whole, filled = flat.size(i), flat.size(i) - flat.padding(i)
        odd = part.keys() != parts[0][1].keys() or any(not filled <= s.numel <= whole for s in part.values())
        if odd or len({len(f.parts[b]) for f in files}) > 1:
            raise CheckpointError(
                f"{files[d].path}: group {b} in pieces of {', '.join(str(p[MASTER].numel) for p in files[d].parts[b])} "
                f"elements, which are not those of {sum(counts):,} on {len(files)} ranks: the files do not belong "
                "together"
            )
    return _apart(flat, parts, [holder])


def _apart(flat: FlatBuffer, parts: Sequence[tuple[int, Mapping[str, Stored]]], holders: Sequence[Holder]) -> Pieces:
    """Tensor by tensor what lies in the parts of a buffer, each with the dp rank that has it."""
    return {
        (name, state): dict.fromkeys(
            holders,
            tuple(
                Fragment(start, parts[part][1][state].elements(place, count), parts[part][0])
                for part, start, place, count in flat.fragments(i).tolist()
            ),
        )
        for i, name in enumerate(flat.names)
        for state in parts[0][1]
    }


def _unlike(folder: StepFolder) -> Iterator[Finding]:
    """Files that cannot be put together: other numbers of buffers than groups of shapes, other states than beside."""
    for rank, files in folder.optims.items():
        head, leader = folder.heads[rank][0], folder.optims[rank[0], 0][0]
        if head.shapes is None:
            yield not_read_yet(f"{head.path}: no param_shapes: ckptlab needs them to know the buffers")
            continue
        for file in files:
            if len(head.shapes) != len(file.states):
                yield contradiction(
                    file.path,
                    f"{file.path}: {len(file.states)} fp32 buffers where {head.path} lists {len(head.shapes)} groups "
                    "of shapes: they come from different runs",
                )
            elif file.group_of != leader.group_of or len(file.options) != len(leader.options):
                yield contradiction(
                    file.path, f"{file.path}: other parameter groups than {leader.path}: they come from different runs"
                )
            else:
                for b, (states, wanted) in enumerate(zip(file.states, leader.states, strict=True)):
                    if lacking := [s for s in wanted if s not in states]:
                        yield contradiction(
                            file.path,
                            f"{file.path}: group {b} has no {', '.join(lacking)}, which {leader.path} has: the files "
                            "do not belong together",
                        )


def _spread_otherwise(file: OptimizerFile, b: int, ranks: int) -> Iterator[Finding]:
    """A buffer of experts that is cut over another number of ranks than have them by the experts' own files."""
    counts = file.state_dict.get("partition_count")
    if isinstance(counts, (list, tuple)) and b < len(counts) and counts[b] != ranks:
        message = (
            f"{file.path}: group {b} is cut over {counts[b]} ranks, and by the files of the experts over {ranks}: "
            "files of experts are missing, or of another run"
        )
        yield contradiction(file.path, message)


def _flat_buffer(files: Sequence[OptimizerFile], b: int, shapes: Shapes) -> FlatBuffer:
    """The geometry of buffer `b` on one (pp, tp) rank, of whose dp ranks these are the files."""
    counts = tuple(math.prod(s) for s in shapes.values())
    if files[0].wrapper is Wrapper.ZERO3:
        return FlatBuffer.per_tensor(tuple(shapes), counts, len(files))
    # ZeRO-1/2 keep the last rank's padding out of its masters. The longest is right even where files were swapped
    left_out = [f.paddings[b] if f.wrapper is Wrapper.ZERO12 and b < len(f.paddings) else 0 for f in files]
    held = max(f.states[b][MASTER].numel + padding for f, padding in zip(files, left_out, strict=True))
    paddings = files[0].alignment[b] if b < len(files[0].alignment) else None
    if paddings and len(paddings) == sum(map(bool, counts)):  # DeepSpeed knows no tensor of no elements
        each = iter(paddings)
        paddings = tuple(next(each) if n else 0 for n in counts)
    return FlatBuffer.contiguous(tuple(shapes), counts, len(files), paddings, held)


def _lengths_and_mappings(
    folder: StepFolder, places: Sequence[Place], b: int, flat: FlatBuffer, round_robin: bool, apart: Sequence[str]
) -> Iterator[Finding]:
    """Compare what the ranks that share a buffer store of it, and say where it lies, with the geometry. apart: the
    states that dp does not cut."""
    expected = [_spans(flat, i) for i in range(len(places))] if flat.partition is not None else []
    for i, (rank, d) in enumerate(places):
        file = folder.optims[rank][d]
        said = file.spans[b] if expected and b < len(file.spans) else {}
        wrong = bool(said) and said != expected[i]
        if wrong and said in expected:
            yield _swapped(file, rank, d, places[expected.index(said)])
            continue
        if wrong:
            yield _contradicting_mappings(folder, round_robin)
        whole = flat.size(i)
        filled = whole - (flat.padding(i) if flat.partition is not None else 0)
        if filled and not any(f.states[b][MASTER].numel for f in folder.optims[rank]):
            yield not_read_yet(
                f"{file.path}: the float32 weights of group {b} ({flat.names[0]} …) are not in this file: they had "
                "been offloaded to NVMe (offload_optimizer), and stand as swap files, in offloaded_tensors or on the "
                "nodes. Load it with DeepSpeed on the mesh that wrote it, offload_optimizer on the CPU or off, and "
                "save it again"
            )
            continue
        for state, stored in file.states[b].items():
            if not filled <= stored.numel <= whole and state not in apart:
                needed = f"{filled:,} to {whole:,}" if whole != filled else f"{filled:,}"
                yield contradiction(
                    file.path,
                    f"{file.path}: {state} of group {b} ({flat.names[0] if flat.names else 'empty'} …) has "
                    f"{stored.numel:,} elements, expected {needed} from the shapes in "
                    f"{folder.heads[rank][0].path}: the two files do not belong together",
                )


def _swapped(file: OptimizerFile, rank: Rank, mine: int, place: Place) -> Finding:
    holder = place[1] if place[0] == rank else f"{place[1]} of tp rank {place[0][1]}"
    return Finding(
        "swapped-file",
        "error",
        Where(files=(file.name,), ranks=({"pp": rank[0], "tp": rank[1], "dp": mine},)),
        f"the partition of dp {mine}",
        f"{file.name} holds the partition of dp {holder}",
        "give the files back their own names: they were swapped when they were copied",
        "headers",
        f"{file.path}: holds the partition of dp rank {holder}, not of {mine}: the files were swapped or renamed. Put "
        "them back under their own names",
    )


def _contradicting_mappings(folder: StepFolder, round_robin: bool) -> Finding:
    reason = (
        "as DeepSpeed writes them under round_robin_gradients. Its own ds_to_universal goes by them and scrambles the "
        "weights"
        if round_robin
        else "for no reason that ckptlab knows"
    )
    found = (
        f"param_slice_mappings contradict param_shapes, {reason}; ckptlab reads by param_shapes, the order in memory"
    )
    todo = (
        "convert it with ckptlab (or zero_to_fp32), never with ds_to_universal"
        if round_robin
        else "compare the weights with an earlier step's before you go on with them"
    )
    where = Where(tuple(f.name for files in folder.optims.values() for f in files))
    expected = "param_slice_mappings that say where the tensors lie in memory"
    return noted(folder.path, "slice-mappings", "warning", where, expected, found, todo)


@lru_cache(maxsize=1024)
def _spans(flat: FlatBuffer, d: int) -> Spans:
    """name → (start, count) in dp rank d's partition: the same for all tp ranks, as a rule."""
    return {flat.names[i]: (int(start), int(count)) for i, _, start, count in flat.within(d)}


def _stage_groups(folder: StepFolder, stage: int, round_robin: bool) -> Groups:
    """(options, names in the program's order) of each parameter group of a stage; at ZeRO-3 a group's sub-groups are
    joined."""
    leader = folder.optims[stage, 0][0]
    joined: list[list[str]] = [[] for _ in leader.options]
    for g, names in zip(leader.group_of, folder.heads[stage, 0][0].shapes or (), strict=True):
        joined[g] += program_order(folder, list(names), round_robin)
    return [(options, tuple(names)) for options, names in zip(leader.options, joined, strict=True)]


def program_order(folder: StepFolder, names: list[str], round_robin: bool) -> list[str]:
    """The tensors of a rank's buffer in the order in which the program has them; of experts, those of all ep ranks."""
    experts = folder.experts
    if round_robin and names:
        dp = len(experts.shares(names, folder.mesh)[0].ranks)
        dealt = dealt_round_robin(range(len(names)), dp)
        names = [name for _, name in sorted(zip(dealt, names, strict=True))]
    return experts.everywhere(names) if experts else names


def dealt_round_robin(names: Sequence[T], dp: int) -> list[T]:
    """The order in which round_robin_gradients lays a group's tensors out: dealt to dp ranks, then rank after rank."""
    return [n for j in range(min(dp, len(names))) for n in names[j::dp]]
