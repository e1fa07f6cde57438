"""Batches for training and evaluation, the same for every number of hosts, worker processes and restarts.

Training reads one endless stream: the training examples, reshuffled each epoch, each with its own random crop. Batch k
is a fixed slice of that stream, and each host takes a fixed block of it. So the position in the data is one number,
which a checkpoint can hold and any other number of hosts or workers can continue from.

The worker processes are spawned: a script of its own that uses `workers > 0` needs `if __name__ == "__main__":`.
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

__all__ = [
    "BadImages",
    "DataSplits",
    "Source",
    "TrainLoader",
    "eval_batches",
    "open_data",
    "steps_per_epoch",
    "train_loader",
]

Batch = dict[str, np.ndarray]

_MOST_NAMED = 10
_BUFFER_BYTES = 2**30  # decoded batches waiting in this process
_EVAL_IMAGES_PER_WORKER = 5000  # below, starting a process costs more than it saves


def steps_per_epoch(num_examples: int, batch_size: int) -> float:
    """How many batches one pass over the examples takes; a fraction when the last one straddles two epochs.

    Args:
      num_examples: in the training split.
      batch_size: global.

    Returns:
      `num_examples / batch_size`.
    """
    return num_examples / batch_size


class BadImages:
    """Collects the images that could not be read (`data.bad_images="skip"`), to name them at the end of a run.

    Each host collects those of its own share.

    Attributes:
      train: indices into the training split.
      eval: indices into the evaluation split.
    """

    def __init__(self, splits: DataSplits, data: Data):
        self._splits, self._data = splits, data
        self.train: set[int] = set()
        self.eval: set[int] = set()

    def report(self) -> str | None:
        """What was found, in words; `None` when every image could be read.

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
            # The reasons are found again here: the ones met in worker processes stayed there.
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
) -> "TrainLoader":
    """The endless stream of training batches.

    Args:
      splits: from `open_data`.
      data: the settings; `batch_size` is global.
      seed: of order and crops.
      micro: deliver each batch of `batch_size` in so many parts (gradient accumulation), one per `next`.
      start: examples of the stream that are already used up, over all hosts: steps done times `batch_size`.
      process_index: this host; by default what JAX says.
      process_count: number of hosts; by default what JAX says.
      bad: told about images that could not be read.

    Returns:
      An iterator over `{"image": uint8 [b, S, S, 3], "label": int32 [b]}` with b = batch_size / micro / process_count.
      The hosts' blocks laid end to end are the batch that a single host would see.

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
    return TrainLoader(splits, data, seed, data.batch_size // micro, start, index, count, bad)


class TrainLoader(grain.DatasetIterator[Batch]):
    """What `train_loader` returns: batches, and a position that can be saved and set.

    The state is plain JSON and the same on every host, so it may be saved by one host, through
    `grain.checkpoint.CheckpointSave` or otherwise. It does not depend on batch size, hosts or workers.
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
    ):
        super().__init__()
        self._source = splits.train
        self._data = data
        self._seed = seed
        self._batch_size = batch_size
        self._position = position
        self._process = (process_index, process_count)
        self._bad = bad
        self._batches: grain.DatasetIterator[Batch] | None = None

    def __next__(self) -> Batch:
        self.start_prefetch()
        assert self._batches is not None
        batch = dict(next(self._batches))
        # Counted here, not read from Grain, whose state depends on the number of workers.
        self._position += self._batch_size
        _collect(batch, len(self._source), self._bad.train if self._bad else None)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position as JSON: examples used up, and the seed and data it refers to."""
        return {"position": self._position, "seed": self._seed, "examples": len(self._source)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position.

        Args:
          state: from `get_state`.

        Raises:
          UserError: it belongs to another seed or another number of training examples.
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
        """Starts reading ahead; `next` does it by itself."""
        self._assert_not_closed()
        if self._batches is not None:
            return
        self._batches = _read_ahead(self.by_number(), self._batch_bytes(), self._data.workers)
        self._batches.start_prefetch()

    def by_number(self) -> grain.MapDataset:
        """The batches from the present position on, each made when it is asked for, in the caller's thread."""
        prepare = PrepareTrain(self._source, self._data)
        stream = grain.MapDataset.range(len(self._source)).seed(self._seed).shuffle().repeat().random_map(prepare)
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
    """The evaluation split once, every example exactly once over all hosts.

    Every host yields the same number of batches (a collective would wait for ever otherwise), all of the same shape:
    the end is padded with zeros.

    Args:
      splits: from `open_data`.
      data: the settings.
      batch_size: global; by default that of the settings.
      process_index: this host; by default what JAX says.
      process_count: number of hosts; by default what JAX says.
      bad: told about images that could not be read.

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
    import jax  # only here: worker processes have no use for it

    return jax.process_index(), jax.process_count()


def _host_batches(
    stream: grain.MapDataset, batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset:
    """The block of this host in each global batch: block p of batch k is block k * count + p of the stream."""
    return stream.batch(batch_size // process_count, drop_remainder=True)[process_index::process_count]


def _read_ahead(batches: grain.MapDataset, batch_bytes: int, workers: int) -> grain.DatasetIterator:
    """Threads, or processes of one thread each, that make whole batches ahead of time.

    Decoding and resizing release Python's lock, so threads already use several cores. Each unit is a whole batch,
    which makes batch k the same for every number of workers, and holds the buffer to a few batches.
    """
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain asks for flags of its own, also where no program has parsed any
            flags.FLAGS.mark_as_parsed()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        dataset = batches.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        )
    else:
        fitting = max(2, _BUFFER_BYTES // max(batch_bytes, 1))
        threads = min(16, os.cpu_count() or 1, fitting)
        dataset = batches.to_iter_dataset(grain.ReadOptions(threads, min(2 * threads, fitting)))
    return iter(dataset)


def _collect(batch: Batch, num_examples: int, found: set[int] | None) -> None:
    """Takes the notes about unreadable images out of a batch."""
    index, skipped = batch.pop("index"), batch.pop("skipped")
    if found is not None:
        for first, length in zip(index[skipped > 0].tolist(), skipped[skipped > 0].tolist(), strict=True):
            found.update((first + step) % num_examples for step in range(length))
