"""Checkpoints behind URLs: the same as near ones, at a bounded number of requests and bytes, both counted."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from compare import differences
from far_server import Server

import ckptlab
from ckptlab import far, paths, stored
from ckptlab.convert import execute, parts, upload
from ckptlab.errors import CheckpointError
from ckptlab.formats.torch import torchfile
from ckptlab.stored import Stored

DATA = Path(__file__).parent.parent / "data"
KINDS = {
    "deepspeed": "gpt_tp2_pp2_dp2/global_step3",
    "stage 3": "plain_zero3_dp2",
    "experts": "moe_ep2_dp4",
    "universal": "gpt_tp2_pp2_dp2/universal",
    "safetensors": "weights",
    "torch": "bin",
    "dcp": "dcp",
}


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of every kind."""
    from test_dcp import Folder

    root = tmp_path_factory.mktemp("near")
    for name in ("gpt_tp2_pp2_dp2", "plain_zero3_dp2", "moe_ep2_dp4"):
        shutil.copytree(DATA / name, root / name, ignore=shutil.ignore_patterns("truth*"))
    ckpt = ckptlab.open(root / "gpt_tp2_pp2_dp2")
    ckptlab.save_weights(ckpt, root / "weights", max_shard_bytes=100_000)
    weights = {name: np.array(array) for name, array in ckpt.full("master", stack=False).items()}
    (root / "bin").mkdir()
    torchfile.write(root / "bin/pytorch_model.bin", weights)
    folder = Folder(root / "dcp")
    halves = {"model.w": (16, 8), "optim.state.w.exp_avg": (16, 8)}
    for key, shape in halves.items():
        whole = np.random.default_rng(len(key)).normal(size=shape).astype(np.float32)
        folder.tensor(key, whole, [(0, (0, 0), (8, 8)), (1, (8, 0), (8, 8))])
    folder.write()
    return root


@pytest.fixture(scope="module")
def memory(near: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    store.put(str(near), "/far/run", recursive=True)
    yield "memory://far/run"
    store.rm("/far", recursive=True)


@pytest.fixture(scope="module")
def s3(near: Path) -> Iterator[tuple[Server, dict[str, Any]]]:
    """A server of S3's protocol with all of it in s3://bucket/run, and the options for it."""
    server = Server("s3")
    options = {"key": "a", "secret": "b", "endpoint_url": server.url}
    store = fsspec.filesystem("s3", **options)
    store.mkdir("bucket")
    store.put(str(near), "bucket/run", recursive=True)
    for folder in ("universal", "universal/global_step3_universal/zero"):  # as consoles make folders
        store.call_s3("put_object", Bucket="bucket", Key=f"run/gpt_tp2_pp2_dp2/{folder}/", Body=b"")
    yield server, options
    server.close()


@pytest.fixture(scope="module", params=["http", "bare"])
def http(request: pytest.FixtureRequest, near: Path) -> Iterator[tuple[str, Server]]:
    server = Server(request.param, str(near))
    yield request.param, server
    server.close()


def same(one: ckptlab.Checkpoint, other: ckptlab.Checkpoint) -> None:
    """Equal in names, states, shapes, findings and every bit."""
    assert list(one) == list(other)
    assert {name: tensor.states for name, tensor in one.items()} == {n: t.states for n, t in other.items()}
    assert [f.code for f in one.findings] == [f.code for f in other.findings]
    assert differences(one.catalog, other.catalog) == []


def same_files(one: Path, other: Path) -> None:
    """Folders of the same files."""
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_the_same_from_a_url(kind: str, near: Path, memory: str) -> None:
    here, there = ckptlab.open(near / KINDS[kind]), ckptlab.open(f"{memory}/{KINDS[kind]}")
    assert there.path.startswith("memory://far/run/")
    assert (there.format, there.mesh) == (here.format, here.mesh)
    same(here, there)
    assert ckptlab.check(there).verdict == ckptlab.check(here).verdict
    assert ckptlab.check(f"{memory}/{KINDS[kind]}", checksums=True).verdict == ckptlab.check(here).verdict
    assert ckptlab.diff(here, there).equal
    a, b = ckptlab.stats(here), ckptlab.stats(there)
    assert a.drop_attrs().equals(b.drop_attrs())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "to", "axes"), [
    ("deepspeed", "deepspeed", {"tp": 4, "pp": 1, "dp": 1}),
    ("stage 3", "universal", {}),
    ("universal", "deepspeed", {"tp": 1, "dp": 2}),
    ("experts", "safetensors", {}),
    ("dcp", "safetensors", {}),
])  # fmt: skip
def test_a_conversion_from_a_url_writes_the_same_bytes(
    kind: str, to: str, axes: dict[str, int], near: Path, memory: str, tmp_path: Path
) -> None:
    for source, name in ((str(near), "here"), (memory, "there")):
        report = ckptlab.open(f"{source}/{KINDS[kind]}").reshape(format=to, **axes).save(tmp_path / name / "new")
        assert report.verified > 0 or kind == "dcp"
    same_files(tmp_path / "here/new", tmp_path / "there/new")


def test_damage_is_found_from_far_too(near: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(near / "plain_zero3_dp2"), "/damaged", recursive=True)
    ckpt = ckptlab.open("memory://damaged")
    hit = next(s for s in ckpt.catalog.stored if s.nbytes > 100)
    data = bytearray(store.cat(hit.path))
    data[hit.offset] ^= 1
    store.pipe(hit.path, bytes(data))
    with pytest.raises(CheckpointError, match=r"memory://damaged/.*has other bytes than were written"):
        ckptlab.open("memory://damaged").reshape(dp=1).save(tmp_path / "new")
    assert any(f.code == "checksum" for f in ckptlab.check("memory://damaged", checksums=True).findings)
    store.pipe(hit.path, bytes(data[: hit.offset]))
    with pytest.raises(CheckpointError, match=r"memory://damaged/.*no usable directory"):
        ckptlab.open("memory://damaged")
    store.rm("/damaged", recursive=True)


def test_an_archive_opens_where_it_lies(near: Path, tmp_path: Path) -> None:
    packed = tmp_path / "all.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(near.rglob("*")):
            archive.write(path, path.relative_to(near))
    here = ckptlab.open(near / KINDS["deepspeed"])
    same(here, ckptlab.open(f"zip://gpt_tp2_pp2_dp2::{packed}"))
    fsspec.filesystem("memory").pipe("/packed/all.zip", packed.read_bytes())
    there = ckptlab.open("zip://gpt_tp2_pp2_dp2/global_step3::memory://packed/all.zip")
    same(here, there)
    assert there.path == "memory://packed/all.zip::zip://gpt_tp2_pp2_dp2/global_step3"


def test_file_urls_are_paths(near: Path) -> None:
    ckpt = ckptlab.open(f"file://{near / KINDS['deepspeed']}")
    assert ckpt.path == str(near / KINDS["deepspeed"])
    with pytest.raises(ckptlab.CkptlabError, match="storage_options are for URLs"):
        ckptlab.open(ckpt.path, storage_options={"anon": True})


def test_what_is_not_there_is_said_by_its_url(near: Path, memory: str) -> None:
    with pytest.raises(CheckpointError, match=r"^memory://far/none: no such file or folder"):
        ckptlab.open("memory://far/none")
    with pytest.raises(CheckpointError, match=r"^nosuch://far: Protocol not known: nosuch"):
        ckptlab.open("nosuch://far/none")
    store = fsspec.filesystem("memory")
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    store.put(str(near / "plain_zero3_dp2"), "/holed", recursive=True)
    lost = next(path for path in store.find("/holed") if path.endswith(name))
    store.rm(lost)
    with pytest.raises(CheckpointError, match=rf"^memory://holed/.*{name} missing"):
        ckptlab.open("memory://holed")
    store.rm("/holed", recursive=True)


def test_the_cache_is_bounded_and_parts_are_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
    fsspec.filesystem("memory").pipe("/bytes/file", data)
    url = paths.absolute("memory://bytes/file")
    monkeypatch.setattr(far, "CACHE", 1 << 20)
    monkeypatch.setattr(far, "_blocks", far._Blocks())
    rng = np.random.default_rng(1)
    for _ in range(50):
        lo, hi = sorted(rng.integers(0, len(data), 2).tolist())
        assert far.fetch([(url, lo, hi), (url, 0, 10)]) == [data[lo:hi], data[:10]]
        assert far.read(url, lo, 100_000) == data[lo : lo + 100_000]
        assert far._blocks._nbytes == sum(map(len, far._blocks._held.values())) <= 1 << 20
    with pytest.raises(CheckpointError, match="has 3000000 bytes, but a tensor in it ends at byte 3000001"):
        far.fetch([(url, 0, len(data) + 1)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_s3_gives_the_same(kind: str, near: Path, s3: tuple[Server, dict[str, Any]], tmp_path: Path) -> None:
    server, options = s3
    here = ckptlab.open(near / KINDS[kind])
    there = ckptlab.open(f"s3://bucket/run/{KINDS[kind]}", storage_options=options)
    same(here, there)
    assert ckptlab.check(there).verdict == ckptlab.check(here).verdict
    server.told(refuse=2)
    same(here, ckptlab.open(f"s3://bucket/run/{KINDS[kind]}"))  # options are known; what is refused is asked for again


@pytest.mark.slow
def test_s3_by_the_environment_and_the_command_line(
    near: Path, s3: tuple[Server, dict[str, Any]], tmp_path: Path
) -> None:
    server, _ = s3
    environment = {
        **os.environ,
        **{"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"},
        "AWS_ENDPOINT_URL": server.url,
    }
    url = "s3://bucket/run/plain_zero3_dp2"

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "ckptlab", *arguments]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stderr
        return found.stdout

    assert "s3://bucket/run/plain_zero3_dp2/global_step3" in run("info", url)
    run("convert", url, str(tmp_path / "new"), "--to", "deepspeed", "--dp", "1")
    ckptlab.open(near / "plain_zero3_dp2").reshape(dp=1).save(tmp_path / "here")
    same_files(tmp_path / "here", tmp_path / "new")


@pytest.mark.slow
def test_http_gives_the_same_by_listings_or_by_manifests(http: tuple[str, Server], near: Path, tmp_path: Path) -> None:
    kind, server = http
    server.told()
    if kind == "bare":
        same(ckptlab.open(near / "weights"), ckptlab.open(f"{server.url}/weights"))  # it has a manifest
        with pytest.raises(CheckpointError, match=r"^http://127.0.0.1:\d+/bin: no such file or folder"):
            ckptlab.open(f"{server.url}/bin")
        same(ckptlab.open(near / "bin"), ckptlab.open(f"{server.url}/bin/pytorch_model.bin"))
        return
    for name in KINDS.values():
        server.told(refuse=3)  # they are asked for again
        same(ckptlab.open(near / name), ckptlab.open(f"{server.url}/{name}"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "http"])
def test_opening_32_ranks_costs_a_bounded_number_of_requests_and_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """On S3 files are small and fetched whole; over HTTP they are holes of 0.1 to 14 GB, and headers are fetched."""
    monkeypatch.syspath_prepend(str(DATA.parent / "benchmarks"))
    import holes

    for name, smaller in {"PP": 1, "LAYERS": 1, "LAST": 5}.items():
        monkeypatch.setattr(holes, name, smaller)
    if kind == "s3":
        monkeypatch.setattr(holes, "HIDDEN", 8)
        for name in ("BLOCK", "EMBED", "NORM"):
            small = {k: tuple(min(n, 64) for n in shape) for k, shape in getattr(holes, name).items()}
            monkeypatch.setattr(holes, name, small)
        monkeypatch.setitem(holes.INFO, "original_vocab_size", 250)
    root = tmp_path / "holes"
    holes.make(root)
    count = sum(path.is_file() for path in root.rglob("*"))
    assert count > 32
    if kind == "s3":
        server, options = request.getfixturevalue("s3")
        fsspec.filesystem("s3", **options).put(str(root), "bucket/holes", recursive=True)
        url, options = "s3://bucket/holes", {"storage_options": options}
    else:
        server = Server("http", str(root))
        request.addfinalizer(server.close)
        url, options = server.url, {}
    server.told(latency=0.05)
    there = ckptlab.open(url, **options)
    told = server.told(latency=0)
    assert there.mesh.size == 32
    a_file, nbytes = (1, 1 << 16) if kind == "s3" else (8, 176 << 10)
    assert count < len(told["requests"]) <= a_file * count + 20
    assert told["bytes"] <= nbytes * count
    assert 8 < told["most"] <= far.AT_ONCE  # many at a time, and not too many
    assert ckptlab.open(root).reshape(tp=2).cost() == there.reshape(tp=2).cost()


def resume(source: str, destination: str, **running: Any) -> Any:
    return ckptlab.open(source).reshape(tp=1, pp=1, dp=2).save(destination, **running)


@pytest.mark.parametrize(
    ("to", "latest"),
    [({"tp": 1, "pp": 1, "dp": 2}, "latest"), ({"format": "universal"}, "latest_universal")],
    ids=["deepspeed", "universal"],
)
def test_a_destination_in_memory_is_what_a_near_one_is(
    to: dict[str, Any], latest: str, near: Path, memory: str, tmp_path: Path
) -> None:
    source = near / KINDS["deepspeed"]
    reshape = ckptlab.open(source).reshape(**to)
    (source.parent / "config.json").write_text("{}")
    report = reshape.save("memory://out/run/new")
    (source.parent / "config.json").unlink()
    assert (report.destination, report.latest) == ("memory://out/run/new", f"memory://out/run/{latest}")
    assert report.beside == ("config.json",)
    reshape.save(tmp_path / "new")
    store = fsspec.filesystem("memory")
    names = {path.removeprefix("/out/run/") for path in store.find("/out/run")}
    assert {latest, "config.json", "new/ckptlab-manifest.json"} < names
    assert "new/ckptlab-journal.json" not in names
    near_names = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "new").rglob("*") if p.is_file())
    assert sorted(n for n in names if n.startswith("new/")) == near_names
    assert all(store.cat(f"/out/run/{name}") == (tmp_path / name).read_bytes() for name in near_names)
    assert ckptlab.check("memory://out/run").verdict == ckptlab.check(tmp_path / "new").verdict
    with pytest.raises(ckptlab.DestinationError, match="memory://out/run/new exists already"):
        reshape.save("memory://out/run/new")
    store.rm("/out", recursive=True)


def test_what_is_not_whole_is_no_checkpoint(near: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    source = str(near / KINDS["deepspeed"])
    put = parts.Upload.send

    def killed(self: Any, path: str) -> None:
        put(self, path)
        raise SystemExit  # kill -9 would not even remove what is up

    with monkeypatch.context() as patched:
        patched.setattr(parts.Upload, "send", killed)
        patched.setattr(far, "remove", lambda gone: None)
        with pytest.raises(SystemExit):
            resume(source, "memory://out/run/new", on=1)
    assert store.find("/out/run/new")
    with pytest.raises(CheckpointError, match=r"^memory://out/run/new: a conversion writes it, or was interrupted"):
        ckptlab.open("memory://out/run/new")
    with pytest.raises(ckptlab.DestinationError, match="exists already"):
        ckptlab.open(source).reshape(tp=4).save("memory://out/run/new")  # another conversion
    resume(source, "memory://out/run/new")
    assert ckptlab.check("memory://out/run/new").healthy
    store.rm("/out", recursive=True)


def test_a_failure_leaves_nothing(near: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: str, source: Any, target: Any) -> None:
        raise CheckpointError("not what was planned")

    reshape = ckptlab.open(near / KINDS["deepspeed"]).reshape(tp=4)
    monkeypatch.setattr(type(reshape.format), "verify", lambda self, *args: fails(*args))
    with pytest.raises(CheckpointError, match="not what was planned"):
        reshape.save("memory://out/run/new")
    assert not fsspec.filesystem("memory").find("/out")


@pytest.mark.slow
def test_on_s3_a_destination_appears_at_once(
    s3: tuple[Server, dict[str, Any]], near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, options = s3
    store = fsspec.filesystem("s3", **options)
    source = f"s3://bucket/run/{KINDS['deepspeed']}"
    ckptlab.open(source, storage_options=options)
    seen: list[list[str]] = []
    complete = upload._Uploads.complete

    def watched(self: Any, last: Any) -> None:
        store.invalidate_cache()
        seen.append(store.find("bucket/out"))
        complete(self, last)

    monkeypatch.setattr(upload._Uploads, "complete", watched)
    resume(source, "s3://bucket/out/new")
    assert seen == [["bucket/out/new/ckptlab-journal.json"]]  # all is up, and nothing to be seen
    resume(str(near / KINDS["deepspeed"]), str(tmp_path / "new"))
    store.invalidate_cache()
    store.get("bucket/out/new", str(tmp_path / "got"), recursive=True)
    same_files(tmp_path / "new", tmp_path / "got")
    assert store.cat("bucket/out/latest") == b"new"
    monkeypatch.setattr(upload._Uploads, "complete", lambda self, last: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resume(source, "s3://bucket/failed/new")
    store.invalidate_cache()
    assert not store.find("bucket/failed")
    assert not store.list_multipart_uploads("bucket")


BEGUN = """
import sys, ckptlab
from ckptlab.convert import upload
upload.EVERY = 0.0
ckptlab.open(sys.argv[1]).reshape(dp=8).save("s3://bucket/killed/new", storage_options={options}, on=2)
"""


def begun(source: Path, options: dict[str, Any], server: Server, files: int) -> None:
    """A conversion to s3://bucket/killed/new that is killed when so many files were sent."""
    store = fsspec.filesystem("s3", **options)
    server.told(latency=0.05)
    process = subprocess.Popen([sys.executable, "-c", BEGUN.replace("{options}", repr(options)), str(source)])
    try:
        sent = 0
        while sent < files:
            assert process.poll() is None
            time.sleep(0.1)
            with suppress(FileNotFoundError):
                sent = store.cat("bucket/killed/new/ckptlab-journal.json").count(b"\n") - 1
    finally:
        process.kill()
        process.wait()
        server.told(latency=0)


@pytest.mark.slow
def test_a_killed_upload_goes_on(s3: tuple[Server, dict[str, Any]], near: Path, tmp_path: Path) -> None:
    """What was sent is not sent again, what was begun does not stay in the store, and the bytes are the same."""
    server, options = s3
    store = fsspec.filesystem("s3", **options)
    source = near / KINDS["stage 3"]
    begun(source, options, server, 8)
    assert list(store.find("bucket/killed")) == ["bucket/killed/new/ckptlab-journal.json"]
    with pytest.raises(CheckpointError, match=r"^s3://bucket/killed/new: a conversion writes it, or was interrupted"):
        ckptlab.open("s3://bucket/killed/new", storage_options=options)
    with pytest.raises(ckptlab.DestinationError, match="exists already"):  # another conversion
        ckptlab.open(source).reshape(dp=4).save("s3://bucket/killed/new", storage_options=options)
    sent = {json.loads(line)[0] for line in store.cat("bucket/killed/new/ckptlab-journal.json").splitlines()[2:]}
    lost = sorted(sent)[0]  # the store has it no more
    uploads = {one["Key"]: one for one in store.list_multipart_uploads("bucket")}
    assert {f"killed/new/{name}" for name in sent} <= uploads.keys()
    key = f"killed/new/{lost}"
    store.call_s3("abort_multipart_upload", Bucket="bucket", Key=key, UploadId=uploads[key]["UploadId"])
    server.told()
    ckpt = ckptlab.open(source)
    report = ckpt.reshape(dp=8).save("s3://bucket/killed/new", storage_options=options)
    assert report.resumed == len(sent) - 1 >= 7
    assert not store.list_multipart_uploads("bucket")
    put = {r.split()[1].removeprefix("/bucket/killed/new/") for r in server.told()["requests"] if r.startswith("PUT")}
    assert put & sent == {lost}
    whole = ckpt.reshape(dp=8).save(tmp_path / "new")
    assert report.verified == whole.verified > 0
    store.invalidate_cache()
    store.get("bucket/killed/new", str(tmp_path / "got"), recursive=True)
    same_files(tmp_path / "new", tmp_path / "got")


@pytest.mark.slow
def test_a_lost_connection_leaves_what_was_sent(
    s3: tuple[Server, dict[str, Any]], near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, options = s3
    store = fsspec.filesystem("s3", **options)
    reshape = ckptlab.open(near / KINDS["stage 3"]).reshape(dp=4)
    save = partial(reshape.save, "s3://bucket/lost/new", storage_options=options, on=1)
    send, sent = parts.InParts.send, []

    def fails(self: Any, path: str) -> None:
        if len(sent) == 5:
            raise OSError(errno.EIO, "the connection was lost")
        sent.append(path)
        send(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(parts.InParts, "send", fails)
        with pytest.raises(OSError, match="the connection was lost"):
            save()
    with monkeypatch.context() as patched:  # two at once: whoever came later goes on, and the first one stops
        take, other = upload._Journal.take, []

        def taken_over(self: Any, one: Any) -> None:
            take(self, one)
            if not other:
                other.append(True)
                assert save().resumed == 5

        patched.setattr(upload._Journal, "take", taken_over)
        with pytest.raises((ckptlab.DestinationError, OSError)):
            save()
    assert ckptlab.check("s3://bucket/lost/new", checksums=True).healthy
    store.invalidate_cache()
    assert not store.exists("bucket/lost/new/ckptlab-journal.json")
    assert not store.list_multipart_uploads("bucket")


@pytest.mark.slow
def test_data_is_fetched_once_and_by_what_is_asked_for(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shapes = {f"{i}.weight": np.random.default_rng(i).normal(size=(1024, 1024)).astype(np.float32) for i in range(4)}
    torchfile.write(tmp_path / "pytorch_model.bin", shapes)
    size = (tmp_path / "pytorch_model.bin").stat().st_size
    server = Server("http", str(tmp_path))
    request.addfinalizer(server.close)
    ckpt = ckptlab.open(server.url)
    server.told()
    ckpt.full("master", stack=False)["2.weight"][10:20].load()
    told = server.told()
    assert len(told["requests"]) == 1
    assert told["bytes"] <= 10 * 4096 + 2 * far.BLOCK
    ckptlab.save_weights(ckpt, tmp_path / "new", on=1)
    told = server.told()
    assert 0.95 * size <= told["bytes"] <= 1.05 * size  # headers and some rows were there
    assert len(told["requests"]) <= 2 * size / far.REQUEST + 12
    found = ckptlab.open(tmp_path / "new").full("master", stack=False)
    assert all(np.array_equal(found[name], array) for name, array in shapes.items())


def test_a_source_that_changes_meanwhile_is_refused(
    near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(near / "plain_zero3_dp2"), "/changing", recursive=True)
    ckpt = ckptlab.open("memory://changing")
    write = execute._write_files

    def replaced(*arguments: Any) -> None:
        write(*arguments)
        path = next(iter(store.find("/changing")))
        store.pipe(path, store.cat(path))

    monkeypatch.setattr(execute, "_write_files", replaced)
    with pytest.raises(CheckpointError, match=r"memory://changing/.*: the file was changed or replaced while"):
        ckpt.reshape(dp=1).save(tmp_path / "new")
    store.rm("/changing", recursive=True)


@pytest.mark.slow
def test_processes_read_from_s3_and_write_to_it(
    s3: tuple[Server, dict[str, Any]], near: Path, tmp_path: Path, processes: Executor
) -> None:
    """They are told the options, and complete each file themselves."""
    _, options = s3
    here = ckptlab.open(near / KINDS["stage 3"])
    there = ckptlab.open(f"s3://bucket/run/{KINDS['stage 3']}", storage_options=options)
    here.reshape(dp=1).save("s3://bucket/processes/new", on=processes)
    assert ckptlab.stats(there, on=processes).equals(ckptlab.stats(here))
    here.reshape(dp=1).save(tmp_path / "new")
    store = fsspec.filesystem("s3", **options)
    store.invalidate_cache()
    store.get("bucket/processes/new", str(tmp_path / "got"), recursive=True)
    same_files(tmp_path / "new", tmp_path / "got")


def test_what_lies_beside_goes_along_from_far_to_near(near: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(near / "plain_zero3_dp2"), "/beside", recursive=True)
    store.pipe("/beside/tokenizer.json", b"{}")
    report = ckptlab.open("memory://beside").reshape(dp=1).save(tmp_path / "new")
    assert report.beside == ("tokenizer.json",)
    assert (tmp_path / "tokenizer.json").read_bytes() == b"{}"
    store.rm("/beside", recursive=True)


def test_large_tensors_come_in_pieces_and_rows_without_what_is_between(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
    fsspec.filesystem("memory").pipe("/bytes/array", b"head" + data.tobytes())
    whole = Stored(paths.absolute("memory://bytes/array"), 4, data.dtype, data.shape, (4096, 1))
    asked: list[int] = []
    fetch = far.fetch

    def watched(ranges: Any, **options: Any) -> Any:
        asked.append(sum(hi - lo for _, lo, hi in ranges))
        return fetch(ranges, **options)

    monkeypatch.setattr(far, "fetch", watched)
    monkeypatch.setattr(stored, "_FAR_PIECE", 100_000)
    found = whole.map()
    assert found.tobytes() == data.tobytes()
    assert not found.flags.writeable
    assert max(asked) == 100_000
    own = whole.private()
    own[0] = 1
    assert whole.map().tobytes() == data.tobytes()
    monkeypatch.setattr(far, "GAP", 1000)
    asked.clear()
    columns = whole.window([slice(3, 64, 2), slice(10, 20)])
    np.testing.assert_array_equal(columns.map(), data[3::2, 10:20])
    np.testing.assert_array_equal(columns.private(), data[3::2, 10:20])
    assert asked == [columns.nbytes] * 2


def test_parts_of_nodes_may_each_lie_elsewhere(near: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in (near / "plain_zero3_dp2/global_step3").iterdir():
        node = "node1" if "rank_1" in path.name else "node0"
        store.put(str(path), f"/{node}/run/global_step3/{path.name}")
    ckpt = ckptlab.open(["memory://node0/run", "memory://node1/run"])
    same(ckptlab.open(near / "plain_zero3_dp2"), ckpt)
    assert ckptlab.check(ckpt, checksums=True).healthy
    assert ckpt.reshape(dp=1).save(tmp_path / "new").verified
    store.rm("/node0", recursive=True)
    store.rm("/node1", recursive=True)


def test_what_is_pickled_takes_the_options_along(near: Path, memory: str) -> None:
    ckpt = ckptlab.open(f"{memory}/{KINDS['deepspeed']}", storage_options={"use_listings_cache": False})
    view = ckpt.full("master", stack=False)
    name, array = next(iter(view.items()))
    there = pickle.dumps(array)
    assert b"use_listings_cache" in there
    far.options.clear()
    assert pickle.loads(there).equals(array)
    assert far.options == {"memory://far": {"use_listings_cache": False}}
    far.options.clear()
    assert b"use_listings_cache" not in pickle.dumps(array)
    assert name in view


def test_what_is_to_be_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far, "_systems", {})
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "s3fs", None)
        without.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
        with pytest.raises(CheckpointError, match=r"^s3://bucket: .*[Ii]nstall s3fs"):
            ckptlab.open("s3://bucket/run")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(CheckpointError, match=r"^memory://far: URLs need fsspec: pip install"):
        ckptlab.open("memory://far/run")
