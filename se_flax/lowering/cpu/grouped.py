"""Grouped convolutions on a CPU."""

import jax
import jax.numpy as jnp

from se_flax.lowering.cpu.dense import dense, pointwise
from se_flax.lowering.cpu.shifts import Pads, Pair
from se_flax.lowering.dispatch import materialize

Array = jax.Array

# A grouped convolution becomes dense ones. Their fewest input channels: fewer make XLA's loops slow, more add zeros.
# Their greatest number: each one has to be compiled.
_BLOCK, _PIECES = 16, 32


def grouped(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair, groups: int) -> Array:
    """A grouped convolution as dense convolutions over several groups each, with block-diagonal kernels.

    Arguments as for `convolve_on_cpu`.
    """
    kh, kw, width, features = kernel.shape
    out = features // groups
    block = max(_BLOCK, width, groups * width // _PIECES)
    fitting = [m for m in range(1, groups + 1) if groups % m == 0 and m * width <= block]
    together = max(fitting)
    blocks = groups // together
    apart = kernel.reshape(kh, kw, width, blocks, together, out).transpose(4, 0, 1, 2, 3, 5)
    spread = _on_diagonal(apart).transpose(2, 3, 0, 4, 5, 1, 6)
    spread = spread.reshape(kh, kw, together * width, blocks, together * out)

    def part(x: Array, kernel: Array) -> Array:
        # Materialised, as are the gradients: else every consumer would recompute the split map's producer.
        x = materialize(x)
        one = (kh, kw) == (1, 1)
        y = pointwise(x, kernel, strides, padding) if one else dense(x, kernel, strides, padding, dilation)
        return materialize(y)

    parts = [part(some, spread[..., i, :]) for i, some in enumerate(jnp.split(x, blocks, axis=-1))]
    return jnp.concatenate(parts, -1)


def _on_diagonal(x: Array) -> Array:
    """x[i] at [i, i] and zeros elsewhere; [t, ...] to [t, t, ...].

    Rows of t + 1 items, read as rows of t, shift item i by i columns. A product with the identity would do, but its
    gradient is a sum on which XLA crashes for some shapes (32 channels in two groups).
    """
    count = x.shape[0]
    rows = jnp.pad(x.reshape(count, -1), ((0, 0), (0, x.size)))
    return rows.reshape(-1)[: count * x.size].reshape(count, *x.shape)
