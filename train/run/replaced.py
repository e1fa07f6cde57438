"""A checkpoint that is written again waits aside until the new one is whole.

It happens where an evaluation that a stopped run left is made up: the checkpoint gets its figures then. Orbax refuses
to write a step that is there, and without the old one a crash would cost all steps since the checkpoint before.
"""

import jax
from etils import epath
from jax.experimental import multihost_utils

_ASIDE = "replaced"


def set_aside(workdir: epath.Path, checkpoint: epath.Path) -> None:
    """Moves a checkpoint out of the folder of checkpoints; all hosts call it."""
    if jax.process_index() == 0:
        aside = workdir / _ASIDE
        aside.mkdir(exist_ok=True)
        checkpoint.rename(aside / checkpoint.name)
    _wait("set aside")


def put_back(workdir: epath.Path, checkpoints: epath.Path) -> None:
    """Puts back what was set aside and has no successor; all hosts call it before they look for checkpoints."""
    aside = workdir / _ASIDE
    if jax.process_index() == 0 and aside.exists():
        for old in aside.iterdir():
            if not (checkpoints / old.name).exists():
                old.rename(checkpoints / old.name)
        aside.rmtree()
    _wait("put back")


def forget(workdir: epath.Path) -> None:
    """Removes what was set aside: its successor is whole."""
    aside = workdir / _ASIDE
    if jax.process_index() == 0 and aside.exists():
        aside.rmtree()


def _wait(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoint {what}")
