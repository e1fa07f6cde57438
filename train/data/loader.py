"""Batches for training and evaluation, the same for every number of hosts, worker processes and restarts.

Training reads one endless stream: the training examples, reshuffled each epoch, each with its own random crop. Batch k
is a fixed slice of that stream, and each host takes a fixed block of it. So the position in the data is one number,
which a checkpoint can store and any number of hosts or workers can continue from.

Worker processes are spawned, so a script that uses `workers > 0` needs `if __name__ == "__main__":`.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from se_flax.errors import UserError
from train.config import Data
from train.data.examples import PrepareEval, PrepareTrain, why_bad
from train.data.sources import DataSplits, Source, open_data
from train.data.workers import ends_explained, prepare_worker

__all__ = [
    "BadImages",
    "DataSplits",
    "Source",
    "TrainLoader",
    "eval_batches",
    "open_data",
    "steps_per_epoch",
    "train_examples",
    "train_loader",
]

Batch = dict[str, np.ndarray]

_MOST_NAMED = 10
_BUFFER_BYTES = 2**30  # decoded batches waiting in this process
_INDICES_AHEAD = 128  # batches of indices waiting in this process
_READ_AT_ONCE = 256  # images of a piece, where the whole split is read
_EVAL_IMAGES_PER_WORKER = 5000  # for fewer images, starting a process costs more than it saves


def steps_per_epoch(num_examples: int, batch_size: int) -> float:
    """Number of batches per epoch; not whole if a batch can span two epochs.

    Args:
      num_examples: size of the training split.
      batch_size: global batch size.

    Returns:
      `num_examples / batch_size`.
    """
    return num_examples / batch_size


class BadImages:
    """Collects images that could not be read (`data.bad_images="skip"`), for the report at the end of a run.

    Each host collects those of its own share; at the end of a run they are put together.

    Attributes:
      train: indices into the training split.
      eval: indices into the evaluation split.
    """

    def __init__(self, splits: DataSplits, data: Data):
        self._splits, self._data = splits, data
        self.train: set[int] = set()
        self.eval: set[int] = set()

    def report(self) -> str | None:
        """The report on unreadable images; `None` if there are none.

        Returns:
          For example `"2 of 3,451 training images could not be read and were replaced: a.jpg (truncated), ..."`.
        """
        lines = []
        for indices, source, what, done in (
            (self.train, self._splits.train, "training", "replaced"),
            (self.eval, self._splits.eval, "evaluation", "left out"),
        ):
            if not indices:
                continue
            # Finds the reasons again, since worker processes do not pass them on.
            training = what == "training"
            named = [
                f"{source.name(index)} ({why_bad(source, index, self._data, training)})"
                for index in sorted(indices)[:_MOST_NAMED]
            ]
            more = f" and {len(indices) - _MOST_NAMED:,} more" if len(indices) > _MOST_NAMED else ""
            lines.append(
                f"{len(indices):,} of {len(source):,} {what} images could not be read and were {done}: "
                + ", ".join(named)
                + more
            )
        return "; ".join(lines) or None


def train_loader(
    splits: DataSplits,
    data: Data,
    *,
    seed: int,
    micro: int = 1,
    start: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
    bad: BadImages | None = None,
    indices: bool = False,
) -> "TrainLoader":
    """The endless stream of training batches.

    Args:
      splits: from `open_data`.
      data: the settings; `batch_size` is global.
      seed: of order and crops.
      micro: number of micro-batches per batch of `batch_size` (gradient accumulation); each `next` returns one.
      start: number of examples already used, over all hosts: steps done times `batch_size`.
      process_index: index of this host; None takes JAX's.
      process_count: number of hosts; None takes JAX's.
      bad: collects images that could not be read.
      indices: leave the images where they are (`train_examples`) and say which ones make a batch.

    Returns:
      An iterator over `{"image": uint8 [b, S, S, 3], "label": int32 [b]}` with b = batch_size / micro / process_count;
      with `indices`, over `{"index": int32 [b]}`, the same examples by their place in the training split.
      The concatenation of the hosts' blocks is the batch of a single host.

    Raises:
      UserError: the seed is out of range, or the batch does not divide into equal parts; while iterating: an image
        could not be read and `data.bad_images` is `error`.
    """
    index, count = _process(process_index, process_count)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is out of range: it must be at least 0 and below 2**32.")
    if micro < 1 or data.batch_size % (micro * count):
        raise UserError(
            f"data.batch_size={data.batch_size} does not divide into {micro} micro-batches on {count} hosts; "
            f"choose a multiple of {max(micro, 1) * count}."
        )
    return TrainLoader(splits, data, seed, data.batch_size // micro, start, index, count, bad, indices)


def train_examples(splits: DataSplits, data: Data, bad: BadImages | None = None) -> Batch:
    """The whole training split, every image as the training batches have it.

    Args:
      splits: from `open_data`.
      data: the settings; a `train_crop` of `train.data.images.FIXED_CROPS`.
      bad: collects images that could not be read.

    Returns:
      `{"image": uint8 [N, S, S, 3], "label": int32 [N]}`, on every host.

    Raises:
      UserError: an image could not be read and `data.bad_images` is `error`.
    """
    total, size = len(splits.train), data.image_size
    whole: Batch = {"image": np.empty((total, size, size, 3), np.uint8), "label": np.empty(total, np.int32)}
    examples = grain.MapDataset.range(total).seed(0).random_map(PrepareTrain(splits.train, data))
    workers = min(data.workers, total // _EVAL_IMAGES_PER_WORKER)
    pieces = _read_ahead(examples.batch(_READ_AT_ONCE), _READ_AT_ONCE * size**2 * 3, workers)
    first = 0
    try:
        with ends_explained():
            for element in pieces:
                piece = dict(element)
                _collect(piece, total, bad.train if bad else None)
                for name, rows in whole.items():
                    rows[first : first + len(piece["label"])] = piece[name]
                first += len(piece["label"])
    finally:
        pieces.close()
    return whole


class TrainLoader(grain.DatasetIterator[Batch]):
    """Iterator over training batches, with a position that can be saved and restored; see `train_loader`.

    The state is plain JSON and the same on every host, so one host can save it, with `grain.checkpoint.CheckpointSave`
    or otherwise. It does not depend on batch size, hosts or workers, nor on whether images or indices are given.

    Attributes:
      indices: whether it gives the indices of images instead of the images.
    """

    def __init__(
        self,
        splits: DataSplits,
        data: Data,
        seed: int,
        batch_size: int,
        position: int,
        process_index: int,
        process_count: int,
        bad: BadImages | None,
        indices: bool,
    ):
        super().__init__()
        self._source = splits.train
        self._data = data
        self._seed = seed
        self._batch_size = batch_size
        self._position = position
        self._process = (process_index, process_count)
        self._bad = bad
        self.indices = indices
        self._batches: grain.DatasetIterator[Batch] | None = None

    def __next__(self) -> Batch:
        self.start_prefetch()
        assert self._batches is not None
        with ends_explained():
            batch = dict(next(self._batches))
        # Grain's own state depends on the number of workers, so the position is counted here.
        self._position += self._batch_size
        if not self.indices:
            _collect(batch, len(self._source), self._bad.train if self._bad else None)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position as JSON: number of examples used, seed, and number of examples in the data."""
        return {"position": self._position, "seed": self._seed, "examples": len(self._source)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position.

        Args:
          state: from `get_state`.

        Raises:
          UserError: the state has another seed or number of training examples.
        """
        mine = self.get_state()
        for key, what in (("examples", "the number of training examples"), ("seed", "the seed of the data")):
            if state[key] != mine[key]:
                raise UserError(
                    f"the saved position in the data is of a run in which {what} was {state[key]}, and here it is "
                    f"{mine[key]}; restore the data and settings of that run, or start a new one."
                )
        self._stop()
        self._position = int(state["position"])

    def start_prefetch(self) -> None:
        """Starts reading ahead; `next` does it if it was not called."""
        self._assert_not_closed()
        if self._batches is not None:
            return
        if self.indices:
            self._batches = iter(self.by_number().to_iter_dataset(grain.ReadOptions(1, _INDICES_AHEAD)))
        else:
            self._batches = _read_ahead(self.by_number(), self._batch_bytes(), self._data.workers)
        self._batches.start_prefetch()

    def by_number(self) -> grain.MapDataset:
        """The batches from the current position on, each made on demand in the caller's thread."""
        stream = grain.MapDataset.range(len(self._source)).seed(self._seed).shuffle().repeat()
        if self.indices:
            stream = stream.map(_as_example)
        else:
            stream = stream.random_map(PrepareTrain(self._source, self._data))
        return _host_batches(stream[self._position :], self._batch_size, *self._process)

    def close(self) -> None:
        """Stops threads and worker processes; the loader cannot be used afterwards."""
        self._stop()
        super().close()

    def _batch_bytes(self) -> int:
        return self._batch_size // self._process[1] * self._data.image_size**2 * 3

    def _stop(self) -> None:
        batches, self._batches = getattr(self, "_batches", None), None
        if batches is not None:
            batches.close()


def eval_batches(
    splits: DataSplits,
    data: Data,
    *,
    batch_size: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    bad: BadImages | None = None,
) -> Iterator[Batch]:
    """One pass over the evaluation split, with every example exactly once over all hosts.

    All hosts yield the same number of batches (otherwise a collective would never end), all of the same shape: the end
    is padded with zeros.

    Args:
      splits: from `open_data`.
      data: the settings.
      batch_size: global batch size; None takes that of the settings.
      process_index: index of this host; None takes JAX's.
      process_count: number of hosts; None takes JAX's.
      bad: collects images that could not be read.

    Returns:
      An iterator over `{"image": uint8 [b, S, S, 3], "label": int32 [b], "mask": bool [b]}` with
      b = batch_size / process_count; the mask is False for padding and for images that could not be read.

    Raises:
      UserError: the batch does not divide into equal parts; while iterating: an image could not be read and
        `data.bad_images` is `error`.
    """
    index, count = _process(process_index, process_count)
    batch_size = batch_size or data.eval_batch_size or data.batch_size
    if batch_size % count:
        raise UserError(f"an evaluation batch of {batch_size} does not divide over {count} hosts; use a multiple.")
    num_examples = len(splits.eval)
    padded = math.ceil(num_examples / batch_size) * batch_size
    batches = _host_batches(
        grain.MapDataset.range(padded).map(PrepareEval(splits.eval, data)), batch_size, index, count
    )
    workers = min(data.workers, num_examples // count // _EVAL_IMAGES_PER_WORKER)

    def run() -> Iterator[Batch]:
        iterator = _read_ahead(batches, batch_size // count * data.image_size**2 * 3, workers)
        try:
            with ends_explained():
                for element in iterator:
                    batch = dict(element)
                    _collect(batch, num_examples, bad.eval if bad else None)
                    yield batch
        finally:
            iterator.close()

    return run()


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    if index is not None and count is not None:
        return index, count
    import jax  # imported here, since worker processes do not need it

    return jax.process_index(), jax.process_count()


def _host_batches(
    stream: grain.MapDataset, batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset:
    """The host's block of each global batch: block p of batch k is block k * count + p of the stream."""
    return stream.batch(batch_size // process_count, drop_remainder=True)[process_index::process_count]


def _read_ahead(batches: grain.MapDataset, batch_bytes: int, workers: int) -> grain.DatasetIterator:
    """Prefetches batches in threads, or in processes of one thread each.

    Decoding and resizing release Python's lock, so threads use several cores. Each worker makes whole batches, so that
    batch k is the same for every number of workers and the buffer holds only a few batches.
    """
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags, which absl refuses before parsing
            flags.FLAGS.mark_as_parsed()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        dataset = batches.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1), prepare_worker
        )
    else:
        fitting = max(2, _BUFFER_BYTES // max(batch_bytes, 1))
        threads = min(16, os.cpu_count() or 1, fitting)
        dataset = batches.to_iter_dataset(grain.ReadOptions(threads, min(2 * threads, fitting)))
    return iter(dataset)


def _as_example(index: int) -> dict[str, Any]:
    return {"index": np.int32(index)}


def _collect(batch: Batch, num_examples: int, found: set[int] | None) -> None:
    """Removes the notes about unreadable images from a batch, and collects them."""
    index, skipped = batch.pop("index"), batch.pop("skipped")
    if found is not None:
        for first, length in zip(index[skipped > 0].tolist(), skipped[skipped > 0].tolist(), strict=True):
            found.update((first + step) % num_examples for step in range(length))
