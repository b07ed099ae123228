"""Suites by which other people's formats, strategies and families prove themselves in their own tests.

    def test_my_format(tmp_path):
        check_format("mine", a_small_checkpoint_of_mine(tmp_path), meshes=[Mesh(tp=2), Mesh(tp=3, dp=2)])

    def test_my_strategy():
        check_strategy(MyStrategy(heads=8), {"wte.weight": (64, 16), "attn.qkv.weight": (48, 16)})

    def test_my_family():
        check_family("mine", tensors_of_my_program, tensors_of_transformers, heads=8, kv_heads=2)

All raise LawError, an AssertionError that lists everything that does not hold, and return the laws that do.
`ckptlab.testing.strategies` has what property tests draw from: meshes, layouts, cuts. It needs hypothesis.
"""

from ckptlab.testing.families import check_family
from ckptlab.testing.formats import check_format
from ckptlab.testing.sharding import check_strategy

__all__ = ["check_family", "check_format", "check_strategy"]


def __dir__() -> list[str]:
    return sorted(__all__)
