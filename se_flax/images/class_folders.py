"""Images and class folders of a directory, by the same rule for training, evaluation and prediction.

An image is a visible file that ends in one of `SUFFIXES`, at any depth. A class is a visible folder directly below the
root, with or without images. Links are followed, but no folder is read twice.
"""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from se_flax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif")
# Refused instead of skipped, since counts of images are documented as exact.
_OTHER_FORMATS = (".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ppm", ".pgm")
# Folders of operating systems: archives of macOS, thumbnails of a NAS, recycle bins, file system repair.
_SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
SPLITS = ("train", "val", "valid", "validation", "test")


def canonical(name: str) -> str:
    """The name in Unicode's NFC, since macOS writes `é` as two characters and other systems as one."""
    return unicodedata.normalize("NFC", name)


def class_folders(root: str | os.PathLike[str]) -> list[str]:
    """The class folders of a root, in the order of the class numbers in training.

    Args:
      root: the folder above the class folders.

    Returns:
      Names as in the file system, sorted by their canonical spelling.

    Raises:
      UserError: a folder cannot be read, two folders have the same canonical name, or a name is not UTF-8.
    """
    folders: dict[str, str] = {}
    for entry in _visible(root):
        if not _is_folder(entry):
            continue
        name = canonical(entry.name)
        if not _is_text(name):
            raise UserError(f"the name of the folder {entry.path!r} is not UTF-8, so it names no class; rename it")
        if name in folders:
            raise UserError(
                f"{os.fspath(root)} has two folders named {name!r} (in two spellings of Unicode); rename one"
            )
        folders[name] = entry.name
    return [folders[name] for name in sorted(folders)]


def pictures_by_class(root: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The images of every class folder of a root.

    Args:
      root: the folder above the class folders.

    Returns:
      Sorted paths below the class folder, with forward slashes, by class folder in the order of `class_folders`.

    Raises:
      UserError: as for `class_folders` and `pictures_below`.
    """
    seen = {os.path.realpath(root): os.fspath(root)}
    return {name: _walk(os.path.join(root, name), seen) for name in class_folders(root)}


def pictures_below(folder: str | os.PathLike[str]) -> list[str]:
    """The images of a folder at any depth.

    Args:
      folder: the folder.

    Returns:
      Sorted paths below `folder`, with forward slashes.

    Raises:
      UserError: a folder cannot be read, a link leads to a folder that was read already, or an image has a format that
        is not supported.
    """
    return _walk(os.fspath(folder), {})


def pictures_beside_folders(root: str | os.PathLike[str]) -> list[str]:
    """The images directly in a folder, sorted; beside class folders they belong to no class."""
    found = [entry.name for entry in _visible(root) if not _is_folder(entry) and _is_picture(entry.name)]
    return sorted(found, key=canonical)


def are_splits(folders: Iterable[str]) -> bool:
    """Whether these are the splits of a data set (`train`, `val`) rather than its classes."""
    return set(folders) <= set(SPLITS)


def _walk(folder: str, seen: dict[str, str]) -> list[str]:
    """Images below a folder; `seen` has the real paths of all folders read so far, and is updated."""
    found: list[str] = []
    others: list[str] = []
    pending = [("", os.path.realpath(folder))]
    while pending:
        prefix, real = pending.pop()
        path = os.path.join(folder, prefix.removesuffix("/")) if prefix else folder
        if real in seen:
            raise UserError(
                f"{path} is the same folder as {seen[real]}, by a link, so its pictures would count twice; "
                "remove the link"
            )
        seen[real] = path
        for entry in _visible(path):
            name = prefix + entry.name
            if _is_folder(entry):
                # Saves calls of realpath: a folder below a real path has a real path unless it is a link.
                below = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                pending.append((name + "/", below))
            elif _is_picture(name):
                found.append(name)
            elif name.lower().endswith(_OTHER_FORMATS):
                others.append(name)
    if others:
        raise UserError(
            f"{os.path.join(folder, min(others))} is a picture in a format that is not read "
            f"({len(others)} such in {folder}); convert to JPEG or PNG, or move it away; "
            f"read are {', '.join(SUFFIXES)}"
        )
    return sorted(found, key=canonical)


def _visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Entries of a folder without hidden ones (`.ipynb_checkpoints`, `._1.png`) and those of operating systems."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not (entry.name.startswith(".") or entry.name in _SYSTEM)]
    except OSError as error:
        raise UserError(
            f"the folder {os.fspath(folder)} cannot be read ({error.strerror or error}); make it readable, or move it "
            "away"
        ) from error
    return sorted(found, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one.

    Raises:
      UserError: it is a broken link that may have been a class folder.
    """
    try:
        if entry.is_dir():
            return True
    except OSError:  # a link to itself
        pass
    if entry.is_symlink() and not Path(entry.name).suffix and not os.path.exists(entry.path):
        raise UserError(
            f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there; correct or remove it"
        )
    return False


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of another encoding
        return False
    return True
