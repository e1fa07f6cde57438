"""Opens the work directory of a run: a folder, or a place in a bucket."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from se_flax.checkpoints.object_store import is_url
from train.run import bucket
from train.run.lock import locked
from train.run.runtime import prepare_workdir
from train.run.store import Store


@contextmanager
def opened(workdir: str | Path) -> Iterator[Store]:
    """Makes a work directory, or copies it from its bucket, and holds its lock.

    Args:
      workdir: a folder, `gs://bucket/folder` or `s3://bucket/folder`.

    Raises:
      UserError: it cannot be read or written, or another run uses it.
    """
    if is_url(str(workdir)):
        with bucket.opened(str(workdir)) as store:
            yield store
        return
    path = prepare_workdir(workdir)
    with locked(path):
        yield Store(path)
