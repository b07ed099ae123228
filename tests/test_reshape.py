"""To any other mesh and back: nothing but padding may change. What cannot be is refused before reading."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compare import DATA, GPT, ZERO2, ZERO3, differences, digest, same_bits, whole
from real_deepspeed import make_case, requires_deepspeed

import ckptlab
from ckptlab.arrays import Tally, reader
from ckptlab.catalog import PARAM
from ckptlab.errors import ReshapeError
from ckptlab.formats import fileplan, read
from ckptlab.formats.deepspeed import universal, write
from ckptlab.formats.deepspeed.info import lists_from_layouts
from ckptlab.formats.deepspeed.options import TargetOptions, Wanted
from ckptlab.formats.deepspeed.target import _sub_groups
from ckptlab.formats.torch import torchfile
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder
from ckptlab.reshaping import Reshape
from ckptlab.sharding.strategies import Rules

THERE = [
    (GPT, Mesh(tp=4), {}),
    (GPT, Mesh(tp=1, pp=4), {}),
    (GPT, Mesh(tp=1, pp=3, dp=2), {}),
    (GPT, Mesh(dp=5), {}),
    (GPT, Mesh(tp=4, pp=4, dp=3), {}),
    (GPT, Mesh(tp=2, pp=2, dp=7), {}),
    (ZERO2, Mesh(dp=1), {}),
    (ZERO2, Mesh(dp=5), {}),
    (ZERO2, Mesh(dp=3), {"zero_stage": 1}),
    (ZERO2, Mesh(dp=4), {"zero_stage": 3}),
    (ZERO2, Mesh(dp=3), {"round_robin": True}),
    (ZERO3, Mesh(dp=1), {}),
    (ZERO3, Mesh(dp=7), {}),
    (ZERO3, Mesh(dp=3), {"zero_stage": 1}),
    (ZERO3, Mesh(dp=4), {"zero_stage": 2}),
    (ZERO3, Mesh(dp=3), {"sub_group_size": np.int64(300)}),
]


def ids(value: Any) -> str | None:
    return value.name if isinstance(value, Path) else str(value) if isinstance(value, Mesh) else None


@pytest.mark.parametrize(
    ("case", "mesh", "options", "form"),
    [
        *((*one, "deepspeed") for one in THERE),
        *((case, Mesh(tp=1), {}, "universal") for case in (GPT, ZERO2, ZERO3)),  # which has no mesh
    ],
    ids=ids,
)
def test_there_and_back_is_the_identity(case: Path, mesh: Mesh, options: dict, form: str, tmp_path: Path) -> None:
    source = read(case)
    before = digest(case)
    Reshape.of(source, mesh, **options).save(tmp_path / "there" / "step", form)
    there = read(tmp_path / "there")
    assert differences(source, there) == []
    assert there.mesh == (mesh if form == "deepspeed" else Mesh())
    home = {"zero_stage": source.zero_stage}
    if "round_robin" in options:
        home["round_robin"] = False
    Reshape.of(there, source.mesh, **home).save(tmp_path / "back" / "step")
    back = read(tmp_path / "back")
    assert differences(source, back) == []
    assert back.mesh == source.mesh
    assert {n: (t.cut, t.layout.text) for n, t in back.tensors.items()} == {
        n: (t.cut, t.layout.text) for n, t in source.tensors.items()
    }
    assert [(g.name, g.tensors) for g in back.groups] == [(g.name, g.tensors) for g in source.groups]
    assert not [n for n in back.findings if n.code != "slice-mappings"]
    assert digest(case) == before


def test_round_robin_is_what_the_run_says_wherever_it_comes_from(tmp_path: Path) -> None:
    """Through one dp rank, and through stages that do not deal."""
    source = read(DATA / "plain_zero2_dp2_round_robin")
    dealt = [f.names for f in source.flat_groups]
    for mesh, stage in ((Mesh(dp=1), 2), (Mesh(dp=2), 3), (Mesh(dp=2), 0)):
        between = tmp_path / f"{mesh.dp}-{stage}" / "step"
        Reshape.of(source, mesh, zero_stage=stage).save(between)
        assert [f.names for f in Reshape.of(read(between), source.mesh, zero_stage=2).target.flat_groups] == dealt
        plain = Reshape.of(read(between), source.mesh, zero_stage=2, round_robin=False).target
        assert [f.names for f in plain.flat_groups] == [g.tensors for g in source.groups]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mesh", "options"), THERE, ids=ids)
def test_the_plans_figures_are_what_happens(case: Path, mesh: Mesh, options: dict, tmp_path: Path) -> None:
    source = read(case)
    reshaped = Reshape.of(source, mesh, **options)
    cost = reshaped.cost()
    tally = Tally()
    written = 0
    for plan in write.files(source, reshaped.target, tally):
        fileplan.write(plan, tmp_path / plan.name)
        written += tensor_bytes(tmp_path / plan.name)
    read_by_pair = tally.read
    assert cost.read == sum(read_by_pair.values())
    assert cost.moved == sum(n for (a, b), n in read_by_pair.items() if a != b)
    assert cost.written == sum(reshaped.file_sizes.values()) == written
    rows, columns = np.nonzero(reshaped.plan.matrix())
    assert {(a, b) for a, b in read_by_pair} == set(zip(rows.tolist(), columns.tolist(), strict=True))


def tensor_bytes(file: Path) -> int:
    """Bytes of weights and optimizer states in a file: all tensors but the client's random states and step counts."""

    def walk(content: Any, seen: set) -> int:
        if isinstance(content, torchfile.Stored):
            place = (content.offset, content.shape)
            if not content.shape or place in seen:
                return 0
            seen.add(place)
            return content.nbytes
        if isinstance(content, dict):
            return sum(walk(v, seen) for k, v in content.items() if k != "rng_state")
        return sum(walk(v, seen) for v in content) if isinstance(content, list) else 0

    return walk(torchfile.read(file), set())


@requires_deepspeed
@pytest.mark.parametrize("case", ["gqa_tp2_pp1_dp2", "llama_tp2_pp1_dp2"])
@pytest.mark.parametrize("form", ["deepspeed", "universal"])
def test_sub_parameters_survive_a_mesh_that_does_not_cut_them(case: str, form: str, tmp_path: Path) -> None:
    source = read(make_case(case, tmp_path))
    Reshape.of(source, Mesh(tp=1, pp=2)).save(tmp_path / "whole" / "step", form)
    Reshape.of(read(tmp_path / "whole"), source.mesh).save(tmp_path / "back" / "step")
    back = read(tmp_path / "back")
    assert differences(source, back) == []
    assert {n: (t.cut, t.layout.text) for n, t in back.tensors.items()} == {
        n: (t.cut, t.layout.text) for n, t in source.tensors.items()
    }
    assert any(t.cut.rows((1,))[0][:, 3].sum() > 1 for t in back.tensors.values() if t.cut.axes)


def test_layouts_of_ones_own_are_written_down(tmp_path: Path) -> None:
    """A strategy's layouts go into universal_checkpoint_info where DeepSpeed's lists can say them."""
    names = r".*(dense_h_to_4h|query_key_value|word_embeddings)\.weight"
    own = {
        names: "(tp out) in",
        r".*(dense_h_to_4h|query_key_value)\.bias": "(tp out)",
        r".*\.bias|.*norm.*|6.*": "out",
    }
    rows = {r".*(attention\.dense|dense_4h_to_h)\.weight": "out (tp in)", r".*position.*": "out in"}
    Reshape.of(read(GPT, Rules.of(own | rows)), Mesh(tp=4)).save(tmp_path / "a" / "step")
    told = read(tmp_path / "a")
    assert told["3.self_attention.dense.weight"].layout.text == "out (tp in)"
    assert told["3.mlp.dense_h_to_4h.weight"].cut.shard_shape((3,)) == (16, 16)
    assert differences(read(GPT), told) == []
    halves = {r".*dense_h_to_4h\.weight": Layout("((tp out) + k) in", totals={"k": 32})}
    source = read(GPT)
    odd = {"3.mlp.dense_h_to_4h.weight": source["3.mlp.dense_h_to_4h.weight"]}
    target = Reshape.of(source, Mesh(tp=2, pp=2)).target
    tensor = target["3.mlp.dense_h_to_4h.weight"]
    layout = next(iter(halves.values()))
    partly = dataclasses.replace(tensor, layout=layout, cut=layout.resolve(tensor.shape, target.mesh))
    assert lists_from_layouts(target) is not None
    assert (
        lists_from_layouts(dataclasses.replace(target, tensors={**target.tensors, **dict.fromkeys(odd, partly)}))
        is None
    )


def test_uneven_widths_for_a_mesh_that_is_to_come(tmp_path: Path) -> None:
    """Three heads of five on two ranks: what a strategy says of tp 2 is known before anything is cut."""
    mapping = {
        r".*qkv\.weight": Layout("(3 tp out) in", sizes={"out": (10, 5)}),
        r".*qkv\.bias": Layout("(3 tp out)", sizes={"out": (10, 5)}),
        r".*proj\.weight": Layout("out (tp in)", sizes={"in": (10, 5)}),
        r"(wte|wpe|adapter|.*fc.)\.weight": "out in",
        r".*": "out",
    }
    source = read(ZERO2, Rules.of(mapping))
    assert source["blocks.0.qkv.weight"].cut.shard_shape((0,)) == (45, 15)
    Reshape.of(source, Mesh(tp=2, dp=2)).save(tmp_path / "two" / "step")
    two = read(tmp_path / "two")
    assert [two["blocks.0.qkv.weight"].cut.shard_shape((k,)) for k in (0, 1)] == [(30, 15), (15, 15)]
    assert differences(source, two) == []
    three = Reshape.of(read(tmp_path / "two", Rules.of(mapping)), Mesh(tp=3)).target
    assert [three["blocks.0.proj.weight"].cut.shard_shape((k,)) for k in range(3)] == [(15, 5)] * 3


def test_padding_rows_that_both_meshes_have_are_kept() -> None:
    source = read(GPT)
    target = Reshape.of(source, Mesh(tp=4)).target
    name = "tied_modules.embed.word_embeddings.weight"
    assert target[name].cut.shape == (128, 16)  # 101 rows, a multiple of 8 · tp
    shards = [reader(source, name, "master").shard(target[name].cut, (t,)) for t in range(4)]
    held = [reader(source, name, "master").shard(source[name].cut, (t,)) for t in range(2)]
    np.testing.assert_array_equal(np.concatenate(shards)[:112], np.concatenate(held))
    assert not np.concatenate(shards)[112:].any()
    assert np.concatenate(held)[101:].any()


def test_a_change_of_dtype_rounds_the_master(tmp_path: Path) -> None:
    source = read(ZERO2)
    Reshape.of(source, Mesh(dp=2), dtype="fp16").save(tmp_path / "step")
    found = read(tmp_path)
    for name, tensor in found.tensors.items():
        if tensor.kind == "parameter":
            expected = whole(source, name, "master").astype(np.float16)
            assert same_bits(whole(found, name, PARAM), expected), name
    assert not list((tmp_path / "step").glob("bf16_*"))
    Reshape.of(found, dtype="bf16").save(tmp_path / "again")
    assert all(
        t.states[PARAM] == ml_dtypes.bfloat16
        for t in read(tmp_path / "again").tensors.values()
        if t.kind == "parameter"
    )


def test_replicas_that_are_to_be_averaged_are_and_it_is_said(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(GPT / "global_step3", tmp_path / "step")
    name = "3.input_layernorm.weight"
    for file in (tmp_path / "step").glob("mp_rank_*"):
        content = torchfile.read(file)
        info = content["universal_checkpoint_info"]
        info["parameter_to_average_patterns"] = info.pop("tp_replicated_parameter_patterns")
        torchfile.write(tmp_path / "new", content)
        (tmp_path / "new").replace(file)
    plain = read(GPT)
    [fragment] = plain.fragments(name, "master", Holder(pp=0, tp=1))
    with open(fragment.stored.path.replace(str(GPT / "global_step3"), str(tmp_path / "step")), "r+b") as f:
        f.seek(fragment.stored.offset)
        f.write((whole(plain, name, "master") + 1).tobytes())  # tp rank 1 has drifted by 1
    averaged = read(tmp_path)
    assert [n.code for n in averaged.findings] == ["averaged"]
    np.testing.assert_allclose(whole(averaged, name, "master"), whole(plain, name, "master") + 0.5, rtol=1e-6)


class TestPipeline:
    def test_layers_are_dealt_as_the_source_was(self) -> None:
        target = Reshape.of(read(GPT), Mesh(pp=4)).target
        layers = {n.split(".")[0]: t.stages for n, t in target.tensors.items() if n[0].isdigit()}
        assert layers == {"2": (0,), "3": (1,), "4": (2,), "5": (3,), "6": (3,)}
        assert [n.code for n in target.findings] == ["pipeline-inferred", "vocabulary-padding"]
        assert {t.stages for n, t in target.tensors.items() if n.startswith("tied_modules")} == {(0, 3)}

    def test_the_user_may_say_how(self) -> None:
        target = Reshape.of(read(GPT), Mesh(pp=2), pipeline=(0, 3)).target
        assert target["2.mlp.dense_h_to_4h.weight"].stages == (0,)
        assert target["3.mlp.dense_h_to_4h.weight"].stages == (1,)
        with pytest.raises(ReshapeError, match="first layer of each of 2 stages"):
            Reshape.of(read(GPT), Mesh(pp=2), pipeline=(0, 3, 5))
        with pytest.raises(ReshapeError, match="expected one of blocks, parameters, uniform"):
            Reshape.of(read(GPT), Mesh(pp=2), pipeline="fair")

    def test_a_stage_without_tensors_is_refused(self) -> None:
        with pytest.raises(ReshapeError, match="pp stage 1 of 3 would hold no tensor"):
            Reshape.of(read(GPT), Mesh(pp=3), pipeline=(0, 7, 8))


class TestRefusals:
    """Nothing is read, nothing is written: the reasons, and the nearest meshes that work."""

    def refuse(self, case: Path, mesh: Mesh, **options: Any) -> str:
        with pytest.raises(ReshapeError) as error:
            Reshape.of(read(case), mesh, **options)
        return str(error.value)

    def test_heads(self) -> None:
        message = self.refuse(GPT, Mesh(tp=3))
        assert "tp 3: 4 attention heads are not divisible by it" in message
        assert "Meshes that work: tp 4 · pp 1 · dp 1; tp 2 · pp 1 · dp 1" in message

    def test_heads_from_the_user(self) -> None:
        assert "heads=6 contradicts the checkpoint, which has 4 attention heads" in self.refuse(
            GPT, Mesh(tp=4), heads=6
        )
        assert Reshape.of(read(GPT), Mesh(tp=4), heads=4).mesh.tp == 4
        told = read(GPT)
        grouped = dataclasses.replace(told, training=dataclasses.replace(told.training, kv_heads=2))
        with pytest.raises(ReshapeError, match="kv_heads=4 contradicts the checkpoint, which has 2 key/value heads"):
            Reshape.of(grouped, Mesh(tp=4), kv_heads=4)
        untold = dataclasses.replace(told, training=dataclasses.replace(told.training, heads=None))
        with pytest.raises(ReshapeError, match="6 attention heads"):
            Reshape.of(untold, Mesh(tp=4), heads=6)

    def test_degrees_by_axis_keep_the_others_and_a_mesh_says_all(self) -> None:
        ckpt = ckptlab.open(GPT)
        assert ckpt.reshape(tp=4).mesh == Mesh(tp=4, pp=2, dp=2)
        assert ckpt.reshape(Mesh(tp=4)).mesh == ckpt.reshape({"tp": 4}).mesh == Mesh(tp=4)
        with pytest.raises(ReshapeError, match="a mesh and tp= are both given"):
            ckpt.reshape(Mesh(dp=2), tp=4)
        with pytest.raises(ReshapeError, match="degrees by axis, tp=4; not"):
            ckpt.reshape((4, 1, 2))

    def test_several_reasons_at_once(self) -> None:
        message = self.refuse(GPT, Mesh(tp=3, pp=9), zero_stage=3)
        for reason in (
            "pipeline engine trains with ZeRO-1 only",
            "9: more stages than the 4",
            "heads",
        ):
            assert reason in message

    def test_stages_for_a_model_without_a_pipeline(self) -> None:
        assert "not written by the pipeline engine" in self.refuse(ZERO2, Mesh(pp=2))

    def test_a_new_tp_without_layouts(self) -> None:
        assert "nothing says how" in self.refuse(ZERO2, Mesh(tp=2))

    def test_padding_that_does_not_fit(self) -> None:
        assert "at least 101 rows, a multiple of tp 4" in self.refuse(GPT, Mesh(tp=4), padded_vocab=102)

    def test_an_axis_that_deepspeed_does_not_have(self) -> None:
        assert "no axis 'ep'" in self.refuse(GPT, Mesh(ep=2))

    def test_an_option_that_does_not_exist(self) -> None:
        assert "no option 'zero'" in self.refuse(GPT, Mesh(), zero=1)

    def test_whole_tensors_without_a_word_of_layers(self, tmp_path: Path) -> None:
        from ckptlab.checkpoint import save_weights

        save_weights(read(ZERO2), tmp_path / "weights")
        assert "no word of a program's layers" in self.refuse(tmp_path / "weights", Mesh(dp=2))


def test_universal_files_are_as_deepspeeds_converter_writes_them(tmp_path: Path) -> None:
    source = read(GPT)
    Reshape.of(source).save(tmp_path / "u" / "step_universal", "universal")
    assert (tmp_path / "u" / "latest_universal").read_text() == "step_universal"
    ours, theirs = tmp_path / "u" / "step_universal", GPT / "universal" / "global_step3_universal"
    names = {str(p.relative_to(theirs)) for p in theirs.rglob("*.pt")}
    assert {str(p.relative_to(ours)) for p in ours.rglob("*.pt")} == names
    for name in sorted(n for n in names if n.startswith("zero/") and n != f"zero/{universal.OPTIMIZER}"):
        a, b = torchfile.read(ours / name), torchfile.read(theirs / name)
        if not isinstance(b, dict):
            assert float(a.map()) == float(b.map()), name
            continue
        assert {k: v for k, v in a.items() if k != "param"} == {k: v for k, v in b.items() if k != "param"}, name
        assert same_bits(a["param"].map(), b["param"].map()), name


def test_sub_groups_are_closed_by_what_a_rank_holds_of_a_shard() -> None:
    """ZeRO-3 counts the elements of its own shard, which tp has cut, not those of the whole."""
    catalog, mesh = read(GPT), Mesh(tp=2, dp=2)
    names = ["3.mlp.dense_h_to_4h.weight", "4.mlp.dense_h_to_4h.weight", "5.mlp.dense_h_to_4h.weight"]
    held = catalog[names[0]].numel // (mesh.tp * mesh.dp)
    wanted = Wanted(catalog, mesh, TargetOptions(sub_group_size=2 * held))
    groups = _sub_groups(wanted, names, catalog.tensors, mesh.dp)
    assert groups == [names[:2], names[2:]]


def test_parts_of_dp_that_deepspeed_does_not_have_are_said() -> None:
    mesh = Mesh(dp=4).split("dp", dp_replicate=2, dp_shard=2)
    target = ckptlab.open(ZERO2).reshape(mesh)
    assert target.mesh == Mesh(dp=4)
    assert [f.text for f in target.check()] == [
        "dp_replicate and dp_shard are one axis to DeepSpeed: ZeRO cuts over all of dp 4"
    ]
    assert ckptlab.open(ZERO2).reshape(Mesh(dp=4)).check() == ()
