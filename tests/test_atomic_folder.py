"""Folders that are replaced: the old or the new one is at the path, whenever the program is killed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from se_flax.checkpoints import atomic_folder as module
from se_flax.checkpoints.atomic_folder import atomic_folder, recover, refuse_overwrite
from se_flax.checkpoints.resolve import locate
from se_flax.errors import UserError

KILLED = """
import os, signal, sys
from pathlib import Path
from se_flax.checkpoints import atomic_folder as module

folder, exchange, at = Path(sys.argv[1]), sys.argv[2] == "True", int(sys.argv[3])
if not exchange:
    module._exchange = lambda one, other: False
calls = 0

def killed_before(original):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call

Path.rename = killed_before(Path.rename)
module.shutil.rmtree = killed_before(module.shutil.rmtree)
with module.atomic_folder(folder) as building:
    (building / "content").write_text("new")
"""


def write(folder, text):
    with atomic_folder(folder) as building:
        (building / "content").write_text(text)


def exchanges(tmp_path):
    """Whether the system can exchange two names here."""
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    return module._exchange(tmp_path / "one", tmp_path / "other")


# Renames and deletions are counted: the exchange needs one deletion, two renames two.
@pytest.mark.parametrize(
    ("exchange", "at", "left"), [(True, 1, "new"), (False, 1, "old"), (False, 2, "old"), (False, 3, "new")]
)
def test_a_kill_leaves_the_old_or_the_new_folder(tmp_path, exchange, at, left):
    if exchange and not exchanges(tmp_path):
        pytest.skip("this file system cannot exchange names")
    folder = tmp_path / "model"
    write(folder, "old")
    words = [sys.executable, "-c", KILLED, str(folder), str(exchange), str(at)]
    assert subprocess.run(words, cwd=Path(__file__).parents[1], check=False).returncode == -signal.SIGKILL
    if exchange:
        assert (folder / "content").read_text() == left, "without any repair"
    recover(folder)
    assert (folder / "content").read_text() == left
    write(folder, "newer")
    assert (folder / "content").read_text() == "newer"


@pytest.mark.parametrize("exchange", [True, False])
def test_nothing_is_left_beside_the_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    folder = tmp_path / "place" / "model"
    write(folder, "old")
    write(folder, "new")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert (folder / "content").read_text() == "new"


def test_an_interruption_between_the_renames_brings_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write(folder, "old")
    original = Path.rename

    def interrupted(self, target):
        if target == folder and self.name != "was":
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(folder, "new")
    assert (folder / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("run", [False, True])
def test_the_next_look_brings_the_old_folder_back(tmp_path, run):
    """Looking is loading, of the folder or of the run that it belongs to, and asking whether it may be overwritten."""
    folder = tmp_path / "model"
    was = tmp_path / ".model-old-abc" / "was"
    was.mkdir(parents=True)
    (was / "se_flax.json").write_text("{}")
    with pytest.raises(UserError, match="has format None"):
        locate(tmp_path if run else folder)
    folder.rename(was.parent.parent / "moved")
    was.parent.mkdir()
    (tmp_path / "moved").rename(was)
    with pytest.raises(UserError, match="exists already"):
        refuse_overwrite(folder, False, sign="se_flax.json", what="a saved checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
