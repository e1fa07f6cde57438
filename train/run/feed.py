"""What the calls of the training step read: batches made on the host, or indices of images that are decoded already.

An accelerator keeps the whole data set in its own memory, each device a copy: an epoch is shuffled over all images, so
every device needs any of them. Its calls run several steps. On a CPU the device's memory is the host's: the data set is
kept once, batches are cut out of it by NumPy, and a call is the same compiled step as without it, bit for bit.
Several hosts read the data set each for themselves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from se_flax.errors import UserError
from train.config import Data
from train.data.images import FIXED_CROPS
from train.data.loader import BadImages, TrainLoader, train_examples
from train.data.sources import DataSplits
from train.run.evaluate import padded_size
from train.run.parallel import Replicas
from train.run.step import make_steps

# Steps of a call: enough that the time between two calls does not count, few enough that a signal is soon answered.
MOST_STEPS = 20
CPU_MOST_STEPS = 1
# `auto` leaves the rest of a device to the network.
_SHARE_OF_MEMORY = 0.25
_LABEL_BYTES = 4


@dataclass(frozen=True)
class Feed:
    """The training data as calls of the step read it.

    Attributes:
      loader: iterator over this host's batches, or over their indices in the data set, with `get_state`.
      table: the data set in the host's memory: `image` uint8 [N, S, S, 3], `label` int32 [N].
      shared: the data set on the devices, which every call reads.
      most_steps: that one call may do.
    """

    loader: Any
    table: Mapping[str, np.ndarray] | None = None
    shared: tuple[Any, ...] = ()
    most_steps: int = 1

    def fetch(self, steps: int) -> Mapping[str, np.ndarray]:
        """The host's part of the next steps' batches, for `Replicas.shard`.

        Args:
          steps: 1 to `most_steps`.

        Returns:
          One batch, or with `shared` `{"index": int32 [n, most_steps]}` as `train.run.step.make_steps` takes it.
        """
        if self.shared:
            columns = [next(self.loader)["index"] for _ in range(steps)]
            index = np.full((len(columns[0]), self.most_steps), -1, np.int32)
            index[:, :steps] = np.stack(columns, axis=1)
            return {"index": index}
        batch: Mapping[str, np.ndarray] = next(self.loader)
        return batch if self.table is None else {name: rows[batch["index"]] for name, rows in self.table.items()}

    def spread(self, step: Any, replicas: Replicas, image_size: int) -> Any:
        """Compiles a step for calls that read this.

        Args:
          step: of one replica, see `train.run.step.make_train_step`.
          replicas: where it runs.
          image_size: of the training images.

        Returns:
          Function of state (whose memory it takes), sharded batch and `*shared`.
        """
        if not self.shared:
            return replicas.spread(step, donate=True)
        return replicas.spread(make_steps(step, image_size), donate=True, shared=len(self.shared))


def make_feed(loader: TrainLoader, splits: DataSplits, data: Data, replicas: Replicas, bad: BadImages) -> Feed:
    """Reads the whole training split and puts it where calls of the step read it.

    Args:
      loader: of the indices of its images.
      splits: the data.
      data: the settings.
      replicas: the devices.
      bad: collects images that could not be read.

    Raises:
      UserError: an image could not be read and `data.bad_images` is `error`.
    """
    table = train_examples(splits, data, bad)
    most_steps = CPU_MOST_STEPS if replicas.devices[0].platform == "cpu" else MOST_STEPS
    if most_steps == 1:
        return Feed(loader, table)
    # A row per image: an array whose last axis has length 3 takes many times its bytes in a TPU's tiles.
    rows = {"image": table["image"].reshape(len(table["image"]), -1), "label": table["label"]}
    return Feed(loader, shared=(replicas.copy(rows),), most_steps=most_steps)


def lives_on_devices(data: Data, splits: DataSplits, replicas: Replicas, epochs: float) -> bool:
    """Whether the data of a run is kept on its devices (`data.place`).

    Args:
      data: the settings, checked.
      splits: the data.
      replicas: the devices.
      epochs: of the run; `auto` reads no image that a short run does not need.

    Raises:
      UserError: that was asked for, and there is no room.
    """
    device = next(d for d in replicas.devices if d.process_index == jax.process_index())
    worthwhile = device.platform != "cpu" and data.train_crop in FIXED_CROPS and epochs >= 1
    if data.place == "host" or (data.place == "auto" and not worthwhile):
        return False
    image = data.image_size**2 * 3 + _LABEL_BYTES
    batch = padded_size(data.eval_batch_size or data.batch_size, replicas.count)
    evaluation = math.ceil(len(splits.eval) / batch) * batch // replicas.count  # each device has its share
    needed = (len(splits.train) + evaluation) * image
    memory = _memory(device)
    if data.place == "auto":
        return memory is not None and needed <= _SHARE_OF_MEMORY * memory[0]
    if memory is not None and needed > memory[1]:
        raise UserError(
            f"data.place='device', but the data set takes {needed:,} bytes on a device ({len(splits.train):,} training "
            f"images of {data.image_size} x {data.image_size} pixels, and its share of the evaluation's) and "
            f"{memory[1]:,} bytes are free there; use data.place='host' or a smaller data.image_size"
        )
    return True


def _memory(device: jax.Device) -> tuple[int, int] | None:
    """Bytes that a device has, and those that are free; None where it does not say."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit", 0)
        return (limit, limit - stats.get("bytes_in_use", 0)) if limit else None
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):  # not Linux
        return None
    return total, free
