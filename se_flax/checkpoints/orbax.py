"""Reader of Orbax checkpoints: a folder with one tree of arrays, or a step of a run with several."""

import contextlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from se_flax.checkpoints.array_file import (
    MAX_HEADER_BYTES,
    MAX_RATIO,
    ArrayFile,
    InvalidFile,
    Source,
    check_count,
    lazy,
    nbytes,
)
from se_flax.checkpoints.prefix import MAX_PARTS, shared_parts, taken_off

MAX_FILES = 1_000_000  # Orbax writes a handful per array if it does not pack them
_TREE = "_METADATA"
_COLLECTIONS = ("params", "batch_stats")

Names = tuple[str, ...]


def open_orbax(source: Source) -> ArrayFile:
    """Reads names and shapes of a checkpoint's variables.

    Args:
      source: a folder.

    Returns:
      Arrays named `params/layer1_0/conv1/kernel`; reading one array reads all of them.
    """
    import orbax.checkpoint as ocp  # slow to import, and only this format needs it

    folder = _tree_folder(source.path)
    source.size = _check_files(folder)
    leaves, notes = _variables(_leaf_paths(folder))
    with quiet(), ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
    found = {name: _leaf(tree, path) for name, path in leaves.items()}

    @cache
    def restored() -> dict[Names, np.ndarray]:
        # Arrays may be compressed, but the ratio over all of them is bounded.
        declared = sum(nbytes(array.shape, array.dtype) for array in arrays.values())
        if declared > source.size * MAX_RATIO:
            raise InvalidFile(
                f"its arrays declare {declared:,} bytes, which its {source.size:,} bytes cannot hold; save it again"
            )
        item = unflatten_dict(dict.fromkeys(leaves.values(), 0))
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        with quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            return flatten_dict(checkpointer.restore(folder, args=args))

    arrays = {
        name: lazy(source, name, meta.shape, meta.dtype, partial(_pick, restored, leaves[name]))
        for name, meta in found.items()
    }
    return ArrayFile(arrays, notes=notes)


def _pick(restored: Callable[[], dict[Names, np.ndarray]], path: Names) -> np.ndarray:
    return restored()[path]


def _tree_folder(path: Path) -> Path:
    """The folder with the tree of arrays: the given one, or its item `state`, or its only item with one."""
    path = path.absolute()  # Orbax requires it
    if (path / _TREE).is_file():
        return path
    items = sorted(entry.name for entry in os.scandir(path) if (path / entry.name / _TREE).is_file())
    if "state" in items or len(items) == 1:
        return path / ("state" if "state" in items else items[0])
    if items:
        raise InvalidFile(f"it holds several trees of arrays; give the folder of one: {', '.join(items[:8])}")
    if (path / "checkpoints").is_dir():
        raise InvalidFile("it is a run's folder; give that of one step, such as checkpoints/1000 in it")
    raise InvalidFile(f"it is a folder without an Orbax checkpoint (no {_TREE} in it); give that of one step")


def _check_files(folder: Path) -> int:
    """Total size of a folder's files in bytes; all must be regular files."""
    size = count = 0
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            count += 1
            info = path.stat()
            if not stat.S_ISREG(info.st_mode) and (name in files or path.is_symlink()):
                raise InvalidFile(f"{path.name!r} in it is no regular file; copy the checkpoint again")
            size += info.st_size if name in files else 0
            if count > MAX_FILES:
                raise InvalidFile(
                    f"it holds over {MAX_FILES:,} files, more than any checkpoint; give the folder of one"
                )
    return size


def _leaf_paths(folder: Path) -> list[Names]:
    """Paths of the arrays in a tree, from its JSON; checked, since Orbax uses them as file names."""
    path = folder / _TREE
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise InvalidFile(f"its {_TREE} is longer than {MAX_HEADER_BYTES:,} bytes; give a checkpoint of one network")
    entries = json.loads(path.read_bytes())["tree_metadata"].values()
    check_count(len(entries))
    leaves = []
    for entry in entries:
        parts = tuple(str(key["key"]) for key in entry["key_metadata"])
        if any(part in ("", ".", "..") or "/" in part or not part.isprintable() for part in parts):
            raise InvalidFile(f"the name {'/'.join(parts)!r} could be misused as a path; save it under another")
        if not entry["value_metadata"].get("skip_deserialize"):  # true of None and of an empty dictionary
            leaves.append(parts)
    return leaves


def _variables(leaves: list[Names]) -> tuple[dict[str, Names], tuple[str, ...]]:
    """Paths of a network's variables by name, from the moving average if there is one, and notes for the user."""
    # The program that saved them may add common parts: {"model": {"params": ..., "batch_stats": ...}}.
    for depth in range(min(shared_parts(leaves), MAX_PARTS) + 1):
        chosen: dict[str, Names] = {}
        for collection in _COLLECTIONS:
            averaged = {"/".join(p[depth + 1 :]): p for p in leaves if p[depth : depth + 2] == ("ema", collection)}
            chosen |= averaged or {"/".join(p[depth:]): p for p in leaves if p[depth : depth + 1] == (collection,)}
        if chosen:
            return chosen, (taken_off("/".join(leaves[0][:depth]) + "/"),) if depth else ()
    tops = ", ".join(sorted({path[0] for path in leaves})[:8])
    names = " nor ".join(_COLLECTIONS)
    raise InvalidFile(f"it has neither {names} at its top level, but: {tops}; save variables under these names")


def _leaf(tree: Any, path: Names) -> Any:
    for part in path:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    if not hasattr(tree, "shape") or not hasattr(tree, "dtype"):
        raise InvalidFile(f"{'/'.join(path)!r} is no array; save variables as dictionaries of arrays")
    return tree


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Orbax's log."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
