"""Encoding of table values as ids: one range of embedding rows per field, one id for missing values.

Ids within a field start with 0, the missing value. Numbers are put into buckets, categories are looked up in a
vocabulary or hashed. What must be learned from the training rows (`fit`) takes one pass over them and memory for the
vocabularies and for a sample of the numbers, not for the rows.
"""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from se_flax.errors import UserError
from train.ctr.config import Data
from train.ctr.sources import Table

# Quantiles come from at most so many values of a field, drawn at random: the share of rows below an edge is then off by
# less than 0.003 or so, and one field takes 1.6 MB.
SAMPLE = 100_000
# floor(log(x)^2) of the largest number that gets a bucket of its own, about 5e9.
LOG_BUCKETS = 500
_BELOW = 4  # buckets for x < 0, and for x in [0, 1), [1, 2) and [2, 2], which the logarithm does not tell apart


class Part(Protocol):
    """What turns one field's values into ids."""

    @property
    def size(self) -> int:
        """Number of ids, the missing value's included."""

    def encode(self, column: Sequence[str]) -> np.ndarray:
        """Args: n texts, "" for a missing value. Returns: int64 [n] in [0, size)."""


def numbers(column: Sequence[str]) -> np.ndarray:
    """Reads numbers.

    Args:
      column: texts; "" and nan are missing.

    Returns:
      float64 [n], NaN where missing.

    Raises:
      UserError: a text that is no number.
    """
    try:
        return np.asarray([float(text or "nan") for text in column], np.float64)
    except ValueError:
        bad = next(text for text in column if not _is_number(text))
        raise UserError(
            f"got {bad!r} in a numeric column; it must be a number or empty (data.missing names another text for "
            "missing values), or else name the column in data.categorical"
        ) from None


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class LogBuckets:
    """Buckets floor(log(x)^2) for x > 2, as in the winning solution of Criteo's contest; small numbers apart.

    Attributes:
      limit: larger values of floor(log(x)^2) share the last bucket.
    """

    limit: int = LOG_BUCKETS

    @property
    def size(self) -> int:
        """Missing; below 0, and the integers 0, 1, 2; then one for each value of floor(log(x)^2)."""
        return 1 + _BELOW + self.limit + 1

    def encode(self, column: Sequence[str]) -> np.ndarray:
        """Args: n texts. Returns: int64 [n]."""
        x = numbers(column)
        large = np.floor(np.log(np.clip(x, 2.0, np.finfo(np.float64).max)) ** 2)
        ids = np.where(x > 2, _BELOW + np.minimum(large, self.limit), np.floor(np.clip(x, -1.0, 2.0)) + 1)
        return np.where(np.isnan(x), 0, ids + 1).astype(np.int64)


@dataclass(frozen=True)
class QuantileBuckets:
    """Buckets with about as many training rows each.

    Attributes:
      edges: ascending; a number is in the bucket after the last edge that is not above it.
    """

    edges: tuple[float, ...]

    @property
    def size(self) -> int:
        """Missing, and one bucket more than edges."""
        return len(self.edges) + 2

    def encode(self, column: Sequence[str]) -> np.ndarray:
        """Args: n texts. Returns: int64 [n]."""
        x = numbers(column)
        return np.where(np.isnan(x), 0, np.searchsorted(np.asarray(self.edges), x, side="right") + 1)


@dataclass(frozen=True)
class Hashed:
    """CRC-32 of a value's UTF-8 text, modulo the number of buckets: the same on every machine and in every run.

    Attributes:
      field: name of the field, which goes into the hash.
      buckets: number of ids beside the missing value's.
    """

    field: str
    buckets: int

    @property
    def size(self) -> int:
        """Missing, and the buckets."""
        return self.buckets + 1

    def encode(self, column: Sequence[str]) -> np.ndarray:
        """Args: n texts. Returns: int64 [n]."""
        start = zlib.crc32(self.field.encode())
        hashes = (zlib.crc32(text.encode("utf-8", "surrogateescape"), start) if text else -1 for text in column)
        found = np.fromiter(hashes, np.int64, len(column))
        return np.where(found < 0, 0, found % self.buckets + 1)


@dataclass(frozen=True)
class Vocabulary:
    """One id for each known value; unseen and rare ones share id 1.

    Attributes:
      values: the known ones.
    """

    values: tuple[str, ...]

    @property
    def size(self) -> int:
        """Missing, unknown, and the values."""
        return len(self.values) + 2

    @cached_property
    def _index(self) -> dict[str, int]:
        return {"": 0, **{value: i for i, value in enumerate(self.values, 2)}}

    def encode(self, column: Sequence[str]) -> np.ndarray:
        """Args: n texts. Returns: int64 [n]."""
        index = self._index
        return np.fromiter((index.get(text, 1) for text in column), np.int64, len(column))


_PARTS: Mapping[str, Any] = {cls.__name__: cls for cls in (LogBuckets, QuantileBuckets, Hashed, Vocabulary)}


@dataclass(frozen=True)
class Encoder:
    """The encoders of all fields, one after the other in the embedding table.

    Attributes:
      fields: their names.
      parts: one per field.
      missing: text of a missing value, beside the empty one.

    Raises:
      UserError: more ids than int32 can count.
    """

    fields: tuple[str, ...]
    parts: tuple[Part, ...]
    missing: str = ""

    def __post_init__(self) -> None:
        if self.num_ids > np.iinfo(np.int32).max:
            raise UserError(f"the fields have {self.num_ids:,} ids; lower data.hash_buckets or raise data.min_count")

    @property
    def offsets(self) -> np.ndarray:
        """First id of every field, int64 [F]."""
        return np.cumsum([0, *(part.size for part in self.parts[:-1])])

    @property
    def num_ids(self) -> int:
        """Rows of the embedding table."""
        return sum(part.size for part in self.parts)

    def __call__(self, columns: Sequence[Sequence[str]]) -> np.ndarray:
        """Encodes rows.

        Args:
          columns: n texts of every field.

        Returns:
          int32 [n, F].

        Raises:
          UserError: a text in a numeric field that is no number.
        """
        ids = [
            part.encode(cleared(column, self.missing)) + offset
            for part, column, offset in zip(self.parts, columns, self.offsets, strict=True)
        ]
        return np.stack(ids, axis=1).astype(np.int32)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        parts = [{"kind": type(part).__name__, **dataclasses.asdict(part)} for part in self.parts]  # type: ignore[call-overload]
        return {"fields": list(self.fields), "missing": self.missing, "parts": parts}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Encoder":
        """Args: what `to_json` gave, also by way of a JSON file. Returns: an equal encoder."""
        parts = []
        for row in plain["parts"]:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k != "kind"}
            parts.append(_PARTS[row["kind"]](**values))
        return cls(tuple(plain["fields"]), tuple(parts), plain["missing"])


def cleared(column: Sequence[str], missing: str) -> Sequence[str]:
    """A column with the text of missing values made empty."""
    return ["" if text == missing else text for text in column] if missing else column


class _Sample:
    """A uniform sample of a stream of numbers: those with the smallest random keys so far."""

    def __init__(self, seed: Sequence[int]):
        self._rng = np.random.default_rng(seed)
        self._kept = np.empty((2, 0))

    def add(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values)]
        both = np.concatenate([self._kept, np.stack([self._rng.random(len(values)), values])], axis=1)
        if both.shape[1] > SAMPLE:
            both = both[:, np.argpartition(both[0], SAMPLE)[:SAMPLE]]
        self._kept = both

    def edges(self, buckets: int) -> tuple[float, ...]:
        values = self._kept[1]
        if not len(values):
            return ()
        return tuple(np.unique(np.quantile(values, np.arange(1, buckets) / buckets)).tolist())


def fit(table: Table, data: Data) -> Encoder:
    """Learns what the encoders must know from the training rows.

    Args:
      table: the training rows. They are read once, and not at all where nothing need be learned.
      data: the settings.

    Returns:
      The encoder. It does not depend on the order of the rows, but for quantiles of more than 100,000 numbers.

    Raises:
      UserError: a text in a numeric field that is no number, or no rows at all.
    """
    samples: dict[int, _Sample] = {}
    counts: dict[int, Counter[str]] = {}
    for i, name in enumerate(table.fields):
        if name in table.numeric and data.bucketing == "quantile":
            samples[i] = _Sample((data.split_seed, i))
        elif name not in table.numeric and data.encoding == "vocabulary":
            counts[i] = Counter()
    if samples or counts:
        _read(table, data, samples, counts)
    parts: list[Part] = []
    for i, name in enumerate(table.fields):
        if i in samples:
            parts.append(QuantileBuckets(samples[i].edges(data.quantiles)))
        elif i in counts:
            kept = (text for text, n in counts[i].items() if text and n >= data.min_count)
            parts.append(Vocabulary(tuple(sorted(kept))))
        else:
            parts.append(LogBuckets() if name in table.numeric else Hashed(name, data.hash_buckets))
    return Encoder(table.fields, tuple(parts), data.missing)


def _read(table: Table, data: Data, samples: Mapping[int, _Sample], counts: Mapping[int, Counter[str]]) -> None:
    rows = 0
    for chunk in table.read():
        rows += len(chunk.labels)
        columns: Iterable[Sequence[str]] = (cleared(column, data.missing) for column in chunk.columns)
        for i, column in enumerate(columns):
            if i in samples:
                samples[i].add(numbers(column))
            elif i in counts:
                counts[i].update(column)
    if not rows:
        raise UserError(f"{table.name} has no rows to train on; give a file with some, or lower data.eval_fraction")
