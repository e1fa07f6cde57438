"""Grouped convolutions on a CPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from se_flax.cpu.dense import dense, pointwise
from se_flax.cpu.shifts import Pads, Pair, Product
from se_flax.memory import written

Array = jax.Array

# Of the dense convolutions that a grouped one is made of: the fewest channels, as fewer make XLA's loops slow and more
# add zeros; and the most convolutions, as every one has to be compiled, with gradients three times.
_BLOCK, _PIECES, _PIECES_IN_TRAINING = 16, 32, 16


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def grouped(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair, groups: int) -> Array:
    """Groups side by side in dense convolutions.

    Arguments as for `convolve_on_cpu`.
    """
    return _in_parts(x, kernel, groups, _form(kernel, strides, padding, dilation), _PIECES)


def _grouped_jvp(strides: Pair, padding: Pads, dilation: Pair, groups: int, primals: Any, tangents: Any) -> Any:
    known = [isinstance(tangent, jax.custom_derivatives.SymbolicZero) for tangent in tangents]
    form = _form(primals[1], strides, padding, dilation)

    def function(*arrays: Array) -> Array:
        rest = iter(arrays)
        x, kernel = (primal if fixed else next(rest) for primal, fixed in zip(primals, known, strict=True))
        return _in_parts(x, kernel, groups, form, _PIECES_IN_TRAINING)

    at, along = ([a for a, fixed in zip(arrays, known, strict=True) if not fixed] for arrays in (primals, tangents))
    return jax.jvp(function, at, along)


grouped.defjvp(_grouped_jvp, symbolic_zeros=True)


def _form(kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Product:
    if kernel.shape[:2] == (1, 1):
        return lambda x, kernel: pointwise(x, kernel, strides, padding)
    return lambda x, kernel: dense(x, kernel, strides, padding, dilation)


def _in_parts(x: Array, kernel: Array, groups: int, form: Product, pieces: int) -> Array:
    """So many dense convolutions at most, of this form."""
    kh, kw, width, features = kernel.shape
    out = features // groups
    block = max(_BLOCK, width, groups * width // pieces)
    fitting = [m for m in range(1, groups + 1) if groups % m == 0 and m * width <= block]
    together = max(fitting)
    blocks = groups // together
    apart = kernel.reshape(kh, kw, width, blocks, together, out).transpose(4, 0, 1, 2, 3, 5)
    spread = _on_diagonal(apart).transpose(2, 3, 0, 4, 5, 1, 6)
    spread = spread.reshape(kh, kw, together * width, blocks, together * out)
    # Written, and so are their gradients: every reader would take what the whole map is made of apart again.
    parts = [written(form(written(some), spread[..., i, :])) for i, some in enumerate(jnp.split(x, blocks, axis=-1))]
    return jnp.concatenate(parts, -1)


def _on_diagonal(x: Array) -> Array:
    """x[i] at [i, i] and zeros elsewhere; [t, ...] to [t, t, ...].

    Written row by row with one item's room too much, the items come to lie one further in every row. A product with the
    identity would do, but its gradient is a sum, on which XLA crashes for some shapes (32 channels in two groups).
    """
    count = x.shape[0]
    rows = jnp.pad(x.reshape(count, -1), ((0, 0), (0, x.size)))
    return rows.reshape(-1)[: count * x.size].reshape(count, *x.shape)
