"""A run that begins with weights alone: what ckptlab writes of them, and what real DeepSpeed makes of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import DATA, ZERO2
from helpers.command import refused, run
from real_deepspeed import requires_deepspeed, resume
from safetensors.numpy import save_file

import ckptlab
from ckptlab import CkptlabError, LayoutError, Mesh, ReshapeError

GPT = DATA / "gpt_tp2_pp2_dp2"
GROUPS: list[dict[str, Any]] = [
    {"name": "decay", "lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    {"name": "no_decay", "lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0},
]


def module_of(ckpt: ckptlab.Checkpoint, **other_shapes: tuple[int, ...]) -> Any:
    """A module with the tensors that a checkpoint of a run has, in their order, and as it ties and trains them."""
    torch = pytest.importorskip("torch")
    root = torch.nn.Module()

    def put(name: str, value: Any, buffer: bool) -> None:
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, value) if buffer else module.register_parameter(last, value)

    for name, tensor in ckpt.items():
        empty = torch.empty(other_shapes.get(name, tensor.shape), device="meta")
        made = empty if tensor.kind == "buffer" else torch.nn.Parameter(empty, requires_grad=tensor.kind == "parameter")
        for called in (name, *tensor.aliases):
            put(called, made, tensor.kind == "buffer")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "w"
    ckptlab.save_weights(ZERO2, folder)
    return folder


@requires_deepspeed
@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("deepspeed", {"dp": 3, "zero_stage": 2}),
        ("deepspeed", {"dp": 2, "zero_stage": 3}),
        ("deepspeed", {"dp": 2, "zero_stage": 1}),
        ("universal", {"dp": 3}),
    ],
    ids=str,
)
def test_real_deepspeed_begins_with_it(form: str, changes: dict[str, int], weights: Path, tmp_path: Path) -> None:
    begun = ckptlab.begin(weights, module_of(ckptlab.open(ZERO2)), param_groups=GROUPS)
    begun.reshape(format=form, **{"zero_stage": 2, **changes}).save(tmp_path / "out" / "step")
    stage = {"zero": changes["zero_stage"]} if "zero_stage" in changes else {}
    universal = form == "universal"
    report = resume(tmp_path / "out" / "step", ZERO2.name, universal=universal, dp=changes["dp"], **stage)
    assert report["status"] == "different", report.get("error")
    compared = {key.split("/", 1)[0] for key in report["differences"]}
    assert compared <= {"exp_avg", "exp_avg_sq", "settings", "step", "steps"}, report["differences"]
    assert {"master", "param"} & set(report["compared"])
    assert report["losses"]


def test_the_start_is_the_weights_and_nothing_else(weights: Path, tmp_path: Path) -> None:
    trained, module = ckptlab.open(ZERO2), module_of(ckptlab.open(ZERO2))
    begun = ckptlab.begin(weights, module, param_groups=GROUPS)
    assert {name: (t.kind, t.aliases) for name, t in begun.items()} == {
        name: (t.kind, t.aliases) for name, t in trained.items()
    }
    assert [g.tensors for g in begun.catalog.groups] == [g.tensors for g in trained.catalog.groups]
    assert begun.iteration == 0
    assert not [f for f in begun.findings if f.code in ("order-unknown", "hyperparameters-assumed")]
    begun.reshape(Mesh(dp=3), format="deepspeed", zero_stage=2).save(tmp_path / "global_step0")
    found = ckptlab.open(tmp_path / "global_step0")
    full = found.full(stack=False)
    for name, tensor in trained.items():
        if tensor.kind == "parameter":
            assert np.array_equal(full[name].master, trained.full("master", stack=False)[name])
            assert not full[name].exp_avg.values.any()
    assert found.catalog.groups[1].options["weight_decay"] == 0
    assert not ckptlab.diff(found, trained, states=["param"]).changed


def test_by_names_alone_it_goes_where_names_count(weights: Path, tmp_path: Path) -> None:
    begun = ckptlab.begin(weights)
    assert {f.code for f in begun.findings} >= {"order-unknown", "hyperparameters-assumed"}
    with pytest.raises(ReshapeError, match="in the model's own order, which nothing says"):
        begun.reshape(format="deepspeed")
    for form in ("universal", "dcp"):
        begun.reshape(format=form).save(tmp_path / form)
        assert ckptlab.diff(tmp_path / form, weights, states=["master"]).equal


PIPE = ckptlab.Mesh(pp=2, tp=2)


@requires_deepspeed
def test_real_deepspeed_begins_a_pipeline_out_of_a_folder_of_transformers(tmp_path: Path) -> None:
    """No module is given: the order of a pipeline's parameters follows from its names."""
    run_ = ckptlab.open(GPT)
    ckptlab.save_pretrained(run_, tmp_path / "hf")
    begun = ckptlab.begin(
        tmp_path / "hf", family="gpt2-megatron-deepspeed-tied", tp=2, heads=4, first=2, final=6, param_groups=GROUPS
    )
    assert [*begun] == [*run_]
    assert [g.tensors for g in begun.catalog.groups] == [g.tensors for g in run_.catalog.groups]
    begun.reshape(PIPE, format="deepspeed", padded_vocab=112).save(tmp_path / "out" / "global_step0")
    report = resume(tmp_path / "out" / "global_step0", GPT.name, dp=1)
    assert report["status"] == "different", report.get("error")
    compared = {key.split("/", 1)[0] for key in report["differences"]}
    assert compared <= {"exp_avg", "exp_avg_sq", "settings", "step", "steps"}, report["differences"]
    assert report["losses"]


MODELS = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", {}),
    "bloom": ("BloomConfig", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_in_the_order_of_transformers_own_models(name: str, tmp_path: Path) -> None:
    """A folder alone, on two tensor-parallel ranks where a layout is known."""
    transformers = pytest.importorskip("transformers")
    cls, fields = MODELS[name]
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 4}
    config = getattr(transformers, cls)(**sizes, intermediate_size=24, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "hf")
    begun = ckptlab.begin(tmp_path / "hf")
    assert not [f for f in begun.findings if f.code == "order-unknown"]
    assert [*begun] == [n for n, _ in model.named_parameters()]
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {*begun}
    assert {alias for tensor in begun.values() for alias in tensor.aliases} == tied
    mesh = Mesh(dp=2) if name == "bloom" else Mesh(tp=2, dp=2)
    begun.reshape(mesh, format="deepspeed", zero_stage=1).save(tmp_path / "out" / "global_step0")
    assert ckptlab.diff(tmp_path / "out", tmp_path / "hf", states=["master"]).equal
    if name == "gpt2":  # the heads of a rank, of q, k and v each
        key = "transformer.h.1.attn.c_attn.weight"
        shards = ckptlab.open(tmp_path / "out").shards("master", stack=False)[key].values
        q, k, v = model.state_dict()[key].numpy().reshape(16, 3, 2, 8).transpose(1, 0, 2, 3)
        assert np.array_equal(shards[1], np.concatenate([part[:, 1] for part in (q, k, v)], axis=1))


def test_what_is_not_the_modules_is_refused(weights: Path, tmp_path: Path) -> None:
    trained = ckptlab.open(ZERO2)
    with pytest.raises(LayoutError, match=r"scale has shape \(1,\), in the module \(2,\)"):
        ckptlab.begin(weights, module_of(trained, scale=(2,)))
    save_file({"scale": np.zeros(1, np.float32), "more": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(LayoutError, match="no weights for 44 tensors of the module"):
        ckptlab.begin(tmp_path, module_of(trained))
    with pytest.raises(ReshapeError, match="one or two, of matrices and of the rest, not 3"):
        ckptlab.begin(weights, param_groups=[{}, {}, {}])
    with pytest.raises(CkptlabError, match="expected one of bf16"):
        ckptlab.begin(weights, dtype="int8")


@pytest.mark.slow
def test_the_command_line_begins_with_a_published_model(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True, eos_token_id=1)
    model, hf = transformers.LlamaForCausalLM(config), tmp_path / "hf"
    model.save_pretrained(hf)
    (tmp_path / "groups.json").write_text(json.dumps([{"lr": 3e-4}]))
    mine = ("--from", "huggingface", "--tp", "2", "--dp", "2", "--param-groups", tmp_path / "groups.json")
    native = run("convert", hf, tmp_path / "native" / "global_step0", "--to", "deepspeed", *mine)
    assert native.exit_code == 0, native.stderr
    found = ckptlab.open(tmp_path / "native")
    assert [*found] == [name for name, _ in model.named_parameters()]
    assert found["model.embed_tokens.weight"].aliases == ("lm_head.weight",)
    assert found.mesh == Mesh(tp=2, dp=2)
    assert found.catalog.groups[0].options["lr"] == 3e-4
    assert ckptlab.diff(found, hf, states=["master"]).equal
    core = ("--family", "llama-megatron-core")
    told = refused("convert", hf, tmp_path / "core" / "global_step0", "--to", "deepspeed", *mine, *core)
    assert "in the model's own order" in told
    other = run("convert", hf, tmp_path / "core" / "universal", "--to", "universal", *mine, *core)
    assert other.exit_code == 0, other.stderr
    began = ckptlab.open(tmp_path / "core" / "universal")
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in began
    assert ckptlab.diff(began, hf, states=["master"]).equal
