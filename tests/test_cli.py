"""The command line: what it prints and writes, its exit status, and one clear message where the input is at fault."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import termios
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from compare import GPT, ZERO2, ZERO3, differences, digest
from helpers.command import refused, run
from safetensors.numpy import load_file

import ckptlab
from ckptlab.cli import main
from ckptlab.cli.options import Size
from ckptlab.formats import read
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.placeholders import foreign as made_by
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder

HEAVY = ("torch", "xarray", "jax", "einx", "deepspeed", "pandas", "dask", "distributed", "fsspec", "matplotlib")


def process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptlab", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, **{"text": True, **options})


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    """A copy of the GPT checkpoint that may be damaged: a folder with `latest` and the step."""
    return Path(shutil.copytree(GPT, tmp_path / "run", ignore=shutil.ignore_patterns("universal", "truth*")))


# What is imported


@pytest.mark.slow
def test_nothing_heavy_is_imported() -> None:
    """One step after the other in one process: the first that imports something is named."""
    steps = {
        "import ckptlab": (*HEAVY, "numpy", "click", "tqdm"),
        "ckptlab.open": HEAVY,
        "from ckptlab.analysis import check, diff": HEAVY,
        "from ckptlab.cli import main": HEAVY,
        f"main(['info', {str(GPT)!r}], standalone_mode=False)": HEAVY,
        f"main(['plan', {str(GPT)!r}, '--tp', '4'], standalone_mode=False)": HEAVY,
        f"main(['check', {str(GPT)!r}], standalone_mode=False)": HEAVY,
    }
    told = "print('imported:', {!r}, sorted(set({!r}) & set(sys.modules)))"
    code = "\n".join(["import sys", *(f"{step}\n{told.format(step, light)}" for step, light in steps.items())])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("imported: ")]
    assert found == [f"imported: {step} []" for step in steps]


@pytest.mark.slow
def test_analysis_has_the_same_names() -> None:
    code = (
        "import ckptlab.analysis.adam; from ckptlab.analysis import check, diff, open_run, plots, stats, updates; "
        "import ckptlab; told = (check, diff, open_run, plots, stats, updates); "
        "names = 'check diff open_run plots stats updates'.split(); "
        "print(all(getattr(ckptlab, n) is getattr(ckptlab.analysis, n) is x for n, x in zip(names, told)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    for name in ckptlab.analysis.__all__:
        assert getattr(ckptlab.analysis, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'statz'"):
        _ = ckptlab.analysis.statz


def test_every_public_name_is_there() -> None:
    for name in ckptlab.__all__:
        assert getattr(ckptlab, name) is not None
    assert set(dir(ckptlab)) == {*ckptlab.__all__, "open", "Tensor"}
    assert not {"open", "Tensor"} & set(ckptlab.__all__)  # `from ckptlab import *` shadows neither Python's nor torch's
    assert ckptlab.CheckpointError.__mro__[1] is ckptlab.CkptlabError
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        _ = ckptlab.opne


# info


def test_info_is_a_table() -> None:
    result = run("info", GPT)
    assert result.exit_code == 0
    assert "tp 2 · pp 2 · dp 2 (8 ranks)" in result.stdout
    assert "{2..5}.mlp.dense_h_to_4h.weight" in result.stdout
    assert result.stderr == ""


def test_info_all_has_a_line_for_every_tensor() -> None:
    shown = run("info", GPT, "--all").stdout
    assert all(f"\n{name} " in shown for name in read(GPT).tensors)


def test_info_json_is_one_object_and_nothing_else() -> None:
    result = run("info", GPT / "universal", "--json")
    about = json.loads(result.stdout)
    assert about["format"] == "universal"
    assert about["trained_on"] == {"pp": 2, "dp": 2, "tp": 2}
    assert len(about["tensors"]) == about["counts"]["tensors"] == 52
    assert {
        "path",
        "mesh",
        "zero_stage",
        "dtype",
        "step",
        "states",
        "groups",
        "client_state",
        "files",
        "findings",
    } <= set(about)


def test_info_takes_a_strategy(tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({r"wte\.weight": "(tp out) in"}))
    about = json.loads(run("info", ZERO2, "--json", "--strategy", rules).stdout)
    assert {t["name"]: t["layout"] for t in about["tensors"]}["wte.weight"] == "(tp out) in"
    assert "no strategy is called 'megatorn'" in refused("info", ZERO2, "--strategy", "megatorn")


# ls


def test_ls_is_a_line_for_every_tensor() -> None:
    lines = run("ls", GPT).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(read(GPT).tensors)
    [line] = [line for line in lines if line.startswith("2.mlp.dense_h_to_4h.weight ")]
    assert re.split(r"  +", line)[1:] == [
        "64 × 16",
        '"(tp out) in"',
        "master exp_avg exp_avg_sq: float32, param: bfloat16",
    ]
    [alone] = run("ls", ZERO2, "wte.weight").stdout.splitlines()
    assert '  "' not in alone  # a checkpoint of tp 1 does not tell
    assert run("ls", ZERO2, "lm_head*").stdout.startswith("wte.weight")  # by its alias


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (["*.mlp.*.weight"], r"\.mlp\..*\.weight$"),
        (["[23].mlp*bias"], r"^[23]\.mlp.*bias$"),
        (["dense_h_to"], "dense_h_to"),
        (["-E", r"^[23]\..*bias$"], r"^[23]\..*bias$"),
    ],
    ids=str,
)
def test_ls_takes_a_pattern(pattern: list[str], expected: str) -> None:
    wanted = [name for name in read(GPT).tensors if re.search(expected, name)]
    found = json.loads(run("ls", GPT, *pattern, "--json").stdout)["tensors"]
    assert [t["name"] for t in found] == wanted != []
    assert set(found[0]) >= {"name", "shape", "layout", "states"}


def test_ls_says_what_it_does_not_find() -> None:
    assert "none of 52 tensors is called like 'mpl'" in refused("ls", GPT, "mpl")
    assert "'(' is no regular expression" in refused("ls", GPT, "(", "-E")


def test_formats_are_what_is_registered() -> None:
    found = json.loads(run("formats", "--json").stdout)
    assert [f["name"] for f in found["formats"]][:3] == ["deepspeed", "universal", "safetensors"]
    assert "megatron" in found["strategies"]
    assert found["backends"][:3] == ["numpy", "torch", "jax"]
    shown = run("formats").stdout.splitlines()
    assert shown[0].split()[0] == "deepspeed"
    assert shown[0].endswith("(reads, writes)")


# plan


def test_plan_keeps_the_axes_that_are_not_named() -> None:
    about = json.loads(run("plan", GPT, "--tp", "4", "--json").stdout)
    assert about["target"]["mesh"] == {"pp": 2, "dp": 2, "tp": 4}
    assert json.loads(run("plan", GPT, "--json").stdout)["target"]["mesh"] == {"pp": 2, "dp": 2, "tp": 2}
    universal = json.loads(run("plan", GPT / "universal", "--dp", "1", "--json").stdout)
    assert universal["target"]["mesh"] == {"pp": 2, "dp": 1, "tp": 2}


def test_plan_takes_layouts_of_the_target(tmp_path: Path) -> None:
    """As `reshape(mesh, strategy=…)` does: lines, a JSON file, sub-axes."""
    mine = ("plan", GPT, "--tp", "4", "--dp", "1", "--pp", "1", "--split", "tp:a=2,b=2")
    line = r".*dense_h_to_4h\.weight=(a out) (b in)"
    about = json.loads(run(*mine, "--to-strategy", line, "--json").stdout)
    own = ckptlab.open(GPT).reshape(
        Mesh(tp=4).split("tp", a=2, b=2), strategy={r".*dense_h_to_4h\.weight": "(a out) (b in)"}
    )
    assert about["target"]["mesh"] == own.mesh.degrees
    assert about["bytes"]["moved"] == own.cost().moved
    assert {entry["target"] for entry in about["layouts"]} == {"(a out) (b in)"}
    assert len(about["layouts"]) == 4
    (tmp_path / "own.json").write_text(json.dumps({r".*dense_h_to_4h\.weight": "(tp out) (dp in)"}))
    told = run("plan", GPT, "--to-strategy", tmp_path / "own.json").stdout
    assert "layouts  2.mlp.dense_h_to_4h.weight (tp out) in → (tp out) (dp in), and of 3 more tensors" in told
    assert "mesh  tp 2 → 4 as a 2 · b 2" in re.sub(r"mesh +", "mesh  ", run(*mine, "--to-strategy", line).stdout)
    said = refused("convert", GPT, tmp_path / "new", "--to", "deepspeed", "--to-strategy", tmp_path / "own.json")
    assert "2.mlp.dense_h_to_4h.weight is cut over dp" in said
    for wrong in (["--split", "tp=2"], ["--to-strategy", "a=b", "--to-strategy", "megatron"]):
        assert run("plan", GPT, *wrong).exit_code == 2


@pytest.mark.slow
def test_explore_writes_a_page(tmp_path: Path) -> None:
    pytest.importorskip("anywidget")
    page = tmp_path / "page.html"
    assert run("explore", ZERO2, page, "--dp", "4").stdout == f"{page}\n"
    title = re.search("<title>(.*?)</title>", page.read_text())
    assert title is not None
    assert ZERO2.name in title[1]
    assert "exists already" in refused("explore", ZERO2, page)
    assert "not divisible by it" in refused("explore", GPT, tmp_path / "other.html", "--tp", "3")


def test_plan_prints_notes_on_stderr() -> None:
    result = run("plan", GPT, "--tp", "4", "--pp", "1", "--dp", "1")
    assert result.exit_code == 0
    assert "padded 112 → 128" in result.stdout
    assert result.stderr.startswith("note: vocabulary padding follows tp")
    assert run("plan", GPT, "--tp", "4", "--json").stderr == ""


def test_plan_takes_every_option(tmp_path: Path) -> None:
    groups = tmp_path / "groups.json"
    groups.write_text('[{"lr": 1.0, "weight_decay": 0.0}, {"lr": 2.0, "weight_decay": 0.0}]')
    options = ["--zero-stage", "1", "--dtype", "fp16", "--pipeline", "0,3", "--padded-vocab", "120", "--heads", "4"]
    about = json.loads(
        run("plan", GPT, "--tp", "4", *options, "--kv-heads", "4", "--param-groups", groups, "--json").stdout
    )
    assert about["target"]["dtype"] == "fp16"
    assert about["layers"]["target"] == [[1, 2], [3, 4, 5, 6]]
    assert about["vocabulary"]["target"] == 120
    about = json.loads(run("plan", ZERO2, "--zero-stage", "3", "--sub-group-size", "500", "--json").stdout)
    assert (about["target"]["zero_stage"], about["target"]["optimizer"]) == (3, "ZeRO-3")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tp", "3"], "tp 3: 4 attention heads are not divisible by it"),
        (["--pp", "9"], "pp 9: more stages than the 4 transformer layers"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_others_that_can(options: list[str], reason: str) -> None:
    message = refused("plan", GPT, *options)
    assert reason in message
    assert "Meshes that work: tp " in message


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    (tmp_path / "groups.json").write_text("{}")
    assert "ZeRO-2 with a pipeline" in refused("plan", GPT, "--zero-stage", "2")
    assert "expected a JSON list of objects" in refused("plan", GPT, "--param-groups", tmp_path / "groups.json")
    assert "missing.json: No such file" in refused("plan", GPT, "--param-groups", tmp_path / "missing.json")
    for wrong in (["--tp", "0"], ["--pipeline", "blokcs"], ["--dtype", "fp23"], ["--zero-stage", "4"]):
        result = run("plan", GPT, *wrong)
        assert result.exit_code == 2
        assert wrong[0] in result.stderr


# convert and diff


def test_the_story_of_a_reshape(tmp_path: Path) -> None:
    before = digest(GPT)
    out = tmp_path / "out" / "global_step3"
    result = run("convert", GPT, out, "--to", "deepspeed", "--tp", "4", "--pp", "1", "--dp", "1")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].startswith(f"{out}: 32 files, ")
    assert result.stderr.startswith("note: vocabulary padding")
    assert (tmp_path / "out" / "latest").read_text() == "global_step3"
    assert read(tmp_path / "out").mesh == Mesh(tp=4)
    same = run("diff", GPT, tmp_path / "out")
    assert (same.exit_code, same.stdout.splitlines()[0][:17]) == (0, "equal: 52 tensors")
    assert digest(GPT) == before


@pytest.mark.parametrize("form", ["deepspeed", "universal"])
def test_convert_json(form: str, tmp_path: Path) -> None:
    result = run("convert", ZERO2, tmp_path / "o" / "step", "--to", form, "--dp", "3", "--zero-stage", "3", "--json")
    about = json.loads(result.stdout)
    assert result.stderr == ""
    assert about["destination"] == str(tmp_path / "o" / "step")
    assert about["files"] + 1 == len([p for p in (tmp_path / "o" / "step").rglob("*") if p.is_file()])  # a manifest
    assert (about["mesh"], about["zero_stage"], about["dtype"]) == ({"pp": 1, "dp": 3, "tp": 1}, 3, "bf16")
    assert Path(about["latest"]).read_text() == "step"
    assert about["bytes_written"] > 0
    assert differences(read(ZERO2), read(tmp_path / "o" / "step")) == []


def test_convert_leaves_the_source_runs_latest_alone(gpt: Path) -> None:
    result = run("convert", gpt, gpt / "reshaped", "--to", "deepspeed", "--tp", "1")
    assert "`latest` beside it is the source run's and was left alone" in result.stderr
    assert (gpt / "latest").read_text() == "global_step3"


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16", "fp32"])
def test_weights(dtype: str | None, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    chosen = ["--dtype", dtype] if dtype else []
    result = run("convert", ZERO3, out, "--to", "safetensors", *chosen, "--max-shard-size", "10kB", "--json")
    about = json.loads(result.stdout)
    assert about["files"] > 2
    assert [n["code"] for n in about["findings"]] == ["states-left-out"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    weight = load_file(out / index["weight_map"]["wte.weight"])["wte.weight"]
    assert str(weight.dtype) == {None: "float32", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    truth = load_file(ZERO3 / "truth.safetensors")["master/wte.weight"]
    assert np.array_equal(weight, truth.astype(weight.dtype))


def test_options_that_a_format_cannot_have(tmp_path: Path) -> None:
    result = run("convert", GPT, tmp_path / "w", "--to", "safetensors", "--tp", "2")
    assert result.exit_code == 2
    assert "--tp has no meaning with --to safetensors" in result.stderr
    result = run("convert", GPT, tmp_path / "w", "--to", "universal", "--max-shard-size", "5GB")
    assert result.exit_code == 2
    assert "--max-shard-size goes with --to safetensors" in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 kb", 1500),
        ("1GiB", 2**30),
        ("3KiB", 3072),
        ("77", 77),
        ("1TiB", 2**40),
        ("2M", 2 * 10**6),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 gallons"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size"):
        Size().convert(text, None, None)


def test_diff_names_the_state_that_only_one_has() -> None:
    result = run("diff", GPT, GPT / "universal")
    assert result.exit_code == 0
    assert "(master, exp_avg, exp_avg_sq)" in result.stdout
    line = next(line for line in result.stdout.splitlines() if "param" in line)
    assert line.split() == ["param", "52", "tensors", "only", "in", "A"]


def test_diff_exit_status(gpt: Path) -> None:
    (file,) = (gpt / "global_step3").glob("bf16_zero_pp_rank_1_mp_rank_03*")
    stored = read(gpt).fragments("5.mlp.dense_4h_to_h.weight", "exp_avg", Holder(pp=1, tp=1))[-1].stored
    assert stored.path == str(file)
    content = bytearray(file.read_bytes())
    content[stored.offset] ^= 1
    file.write_bytes(content)
    result = run("diff", GPT, gpt, "--json")
    assert result.exit_code == 1
    about = json.loads(result.stdout)
    (one,) = about["differences"]
    assert (about["equal"], one["name"], one["state"], one["count"]) == (
        False,
        "5.mlp.dense_4h_to_h.weight",
        "exp_avg",
        1,
    )
    assert run("diff", GPT, gpt, "--states", "master, exp_avg_sq").exit_code == 0
    assert run("diff", GPT, gpt, "--states", "exp_avg").exit_code == 1
    assert "no state 'exp'" in refused("diff", GPT, gpt, "--states", "exp")
    refused("diff", GPT, gpt / "nowhere")


# Bad input


def missing(step: Path) -> str:
    name = "bf16_zero_pp_rank_1_mp_rank_02_optim_states.pt"
    (step / name).unlink()
    return name


def truncated(step: Path) -> str:
    name = "bf16_zero_pp_rank_0_mp_rank_03_optim_states.pt"
    os.truncate(step / name, (step / name).stat().st_size - 3000)
    return name


def cut_to_nothing(step: Path) -> str:
    os.truncate(step / "layer_03-model_01-model_states.pt", 0)
    return "layer_03-model_01-model_states.pt"


def foreign(step: Path) -> str:
    other = ZERO2 / "global_step3" / "mp_rank_00_model_states.pt"
    shutil.copy(other, step / "mp_rank_02_model_states.pt")
    return "mp_rank_02_model_states.pt"


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def hostile(step: Path) -> str:
    name = "mp_rank_01_model_states.pt"
    with zipfile.ZipFile(step / name, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Evil(step / "executed"), protocol=2))
        file.writestr("archive/version", "3\n")
    return name


def torchscript(step: Path) -> str:
    name = "mp_rank_01_model_states.pt"
    with zipfile.ZipFile(step / name, "a") as file:
        file.writestr("archive/constants.pkl", b"\x80\x02).")
    return name


DAMAGE = [missing, truncated, cut_to_nothing, foreign, hostile, torchscript]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
@pytest.mark.parametrize("command", ["info", "plan", "convert", "diff"])
def test_damage_is_refused_by_name_and_nothing_is_touched(
    command: str, damage: Callable[[Path], str], gpt: Path, tmp_path: Path
) -> None:
    name = damage(gpt / "global_step3")
    before = digest(tmp_path)
    more = {"convert": [tmp_path / "out" / "step", "--to", "deepspeed", "--tp", "1"], "diff": [GPT]}.get(command, [])
    message = refused(command, gpt, *more)
    assert name in message
    assert len(message) < 600
    assert digest(tmp_path) == before
    assert not (tmp_path / "out").exists()
    assert not (gpt / "global_step3" / "executed").exists()


def test_hostile_client_state_is_opened_without_being_executed(gpt: Path, tmp_path: Path) -> None:
    name = "mp_rank_00_model_states.pt"
    file = gpt / "global_step3" / name
    content = dict(torchfile.read(str(file)))
    marker = tmp_path / "executed"
    content["gift"] = made_by("posix", "system", f"touch {marker}")
    torchfile.write(str(file) + ".new", content)
    os.replace(str(file) + ".new", file)
    about = json.loads(run("info", gpt, "--json").stdout)
    assert "posix.system" in about["client_state"]["not_imported"]
    assert run("convert", gpt, tmp_path / "o" / "step", "--to", "deepspeed", "--tp", "1").exit_code == 0
    assert not marker.exists()


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert f"{tmp_path}: no checkpoint here" in refused("info", tmp_path)
    assert "nowhere: no such file or folder" in refused("info", tmp_path / "nowhere")
    for case in (ZERO2, ZERO3):
        shutil.copytree(case / "global_step3", tmp_path / case.name)
    message = refused("info", tmp_path)
    assert "holds 2 checkpoints" in message
    assert f"{tmp_path / ZERO3.name} (deepspeed)" in message


def test_a_destination_that_exists(gpt: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    before = digest(tmp_path)
    for form in ("deepspeed", "universal", "safetensors"):
        assert f"{tmp_path / 'mine'} exists already" in refused("convert", gpt, tmp_path / "mine", "--to", form)
        assert f"{gpt / 'global_step3'} exists" in refused("convert", gpt, gpt / "global_step3", "--to", form)
    assert digest(tmp_path) == before


def test_a_mesh_that_cannot_be_leaves_no_destination(gpt: Path, tmp_path: Path) -> None:
    before = digest(tmp_path)
    refused("convert", gpt, tmp_path / "out", "--to", "universal", "--tp", "3")
    assert digest(tmp_path) == before


def test_errors_of_the_operating_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(error: BaseException) -> None:
        def raises(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("ckptlab.convert.run", raises)

    command = ["convert", GPT, tmp_path / "o", "--to", "deepspeed"]
    fail(PermissionError(errno.EACCES, "Permission denied", "/data/run"))
    assert refused(*command) == "ckptlab: /data/run: Permission denied\n"
    fail(OSError(errno.ENOSPC, "No space left on device"))
    message = refused(*command)
    assert "No space left on device" in message
    assert "repeat the command" in message
    fail(KeyboardInterrupt())
    result = run(*command)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert "repeat the command" in result.stderr
    lock = RuntimeError("release unlocked lock")  # what it becomes in threading.Condition.wait
    lock.__context__ = KeyboardInterrupt()
    fail(lock)
    assert run(*command).exit_code == 130


# As a process


@pytest.mark.slow
def test_as_a_process(tmp_path: Path) -> None:
    done = process("convert", ZERO2, tmp_path / "step", "--to", "universal")
    assert (done.returncode, done.stderr) == (0, ""), "no bar where nobody looks"
    assert run("diff", ZERO2, tmp_path / "step").exit_code == 0
    assert process("diff", ZERO2, ZERO3, "--states", "exp_avg").returncode == 1
    trouble = process("diff", ZERO2, tmp_path / "nowhere")
    assert (trouble.returncode, trouble.stdout) == (2, "")
    assert trouble.stderr.count("\n") == 1


def test_a_bar_in_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for name, options in (("bar", []), ("none", ["--no-progress"])):
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        command = ["convert", ZERO2, tmp_path / name / "s", "--to", "safetensors", *options]
        with monkeypatch.context() as patched, os.fdopen(theirs, "w") as terminal:
            patched.setattr(sys, "stderr", terminal)
            main([str(c) for c in command], standalone_mode=False)
        shown[name] = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end is closed and all is read
                break
            if not piece:
                break
            shown[name] += piece
        os.close(ours)
    assert b"writing" in shown["bar"]
    assert b"writing" not in shown["none"]


@pytest.mark.slow
def test_a_terminal_that_knows_no_arrows() -> None:
    done = process("plan", GPT, "--tp", "4", encoding="latin-1", env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", [[], ["info"], ["plan"], ["convert"], ["diff"]], ids=lambda c: c[0] if c else "main"
)
def test_help_has_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"  ckptlab {command[0] if command else 'info'} run" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 96


def test_options_of_other_commands_are_said_to_be_theirs() -> None:
    assert "No such option '--tp' here: it is one of explore, plan, convert" in run("info", "x", "--tp", "4").output
    assert "No such option '--nosuch'" in run("info", "x", "--nosuch").output


def test_version() -> None:
    assert run("--version").stdout == f"ckptlab {ckptlab.__version__}\n"


@pytest.mark.slow
def test_a_package_that_is_broken_is_named_in_a_line(tmp_path: Path) -> None:
    about = tmp_path / "broken-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ckptlab.formats]\nbroken = no_such_module:Broken\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "ckptlab", "ls", str(ZERO2), "wte"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("wte.weight")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "note: format 'broken' of the package broken cannot be loaded (ModuleNotFoundError: No module"
    )
