"""Several hosts, played by two processes on one machine: the same figures as one host with as many devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import se_flax
from train.report import read_metrics

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "--config=configs/digits.py",
    "--config.data.image_size=8",
    "--config.steps=3",
    "--config.optim.warmup_epochs=0",
    "--config.log_every_steps=1",
    "--config.parallel.batch_norm=global",
    "--config.compilation_cache=",
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(workdir, *more, devices, **environment):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "train", *SETTINGS, f"--workdir={workdir}", *more],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def test_two_hosts_train_evaluate_and_save_like_one(tmp_path):
    address = f"localhost:{free_port()}"
    hosts = [
        start(
            tmp_path / "two",
            "--config.parallel.distributed=true",
            devices=1,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    for host in hosts:
        assert "of 360" in finish(host)
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


def test_hosts_that_nobody_names_are_an_error(tmp_path):
    process = start(tmp_path, "--config.parallel.distributed=true", devices=1)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "the hosts of the run are not known" in err.splitlines()[-1]
    assert "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave the setting out" in err
