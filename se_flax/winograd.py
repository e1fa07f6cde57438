"""A 3x3 convolution with 16 products where 36 are written down: F(2x2, 3x3) of Winograd's minimal filtering.

Lavin and Gray 2016 (arXiv:1509.09308), section 4.1: tiles of 4 x 4 inputs, transformed, times the transformed kernel,
give 2 x 2 outputs, y = A^T [(G g G^T) * (B^T d B)] A. All tiles and channels together make sixteen matrix products. The
transforms add and subtract; in float32 the result's error stays below twice that of the direct sum.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Pads = tuple[tuple[int, int], tuple[int, int]]

# G of the paper's equation 9; its transform of a kernel as one matrix from the 9 taps to the 16 factors.
_TAPS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_KERNEL = np.kron(_TAPS, _TAPS)


def convolve(x: Array, kernel: Array, padding: Pads) -> Array:
    """A 3x3 convolution with stride 1.

    Its transposes, which are what gradients need, take as few products.

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
    down, across = (side + side % 2 for side in (h, w))  # the outputs of whole tiles
    (top, bottom), (left, right) = padding
    x = jnp.pad(x, ((0, 0), (top, bottom + down - h), (left, right + across - w), (0, 0)))
    factors = (jnp.asarray(_KERNEL, x.dtype) @ kernel.reshape(9, -1)).reshape(4, 4, channels, features)
    rows = []
    for i, row in enumerate(_inputs(x, 1)):
        tiles = jnp.stack(_inputs(row, 2)).reshape(4, -1, channels)
        products = jax.lax.dot_general(tiles, factors[i], (((2,), (1,)), ((0,), (0,))))
        products = products.reshape(4, n, down // 2, across // 2, features)
        rows.append(jnp.stack(_outputs(products), axis=3).reshape(n, down // 2, across, features))
    y = jnp.stack(_outputs(rows), axis=2).reshape(n, down, across, features)
    return jax.lax.slice(y, (0,) * 4, (n, h, w, features))


def _inputs(x: Array, axis: int) -> list[Array]:
    """B^T d along an axis of 2 t + 2 pixels: four maps of t, the tiles' first to last factors."""
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    # Pairs and not strided slices: the transpose puts pixels side by side, where slices would leave gaps to add up.
    even, odd = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
    last = even.shape[axis]
    first, third = (jax.lax.slice_in_dim(even, i, last - 1 + i, axis=axis) for i in range(2))
    second, fourth = (jax.lax.slice_in_dim(odd, i, last - 1 + i, axis=axis) for i in range(2))
    return [first - third, second + third, third - second, second - fourth]


def _outputs(products: Array | list[Array]) -> list[Array]:
    """A^T m: a tile's two outputs."""
    first, second, third, fourth = products
    return [first + second + third, second - third - fourth]
