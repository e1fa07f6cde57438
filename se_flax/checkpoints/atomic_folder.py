"""Atomic writing of folders: they appear as a whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from se_flax.errors import UserError


def refuse_overwrite(folder: Path, overwrite: bool, *, sign: str, what: str) -> None:
    """Refuses to write over what one would miss.

    Args:
      folder: where something is to be written.
      overwrite: an earlier one of its kind may be replaced.
      sign: a file that every folder of that kind has.
      what: one such, in words.

    Raises:
      UserError: the folder has something in it, and it may not be replaced or is something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{folder} exists already; choose another folder, or pass overwrite=True to replace it")
    if not (folder / sign).is_file():
        raise UserError(f"{folder} exists and is not {what}; choose another folder")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside the wanted one, which takes its place when the block ends well.

    Args:
      folder: the wanted one; what is there is replaced.

    Yields:
      The folder to write into.

    Raises:
      UserError: the disk or the file system did not allow it.
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
    """Puts a finished folder in its place; what was there goes only once the new one stands."""
    if not folder.exists():
        building.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(old / "was")
    try:
        building.rename(folder)
    except OSError:
        (old / "was").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
