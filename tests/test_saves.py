"""Checkpoints of small states: what a crash, damage or a disk that refuses leaves, and what is read after it."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from se_flax.errors import UserError
from train.run import seal
from train.run.checkpoint import Checkpoints
from train.run.step import TrainState

ROOT = Path(__file__).parents[1]
SAVED = {4: 0.9, 8: None, 12: 0.5}  # top-1 by step


def state_of(number):
    values = np.random.default_rng(number).normal(size=(3, 40)).astype(np.float32)
    return TrainState(
        step=jnp.asarray(number, jnp.int32),
        params={"conv1": {"kernel": jnp.asarray(values)}},
        batch_stats={"bn1": {"mean": jnp.asarray(values[0])}},
        opt_state=(jnp.asarray(values[1]),),
        ema=None,
        key=jnp.zeros(2, jnp.uint32),
    )


def save(checkpoints, number, top1=None, state=None):
    checkpoints.save(
        number,
        state or state_of(number),
        data={"next": number},
        run={"config": {"reduction": 16.0}, "number": number},
        metrics=None if top1 is None else {"eval_top1": top1, "eval_loss": 1.0},
    )


def opened(workdir, keep_last=2, keep_best=1):
    return Checkpoints(workdir, keep_last=keep_last, keep_best=keep_best)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A work directory with the checkpoints of the steps 4 (the best one), 8 and 12."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = opened(workdir)
    for number, top1 in SAVED.items():
        save(checkpoints, number, top1)
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def files_of(workdir, number):
    folder = workdir / "checkpoints" / str(number)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    if not content:
        path.write_bytes(b"\x01")
        return
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = (cut, empty, Path.unlink, flip)


def assert_restored(restored, number):
    """Everything is what was saved of this step, to the bit."""
    expected = state_of(number)
    assert restored.step == number and restored.data == {"next": number} and restored.run["number"] == number
    assert int(restored.state.step) == number
    np.testing.assert_array_equal(restored.state.params["conv1"]["kernel"], expected.params["conv1"]["kernel"])
    np.testing.assert_array_equal(restored.state.batch_stats["bn1"]["mean"], expected.batch_stats["bn1"]["mean"])
    np.testing.assert_array_equal(restored.state.opt_state[0], expected.opt_state[0])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", [4, 12])
def test_damage_to_any_file_is_named_and_the_newest_whole_checkpoint_is_used(saved, tmp_path, number, damage):
    names = files_of(saved, number)
    assert {name.split("/")[0] for name in names} >= {"state", "data", "run", seal.SEAL} and len(names) > 12
    whole = max(step for step in SAVED if step != number)
    for i, name in enumerate(names):
        workdir = Path(shutil.copytree(saved, tmp_path / str(i)))
        before = (workdir / "checkpoints" / str(number) / name).read_bytes()
        damage(workdir / "checkpoints" / str(number) / name)
        if damage is not Path.unlink and (workdir / "checkpoints" / str(number) / name).read_bytes() == before:
            continue  # an empty file was emptied
        checkpoints = opened(workdir)
        assert checkpoints.newest_run()["number"] == whole, name
        restored = checkpoints.restore(state_of(0))
        assert_restored(restored, whole)
        (warning, resuming) = restored.lines()
        place = f"{workdir}/checkpoints/{number} is {'unconfirmed' if name == seal.SEAL else 'damaged'} ({name} "
        assert warning.startswith(f"warning: checkpoint {place}"), name
        assert warning.endswith(f"it is not used and was moved to {workdir}/damaged/{number}"), name
        assert resuming == f"resuming from step {whole}"
        save(checkpoints, 12 if number == 12 else 16)  # the number is free
        checkpoints.close()
        assert not opened(workdir)._problems


def test_settings_that_still_are_json_are_not_believed(workdir):
    path = workdir / "checkpoints" / "12" / "run" / "metadata"
    path.write_text(path.read_text().replace("16.0", "16.1"))
    assert opened(workdir).newest_run()["config"] == {"reduction": 16.0}
    assert opened(workdir).newest_run()["number"] == 8


def test_a_whole_checkpoint_without_digests_is_used_when_there_is_no_other(workdir):
    """It is what a crash right after the write leaves; it is said, and from then on it has digests."""
    for number in (4, 8):
        shutil.rmtree(workdir / "checkpoints" / str(number))
    (workdir / "checkpoints" / "12" / seal.SEAL).write_text("")
    checkpoints = opened(workdir)
    assert checkpoints.newest_run()["number"] == 12
    restored = checkpoints.restore(state_of(0))
    assert_restored(restored, 12)
    assert next(restored.lines()) == (
        f"warning: checkpoint {workdir}/checkpoints/12 is unconfirmed (digests.json cannot be read); it is used, since "
        "there is no other, but damage to it would not have been noticed"
    )
    again = opened(workdir).restore(state_of(0))
    assert list(again.lines()) == ["resuming from step 12"]
    flip(workdir / "checkpoints" / "12" / "data" / "metadata")
    with pytest.raises(UserError, match=r"none of the 1 checkpoints .*12 is damaged \(data/metadata is changed\)"):
        opened(workdir).restore(state_of(0))
    assert (workdir / "checkpoints" / "12").is_dir(), "nothing is moved when nothing was restored"


def test_a_save_does_not_wait_for_the_digests_and_counts_only_with_them(tmp_path, monkeypatch):
    may_go, original = threading.Event(), seal.seal

    def slow(folder):
        assert may_go.wait(60)
        original(folder)

    monkeypatch.setattr(seal, "seal", slow)
    checkpoints = opened(tmp_path)
    save(checkpoints, 4)
    try:
        assert checkpoints.newest() == "" and checkpoints.steps() == []
    finally:
        may_go.set()
    checkpoints.finish()
    assert checkpoints.newest() == f"{tmp_path}/checkpoints/4"
    seal.check(tmp_path / "checkpoints" / "4")
    checkpoints.close()


def test_digests_are_those_of_the_files(workdir):
    """Computed anew with hashlib, of all files but the digests themselves."""
    import hashlib

    folder = workdir / "checkpoints" / "12"
    said = json.loads((folder / seal.SEAL).read_text())["files"]
    assert sorted([*said, seal.SEAL]) == files_of(workdir, 12)
    for name, digest in said.items():
        assert hashlib.blake2b((folder / name).read_bytes(), digest_size=16).hexdigest() == digest


def test_the_last_and_the_best_are_kept_and_two_at_least(tmp_path):
    checkpoints = opened(tmp_path, keep_last=1)
    for number, top1 in ((1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, 0.1), (6, None)):
        save(checkpoints, number, top1)
    checkpoints.close()
    # With one alone, a newest state that gives a loss of NaN would be all that is left.
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.last_good(5) == f"the last good checkpoint is {tmp_path}/checkpoints/2"
    # What is the best of all is known in the next process too.
    checkpoints = opened(tmp_path, keep_last=2)
    save(checkpoints, 7, 0.8)
    save(checkpoints, 8)
    checkpoints.close()
    assert checkpoints.steps() == [2, 7, 8]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "7", "8"]
    assert not (tmp_path / ".old").exists()


def test_nothing_is_deleted_before_the_new_one_is_sealed(workdir, monkeypatch):
    """Also where Orbax itself succeeds."""

    def refuse(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

    checkpoints = opened(workdir, keep_last=1, keep_best=0)
    monkeypatch.setattr(seal, "seal", refuse)
    save(checkpoints, 16)
    with pytest.raises(UserError) as caught:
        save(checkpoints, 20)
    assert str(caught.value) == (
        f"the checkpoint of step 16 in {workdir}/checkpoints could not be written (Input/output error); the newest "
        f"whole checkpoint is {workdir}/checkpoints/12; check the disk, then run the same command to resume"
    )
    assert checkpoints.steps() == [4, 8, 12]
    assert_restored(opened(workdir).restore(state_of(0)), 12)


def test_a_half_deleted_checkpoint_is_not_seen(workdir, monkeypatch):
    checkpoints = opened(workdir, keep_best=0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed before it
        save(checkpoints, 16)
        checkpoints.close()
    assert sorted(path.name for path in (workdir / ".old").iterdir()) == ["4", "8"]
    assert opened(workdir).steps() == [12, 16]
    assert not (workdir / ".old").exists()


def test_what_a_kill_left_of_a_save_is_deleted(workdir):
    """The step may never be saved again: it may have been that of a signal."""
    left = workdir / "checkpoints" / "10.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "manifest.ocdbt").write_bytes(b"half")
    opened(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["12", "4", "8"]


@pytest.mark.parametrize(("holder", "name"), [(ocp.AsyncCheckpointer, "save"), (seal, "seal")])
def test_a_checkpoint_is_replaced_only_by_a_whole_one(workdir, monkeypatch, holder, name):
    """Killed while Orbax writes the new one of the same step, or before its digests."""

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    checkpoints = opened(workdir)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(holder, name, killed)
        save(checkpoints, 12, state=state_of(99))
        checkpoints.finish()
    assert_restored(opened(workdir).restore(state_of(0)), 12)
    save(checkpoints, 12, state=state_of(99))
    checkpoints.close()
    assert int(opened(workdir).restore(state_of(0)).state.step) == 99
    assert not (workdir / ".old").exists()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EPERM, r"\(Operation not permitted\); .*; make the folder writable, then"),
        (errno.EROFS, r"\(Read-only file system\); .*; make the folder writable, then"),
        (errno.EIO, r"\(Input/output error\); .*; check the disk, then"),
        (errno.ENOSPC, r"\(No space left on device\); .*; free some space, then"),
        (errno.EDQUOT, r"\(Disk quota exceeded\); .*; free some space, then"),
    ],
)
def test_what_the_disk_refuses_is_one_sentence(workdir, monkeypatch, number, text):
    def refuse(self, directory, **kwargs):
        # As TensorStore says it, without an OSError.
        raise ValueError(f"UNKNOWN: Error writing local file [os_error_code='{number}']")

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", refuse)
    checkpoints = opened(workdir)
    with pytest.raises(UserError, match=rf"checkpoint of step 16 in .* could not be written {text} run the same") as e:
        save(checkpoints, 16)
    assert f"the newest whole checkpoint is {workdir}/checkpoints/12;" in str(e.value)
    assert str(e.value).startswith("the disk is full") == (number in (errno.ENOSPC, errno.EDQUOT))


PROGRAM = """
import os, resource, sys
from train.cli import exit_code
from train.run.checkpoint import Checkpoints
sys.path.insert(0, {tests!r})
from test_saves import save

def main():
    checkpoints = Checkpoints({workdir!r}, keep_last=2, keep_best=1)
    save(checkpoints, 4)
    checkpoints.finish()
    {trouble}
    for number in (8, 12, 16):
        save(checkpoints, number)
    return 0

original = os.mkdir
def refused(path, *args, **kwargs):
    if ".orbax-checkpoint-tmp" in str(path):
        raise PermissionError(1, "Operation not permitted", str(path))
    return original(path, *args, **kwargs)

sys.exit(exit_code(main))
"""


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("os.mkdir = refused", "Operation not permitted"),
        # The system itself refuses: no file may be longer than this.
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))", "File too large"),
    ],
)
def test_a_process_whose_save_failed_ends_at_once_and_without_tracebacks(tmp_path, trouble, reason):
    program = PROGRAM.format(tests=str(ROOT / "tests"), workdir=str(tmp_path), trouble=trouble)
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=200, check=False
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: the checkpoint of step 8 in {tmp_path}/checkpoints could not be written ({reason}")
    assert f"the newest whole checkpoint is {tmp_path}/checkpoints/4;" in line


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["params", "batch_stats", "ema"])
def test_a_state_that_is_not_finite_is_not_saved(workdir, part, value):
    bad = {"params": {"conv1": {"kernel": jnp.asarray([1.0, value])}}, "batch_stats": {"mean": jnp.asarray([value])}}
    bad["ema"] = {"params": bad["params"]}
    checkpoints = opened(workdir)
    with pytest.raises(UserError) as caught:
        save(checkpoints, 16, state=state_of(16).replace(**{part: bad[part]}))
    assert str(caught.value) == (
        f"the parameters or the statistics are not finite after step 16; the last good checkpoint is {workdir}/"
        "checkpoints/12; lower optim.learning_rate and start in a new --workdir"
    )
    assert checkpoints.steps() == [4, 8, 12] and not (workdir / "checkpoints" / "16").exists()


def test_the_optimizers_own_infinities_are_saved(tmp_path):
    checkpoints = opened(tmp_path)
    save(checkpoints, 1, state=state_of(1).replace(opt_state=(jnp.asarray([np.inf]),)))
    checkpoints.close()
    assert checkpoints.steps() == [1]
