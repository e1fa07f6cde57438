"""Worker processes that read images: they end with the program, and one that ends alone is one sentence."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, parent_process

from se_flax.errors import UserError


def prepare_worker(index: int, count: int) -> None:
    """Prepares a worker process; for Grain's `worker_init_fn`.

    A terminal's Ctrl-C and a cluster's SIGTERM reach the whole group of processes. The program saves its state then and
    still needs its workers, which it ends itself. A program that is killed cannot do so, so workers watch it.

    Args:
      index: of the worker.
      count: of workers.
    """
    del index, count
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_program, daemon=True).start()


def _end_with_the_program() -> None:
    # Not PR_SET_PDEATHSIG: Grain starts workers from threads, and that signal comes when the thread ends.
    program = parent_process()
    if program is not None:
        connection.wait([program.sentinel])
        os._exit(1)


@contextmanager
def ends_explained() -> Iterator[None]:
    """Says in one sentence that a worker has ended.

    Raises:
      UserError: a worker was killed or crashed.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(error))
        if found is None:
            raise
        code = int(found[1])
        reason = f"exit code {code}"
        if code < 0:
            reason = f"{signal.Signals(-code).name}" + ("; out of memory?" if -code == signal.SIGKILL else "")
        raise UserError(
            f"a data worker ended ({reason}); run the same command to resume, with a smaller data.workers if memory is "
            "short"
        ) from error
