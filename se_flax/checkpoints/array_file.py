"""Lazily read arrays of a file, and the checks that all file formats share.

Names, shapes, dtypes and sizes that a file declares are checked before they are used. Exceptions that libraries raise
for a damaged file become one sentence about that file.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from se_flax.errors import UserError

MAX_ARRAYS = 100_000  # the largest networks have a few thousand; each entry costs memory before its name is checked
MAX_NAME = 512  # characters; the longest known names have under 100
MAX_HEADER_BYTES = 64 << 20  # 100,000 entries with the longest names fit
MAX_RANK = 32  # NumPy's own bound until 2.0; kernels have rank 5
MAX_RATIO = 1100  # of declared to stored bytes; deflate, the usual compression, reaches 1,032 at most
# Beyond a gigabyte in all: trained weights hardly shrink, and a small file of zeros must not fill the memory.
MAX_TOTAL_RATIO, FREE_BYTES = 20, 1 << 30

BFLOAT16 = np.dtype(jnp.bfloat16)
_TO_FLOAT32 = ("float16", "bfloat16", "float64")
DTYPES = {
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "bfloat16": BFLOAT16,
    "bool": np.dtype(bool),
}


def is_raw_bfloat16(dtype: np.dtype) -> bool:
    """Whether a dtype is `|V2`, raw bytes, as which NumPy saves bfloat16.

    NumPy saves all types that are not its own as raw bytes. Of JAX's types only bfloat16 is one with two bytes.
    """
    return dtype == np.dtype("V2")


def raw_bfloat16_notes(count: int) -> tuple[str, ...]:
    """A note on `count` arrays of this dtype, if any."""
    return (f"{count} arrays of dtype |V2 were read as bfloat16, which NumPy saves under that name",) if count else ()


@dataclass(frozen=True)
class LazyArray:
    """An array in a file.

    Attributes:
      shape: as the file declares it.
      dtype: as stored; `numpy.asarray` turns float16, bfloat16 and float64 into float32.
      read: reads the array; raises UserError if the file does not hold an array of this shape and dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array in a file cannot be read without a copy; use copy=None")
        value = self.read()
        return value if dtype is None else value.astype(dtype, copy=False)


@dataclass(frozen=True)
class ArrayFile(Mapping[str, LazyArray]):
    """The arrays of an open file by name.

    Attributes:
      arrays: the same as a plain dictionary.
      metadata: metadata in the header of a .safetensors file; empty for other formats.
      notes: a sentence on each deviation from what the file declares.
    """

    arrays: Mapping[str, LazyArray]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LazyArray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


class InvalidFile(ValueError):
    """An error in a file, as a sentence without the file's path; see `as_user_error`."""


@dataclass
class Source:
    """A file being read.

    Attributes:
      path: of the file.
      size: its actual size in bytes.
      closing: resources to close at the end.
      closed: whether they are closed.
    """

    path: Path
    size: int
    closing: contextlib.ExitStack
    closed: bool = False


@contextlib.contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """Turns any exception from reading a file into a `UserError`, one sentence about that file."""
    try:
        yield
    except UserError:
        raise
    except InvalidFile as error:
        raise UserError(f"{path}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{path} holds more than fits into memory; free some, or use a smaller file") from error
    except Exception as error:  # which exception depends on where the file is damaged
        raise UserError(
            f"{path} is damaged or of another format ({one_line(error)}); download or save it again"
        ) from error


def one_line(text: object) -> str:
    """The first line of an error or name, shortened and printable."""
    one_line = next(iter(str(text).strip().splitlines()), "") or type(text).__name__
    one_line = "".join(c if c.isprintable() else "?" for c in one_line)
    return one_line if len(one_line) <= 160 else one_line[:157] + "..."


def check_name(name: str) -> None:
    """Refuses a name that could not be exported safely.

    Args:
      name: of an array, parts joined by `/` or `.`.

    Raises:
      InvalidFile: the name is empty or too long, has unprintable characters, or could lead out of a folder as a path.
    """
    if not 0 < len(name) <= MAX_NAME:
        raise InvalidFile(f"the name {one_line(name)!r} has {len(name)} characters; allowed: 1 to {MAX_NAME}")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise InvalidFile(
            f"the name {one_line(name)!r} could be misused as a path; allowed: printable parts joined by / or ."
        )


def nbytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of an array, as an exact integer."""
    return math.prod(shape) * dtype.itemsize


def lazy(source: Source, name: str, shape: Any, dtype: Any, read: Callable[[], Any]) -> LazyArray:
    """An array as the file declares it, after all checks that need no data."""
    check_name(name)
    raw = isinstance(dtype, np.dtype) and is_raw_bfloat16(dtype)
    kept = BFLOAT16 if raw else DTYPES.get(str(getattr(dtype, "name", dtype)))
    if kept is None:
        nameless = isinstance(dtype, np.dtype) and dtype.kind == "V"
        why = ", raw bytes as NumPy saves types that it does not know; save it as float32" if nameless else ""
        raise InvalidFile(f"array {name!r} has dtype {one_line(dtype)}{why}; allowed: {', '.join(DTYPES)}")
    shape = tuple(shape)
    # NumPy computes sizes in 64 bits, which must not overflow, also for arrays with an axis of length zero.
    sane = len(shape) <= MAX_RANK and all(type(n) is int and n >= 0 for n in shape)
    if not sane or math.prod(max(n, 1) for n in shape) * kept.itemsize >= 1 << 63:
        raise InvalidFile(f"array {name!r} has the impossible shape {one_line(shape)}; save it again")
    return LazyArray(shape, kept, partial(_read, source, name, shape, kept, read))


def _read(source: Source, name: str, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], Any]) -> np.ndarray:
    if source.closed:
        raise ValueError(f"{source.path} is closed; read its arrays inside the with block")
    with as_user_error(source.path):
        value = np.asarray(read())
        value = value.view(BFLOAT16) if is_raw_bfloat16(value.dtype) else value
        if value.shape != shape or value.dtype.name != dtype.name:
            raise InvalidFile(f"array {name!r} is {value.dtype.name} {value.shape}, declared as {dtype.name} {shape}")
        with np.errstate(over="raise"):  # a float64 beyond float32's range is not a weight
            return value.astype(np.float32 if dtype.name in _TO_FLOAT32 else dtype, copy=False)


def check_count(count: int) -> None:
    """Refuses more than `MAX_ARRAYS` arrays."""
    if count > MAX_ARRAYS:
        raise InvalidFile(f"it holds over {MAX_ARRAYS:,} arrays, more than any network; give one with fewer")


def check_total(size: int, arrays: Mapping[str, LazyArray]) -> None:
    """Refuses a file whose arrays take far more memory than trained weights in a file of its size can.

    Args:
      size: of the file in bytes.
      arrays: by name.

    Raises:
      InvalidFile: they do.
    """
    declared = sum(nbytes(array.shape, array.dtype) for array in arrays.values())
    # More than compression can save is no question of memory: reading the array says what is wrong.
    if max(FREE_BYTES, size * MAX_TOTAL_RATIO) < declared <= size * MAX_RATIO:
        raise InvalidFile(
            f"its arrays take {declared:,} bytes of memory, {declared // max(size, 1):,} times the file's {size:,}; "
            "trained weights hardly shrink: save them without compression"
        )
