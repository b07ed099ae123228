"""Low-rank adapters of a run: alone, as PEFT's files have them, and merged into the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import ckptlab
from ckptlab import Cut, Mesh, adapters, families
from ckptlab.arrays import reader
from ckptlab.testing.strategies import cuts

AT = "base_model.model.model.layers.0.self_attn"
SHAPES = {"q_proj": (16, 8), "k_proj": (8, 8), "v_proj": (8, 8), "o_proj": (8, 16)}


def _tensors(rank: int = 4) -> dict[str, np.ndarray]:
    """A Llama of one layer, q and v adapted, lm_head trained as a whole."""
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype("f4")

    found = {
        f"{AT}.{n}{'.base_layer' if n in ('q_proj', 'v_proj') else ''}.weight": drawn(*s) for n, s in SHAPES.items()
    }
    for name in ("q_proj", "v_proj"):
        out, into = SHAPES[name]
        found[f"{AT}.{name}.lora_A.default.weight"] = drawn(rank, into)
        found[f"{AT}.{name}.lora_B.default.weight"] = drawn(out, rank)
    root, layer = "base_model.model", "base_model.model.model.layers.0"
    found |= {
        f"{layer}.mlp.{n}_proj.weight": drawn(*s) for n, s in {"gate": (6, 8), "up": (6, 8), "down": (8, 6)}.items()
    }
    found |= {f"{layer}.{n}_layernorm.weight": drawn(8) for n in ("input", "post_attention")}
    found |= {f"{root}.model.embed_tokens.weight": drawn(11, 8), f"{root}.model.norm.weight": drawn(8)}
    found[f"{root}.lm_head.original_module.weight"] = drawn(11, 8)
    found[f"{root}.lm_head.modules_to_save.default.weight"] = drawn(11, 8)
    return found


def test_a_merged_weight_of_16_bits_is_rounded_once(tmp_path: Path) -> None:
    """Base in bfloat16: the sum is float32, also seen through a family, and bfloat16 only where that is asked for."""
    tensors = {n: t if ".lora_" in n else t.astype(ml_dtypes.bfloat16) for n, t in _tensors().items()}
    (tmp_path / "run").mkdir()
    save_file(tensors, tmp_path / "run" / "model.safetensors")
    run = ckptlab.open(tmp_path / "run")
    a, b = (tensors[f"{AT}.q_proj.lora_{kind}.default.weight"] for kind in "AB")
    exact = tensors[f"{AT}.q_proj.base_layer.weight"].astype("f4") + np.float32(2) * (b @ a)
    name = "model.layers.0.self_attn.q_proj.weight"
    for dtype, expected in (("fp32", exact), ("bf16", exact.astype(ml_dtypes.bfloat16))):
        ckptlab.save_pretrained(run, tmp_path / dtype, adapter="merged", lora_alpha=8, heads=4, dtype=dtype)
        made = load_file(tmp_path / dtype / "model.safetensors")[name]
        apart = np.abs(made.astype("f4") - expected.astype("f4")).max()
        assert apart <= (1e-6 if dtype == "fp32" else 0)
    merged = adapters.merged(run.catalog, adapters.find(run.catalog), 8)
    seen = families.resolve("llama-megatron-core").onto(merged, "left", heads=4, kv_heads=2)
    assert seen.findings[-1].code == "family-stateless"  # k is frozen, in 16 bits
    (tmp_path / "all").mkdir()
    save_file({n: t.astype("f4") for n, t in tensors.items()}, tmp_path / "all" / "model.safetensors")
    run = ckptlab.open(tmp_path / "all")
    merged = adapters.merged(run.catalog, adapters.find(run.catalog), 8)
    core = families.resolve("llama-megatron-core").onto(merged, "left", heads=4, kv_heads=2)
    joined = reader(core, "decoder.layers.0.self_attention.linear_qkv.weight", "master").shard(Cut.whole((32, 8)), ())
    np.testing.assert_allclose(joined[:8], exact[:8], rtol=0, atol=1e-6)


@pytest.fixture
def run(tmp_path: Path) -> ckptlab.Checkpoint:
    (tmp_path / "run").mkdir()
    save_file(_tensors(), tmp_path / "run" / "model.safetensors")
    return ckptlab.open(tmp_path / "run")


def _merged(tensors: dict[str, np.ndarray], name: str, scale: float) -> np.ndarray:
    a, b = (tensors[f"{AT}.{name}.lora_{kind}.default.weight"] for kind in "AB")
    return tensors[f"{AT}.{name}.base_layer.weight"] + np.float32(scale) * (b @ a)


def test_an_adapter_alone_is_as_peft_reads_it(run: ckptlab.Checkpoint, tmp_path: Path) -> None:
    ckptlab.save_pretrained(run, tmp_path / "out", adapter="alone", lora_alpha=8)
    there, tensors = load_file(tmp_path / "out" / "adapter_model.safetensors"), _tensors()
    expected = {n.replace(".default", ""): t for n, t in tensors.items() if ".lora_" in n}
    expected["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.modules_to_save.default.weight"]
    assert there.keys() == expected.keys()
    assert all(np.array_equal(there[n], expected[n]) for n in expected)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (4, 8, ["q_proj", "v_proj"])
    assert said["modules_to_save"] == ["lm_head"]
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_merged_model_is_the_base_and_the_product(run: ckptlab.Checkpoint, tmp_path: Path) -> None:
    """In float32, and in bfloat16 rounded once from that sum."""
    tensors = _tensors()
    for dtype, kind in ((None, np.float32), ("bf16", ml_dtypes.bfloat16)):
        out = tmp_path / str(dtype)
        ckptlab.save_pretrained(run, out, adapter="merged", lora_alpha=8, heads=4, dtype=dtype)
        made = ckptlab.open(out).full(stack=False)
        assert "model.layers.0.self_attn.o_proj.weight" in made
        assert not [n for n in made if "lora" in n or n.startswith("base_model")]
        for name in ("q_proj", "v_proj"):
            ((_, array),) = made[f"model.layers.0.self_attn.{name}.weight"].data_vars.items()
            expected = _merged(tensors, name, 2.0).astype(kind)
            np.testing.assert_allclose(array.values.astype("f4"), expected.astype("f4"), rtol=0, atol=1e-6)
        ((_, head),) = made["lm_head.weight"].data_vars.items()
        saved = tensors["base_model.model.lm_head.modules_to_save.default.weight"]
        assert np.array_equal(head.values, saved.astype(kind))
    assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == 2


def test_what_is_beside_the_run_says_alpha_and_how(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(_tensors(), folder / "model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "use_rslora": True, "lora_dropout": 0.1}))
    run = ckptlab.open(folder)
    catalog = adapters.merged(run.catalog, adapters.find(run.catalog), None)
    name = "model.layers.0.self_attn.q_proj.weight"
    made = reader(catalog, name, "master").shard(Cut.whole((16, 8)), ())
    np.testing.assert_allclose(made, _merged(_tensors(), "q_proj", 8 / 4**0.5), rtol=1e-6, atol=1e-6)
    assert adapters.config(run.catalog, adapters.find(run.catalog), None)["lora_dropout"] == 0.1


@pytest.mark.slow
@given(data=st.data(), turned=st.booleans())
def test_a_merged_weight_is_read_in_any_cut(
    data: st.DataObject, turned: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("lora") / "run"
    base, a, b = (rng.normal(size=shape).astype("f4") for shape in ((12, 8), (3, 8), (12, 3)))
    if turned:
        a, b = rng.normal(size=(3, 12)).astype("f4"), rng.normal(size=(8, 3)).astype("f4")
    folder.mkdir()
    names = {"base_layer.weight": base, "lora_A.default.weight": a, "lora_B.default.weight": b}
    save_file({f"x.{n}": t for n, t in names.items()}, folder / "model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "fan_in_fan_out": turned}))
    run = ckptlab.open(folder)
    one = reader(adapters.merged(run.catalog, adapters.find(run.catalog), None), "x.weight", "master")
    whole = base + (b @ a).T if turned else base + b @ a
    cut = data.draw(cuts((12, 8), Mesh(tp=data.draw(st.integers(1, 3)), dp=2)))
    for at in cut.coordinates():
        padded = np.zeros(cut.shape, "f4")
        padded[:12, :8] = whole
        np.testing.assert_allclose(one.shard(cut, at), cut.take(padded, at), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused(run: ckptlab.Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ckptlab.ReshapeError, match="holds a low-rank adapter: say adapter="):
        ckptlab.save_pretrained(run, tmp_path / "out")
    with pytest.raises(ckptlab.CheckpointError, match="nobody says lora_alpha"):
        ckptlab.save_pretrained(run, tmp_path / "out", adapter="alone")
    tensors = _tensors()
    for changed, said in (
        ({n: t for n, t in tensors.items() if "base_layer" not in n}, "holds no base of"),
        ({n: t for n, t in tensors.items() if "q_proj.lora_B" not in n}, "has no lora_B"),
        ({**tensors, f"{AT}.q_proj.lora_B.default.weight": np.zeros((8, 4), "f4")}, "has shape"),
        ({**tensors, f"{AT}.q_proj.lora_magnitude_vector.default.weight": np.zeros(8, "f4")}, "does not know"),
        ({n: t for n, t in tensors.items() if "default" not in n}, "no adapter"),
        ({**tensors, f"{AT}.q_proj.base_layer.weight": np.zeros((64, 1), "u1")}, "is quantized"),
    ):
        folder = tmp_path / said.replace(" ", "_")
        folder.mkdir()
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(ckptlab.CheckpointError, match=said):
            ckptlab.save_pretrained(ckptlab.open(folder), tmp_path / "out", adapter="merged", lora_alpha=8)
    assert not (tmp_path / "out").exists()


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "alpha_pattern": {"v_proj": 3, r"layers\.1\.mlp\.down_proj": 5},
            "rank_pattern": {"down_proj": 2},
        },
    ),
    "rslora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("beside", [True, False], ids=["config beside", "alpha given"])
def test_peft_loads_an_adapter_alone_and_computes_the_same(name: str, beside: bool, tmp_path: Path) -> None:
    """PEFT's own model is the run; its own loading is the judge, of the merged model transformers'."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind, fields = KINDS[name]
    if not beside and {"alpha_pattern", "use_rslora"} & fields.keys():
        pytest.skip("what no weights tell")
    sizes: dict[str, int] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"eos_token_id": 1, "bos_token_id": 1, "attn_implementation": "eager"}
    if kind == "llama":
        base = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=2, **more)
        )
    else:
        base = transformers.GPT2LMHeadModel._from_config(transformers.GPT2Config(**sizes, **more))
    base = base.eval()
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields)).eval()
    for key, parameter in model.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    (tmp_path / "run").mkdir()
    held = {key: value.detach().numpy().copy() for key, value in model.state_dict().items()}
    save_file(held, tmp_path / "run" / "model.safetensors")
    if beside:
        model.peft_config["default"].save_pretrained(tmp_path / "run")
    said: dict[str, Any] = {} if beside else {"lora_alpha": 8}
    tokens = torch.arange(12)[None]
    expected = model(tokens).logits.detach()
    ckptlab.save_pretrained(tmp_path / "run", tmp_path / "alone", adapter="alone", **said)
    fresh = type(base).from_pretrained(tmp_path / "base", attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "alone").eval()
    assert torch.equal(loaded(tokens).logits, expected)
    ckptlab.save_pretrained(tmp_path / "run", tmp_path / "merged", adapter="merged", heads=4, **said)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-5, atol=1e-5)
