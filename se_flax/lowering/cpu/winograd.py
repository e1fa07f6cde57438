"""Winograd's minimal filtering F(2x2, 3x3): 3x3 convolutions with 16 multiplications instead of 36.

Lavin and Gray 2016 (arXiv:1509.09308), section 4.1: a tile d of 4 x 4 inputs and the kernel g give 2 x 2 outputs,
y = A^T [(G g G^T) * (B^T d B)] A. Over all tiles and channels the product in the middle is sixteen matrix products. The
transforms add and subtract; in float32 the error of the result stays below twice that of the direct sum.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from se_flax.lowering.cpu.shifts import Pads, Pair
from se_flax.lowering.dispatch import materialize

Array = jax.Array

# Fewest channels, and fewest tiles of 2 x 2 pixels, for which the transforms cost less than the products they save.
_CHANNELS, _TILES = 64, 128


def is_worth_it(x: Array, kernel: Array, strides: Pair, dilation: Pair) -> bool:
    """Whether the kernel is 3x3 with stride and dilation 1, and channels and tiles are enough to pay the transforms.

    False below float32, where the transforms' sums would be rounded. The parts of a grouped convolution do not gain.
    """
    if kernel.shape[:2] != (3, 3) or not strides == dilation == (1, 1) or x.dtype.itemsize < 4:
        return False
    images = x.shape[0] if isinstance(x.shape[0], int) else 1  # symbolic: one at least
    return min(kernel.shape[2:]) >= _CHANNELS and images * math.prod(x.shape[1:3]) >= 4 * _TILES


def convolve(x: Array, kernel: Array, padding: Pads) -> Array:
    """A 3x3 convolution with stride 1. Its transposes, for the gradients, take as few products.

    Args:
      x: [N, H, W, C], float32 or float64.
      kernel: [3, 3, C, features], of x's dtype.
      padding: ((top, bottom), (left, right)).

    Returns:
      [N, H + top + bottom - 2, W + left + right - 2, features] of x's dtype.
    """
    n, height, width, channels = x.shape
    features = kernel.shape[3]
    h, w = (side + sum(pads) - 2 for side, pads in zip((height, width), padding, strict=True))
    down, across = (side + side % 2 for side in (h, w))  # rounded up to whole tiles
    (top, bottom), (left, right) = padding
    x = jnp.pad(x, ((0, 0), (top, bottom + down - h), (left, right + across - w), (0, 0)))
    x = materialize(x)  # else padded again for each of its four consumers
    rows = []
    for row, factors in zip(_inputs(x, 1), _factors(kernel, 0), strict=True):
        tiles = jnp.stack(_inputs(row, 2)).reshape(4, -1, channels)
        products = jax.lax.dot_general(tiles, jnp.stack(_factors(factors, 0)), (((2,), (1,)), ((0,), (0,))))
        rows.append(products.reshape(4, n, down // 2, across // 2, features))
    rows = [jnp.stack(_outputs(r), axis=3).reshape(n, down // 2, across, features) for r in rows]
    y = jnp.stack(_outputs(rows), axis=2).reshape(n, down, across, features)
    return jax.lax.slice(y, (0,) * 4, (n, h, w, features))


def _factors(kernel: Array, axis: int) -> list[Array]:
    """G g along an axis of 3 taps: four transformed kernels."""
    first, middle, last = (jax.lax.index_in_dim(kernel, i, axis, keepdims=False) for i in range(3))
    half, odd = (first + last) * 0.5, middle * 0.5
    return [first, half + odd, half - odd, last]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _inputs(x: Array, axis: int) -> list[Array]:
    """B^T d along an axis of 2 t + 2 pixels: four maps, the first to last element of all t transformed tiles."""
    tiles = x.shape[axis] // 2 - 1
    every_other = [jax.lax.slice_in_dim(x, i, i + 2 * tiles - 1, 2, axis) for i in range(4)]
    return _combined(*every_other)


@_inputs.defjvp
def _inputs_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[list[Array], list[Array]]:
    # By pairs of pixels: the transpose then interleaves; that of strided slices pads with zeros and adds.
    (dx,) = tangents
    pairs = dx.reshape(*dx.shape[:axis], dx.shape[axis] // 2, 2, *dx.shape[axis + 1 :])
    even, odd = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
    last = even.shape[axis]
    first, third = (jax.lax.slice_in_dim(even, i, last - 1 + i, axis=axis) for i in range(2))
    second, fourth = (jax.lax.slice_in_dim(odd, i, last - 1 + i, axis=axis) for i in range(2))
    return _inputs(*primals, axis), _combined(first, second, third, fourth)


def _combined(first: Array, second: Array, third: Array, fourth: Array) -> list[Array]:
    return [first - third, second + third, third - second, second - fourth]


def _outputs(products: Array | list[Array]) -> list[Array]:
    """A^T m along an axis: the two outputs of a tile."""
    first, second, third, fourth = products
    return [first + second + third, second - third - fourth]
