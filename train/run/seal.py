"""Digests of a checkpoint's files: they are written when it is complete, and tell later whether it still is.

`digests.json` in a checkpoint's folder holds the BLAKE2b digest of every other file in it, and one of its own content.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

SEAL = "digests.json"
# A file this large is read in pieces when its digest is taken.
_PIECE = 1 << 22


class Unsealed(ValueError):
    """A checkpoint has no digests that can be read, so nothing says whether it is whole."""


def seal(folder: Path) -> None:
    """Writes the digests of a complete folder. Its files and then the digests are on the disk when this returns.

    Args:
      folder: of a checkpoint.

    Raises:
      OSError: a file cannot be read or written.
    """
    digests = {name: _digest(folder / name, sync=True) for name in _files(folder)}
    text = json.dumps({"files": digests, "own": _own(digests)}, indent=0) + "\n"
    building = folder / f".{SEAL}"
    with building.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    building.replace(folder / SEAL)
    for path in (folder, folder.parent):  # a rename is on the disk when its folder is
        _sync_folder(path)


def check(folder: Path) -> None:
    """Compares a folder with its digests.

    Args:
      folder: of a checkpoint.

    Raises:
      Unsealed: it has no digests, or they cannot be read.
      ValueError: a file is changed or missing, and which.
      OSError: a file cannot be read.
    """
    for name, digest in _recorded(folder).items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} is changed")


def _recorded(folder: Path) -> dict[str, str]:
    try:
        said = json.loads((folder / SEAL).read_bytes())
    except FileNotFoundError as error:
        raise Unsealed(f"{SEAL} is missing") from error
    except (OSError, ValueError) as error:
        raise Unsealed(f"{SEAL} cannot be read") from error
    files = said.get("files") if isinstance(said, dict) else None
    if not isinstance(files, dict) or said.get("own") != _own(files):
        raise Unsealed(f"{SEAL} is changed")
    return files


def _own(digests: dict[str, str]) -> str:
    return hashlib.blake2b(json.dumps(digests, sort_keys=True).encode(), digest_size=16).hexdigest()


def _files(folder: Path, prefix: str = "") -> Iterator[str]:
    """Relative names of all files below a folder but the digests."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _files(folder / entry.name, name + "/")
        elif name not in (SEAL, f".{SEAL}"):
            yield name


def _digest(path: Path, *, sync: bool = False) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
        if sync:
            os.fsync(stream.fileno())
    return digest.hexdigest()


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
