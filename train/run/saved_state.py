"""The training state on its way to and from a checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any
State = flax.struct.PyTreeNode  # `train.run.step.TrainState`, or another one


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      step: its number.
      state: the training state, on the devices of the state it was restored like.
      data: the position in the training data.
      run: settings and class names.
      skipped: one sentence for each checkpoint that was damaged.
    """

    step: int
    state: Any
    data: dict[str, Any]
    run: dict[str, Any]
    skipped: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """What a person should know about it."""
        for text in self.skipped:
            yield f"warning: {text}"
        yield f"resuming from step {self.step:,}"


def arrays_of(state: State) -> dict[str, PyTree]:
    """The state as a dictionary without the parts it does not have."""
    return {name: value for name, value in vars(state).items() if value is not None}


def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, dtype and devices of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def placed(like: jax.Array, values: np.ndarray) -> jax.Array:
    """Values that every host has, on the devices of an array."""
    return jax.make_array_from_callback(like.shape, like.sharding, values.__getitem__)


def orbax_writer() -> ocp.AsyncCheckpointer:
    """Orbax on the first host alone: it waits for no other one."""
    options = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
        options = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="first")
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=options)),
        # A folder that cannot be made is an error at once; in a thread, others would wait minutes for it.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        multiprocessing_options=options,
    )
