"""Files of a run that a kill, damage or a second run must not harm: metrics, settings, checkpoints, the lock."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import flax.struct
import jax
import numpy as np
import pytest

import se_flax.checkpoints.files
import train.ctr.loop
import train.run.report
from se_flax.checkpoints import atomic_folder
from se_flax.errors import UserError
from train.config import Config
from train.run.checkpoint import Checkpoints
from train.run.lock import LOCK, locked
from train.run.loop import run
from train.run.report import Metrics, read_metrics, write_settings

ROOT = Path(__file__).parents[1]
ROWS = [{"step": step, "epoch": step / 10, "loss": 1 / step, "accuracy": 0.5} for step in range(1, 6)]


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


# ---- metrics.jsonl and config.json


def same_file(path):
    """Changes whenever something is written to a file or it is replaced."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def test_nothing_is_written_where_every_line_stays(metrics, monkeypatch, capsys):
    before = same_file(metrics)
    monkeypatch.setattr(train.run.report, "replacing", lambda *_: pytest.fail("written"))
    assert Metrics(metrics, 5).rows == ROWS
    assert same_file(metrics) == before and capsys.readouterr().err == ""


class Killed(BaseException):
    """The process is gone: what it would do after this does not happen."""


@pytest.mark.parametrize("start", [3, 0])
def test_a_kill_while_lines_are_dropped_loses_none(metrics, monkeypatch, start):
    def killed(*_):
        raise Killed

    whole = metrics.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(se_flax.checkpoints.files.os, "replace", killed)
        with pytest.raises(Killed):
            Metrics(metrics, start)
    assert metrics.read_bytes() == whole
    Metrics(metrics, start)
    assert read_metrics(metrics) == ROWS[:start]


DAMAGE = [b"{}", b"[1]", b"5", b"null", b"", b'{"step": "x"}', b'{"step": 2}', b"\xff\xfe", b'{"step": 6, "epo']
DAMAGE += [b'{"step": 2, "epoch": 0.2, "loss": "low"}', b'{"step": true, "epoch": 1}']


@pytest.mark.parametrize("line", DAMAGE)
def test_a_damaged_line_is_dropped_and_said(metrics, line, capsys):
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    assert read_metrics(metrics) == ROWS
    kept = Metrics(metrics, 5)
    assert capsys.readouterr().err == f"warning: {metrics} had 1 damaged line, now left out\n"
    kept.write(6, 0.6, {"loss": 0.1})
    assert read_metrics(metrics) == [*ROWS, {"step": 6, "epoch": 0.6, "loss": 0.1}]
    assert metrics.read_bytes().startswith(b"".join(lines))


def test_a_line_without_its_end_is_not_joined_with_the_next(metrics, capsys):
    metrics.write_bytes(metrics.read_bytes().rstrip(b"\n") + b'\n{"st\n[')
    Metrics(metrics, 5).write(6, 0.6, {"loss": 0.1})
    assert [row["step"] for row in read_metrics(metrics)] == [1, 2, 3, 4, 5, 6]
    assert "had 2 damaged lines" in capsys.readouterr().err


def test_figures_that_a_run_will_record_are_dropped_at_its_start(metrics):
    evaluation = {"step": 5, "epoch": 0.5, "eval_loss": 2.0}
    with metrics.open("a") as stream:
        stream.write(json.dumps(evaluation) + "\n")
    assert Metrics(metrics, 5, ["eval_loss"]).rows == ROWS
    assert Metrics(metrics, 5, ["loss"]).rows == ROWS[:4]


def test_settings_are_replaced_whole(tmp_path, monkeypatch):
    write_settings(tmp_path, {"steps": 1})
    before = same_file(tmp_path / "config.json")
    write_settings(tmp_path, {"steps": 1})
    assert same_file(tmp_path / "config.json") == before
    replace = os.replace

    def check(source, target):
        assert json.loads(Path(source).read_text()) == {"steps": 2}
        assert json.loads(Path(target).read_text()) == {"steps": 1}
        replace(source, target)

    monkeypatch.setattr(se_flax.checkpoints.files.os, "replace", check)
    write_settings(tmp_path, {"steps": 2})
    assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# ---- a checkpoint that is written again


class State(flax.struct.PyTreeNode):
    x: jax.Array


def state(value):
    return State(jax.device_put(np.full(3, value, np.float32), jax.devices()[0]))


def save(checkpoints, step, value, **figures):
    checkpoints.save(step, state(value), data={"position": value}, run={"config": {}}, metrics=figures or None)


def restored(workdir):
    checkpoints = Checkpoints(workdir, keep_last=1, keep_best=1)
    found = checkpoints.restore(state(0))
    checkpoints.close()
    return found.step, float(found.state.x[0]), found.data["position"], found.skipped


def test_a_checkpoint_is_replaced_with_its_figures(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    save(checkpoints, 1, 10)
    save(checkpoints, 1, 11, eval_top1=0.9)
    save(checkpoints, 2, 20, eval_top1=0.1)
    save(checkpoints, 3, 30)
    save(checkpoints, 4, 40)
    checkpoints.finish()
    assert checkpoints.steps() == [1, 3, 4], "the newest two and the best"
    checkpoints.close()
    assert restored(tmp_path) == (4, 40, 40, ())


# ---- the lock

HOLDER = "from train.run.lock import locked\nfrom pathlib import Path\nimport sys, time\n"
HOLDER += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of a work directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(("start", "config"), [(run, Config()), (train.ctr.loop.run, None)])
def test_a_second_run_in_a_work_directory_is_refused(tmp_path, holder, start, config):
    if config is None:
        config = train.ctr.loop.Config()
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train="csv:none.csv", numeric="I1"))
    before = sorted(tmp_path.rglob("*"))
    text = rf"another run is using {re.escape(str(tmp_path))} \(process {holder.pid} on \S+\); wait for its end or"
    for _ in range(2):  # a refused run does not take the name of the first away
        with pytest.raises(UserError, match=text):
            start(config, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    with locked(tmp_path):
        pass


def test_what_a_killed_run_left_half_written_is_deleted(tmp_path, monkeypatch):
    """Under the lock nobody else writes there; a replaced folder between its two renames comes back first."""

    def killed(*_):
        raise Killed

    write_settings(tmp_path, {"steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        patch.setattr(se_flax.checkpoints.files.os, "replace", killed)
        with pytest.raises(Killed):
            write_settings(tmp_path, {"steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(atomic_folder.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed), atomic_folder.atomic_folder(tmp_path / "model"):
            raise Killed
    (tmp_path / ".model-old-abcdefgh" / "was").mkdir(parents=True)
    (tmp_path / ".model-old-abcdefgh" / "was" / "old").touch()
    (tmp_path / ".notes.json").touch()  # a person's own
    assert len(list(tmp_path.iterdir())) == 5
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, ".notes.json", "config.json", "model"]
    assert (tmp_path / "model" / "old").exists() and json.loads((tmp_path / "config.json").read_text()) == {"steps": 1}


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path):
        assert "is on a file system without locks (Function not implemented)" in capsys.readouterr().err
