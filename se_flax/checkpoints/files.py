"""Readers for untrusted weight files: safetensors, NumPy, HDF5, PyTorch, Orbax.

    with open_arrays("model.safetensors") as arrays:
        arrays["conv1.weight"].shape
        np.asarray(arrays["conv1.weight"])

Opening reads only names, shapes and dtypes, so that a caller can compare them with its network before it reads data. A
file whose header does not match its content raises a `UserError`. Nothing in a file is executed, and no memory is
allocated for sizes that are only declared.
"""

import contextlib
import errno
import os
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.numpy

from se_flax.checkpoints.array_file import (
    BFLOAT16,
    DTYPES,
    ArrayFile,
    InvalidFile,
    Source,
    as_user_error,
    check_count,
    check_name,
    check_total,
)
from se_flax.checkpoints.formats import open_h5, open_npz, open_safetensors, open_torch
from se_flax.checkpoints.orbax import open_orbax
from se_flax.errors import UserError

ALLOWED = ".safetensors, .npz, .h5, .hdf5, .pth, .pt, .bin, .ckpt, .tar, or the folder of an Orbax checkpoint"

_ZIP, _HDF5 = b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"
_Reader = Callable[[Source], ArrayFile]
# Reader and first bytes by suffix; .safetensors files have no fixed first bytes.
_READERS: dict[str, tuple[_Reader, tuple[bytes, ...]]] = {
    ".safetensors": (open_safetensors, ()),
    ".npz": (open_npz, (_ZIP,)),
    **dict.fromkeys((".h5", ".hdf5"), (open_h5, (_HDF5,))),
    # Lightning writes .ckpt; PyTorch's own tutorials save a pickle as .tar.
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".tar"), (open_torch, (_ZIP, b"\x80"))),
}
_LOOKS = (
    (_ZIP, "a ZIP archive"),
    (_HDF5, "an HDF5 file"),
    (b"\x93NUMPY", "a single .npy array"),
    (b"\x80", "a Python pickle"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for"),
    (b"<", "a web page"),
)
_SPECIAL = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextlib.contextmanager
def open_arrays(path: str | os.PathLike[str]) -> Iterator[ArrayFile]:
    """Opens a file of arrays; the suffix tells its format.

    A PyTorch file may hold a state dict, or a dictionary with a state dict under a name that training programs use
    (`se_flax.checkpoints.prefix.unwrapped`). Reading it needs PyTorch, which is made to load plain arrays only. An
    Orbax folder may be a checkpoint, or a step of a run with the item `state`; its `params` and `batch_stats` are read,
    from the moving average `ema` if there is one. Groups of an HDF5 file and parts of an Orbax tree are joined by `/`.

    Args:
      path: one of `ALLOWED`.

    Yields:
      The arrays by name, to be read before the block ends. `numpy.asarray` converts float16, bfloat16 and float64 to
      float32 and keeps integers.

    Raises:
      UserError: the file is missing, not a regular file, of another format, damaged, or too large to be a network;
        reading an array can raise it too.
    """
    path = Path(path)
    with contextlib.ExitStack() as closing:
        with as_user_error(path):
            source, reader = _identify(path, closing)
            arrays = reader(source)
            check_count(len(arrays))
            if source.size:  # a folder has its own bound
                check_total(source.size, arrays)
        try:
            yield arrays
        finally:
            source.closed = True


def _identify(path: Path, closing: contextlib.ExitStack) -> tuple[Source, _Reader]:
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            return Source(path, 0, closing), open_orbax
        special = next((what for test, what in _SPECIAL if test(info.st_mode)), None)
        if special:  # opening it could block or never end
            raise UserError(f"{path} is {special}; give a regular file: {ALLOWED}")
        suffix = path.suffix.lower()
        if suffix == ".keras":
            raise UserError(f"{path} is a Keras archive; unzip it and give the model.weights.h5 in it")
        if suffix not in _READERS:
            raise UserError(f"{path} ends in {suffix or 'nothing'}; allowed: {ALLOWED}")
        with path.open("rb") as stream:
            head = stream.read(32)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give {ALLOWED}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that can: {ALLOWED}") from error
    reader, starts = _READERS[suffix]
    if suffix == ".safetensors":
        fits = 10 <= 8 + int.from_bytes(head[:8], "little") <= info.st_size and head[8:9] == b"{"
    else:
        fits = head.startswith(starts)
    if not fits:
        looks = next(
            (what for start, what in _LOOKS if head.startswith(start)), f"damaged, it begins with {head[:8]!r}"
        )
        raise UserError(f"{path} is {looks if head else 'empty'}, no {suffix} file; download or save it again")
    return Source(path, info.st_size, closing), reader


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays to a file atomically: an older file stays until the new one is complete.

    Args:
      path: ends in `.safetensors` or `.npz`.
      arrays: arrays by name, also those of an open file. bfloat16 becomes float32 in `.npz`, whose format lacks it.
      metadata: text for the header of a `.safetensors` file; `.npz` has no place for it.

    Raises:
      UserError: the suffix is another, a name or dtype could not be read back, the disk is full, or the folder is
        missing or not writable.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".npz"):
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; arrays are written to .safetensors or .npz")
    try:
        check_count(len(arrays))
        for name in arrays:
            check_name(name)
        values = {name: np.asarray(value, order="C") for name, value in arrays.items()}
        for name, value in values.items():
            if value.dtype.name not in DTYPES:
                raise InvalidFile(f"array {name!r} has dtype {value.dtype}; allowed: {', '.join(DTYPES)}")
    except InvalidFile as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    with replacing(path) as stream:
        if suffix == ".npz":
            _write_npz(stream, values)
        else:
            stream.write(safetensors.numpy.save(values, None if metadata is None else dict(metadata)))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file that replaces the target when the block ends without an error.

    Args:
      path: the target; an existing file is replaced.

    Yields:
      The temporary file to write into, beside the target.

    Raises:
      UserError: the disk is full, or the folder is missing or not writable.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # a crash after the renaming must not leave an empty file
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason, remedy = ("the disk is full", "free some space") if full else (error.strerror, "give another path")
        raise UserError(f"{path} could not be written ({reason}), nothing was changed; {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write_npz(stream: IO[bytes], values: dict[str, np.ndarray]) -> None:
    # Not numpy.savez: it takes names as keyword arguments, and `file` is its own.
    with zipfile.ZipFile(stream, "w") as archive:
        for name, value in values.items():
            with archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True) as member:
                value = value.astype(np.float32) if value.dtype == BFLOAT16 else value
                np.lib.format.write_array(member, value, allow_pickle=False)
