"""How layers are dealt to stages, beside DeepSpeed's own partitioners."""

from __future__ import annotations

import pytest
from compare import GPT
from hypothesis import given
from hypothesis import strategies as st

from ckptlab.formats import read
from ckptlab.formats.deepspeed.pipeline import Pipeline, describe, stage_of

BLOCK, NORM = (("w", (4, 4)),), (("b", (4,)),)


def pipeline(weights: list[int]) -> Pipeline:
    return Pipeline(tuple((BLOCK if w else ()) for w in weights), tuple(weights), (0,) * len(weights))


@pytest.mark.slow
@given(st.lists(st.sampled_from([0, 0, 1, 1, 1, 5, 100]), min_size=1, max_size=14), st.integers(1, 6))
def test_dealt_as_deepspeed_deals(weights: list[int], pp: int) -> None:
    runtime = pytest.importorskip("deepspeed.runtime.utils")
    assert list(pipeline(weights).starts(pp, "parameters")) == [
        int(i) for i in runtime.partition_balanced(weights, pp)[:-1]
    ]
    assert list(pipeline(weights).starts(pp, "uniform")) == runtime.partition_uniform(len(weights), pp)[:-1]


def test_megatrons_nine_layers() -> None:
    layers = describe(read(GPT))
    assert layers.blocks == (0, 0, 1, 1, 1, 1, 0, 0)
    assert layers.starts(2, "blocks") == (0, 4)
    assert layers.starts(4, "blocks") == (0, 3, 4, 5)
    assert [stage_of(i, (0, 3, 4, 5)) for i in range(8)] == [0, 0, 0, 1, 2, 3, 3, 3]


def test_the_method_is_the_one_that_fits() -> None:
    signatures = ((), BLOCK, BLOCK, BLOCK, BLOCK, NORM, ())
    counts = (0, 16, 16, 16, 16, 4, 0)
    assert Pipeline(signatures, counts, (0, 0, 0, 1, 1, 1, 1)).infer_method(2) == "blocks"
    assert Pipeline(signatures, counts, (0, 0, 0, 0, 1, 1, 1)).infer_method(2) == "uniform"
    assert Pipeline(signatures, counts, (0, 0, 1, 1, 1, 1, 1)).infer_method(2) is None
