"""One run at a time in a work directory."""

import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import jax
import numpy as np
from jax.experimental import multihost_utils

from se_flax.checkpoints.atomic_folder import recover
from se_flax.errors import UserError
from train.run.report import say
from train.run.runtime import MODEL

LOCK = ".lock"
# Names of `se_flax.checkpoints`: files.replacing, atomic_folder.atomic_folder.
_FILE = r"\.[a-z]+\.jsonl?\.[0-9a-f]{8}"
_FOLDER = rf"\.{MODEL}-(old-)?\w{{8}}"


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of a work directory. It ends with the process that holds it, however that ends.

    The first host of a run holds it for all. A file system without locks is used without one, and that is said. What a
    run that was killed had not finished writing is deleted: nobody else writes there now.

    Args:
      workdir: exists; `.lock` in it names the process that has the lock.

    Raises:
      UserError: another run has it.
    """
    path = workdir / LOCK
    stream, free = _take(path) if jax.process_index() == 0 else (None, True)
    if jax.process_count() > 1:
        free = bool(multihost_utils.broadcast_one_to_all(np.asarray(free)))
    try:
        if not free:
            raise UserError(
                f"another run is using {workdir}{_holder(path)}; wait for its end or stop it, or use another --workdir"
            )
        if stream is not None:
            _delete_unfinished(workdir)
        yield
    finally:
        if stream is not None:
            if free:
                stream.truncate(0)
            stream.close()


def _take(path: Path) -> tuple[IO[str], bool]:
    """The open file, and whether no other run has the lock."""
    stream = path.open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return stream, False
        say(f"warning: {path.parent} is on a file system without locks ({error.strerror}); start one run there")
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream, True


def _delete_unfinished(workdir: Path) -> None:
    """Deletes what `replacing` and `atomic_folder` were writing when the process was killed."""
    recover(workdir / MODEL)
    for path in workdir.iterdir():
        if re.fullmatch(_FILE, path.name):
            path.unlink()
        elif re.fullmatch(_FOLDER, path.name):
            shutil.rmtree(path, ignore_errors=True)


def _holder(path: Path) -> str:
    try:
        text = path.read_text(errors="replace").strip()
    except OSError:
        return ""
    return f" ({text[:200]})" if text.isprintable() and text else ""
