"""Several hosts, played by two processes on one machine: the same figures as one host with as many devices."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from bucket_servers import BUCKET, environment, s3_server
from stress.hosts import environments

import se_flax
from se_flax.checkpoints.object_store import ObjectStore
from se_flax.errors import UserError
from train.run.report import read_metrics
from train.run.runtime import join_hosts

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "--config=configs/digits.py",
    "--config.model.name=test_efficientnet",  # small, so that it compiles quickly
    "--config.data.image_size=8",
    "--config.steps=3",
    "--config.optim.warmup_epochs=0",
    "--config.log_every_steps=1",
    "--config.parallel.batch_norm=global",
    "--config.compilation_cache=",
)


def start(workdir, *more, devices, **environment):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "train", *SETTINGS, f"--workdir={workdir}", *more],
        cwd=ROOT,
        env={**os.environ, **environment, "XLA_FLAGS": flags},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return err + out


@pytest.fixture
def start_two():
    """Starts two hosts of one device each; whatever happens, none of them outlives the test."""
    started = []

    def start_both(workdir, *more):
        hosts = two_hosts(workdir, *more)
        started.extend(hosts)
        return hosts

    yield start_both
    for host in started:
        host.kill()
        host.communicate()


def two_hosts(workdir, *more):
    words = (workdir, "--config.parallel.distributed=true", *more)
    return [start(*words, devices=1, **environment) for environment in environments(2)]


def test_two_hosts_with_a_bucket_train_evaluate_and_save_like_one(tmp_path, start_two, monkeypatch):
    with s3_server() as port:
        for name, value in environment("s3", port).items():
            monkeypatch.setenv(name, value)
        texts = [finish(host) for host in start_two(f"s3://{BUCKET}/two")]
        assert all("of 360" in text for text in texts)
        assert "2 hosts; if one is lost, the others end within 30 s (JAX says that a task died), and the s" in texts[0]
        there = ObjectStore(f"s3://{BUCKET}/two")
        there.download(there.find(), tmp_path / "two")
    finish(start(tmp_path / "one", devices=2))
    two, one = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert len(two) == len(one) == 4
    for a, b in zip(two, one, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"images_per_second", "data_wait"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    assert (tmp_path / "two" / "checkpoints" / "3").is_dir()
    two, one = (jax.tree.leaves(se_flax.load_pretrained(tmp_path / name).variables) for name in ("two", "one"))
    for a, b in zip(two, one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_signal_to_one_host_stops_all_at_the_same_step_and_they_resume(tmp_path, start_two):
    hosts = start_two(tmp_path, "--config.steps=1000000")
    figures = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (figures.is_file() and figures.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and all(host.poll() is None for host in hosts)
        time.sleep(0.1)
    hosts[1].send_signal(signal.SIGINT)  # which it passes on as SIGTERM, to itself
    texts = ["".join(host.communicate(timeout=300)) for host in hosts]
    assert [host.returncode for host in hosts] == [130, 130], texts
    (newest,) = (path.name for path in (tmp_path / "checkpoints").iterdir())
    assert all(f"stopped at step {newest} " in text for text in texts)
    for host in start_two(tmp_path, f"--config.steps={int(newest) + 2}"):
        finish(host)
    assert (tmp_path / "checkpoints" / str(int(newest) + 2)).is_dir()


HOST = """
import sys
import numpy as np
from train.run.runtime import join_hosts, leaving_with_a_lost_host
join_hosts(10)
from jax.experimental.multihost_utils import process_allgather
with leaving_with_a_lost_host():
    for step in range(10**9):
        process_allgather(np.asarray(step))
        if step == 3:
            print("ready", flush=True)
"""


def two_scripts(script):
    """Starts two processes that know of each other."""
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    return [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)
        for environment in environments(2)
    ]


def test_a_lost_host_ends_the_others_in_one_sentence():
    first, second = two_scripts(HOST)
    try:
        for host in (first, second):
            assert "ready\n" in iter(host.stdout.readline, "")
        second.kill()
        _, error = first.communicate(timeout=300)
        assert first.returncode == 1, error
        assert error.splitlines()[-1].startswith("error: another host was lost (")
        assert error.endswith("); run the same command on all hosts to resume from the last checkpoint\n")
        assert "Traceback" not in error and len(error.splitlines()) < 10
    finally:
        for host in (first, second):
            host.kill()
            host.communicate()


UNION = """
from train.run.hosts import of_all
from train.run.runtime import join_hosts
join_hosts(30)
import jax
mine = [{70_000, 3}, {5, 3, 0}][jax.process_index()]
print(sorted(of_all(mine)), sorted(of_all(mine if 5 in mine else set())), sorted(of_all(set())))
"""


def test_what_each_host_found_is_known_to_all():
    said = [finish(host).splitlines()[-1] for host in two_scripts(UNION)]  # behind lines of Gloo
    assert said == ["[0, 3, 5, 70000] [0, 3, 5] []"] * 2


def test_hosts_join_with_the_heartbeat_that_was_set(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **keywords: given.update(keywords))
    join_hosts(45)
    assert given["heartbeat_timeout_seconds"] == 45
    with pytest.raises(UserError, match=r"got parallel\.heartbeat_seconds=0; it must be at least 5"):
        join_hosts(0)


def test_hosts_that_nobody_names_are_an_error(tmp_path):
    process = start(tmp_path, "--config.parallel.distributed=true", devices=1)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "the hosts of the run are not known" in err.splitlines()[-1]
    assert "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave the setting out" in err
