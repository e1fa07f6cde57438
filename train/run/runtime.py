"""Process set-up: multi-host initialisation, compilation cache, work directory."""

import os
from pathlib import Path

import jax

from se_flax.errors import UserError


def join_hosts() -> None:
    """Connects the hosts of a run; must come before JAX looks for devices.

    A TPU pod, SLURM, Open MPI and Kubernetes say by themselves who is who. Elsewhere, three variables of the
    environment do: JAX_COORDINATOR_ADDRESS (host:port of the first one), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      UserError: neither says it.
    """
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    numbers = [int(os.environ[name]) if name in os.environ else None for name in names]
    try:
        jax.distributed.initialize(num_processes=numbers[0], process_id=numbers[1])
    except ValueError as error:
        raise UserError(
            f"parallel.distributed=true, but the hosts of the run are not known ({str(error).rstrip('.')}); set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave the setting out on one host"
        ) from error


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled steps between runs, so that the second start is quick."""
    path = Path(folder).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)  # a kernel's draw takes 0.1


def prepare_workdir(workdir: str | Path) -> Path:
    """Makes the work directory.

    Raises:
      UserError: it is in a bucket, there is a file of that name, or it cannot be written.
    """
    if "://" in str(workdir):
        raise UserError(
            f"got --workdir={workdir}, which is no folder; mount the bucket and name the mounted folder, or train in a "
            "local one and copy it there, as colab/train_on_tpu.py does"
        )
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
