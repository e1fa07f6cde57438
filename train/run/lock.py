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

from se_flax.checkpoints.atomic_folder import recover
from se_flax.errors import UserError
from train.run.hosts import from_first, is_first
from train.run.report import say
from train.run.runtime import MODEL

LOCK = ".lock"
# Names of `se_flax.checkpoints`: files.replacing, atomic_folder.atomic_folder.
_FILE = r"\.[a-z]+\.jsonl?\.[0-9a-f]{8}"
_FOLDER = rf"\.{MODEL}-(old-)?\w{{8}}"


@contextmanager
def locked(workdir: Path, name: str = "") -> Iterator[None]:
    """Holds the lock of a work directory. It ends with the process that holds it, however that ends.

    The first host of a run holds it for all. A file system without locks is used without one, and that is said. What a
    run that was killed had not finished writing is deleted: nobody else writes there now.

    Args:
      workdir: exists; `.lock` in it names the process that has the lock.
      name: what messages call it; empty is its path.

    Raises:
      UserError: another run has it.
    """
    path = workdir / LOCK
    stream = path.open("a") if is_first() else None
    taken = False

    def take() -> None:
        nonlocal taken
        taken = stream is not None and _take(path, stream)
        if not taken:
            raise UserError(
                f"another run is using {name or workdir}{_holder(path)}; wait for its end or stop it, or use another "
                "--workdir"
            )
        _delete_unfinished(workdir)

    try:
        from_first(take)
        yield
    finally:
        if stream is not None:
            if taken:
                stream.truncate(0)
            stream.close()


def _take(path: Path, stream: IO[str]) -> bool:
    """Whether no other run has the lock."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        say(f"warning: {path.parent} is on a file system without locks ({error.strerror}); start one run there")
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return True


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
