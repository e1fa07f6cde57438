"""Batches of table rows: encoded, shuffled through a buffer, of one size."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from train.ctr.encode import Encoder
from train.ctr.sources import Table

Batch = dict[str, np.ndarray]


class Block(NamedTuple):
    """Encoded rows: ids int32 [n, F], labels float32 [n]."""

    ids: np.ndarray
    labels: np.ndarray


def encoded(table: Table, encoder: Encoder) -> Iterator[Block]:
    """The rows of a table in their order, chunk by chunk."""
    for chunk in table.read():
        yield Block(encoder(chunk.columns), chunk.labels)


def shuffled(blocks: Iterable[Block], rows: int, seed: Sequence[int]) -> Iterator[Block]:
    """Shuffles a stream through a buffer: every row comes out once, at most a buffer and a block later.

    Args:
      blocks: the stream.
      rows: size of the buffer; 0 leaves the order as it is. One as large as the stream shuffles it uniformly.
      seed: of the order.

    Yields:
      Blocks.
    """
    if not rows:
        yield from blocks
        return
    rng = np.random.default_rng(seed)
    held: Block | None = None
    waiting: list[Block] = []
    for block in blocks:
        if held is None:
            waiting.append(block)
            if sum(len(each.labels) for each in waiting) >= rows:
                held, waiting = _permuted(waiting, rng), []
            continue
        size = len(held.labels)
        for start in range(0, len(block.labels), size):
            labels = block.labels[start : start + size]
            places = rng.choice(size, len(labels), replace=False)
            out = Block(held.ids[places], held.labels[places])
            held.ids[places], held.labels[places] = block.ids[start : start + size], labels
            yield out
    if waiting or held is not None:
        yield _permuted(waiting if held is None else [held], rng)


def _permuted(blocks: Sequence[Block], rng: np.random.Generator) -> Block:
    ids = np.concatenate([block.ids for block in blocks])
    labels = np.concatenate([block.labels for block in blocks])
    order = rng.permutation(len(labels))
    return Block(ids[order], labels[order])


def batches(blocks: Iterable[Block], size: int) -> Iterator[Batch]:
    """Cuts a stream into batches of one size, so that one compiled step takes them all.

    Args:
      blocks: the stream.
      size: rows of a batch.

    Yields:
      `ids` int32 [size, F], `labels` float32 [size] and `weights` float32 [size]: 1, and 0 for the copies of the last
      row that fill up the last batch.
    """
    kept: list[Block] = []
    count = 0
    for block in blocks:
        start = 0
        while count + len(block.labels) - start >= size:
            stop = start + size - count
            kept.append(Block(block.ids[start:stop], block.labels[start:stop]))
            yield _joined(kept, size)
            kept, count, start = [], 0, stop
        if start < len(block.labels):
            kept.append(Block(block.ids[start:], block.labels[start:]))
            count += len(block.labels) - start
    if kept:
        yield _joined(kept, size)


def _joined(blocks: Sequence[Block], size: int) -> Batch:
    ids = np.concatenate([block.ids for block in blocks])
    labels = np.concatenate([block.labels for block in blocks])
    count = len(labels)
    fill = (0, size - count)
    return {
        "ids": np.pad(ids, (fill, (0, 0)), mode="edge"),
        "labels": np.pad(labels, fill, mode="edge"),
        "weights": (np.arange(size) < count).astype(np.float32),
    }
