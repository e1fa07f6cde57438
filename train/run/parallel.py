"""Spreads a per-replica step over devices: under `jit(shard_map)`, or under `pmap`, with the same numbers.

The state is one copy, replicated; batches are split along their first axis. More than one host is JAX's own runtime
(`jax.distributed.initialize`): each host feeds its part of the batch, and nothing here changes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from se_flax.errors import UserError, closest
from train.run.step import AXIS

PyTree = Any


@dataclass(frozen=True)
class Replicas:
    """Devices and the way a step is spread over them.

    Attributes:
      devices: all devices of the run, over all hosts.
      backend: `shard_map` or `pmap`.
    """

    devices: tuple[jax.Device, ...]
    backend: str = "shard_map"

    @property
    def count(self) -> int:
        """Replicas over all hosts."""
        return len(self.devices)

    @property
    def _mesh(self) -> Mesh:
        return Mesh(np.asarray(self.devices), (AXIS,))

    def spread(self, step: Callable[..., PyTree], *, donate: bool = False, shared: int = 0) -> Callable[..., PyTree]:
        """Compiles `step(replicated, batch, *shared)` for these devices.

        Args:
          step: function of one replica; the axis `train.run.step.AXIS` is bound, its results are equal on all replicas.
          donate: the first argument's memory may be reused for the result.
          shared: number of further arguments, replicated like the first.

        Returns:
          Function of the replicated argument (see `replicate`), of a global batch (see `shard`) and of what is shared.
        """
        donated = (0,) if donate else ()
        if self.backend == "pmap":
            in_axes = (None, 0, *[None] * shared)
            return jax.pmap(
                step, axis_name=AXIS, in_axes=in_axes, out_axes=None, devices=self.devices, donate_argnums=donated
            )
        # check_vma=False keeps the collectives where the step writes them; with it on, the transpose of a replicated
        # parameter would sum gradients a second time.
        spread = jax.shard_map(
            step,
            mesh=self._mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS), *[PartitionSpec()] * shared),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return jax.jit(spread, donate_argnums=donated)

    def replicate(self, tree: PyTree) -> PyTree:
        """Puts one copy of every array on each device; arrays keep their shape."""
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def copy(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Like `replicate`, for arrays that every host has, and without comparing them between the hosts."""
        sharding = NamedSharding(self._mesh, PartitionSpec())
        return {k: jax.make_array_from_process_local_data(sharding, v, v.shape) for k, v in arrays.items()}

    def shard(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts a host's part of a batch on its devices.

        Args:
          batch: arrays [n, ...] of this host; n is a multiple of the number of its devices.

        Returns:
          Global arrays: [N, ...] for `shard_map`, [local devices, n / devices, ...] for `pmap`.
        """
        if self.backend == "pmap":
            local = [d for d in self.devices if d.process_index == jax.process_index()]
            # pmap takes a host's share stacked; it is laid out over the devices here, not in the call.
            stacked = {k: v.reshape(len(local), -1, *v.shape[1:]) for k, v in batch.items()}
            sharding = NamedSharding(Mesh(np.asarray(local), (AXIS,)), PartitionSpec(AXIS))
            return jax.device_put(stacked, sharding)
        sharding = NamedSharding(self._mesh, PartitionSpec(AXIS))
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

    def replicated_shapes(self, tree: PyTree) -> PyTree:
        """What `replicate` would give, as `jax.ShapeDtypeStruct`: enough to compile a step, and nothing is allocated.

        Args:
          tree: arrays or shapes.
        """
        sharding = NamedSharding(self._mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def sharded_shapes(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """What `shard` would give on one host, as `jax.ShapeDtypeStruct`.

        Args:
          batch: shapes [N, ...] of the whole batch; N is a multiple of the number of devices.
        """
        sharding = NamedSharding(self._mesh, PartitionSpec(AXIS))

        def shape(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
            stacked = (self.count, x.shape[0] // self.count, *x.shape[1:])
            return stacked if self.backend == "pmap" else x.shape

        return {k: jax.ShapeDtypeStruct(shape(x), x.dtype, sharding=sharding) for k, x in batch.items()}


BACKENDS = ("shard_map", "pmap")


def make_replicas(backend: str, devices: int, there: Sequence[jax.Device] | None = None) -> Replicas:
    """Chooses the devices of a run.

    Args:
      backend: `shard_map` or `pmap`.
      devices: how many; 0 for all that there are.
      there: the devices to choose from, such as those of a topology; None for those that JAX sees.

    Returns:
      The replicas.

    Raises:
      UserError: unknown backend, or more devices than there are.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown parallel.backend {backend!r}; {closest(backend, BACKENDS)}")
    seen = "JAX sees" if there is None else "the topology has"
    there = tuple(jax.devices() if there is None else there)
    if not 0 <= devices <= len(there):
        raise UserError(
            f"got parallel.devices={devices}, but {seen} {len(there)} {there[0].platform} device(s); "
            f"give 1 to {len(there)}, or 0 for all"
        )
    return Replicas(there[: devices or None], backend)
