"""Process set-up: multi-host initialisation, compilation cache, work directory."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from se_flax.errors import UserError

MODEL = "model"  # folder of the saved network in the work directory
# What errors of collectives and barriers say when another process is gone: Gloo, NCCL, JAX's coordination service.
_LOST = re.compile(
    r"gloo|nccl|unavailable|deadline.?exceeded|connection (reset|closed|refused)|socket closed|coordination|heartbeat"
    r"|barrier",
    re.IGNORECASE,
)


def join_hosts(heartbeat_seconds: int) -> None:
    """Connects the hosts of a run; must come before JAX looks for devices.

    A TPU pod, SLURM, Open MPI and Kubernetes say by themselves who is who. Elsewhere, three variables of the
    environment do: JAX_COORDINATOR_ADDRESS (host:port of the first one), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      heartbeat_seconds: after which a silent host is lost.

    Raises:
      UserError: neither says it, or the time is too short.
    """
    if heartbeat_seconds < 5:
        raise UserError(
            f"got parallel.heartbeat_seconds={heartbeat_seconds}; it must be at least 5, or a busy host is taken for a "
            "lost one"
        )
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    numbers = [int(os.environ[name]) if name in os.environ else None for name in names]
    try:
        jax.distributed.initialize(
            num_processes=numbers[0], process_id=numbers[1], heartbeat_timeout_seconds=heartbeat_seconds
        )
    except ValueError as error:
        raise UserError(
            f"parallel.distributed=true, but the hosts of the run are not known ({str(error).rstrip('.')}); set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave the setting out on one host"
        ) from error


@contextmanager
def leaving_with_a_lost_host() -> Iterator[None]:
    """Says in one sentence that another host of the run is gone, and ends this process at once, with exit code 1.

    Nothing can be computed or saved without it, and an orderly end would wait for it for minutes.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _lost(error)
        if jax.process_count() == 1 or reason is None:
            raise
        print(
            f"error: another host was lost ({reason}); run the same command on all hosts to resume from the last "
            "checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _lost(error: BaseException | None) -> str | None:
    """The line of an exception, or of what caused it, that says that another process is gone."""
    while error is not None:
        for line in str(error).splitlines():
            if _LOST.search(line):
                return line.strip()[:160]
        error = error.__cause__ or error.__context__
    return None


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled steps between runs, so that the second start is quick."""
    path = Path(folder).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)  # a kernel's draw takes 0.1


def prepare_workdir(workdir: str | Path) -> Path:
    """Makes the work directory.

    Raises:
      UserError: there is a file of that name, or it cannot be written.
    """
    path = Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={workdir} ({error.strerror}); name a directory that can be created"
        ) from error
    return path
