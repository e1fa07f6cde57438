"""Tables as streams of chunks: CSV, libsvm-like id lists, npz archives. No file is held in memory as a whole.

A value is text until `train.ctr.encode` makes an id of it; an npz archive's ids are treated like text ids, so that
unseen ones are told from seen ones in the same way.
"""

import csv
import glob
import gzip
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from se_flax.checkpoints.files import open_arrays
from se_flax.errors import UserError, closest
from train.ctr.config import Data, expand

KINDS = ("csv", "libsvm", "npz")
_MOST_OF_A_LINE = 1 << 20
_LABELS = {"0": 0.0, "1": 1.0, "-1": 0.0, "+1": 1.0, "0.0": 0.0, "1.0": 1.0, "-1.0": 0.0}


class Chunk(NamedTuple):
    """Some rows.

    Attributes:
      labels: float32 [n], 0 or 1.
      columns: the values of every field, n texts each.
    """

    labels: np.ndarray
    columns: tuple[Sequence[str], ...]

    def where(self, mask: np.ndarray) -> "Chunk":
        """The rows where a bool [n] is true."""
        return Chunk(self.labels[mask], tuple(list(itertools.compress(column, mask)) for column in self.columns))


@dataclass(frozen=True)
class Table:
    """A table that can be read again and again.

    Attributes:
      name: for messages.
      fields: names of the fields, in the order of a chunk's columns.
      numeric: those of them that hold numbers.
      read: starts reading from the first row.
    """

    name: str
    fields: tuple[str, ...]
    numeric: frozenset[str]
    read: Callable[[], Iterator[Chunk]]

    def part(self, low: float, high: float, seed: int) -> "Table":
        """A random share of the rows, the same at every reading and for every chunk size.

        Args:
          low: rows whose random number in [0, 1) is at least this ...
          high: ... and below this.
          seed: of the numbers; parts of one seed with disjoint ranges are disjoint.

        Returns:
          The table of these rows.
        """

        def read() -> Iterator[Chunk]:
            rng = np.random.default_rng(seed)
            for chunk in self.read():
                numbers = rng.random(len(chunk.labels))
                kept = chunk.where((numbers >= low) & (numbers < high))
                if len(kept.labels):
                    yield kept

        return Table(self.name, self.fields, self.numeric, read)


def _label(text: str, where: str, line: int) -> float:
    value = _LABELS.get(text.strip())
    if value is None:
        raise UserError(f"the label in line {line} of {where} is {text!r}; a label is 0 or 1 (or -1 for 0)")
    return value


def _rows(lines: Iterable[str], where: str, delimiter: str) -> Iterator[list[str]]:
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(
            f"line {reader.line_num} of {where} is no CSV ({error}); mend the line, or set data.delimiter"
        ) from error


def read_csv(
    lines: Iterable[str],
    where: str,
    *,
    names: Sequence[str],
    label: str,
    fields: Sequence[str],
    delimiter: str = ",",
    chunk_rows: int,
) -> Iterator[Chunk]:
    """Reads comma-separated lines, no further ahead than a chunk.

    Args:
      lines: of the file.
      where: its name, for messages.
      names: of all columns; empty when the first line has them.
      label: the column with 0 or 1.
      fields: the columns to read.
      delimiter: between values.
      chunk_rows: rows of a chunk; the last one may have fewer.

    Yields:
      The chunks.

    Raises:
      UserError: a column that is not there, a row with another number of values, or a label that is none.
    """
    reader = _rows(lines, where, delimiter)
    line = 0
    if not names:
        names, line = [name.strip() for name in next(reader, [])], 1
    index = {name: i for i, name in enumerate(names)}
    for name in (label, *fields):
        if name not in index:
            raise UserError(
                f"{where} has no column {name!r}; {closest(name, index)} (data.columns names them where the file does "
                "not)"
            )
    wanted = [index[name] for name in fields]
    while rows := list(itertools.islice(reader, chunk_rows)):
        for offset, row in enumerate(rows, line + 1):
            if row and len(row) != len(names):
                raise UserError(
                    f"line {offset} of {where} has {len(row)} values, and there are {len(names)} columns; "
                    "mend the line, or set data.delimiter or data.columns"
                )
        labels = [_label(row[index[label]], where, n) for n, row in enumerate(rows, line + 1) if row]
        line += len(rows)
        columns = list(zip(*(row for row in rows if row), strict=True))
        if columns:
            yield Chunk(np.asarray(labels, np.float32), tuple(columns[i] for i in wanted))


def _id(item: str, where: str, line: int) -> str:
    """The id of `id`, `id:1` or `field:id:1`."""
    parts = item.split(":")
    if len(parts) == 1:
        return item
    if len(parts) > 3 or parts[-1] not in ("1", "1.0"):
        raise UserError(
            f"{item!r} in line {line} of {where} is no id; an entry is id, id:1 or field:id:1, and numbers go in as "
            "columns of a CSV file"
        )
    return parts[-2]


def read_libsvm(lines: Iterable[str], where: str, *, fields: int = 0, chunk_rows: int) -> Iterator[Chunk]:
    """Reads lines `label id:1 id:1 ...`, no further ahead than a chunk; the place in a line is the field.

    Args:
      lines: of the file; empty ones and those that start with # are passed over.
      where: its name, for messages.
      fields: ids per line; 0 takes the first line's.
      chunk_rows: rows of a chunk; the last one may have fewer.

    Yields:
      The chunks.

    Raises:
      UserError: a line with another number of ids, an entry that is no id, or a label that is none.
    """
    numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#"))
    while block := list(itertools.islice(numbered, chunk_rows)):
        labels, rows = [], []
        for n, line in block:
            label, *items = line.split()
            fields = fields or len(items)
            if len(items) != fields or not items:
                raise UserError(
                    f"line {n} of {where} has {len(items)} ids, and {fields} are expected: the place in the line is "
                    "the field, so every line has as many"
                )
            labels.append(_label(label, where, n))
            rows.append([_id(item, where, n) for item in items])
        yield Chunk(np.asarray(labels, np.float32), tuple(zip(*rows, strict=True)))


def read_arrays(ids: np.ndarray, labels: np.ndarray, *, chunk_rows: int) -> Iterator[Chunk]:
    """Cuts arrays into chunks.

    Args:
      ids: integers [n, fields].
      labels: 0 or 1, [n].
      chunk_rows: rows of a chunk.

    Yields:
      The chunks.
    """
    for start in range(0, len(ids), chunk_rows):
        part = ids[start : start + chunk_rows]
        yield Chunk(
            labels[start : start + chunk_rows].astype(np.float32),
            tuple(part[:, f].astype(str).tolist() for f in range(ids.shape[1])),
        )


def _files(pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern))
    if not files:
        raise UserError(f"there is no file {pattern!r}; give the path of one, or a pattern with *")
    return files


def _lines(path: str) -> Iterator[str]:
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            # Not whole lines: a packed file of a megabyte can hold one of a gigabyte.
            for number, line in enumerate(iter(lambda: stream.readline(_MOST_OF_A_LINE), ""), 1):
                if len(line) == _MOST_OF_A_LINE:
                    raise UserError(f"line {number} of {path} is longer than {_MOST_OF_A_LINE:,} characters; mend it")
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); give another, or pack it again") from error


def _open_csv(pattern: str, data: Data) -> Table:
    files = _files(pattern)
    numeric, categorical = expand(data.numeric), expand(data.categorical)
    fields = numeric + categorical
    if not fields:
        raise UserError(
            "data.numeric and data.categorical are empty; name the columns to use, such as --config.data.numeric=I1-I13"
        )
    expand(f"{data.numeric},{data.categorical}")  # a column in both is one too many
    delimiter = data.delimiter.replace("\\t", "\t")
    if len(delimiter) != 1 or delimiter in '\r\n"':
        raise UserError(
            f"got data.delimiter={data.delimiter!r}; give one character that is no quote and no end of a line"
        )

    def read() -> Iterator[Chunk]:
        for path in files:
            yield from read_csv(
                _lines(path),
                path,
                names=expand(data.columns),
                label=data.label,
                fields=fields,
                delimiter=delimiter,
                chunk_rows=data.chunk_rows,
            )

    return Table(pattern, fields, frozenset(numeric), read)


def _open_libsvm(pattern: str, data: Data) -> Table:
    files = _files(pattern)
    first = next(read_libsvm(_lines(files[0]), files[0], chunk_rows=1), None)
    if first is None:
        raise UserError(f"{files[0]} has no rows; give a file with lines such as '1 266:1 1244:1'")
    count = len(first.columns)

    def read() -> Iterator[Chunk]:
        for path in files:
            yield from read_libsvm(_lines(path), path, fields=count, chunk_rows=data.chunk_rows)

    return Table(pattern, tuple(f"field{i}" for i in range(count)), frozenset(), read)


def _open_npz(text: str, data: Data) -> Table:
    path, _, name = text.rpartition(":")
    if not path:
        raise UserError(f"got npz:{text}; give npz:<path>:<name>, where <name>_ids and <name>_y are arrays of the file")
    wanted = (f"{name}_ids", f"{name}_y")
    with open_arrays(_files(path)[0]) as arrays:
        for array in wanted:
            if array not in arrays:
                raise UserError(f"{path} has no array {array!r}; {closest(array, list(arrays))}")
        first, second = (arrays[array] for array in wanted)
        if len(first.shape) != 2 or first.dtype.kind not in "iu" or second.shape != first.shape[:1]:
            raise UserError(
                f"{wanted[0]} of {path} is {first.dtype} {first.shape} and {wanted[1]} {second.shape}; "
                "integers [rows, fields] and [rows] are expected"
            )
        ids, labels = np.asarray(first), np.asarray(second)
    if not np.isin(labels, (0, 1)).all():
        raise UserError(f"{wanted[1]} of {path} has values other than 0 and 1; a label is 0 or 1")
    fields = tuple(f"field{i}" for i in range(ids.shape[1]))
    return Table(text, fields, frozenset(), lambda: read_arrays(ids, labels, chunk_rows=data.chunk_rows))


def open_table(source: str, data: Data) -> Table:
    """Opens a table.

    Args:
      source: `csv:<path>`, `libsvm:<path>` (both with * for several files, and .gz) or `npz:<path>:<name>`.
      data: the settings of columns and chunks.

    Returns:
      The table; nothing but its first row was read, an npz archive apart.

    Raises:
      UserError: an unknown kind, no such file or array, or columns that do not fit.
    """
    kind, _, rest = source.partition(":")
    openers = {"csv": _open_csv, "libsvm": _open_libsvm, "npz": _open_npz}
    if kind not in openers or not rest:
        raise UserError(f"unknown table {source!r}; give csv:<path>, libsvm:<path> or npz:<path>:<name>")
    return openers[kind](rest, data)


class Splits(NamedTuple):
    """The rows to train on, to evaluate on, and to test on at the end, if any."""

    train: Table
    eval: Table
    test: Table | None


def open_splits(data: Data) -> Splits:
    """Opens the tables of a run; what has no file of its own is a share of the training rows.

    Raises:
      UserError: see `open_table`; files with different fields.
    """
    whole = open_table(data.train, data)
    eval_share = 0.0 if data.eval else data.eval_fraction
    test_share = 0.0 if data.test else data.test_fraction
    held = eval_share + test_share
    train = whole.part(held, 1.0, data.split_seed) if held else whole
    eval_ = open_table(data.eval, data) if data.eval else whole.part(0.0, eval_share, data.split_seed)
    test = open_table(data.test, data) if data.test else None
    if test is None and test_share:
        test = whole.part(eval_share, held, data.split_seed)
    for table in (eval_, test):
        if table is not None and table.fields != whole.fields:
            raise UserError(
                f"{table.name} has {len(table.fields)} fields and {whole.name} has {len(whole.fields)}; "
                "all tables of a run have the same"
            )
    return Splits(train, eval_, test)
