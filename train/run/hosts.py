"""What the hosts of a run tell each other. The first one alone reads and writes the work directory."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from se_flax.errors import UserError

PyTree = Any
# Bytes of one transfer; an array of 8-bit integers, whose sums over the hosts are exact.
_PIECE = 1 << 26


def is_first() -> bool:
    """Whether this process is the first host of its run, or the only one."""
    return jax.process_index() == 0


def from_first(answer: Callable[[], Any]) -> Any:
    """Calls a function on the first host and returns its result on every host. All hosts must call this together.

    Args:
      answer: returns what JSON can hold.

    Raises:
      UserError: the function raised one; on every host.
    """
    if jax.process_count() == 1:
        return answer()
    said = b""
    if is_first():
        try:
            said = json.dumps({"answer": answer()}).encode()
        except UserError as error:
            said = json.dumps({"error": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(said), np.int32)))
    received = json.loads(_sent(np.frombuffer(said, np.uint8) if said else np.zeros(size, np.uint8)).tobytes())
    if "error" in received:
        raise UserError(received["error"])
    return received["answer"]


def arrays_from_first(tree: PyTree) -> PyTree:
    """The arrays of the first host on every host, bit for bit. All hosts must call this together.

    Args:
      tree: arrays; the others' have the same shapes and dtypes, and any values.

    Returns:
      A tree of NumPy arrays.
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(_array_from_first, tree)


def of_all(found: set[int]) -> set[int]:
    """The union of the sets of all hosts, on every host. All hosts must call this together.

    Args:
      found: integers of this host, from 0 to 2^31 - 1.
    """
    if jax.process_count() == 1:
        return found
    most = int(multihost_utils.process_allgather(np.asarray(len(found), np.int32)).max())
    padded = np.full(most, -1, np.int32)
    padded[: len(found)] = sorted(found)
    return set(np.asarray(multihost_utils.process_allgather(padded)).ravel().tolist()) - {-1}


def _array_from_first(x: Any) -> np.ndarray:
    x = np.asarray(x)
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    pieces = [_sent(data[start : start + _PIECE]) for start in range(0, data.size, _PIECE)]
    received = np.concatenate(pieces) if pieces else data
    return received.view(x.dtype).reshape(x.shape)


def _sent(data: np.ndarray) -> np.ndarray:
    """Bytes of the first host."""
    return np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8)
