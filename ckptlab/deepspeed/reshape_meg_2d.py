"""Which old model-parallel ranks each new one is made of: maps over (pp, tp), in both directions.

As `deepspeed.checkpoint.reshape_meg_2d` (DeepSpeed 0.19.8), whose maps these are wherever it has one; it stops where
a degree grows or does not divide the old one, these go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ckptlab.arguments import explained
from ckptlab.errors import ArgumentError
from ckptlab.mesh import Mesh

Item = TypeVar("Item")


@explained
def partition_data(data_list: list[Item], num_partitions: int) -> list[list[Item]]:
    """The list in so many consecutive parts of one size. ArgumentError (an AssertionError) if they cannot be of one
    size."""
    if num_partitions < 1 or len(data_list) % num_partitions:
        raise ArgumentError(f"{len(data_list)} items cannot be cut into {num_partitions} parts of one size")
    return spread(data_list, num_partitions)


def spread(data_list: Sequence[Item], count: int) -> list[list[Item]]:
    """The list dealt to `count` ranks, in order: rank j has every item of which its equal share of the list holds
    some.

    Where `count` divides the length these are the parts of `partition_data`; otherwise neighbours share items, and
    where there are more ranks than items each item goes to several.
    """
    n = len(data_list)
    return [list(data_list[j * n // count : -(-(j + 1) * n // count)]) for j in range(count)]


@explained
class meg_2d_parallel_map:  # noqa: N801 - DeepSpeed's name
    """A list of data (ranks, as a rule) for each coordinate (pp, tp). `map` holds them under "pp,tp"."""

    def __init__(self, pp_degree: int, tp_degree: int) -> None:
        self.pp_degree = pp_degree
        self.tp_degree = tp_degree
        self.map: dict[str, list[int]] = {}

    def simple_init(self) -> None:
        """Give each coordinate its own rank, pp * TP + tp."""
        mesh = Mesh(pp=self.pp_degree, tp=self.tp_degree)
        self.map = {
            self._make_key(pp, tp): [mesh.rank(pp=pp, tp=tp)]
            for pp in range(self.pp_degree)
            for tp in range(self.tp_degree)
        }

    def add_data(self, pp_index: int, tp_index: int, data: list[int]) -> None:
        """Append to the list at a coordinate. ArgumentError if it is not on the map or `data` is no list."""
        self._validate_indices(pp_index, tp_index)
        if type(data) is not list:
            raise ArgumentError(f"data for pp {pp_index}, tp {tp_index}: expected a list, found {type(data).__name__}")
        self.map.setdefault(self._make_key(pp_index, tp_index), []).extend(data)

    def get_data(self, pp_index: int | None = None, tp_index: int | None = None) -> list[int]:
        """The data at a coordinate; None stands for all coordinates on that axis, pp being the slower one."""
        self._validate_indices(pp_index, tp_index)
        stages = range(self.pp_degree) if pp_index is None else [pp_index]
        ranks = range(self.tp_degree) if tp_index is None else [tp_index]
        return [item for pp in stages for tp in ranks for item in self.map[self._make_key(pp, tp)]]

    def print_data(self, tag: str) -> None:
        """Print the tag and the list of every coordinate."""
        print(tag)
        for key, value in self.map.items():
            print(f"{key} = {value}")

    def _validate_indices(self, pp_index: int | None, tp_index: int | None) -> None:
        for axis, index, degree in (("pp", pp_index, self.pp_degree), ("tp", tp_index, self.tp_degree)):
            if index is not None and index >= degree:
                raise ArgumentError(f"{axis} {index} is outside {axis}({degree})")

    @staticmethod
    def _make_key(pp: int, tp: int) -> str:
        return f"{pp},{tp}"

    def __repr__(self) -> str:
        return f"<meg_2d_parallel_map of pp {self.pp_degree}, tp {self.tp_degree}: {self.map}>"


@explained
def reshape_meg_2d_parallel(
    old_pp_degree: int, old_tp_degree: int, new_pp_degree: int, new_tp_degree: int, verbose: bool = False
) -> meg_2d_parallel_map:
    """For each coordinate of the new degrees the old ranks that hold what it needs: tp first, then pp.

    Downwards ranks are put together, upwards several new ranks share an old one. `verbose` prints the steps.
    """
    found = meg_2d_parallel_map(old_pp_degree, old_tp_degree)
    found.simple_init()
    if verbose:
        found.print_data("original_2d_map:")
    if new_tp_degree != old_tp_degree:
        found = _reshape_tp(found, new_tp_degree)
    if verbose:
        found.print_data("after_tp_reshape:")
    if new_pp_degree != old_pp_degree:
        found = _reshape_pp(found, new_pp_degree)
    if verbose:
        found.print_data("final_2d_map:")
    return found


def _reshape_tp(old: meg_2d_parallel_map, degree: int) -> meg_2d_parallel_map:
    new = meg_2d_parallel_map(old.pp_degree, degree)
    for pp in range(old.pp_degree):
        for tp, ranks in enumerate(spread(old.get_data(pp_index=pp), degree)):
            new.add_data(pp, tp, ranks)
    return new


def _reshape_pp(old: meg_2d_parallel_map, degree: int) -> meg_2d_parallel_map:
    new = meg_2d_parallel_map(degree, old.tp_degree)
    for tp in range(old.tp_degree):
        if degree > old.pp_degree:  # a new stage needs all ranks of the old stages that it is cut from
            stages = spread([old.get_data(pp, tp) for pp in range(old.pp_degree)], degree)
            held = [[rank for stage in needed for rank in stage] for needed in stages]
        else:
            held = spread(old.get_data(tp_index=tp), degree)
        for pp, ranks in enumerate(held):
            new.add_data(pp, tp, ranks)
    return new


@explained
def get_mpu_ranks(
    tp_size: int = 1, pp_size: int = 1, dp_size: int = 1, virtual_pp_size: int | None = None
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Megatron's process groups of tp · pp · dp ranks, also printed: (tensor, model, data) parallel.

    A tensor-parallel group differs in tp alone, a data-parallel one in dp alone; a model-parallel group, which
    DeepSpeed calls PP, holds all ranks of one replica of the model. `virtual_pp_size` changes no group.
    """
    mesh = Mesh(pp=pp_size, dp=dp_size, tp=tp_size)
    print(f"\n\n*** tp={tp_size}, pp={pp_size}, dp={dp_size}, world={mesh.size}")
    groups = {"DP": mesh.groups("dp"), "PP": mesh.groups("pp", "tp"), "TP": mesh.groups("tp")}
    for name, ranks in groups.items():
        print(name, ranks)
    return groups["TP"], groups["PP"], groups["DP"]
