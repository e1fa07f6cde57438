"""Atomic writing of folders: they appear as a whole or not at all."""

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from se_flax.errors import UserError

# Of Linux's <fcntl.h> and <linux/fs.h>.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def refuse_overwrite(folder: Path, overwrite: bool, *, sign: str, what: str) -> None:
    """Refuses to overwrite a folder, unless it was asked for and the folder is of the same kind.

    Args:
      folder: the folder to write.
      overwrite: an existing folder of the same kind may be replaced.
      sign: a file that every folder of that kind has.
      what: name of the kind, with article, for the message.

    Raises:
      UserError: the folder is not empty, and may not be replaced or is of another kind.
    """
    recover(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{folder} exists already; choose another folder, or pass overwrite=True to replace it")
    if not (folder / sign).is_file():
        raise UserError(f"{folder} exists and is not {what}; choose another folder")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces the target when the block ends without an error.

    Args:
      folder: the target; an existing one is replaced.

    Yields:
      The temporary folder to write into, beside the target.

    Raises:
      UserError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield building
        building.chmod(0o755)
        _swap(building, folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _swap(building: Path, folder: Path) -> None:
    """Renames a finished folder to its target; an existing target is deleted only after that."""
    if not folder.exists():
        building.rename(folder)
        return
    if _exchange(building, folder):  # what was there is in `building` now, which its maker deletes
        return
    # Between these two renames there is nothing at the target: `recover` brings the old folder back after a crash.
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(old / "was")
    try:
        building.rename(folder)
    except BaseException:  # an interruption too: the old folder is deleted below
        (old / "was").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step, where the system can (Linux 3.15, most local file systems); else False."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system or C library
        return False
    result: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return result == 0


def recover(folder: Path) -> None:
    """Brings back what a crash of `atomic_folder` between its two renames left under another name.

    Args:
      folder: the target, which such a crash leaves without anything there.
    """
    if folder.exists():
        return
    with contextlib.suppress(OSError):  # the next look may write there
        kept = [path / "was" for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}-old-")]
        for was in (path for path in kept if path.is_dir()):
            was.rename(folder)
            was.parent.rmdir()
            return
