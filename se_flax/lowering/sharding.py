"""Explicit mesh axes (`jax.sharding.AxisType.Explicit`, the default of `jax.make_mesh`).

On explicit axes an array's sharding is part of its type, and JAX refuses an operation whose result would have an
ambiguous sharding. The rule of this package: images keep their sharding; kernels, and channels where an operation mixes
them, are gathered first. So parameters may have any sharding (fully sharded data parallelism, FSDP), and their
gradients have the same. On automatic axes and inside `jax.shard_map` nothing changes.
"""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Array = jax.Array


def has_explicit_axes(*arrays: Array) -> bool:
    """Whether any of the arrays lives on a mesh with an explicit axis."""
    return any(AxisType.Explicit in (jax.typeof(x).sharding.mesh.axis_types or ()) for x in arrays)


def gathered(x: Array, *axes: int) -> Array:
    """Gathers an array along some of its axes (all-gather).

    Args:
      x: any array.
      *axes: the axes to gather; all if none is given.

    Returns:
      The array, not sharded along these axes; `x` itself if they are not sharded explicitly.
    """
    if not has_explicit_axes(x):
        return x
    sharding = jax.typeof(x).sharding
    spec = list(sharding.spec) + [None] * (x.ndim - len(sharding.spec))
    rest = list(spec)
    for axis in axes or range(x.ndim):
        rest[axis] = None
    return x if rest == spec else jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*rest)))


def over_images(function: Callable[[Array, Array], Array], x: Array, kernel: Array) -> Array:
    """Applies a function of maps and a kernel on each device separately, with `jax.shard_map`.

    XLA's partitioner multiplies the gradient of a grouped convolution's kernel by the size of each mesh axis that the
    images are not sharded over (seen with JAX 0.10.2 and 0.12.0). Inside `jax.shard_map` it has nothing to partition.

    Args:
      function: from maps [n, ..., C] and the kernel to maps [n, ..., features]; independent for each image.
      x: [N, ..., C]; it or the kernel has explicit axes.
      kernel: of any sharding; it is gathered.

    Returns:
      [N, ..., features]; N is sharded as in x, the other axes are not.
    """
    x, kernel = gathered(x, *range(1, x.ndim)), gathered(kernel)
    sharding = jax.typeof(x if has_explicit_axes(x) else kernel).sharding
    images = PartitionSpec(*jax.typeof(x).sharding.spec[:1])
    return jax.shard_map(function, mesh=sharding.mesh, in_specs=(images, PartitionSpec()), out_specs=images)(x, kernel)


def matched(x: Array, like: Array) -> Array:
    """Reshards an array as another one. A custom VJP must give its cotangents the shardings of the primals.

    Args:
      x: any array.
      like: array of the same shape.

    Returns:
      `x` with the sharding of `like`; `x` itself without explicit axes.
    """
    return jax.sharding.reshard(x, jax.typeof(like).sharding) if has_explicit_axes(like) else x
