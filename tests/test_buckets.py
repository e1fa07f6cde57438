"""Work directories in buckets, on servers of this machine: S3, GCS, and the faults that a proxy before them injects."""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gcsfs.retry
import numpy as np
import pytest
from bucket_servers import BUCKET, FaultProxy, environment, gcs_server, s3_server
from test_saves import save, state_of

import se_flax
from se_flax.checkpoints import object_store
from se_flax.checkpoints.object_store import ObjectStore
from se_flax.errors import UserError
from train.run import bucket, lease
from train.run.checkpoint import Checkpoints
from train.run.report import read_metrics

ROOT = Path(__file__).parents[1]
SERVERS = {"s3": s3_server, "gs": gcs_server}


@pytest.fixture(scope="module", params=list(SERVERS))
def server(request):
    """Scheme, and port of a server."""
    for name in ("werkzeug", "gcp-storage-emulator", "gcp_storage_emulator"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with SERVERS[request.param]() as port:
        yield request.param, port


@pytest.fixture
def proxy(server):
    _, port = server
    proxy = FaultProxy(port)
    yield proxy
    proxy.close()


@pytest.fixture
def url(server, proxy, monkeypatch, tmp_path):
    """A new folder in the bucket, behind the proxy; nothing waits long between two attempts."""
    scheme, _ = server
    for name, value in environment(scheme, proxy.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(gcsfs.retry.asyncio, "sleep", _at_once)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # as on a machine of its own
    return f"{scheme}://{BUCKET}/{tmp_path.name}/run"


_sleep = asyncio.sleep


async def _at_once(seconds):
    await _sleep(0)


@pytest.fixture
def another_machine(monkeypatch, tmp_path):
    """What follows happens on a machine that has none of the files."""

    def move(name="second"):
        place = tmp_path / name
        place.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        monkeypatch.setattr(lease, "_BOOT", place / "no boot id")
        monkeypatch.setattr(lease.socket, "gethostname", lambda: name)

    return move


def checkpoints_of(store):
    return Checkpoints(store, keep_last=2, keep_best=1)


def local_state(restored):
    return np.asarray(restored.state.params["conv1"]["kernel"])


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs to aiohttp
def test_objects_are_those_that_were_written(url, tmp_path):
    store = ObjectStore(url)
    assert store.find() == {} and store.read("absent") is None
    assert store.write("text", b"abc", new=True) and store.read("text") == b"abc"
    files = {"empty": b"", "below/large": bytes(range(256)) * 24_000}  # over 5 MB: in parts
    files |= {f"ends {end.hex()}": b"1" + end for end in (b"\r", b"\n", b"\r\n")}
    for name, data in files.items():
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_bytes(data)
    store.upload(tmp_path / "up", files, "one/")
    store.copy(["one/empty"], "one/", "two/")
    store.delete(["text", "absent"])
    found = store.find()
    assert found == {"two/empty": 0} | {f"one/{name}": len(data) for name, data in files.items()}
    store.download({n: s for n, s in found.items() if n.startswith("one/")}, tmp_path / "down", strip="one/")
    assert {name: (tmp_path / "down" / name).read_bytes() for name in files} == files


@pytest.mark.parametrize("fault", [503, "dead", "cut", 2.0])
def test_what_fails_for_a_moment_is_repeated(url, proxy, tmp_path, fault, monkeypatch):
    monkeypatch.setattr(object_store, "_READ_SECONDS", 0.5)
    data = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "file").write_bytes(data)
    store, left = ObjectStore(url), {}

    def once(method, path):
        if fault in ("cut", 2.0) and method != "GET":
            return None
        left.setdefault((method, path), 1)
        left[method, path] -= 1
        return fault if left[method, path] == 0 else None

    proxy.rule = once
    store.upload(tmp_path, ["file"])
    store.download(store.find(), tmp_path / "down")
    assert (tmp_path / "down/file").read_bytes() == data
    assert min(left.values()) < 0  # every request was refused once and made again


def test_a_server_that_does_not_come_back_is_one_sentence(url, proxy):
    store = ObjectStore(url)
    proxy.rule = lambda method, path: 503
    with pytest.raises(UserError) as caught:
        store.write("name", b"data")
    text = str(caught.value)
    assert text.startswith(f"{url} could not be written (name): ") and text.endswith("; try again later")
    assert "\n" not in text and len(text) < 400


def test_without_permission_nothing_is_repeated(url, proxy):
    store = ObjectStore(url)
    proxy.rule = lambda method, path: 403
    before = len(proxy.seen)
    with pytest.raises(UserError, match=r"could not be written \(name\): .*; check address, credentials and perm"):
        store.write("name", b"data")
    assert len(proxy.seen) == before + 1


def test_a_bucket_that_does_not_exist(url, proxy):
    store = ObjectStore(url.replace(BUCKET, "no-such-bucket"))
    with pytest.raises(UserError, match=r"no-such-bucket.*; check address, credentials and permissions"):
        store.write("name", b"data")


def test_what_the_server_lost_is_copied_again(url, monkeypatch, tmp_path):
    store = ObjectStore(url)
    put, calls = store._fs.put_file, []

    def lose(local, remote):
        calls.append(Path(local).name)
        if calls.count("b") > losses or not local.endswith("/b"):
            put(local, remote)

    monkeypatch.setattr(store._fs, "put_file", lose)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"data")
    losses = 2
    store.upload(tmp_path, ["a", "b"], "one/")
    assert store.find() == {"one/a": 4, "one/b": 4} and sorted(calls) == ["a", "b", "b", "b"]
    losses = 100
    with pytest.raises(UserError, match=r"could not be written \(two/b\): the server took it and does not have it"):
        store.upload(tmp_path, ["a", "b"], "two/")


@pytest.mark.parametrize("text", ["http://host/run", "gs://", "s3:///"])
def test_other_addresses_are_refused(text):
    with pytest.raises(UserError, match=r"give a folder, gs://<bucket>/<folder> or s3://<bucket>/<folder>"):
        ObjectStore(text)


@pytest.mark.parametrize(("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_missing_library_is_named(monkeypatch, scheme, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "gcsfs.core", raising=False)
    with pytest.raises(UserError, match=rf"needs the package {package} .*pip install 'se-flax\[{extra}\]'"):
        ObjectStore(f"{scheme}://bucket/run")


def test_checkpoints_come_back_on_another_machine(url, another_machine):
    with bucket.opened(url) as store:
        (store.folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1}\n{"step": 2, "ep')
        checkpoints = checkpoints_of(store)
        for step, top1 in {4: 0.9, 8: None, 12: 0.5}.items():
            save(checkpoints, step, top1)
        checkpoints.close()
        assert checkpoints.newest() == f"{url}/checkpoints/12"
    there = ObjectStore(url).find()
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints/")} == {"4", "8", "12"}
    assert ".lock" not in there and not store.folder.exists()
    another_machine()
    with bucket.opened(url) as store:
        checkpoints = checkpoints_of(store)
        restored = checkpoints.restore(state_of(0))
        assert not restored.skipped and checkpoints.steps() == [4, 8, 12] and restored.step == 12
        np.testing.assert_array_equal(local_state(restored), local_state_of(12))
        assert (store.folder / "metrics.jsonl").read_text() == '{"step": 1, "epoch": 0.1}\n'
        save(checkpoints, 16)
        checkpoints.close()
    assert {n.split("/")[1] for n in ObjectStore(url).find() if n.startswith("checkpoints/")} == {"4", "12", "16"}


def local_state_of(number):
    return np.asarray(state_of(number).params["conv1"]["kernel"])


@pytest.mark.parametrize("cut", ["run/metadata", "digests.json"])
def test_a_checkpoint_that_was_not_copied_as_a_whole_is_none(url, monkeypatch, another_machine, cut):
    with bucket.opened(url) as store:
        checkpoints = checkpoints_of(store)
        save(checkpoints, 4)
        checkpoints.finish()
        put = store._bucket._fs.put_file

        def refuse(local, remote):
            if remote.endswith(f"/8/{cut}"):
                raise PermissionError("no longer yours")
            put(local, remote)

        monkeypatch.setattr(store._bucket._fs, "put_file", refuse)
        save(checkpoints, 8)
        with pytest.raises(UserError) as caught:
            checkpoints.close()
        assert str(caught.value) == (
            f"{url} could not be written (checkpoints/8/{cut}): no longer yours; check address, credentials and "
            f"permissions; the newest whole checkpoint is {url}/checkpoints/4; then run the same command to resume"
        )
    assert any(name.startswith("checkpoints/8/") for name in ObjectStore(url).find())
    another_machine()
    with bucket.opened(url) as store:
        restored = checkpoints_of(store).restore(state_of(0))
        assert restored.step == 4
        np.testing.assert_array_equal(local_state(restored), local_state_of(4))
    assert not any(name.startswith("checkpoints/8/") for name in ObjectStore(url).find())


def test_a_damaged_copy_is_named_and_moved(url, another_machine):
    with bucket.opened(url) as store:
        checkpoints = checkpoints_of(store)
        save(checkpoints, 4)
        save(checkpoints, 8)
        checkpoints.close()
    objects = ObjectStore(url)
    objects.write("checkpoints/8/run/metadata", objects.read("checkpoints/8/run/metadata").replace(b"8", b"9"))
    another_machine()
    with bucket.opened(url) as store:
        restored = checkpoints_of(store).restore(state_of(0))
    assert restored.step == 4
    place = f"{url}/checkpoints/8 is damaged (run/metadata is changed); it is not used and was moved to {url}/damaged/8"
    assert restored.skipped == (f"checkpoint {place}",)
    names = objects.find()
    assert "damaged/8/digests.json" in names and not any(name.startswith("checkpoints/8/") for name in names)


def test_a_checkpoint_of_the_same_step_replaces_the_old_one_when_it_is_whole(url, another_machine):
    with bucket.opened(url) as store:
        checkpoints = checkpoints_of(store)
        save(checkpoints, 4)
        save(checkpoints, 4, top1=0.7, state=state_of(5))
        checkpoints.close()
    names = ObjectStore(url).find()
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"4.1"}
    another_machine()
    with bucket.opened(url) as store:
        restored = checkpoints_of(store).restore(state_of(0))
        np.testing.assert_array_equal(local_state(restored), local_state_of(5))


def test_one_run_at_a_time(url, another_machine, monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.1)
    monkeypatch.setattr(lease, "EXPIRES", 30.0)
    with bucket.opened(url):
        with pytest.raises(UserError, match=f"another run is using {url} \\(process {os.getpid()} on "):  # noqa: SIM117
            with bucket.opened(url):
                pass
        another_machine()
        with pytest.raises(UserError, match=f"another run is using {url} .*wait for its end or stop it"):  # noqa: SIM117
            with bucket.opened(url):
                pass
    with bucket.opened(url):  # it has given it back
        pass


def test_the_lease_of_a_dead_run_expires_and_a_run_that_lost_it_stops(url, another_machine, monkeypatch, capsys):
    monkeypatch.setattr(lease, "RENEW", 0.2)
    monkeypatch.setattr(lease, "EXPIRES", 0.4)
    silent = threading.Event()
    monkeypatch.setattr(lease.Lease, "renew", _unless(silent, lease.Lease.renew))
    with bucket.opened(url) as first:
        checkpoints = checkpoints_of(first)
        silent.set()  # as if its machine slept
        another_machine()
        with bucket.opened(url):
            assert f"waiting up to 0 s: {url} may be in use (process " in capsys.readouterr().err
            silent.clear()
            deadline = time.monotonic() + 60
            while first._lost is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            with pytest.raises(UserError, match=f"another run is using {url}"):
                save(checkpoints, 4)


def test_while_a_run_is_fetched_nothing_of_it_is_copied_back(url, monkeypatch):
    figures = b"".join(b'{"step": %d, "epoch": 0.1}\n' % step for step in range(100))
    with bucket.opened(url) as store:
        (store.folder / "metrics.jsonl").write_bytes(figures)
    monkeypatch.setattr(lease, "RENEW", 0.02)
    download = ObjectStore.download

    def slow(self, names, folder, strip=""):
        if "metrics.jsonl" in names:
            (folder / "metrics.jsonl").write_bytes(figures[:600])  # half of it has arrived
            time.sleep(0.5)
            assert self.read("metrics.jsonl") == figures
        download(self, names, folder, strip)

    monkeypatch.setattr(ObjectStore, "download", slow)
    with bucket.opened(url) as store:
        assert (store.folder / "metrics.jsonl").read_bytes() == figures


def test_the_lease_is_renewed_while_a_checkpoint_is_copied(url, monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.02)
    renewed, upload, during = [], ObjectStore.upload, []

    def slow(self, folder, names, to=""):
        before = len(renewed)
        if to:
            time.sleep(0.5)
            during.append(len(renewed) - before)
        upload(self, folder, names, to)

    monkeypatch.setattr(ObjectStore, "upload", slow)
    monkeypatch.setattr(lease.Lease, "renew", lambda self: renewed.append(1))
    with bucket.opened(url) as store:
        checkpoints = checkpoints_of(store)
        save(checkpoints, 4)
        checkpoints.close()
    assert len(during) == 2 and min(during) >= 2


def test_a_file_comes_with_its_description(url):
    objects = ObjectStore(url)
    for name in ("a.npz", "a.npz.json", "b.npz"):
        objects.write(name, name.encode())
    with object_store.local_copy(f"{url}/a.npz", (".npz",), "se_flax.json") as path:
        assert path.read_text() == "a.npz"
        assert {each.name for each in path.parent.iterdir()} == {"a.npz", "a.npz.json"}
    with pytest.raises(UserError, match=r"c\.npz: no such file or folder"):  # noqa: SIM117
        with object_store.local_copy(f"{url}/c.npz", (".npz",), "se_flax.json"):
            pass


def _unless(event, method):
    def call(self):
        if not event.is_set():
            method(self)

    return call


SETTINGS = (
    "--config=configs/digits.py",
    "--config.model.name=test_efficientnet",
    "--config.data.image_size=8",
    "--config.optim.warmup_epochs=0",
    "--config.steps=24",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=4",
    "--config.compilation_cache=",
)


def train(workdir, temporary):
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "train", *SETTINGS, f"--workdir={workdir}"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary), "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("server", ["gs"], indirect=True)  # tests/test_hosts.py trains with the other one
def test_a_run_that_was_killed_goes_on_elsewhere_to_the_same_bits(url, tmp_path):
    objects = ObjectStore(url)
    run = train(url, tmp_path / "first")
    deadline = time.monotonic() + 300
    while not any(name.endswith("digests.json") for name in objects.find()):
        assert run.poll() is None and time.monotonic() < deadline, run.stderr.read() if run.poll() else ""
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    newest = max(int(n.split("/")[1]) for n in objects.find() if n.endswith("digests.json"))
    shutil.rmtree(tmp_path / "first")
    for folder, place in ((url, tmp_path / "second"), (tmp_path / "local", tmp_path / "third")):
        run = train(folder, place)
        _, err = run.communicate(timeout=600)
        assert run.returncode == 0, err
        assert (f"resuming from step {newest}" in err) == (folder == url), err
    loaded, local = se_flax.load_pretrained(url), se_flax.load_pretrained(tmp_path / "local")
    assert loaded.labels == local.labels
    for a, b in zip(*(se_flax_leaves(x) for x in (loaded, local)), strict=True):
        np.testing.assert_array_equal(a, b)
    objects.download({n: s for n, s in objects.find().items() if n == "metrics.jsonl"}, tmp_path / "read")
    rows = read_metrics(tmp_path / "read/metrics.jsonl"), read_metrics(tmp_path / "local/metrics.jsonl")
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}
    names = objects.find()
    assert {"config.json", "curves.png", "model/se_flax.json"} <= names.keys() and ".lock" not in names
    assert sum(name.startswith("events/") for name in names) == 1
    assert json.loads(objects.read("config.json"))["steps"] == 24


TIMES = ("images_per_second", "data_wait")


def se_flax_leaves(loaded):
    import jax

    return jax.tree.leaves(loaded.variables)
