"""Pooling of float maps [N, H, W, C] as PyTorch and timm do it; others are a `UserError`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.arrays import check_array
from se_flax.lowering.dispatch import by_platform

Array = jax.Array


def max_pool(x: Array, size: int = 3, strides: int = 2, padding: int = 1) -> Array:
    """Maximum over size x size windows; x [N, H, W, C], `padding` pixels of -inf on every side.

    Among equal maxima of a window the first gets the gradient. On a CPU, where XLA's pooling is slow and another
    implementation runs, they share it.
    """
    x = check_array(x, "max_pool", "[N, H, W, C]")

    def xla_pool(x: Array) -> Array:
        return nn.max_pool(x, (size, size), (strides, strides), [(padding, padding)] * 2)

    def by_axis(x: Array) -> Array:
        for axis in (1, 2):
            edge = [(padding, padding) if i == axis else (0, 0) for i in range(x.ndim)]
            x = jnp.pad(x, edge, constant_values=-jnp.inf)
            end = x.shape[axis] - size + 1
            windows = [jax.lax.slice_in_dim(x, i, i + end, strides, axis) for i in range(size)]
            x = functools.reduce(jnp.maximum, windows)
        return x

    return by_platform(x, cpu=by_axis, default=xla_pool)


def caffe_max_pool(x: Array) -> Array:
    """Maximum over 3x3 windows at stride 2, padded after the last row and column only (PyTorch's `ceil_mode`).

    Args:
      x: [N, H, W, C].

    Returns:
      [N, H / 2, W / 2, C], halves rounded down except that a map of one pixel keeps it.
    """
    x = check_array(x, "caffe_max_pool", "[N, H, W, C]")
    hang = [(0, max(3 - dim, (dim - 3) % 2)) for dim in x.shape[1:3]]
    return nn.max_pool(x, (3, 3), (2, 2), hang)


def avg_pool(x: Array, size: int, strides: int) -> Array:
    """Mean over size x size windows of x [N, H, W, C]; windows beyond the edge average their pixels inside the map."""
    x = check_array(x, "avg_pool", "[N, H, W, C]")
    # For a symbolic size the greatest padding serves: no window can start inside it.
    padding = [(0, -(dim - size) % strides if isinstance(dim, int) else strides - 1) for dim in x.shape[1:3]]
    return nn.avg_pool(x, (size, size), (strides, strides), padding, count_include_pad=False)


def blur_pool(x: Array, mode: str = "constant") -> Array:
    """Halves the resolution after a binomial low-pass filter (Zhang 2019, section 3.2: BlurPool, triangle 3).

    Args:
      x: [N, H, W, C].
      mode: of the padding by one pixel on every side: `constant` (zeros) or `reflect`.

    Returns:
      [N, ceil(H / 2), ceil(W / 2), C].
    """
    x = check_array(x, "blur_pool", "[N, H, W, C]")
    for axis in (1, 2):
        size = x.shape[axis]
        x = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)], mode)
        before, here, after = (jax.lax.slice_in_dim(x, i, i + size, 2, axis) for i in range(3))
        x = (before + 2 * here + after) * 0.25
    return x


def unpool_nearest(x: Array, height: int, width: int) -> Array:
    """A map of half the size, rounded down, at the full size: pixel i of n takes pixel floor(i * (n // 2) / n).

    Args:
      x: [N, height // 2, width // 2, C].
      height: of the result.
      width: of the result.

    Returns:
      [N, height, width, C].
    """
    x = check_array(x, "unpool_nearest", "[N, H, W, C]")
    sides = (height, width)
    if not all(isinstance(side, int) for side in sides):  # symbolic: even or odd is not known
        for axis, side in enumerate(sides, 1):
            x = jnp.take(x, jnp.arange(side) * x.shape[axis] // side, axis)
        return x
    n, h, w, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, channels)).reshape(n, 2 * h, 2 * w, channels)
    for axis, side in enumerate(sides, 1):
        if side % 2:
            x = jnp.concatenate([jax.lax.slice_in_dim(x, 0, 1, axis=axis), x], axis)
    return x
