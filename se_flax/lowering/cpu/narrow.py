"""Grouped convolutions with few channels per group on a CPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import broadcast_to_rank

from se_flax.lowering.cpu.shifts import (
    Pads,
    Pair,
    bilinear_jvp,
    framed,
    in_columns,
    over_channels,
    over_ranges,
    scattered,
)
from se_flax.lowering.dispatch import materialize

Array = jax.Array

# Limits of the sum of shifted maps: the fewest groups, over which the loop is vectorised, and the most products, beyond
# which XLA's loop is no faster, or far slower.
_VECTOR, _PRODUCTS = 16, 72


def is_narrow(kernel: Array, groups: int) -> bool:
    """Whether the groups are many and have so few channels that block-diagonal kernels would be mostly zeros.

    False below float32, where every partial sum would be rounded. The kernel is [kh, kw, C / groups, features].
    """
    kh, kw, width, features = kernel.shape
    products = kh * kw * max(width, features // groups)
    return groups >= _VECTOR and products <= _PRODUCTS and kernel.dtype.itemsize >= 4


def narrow(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair, groups: int) -> Array:
    """The sum over the taps and a group's channels of the shifted map times the tap's vector over the groups.

    Arguments as for `convolve_on_cpu`.
    """
    # Materialised: otherwise XLA's loops would gather the taps at every pixel.
    taps = materialize(_groups_last(kernel, groups))
    y = materialize(_of_groups(_groups_last(x, groups), taps, strides, padding, dilation))
    return y.swapaxes(3, 4).reshape(*y.shape[:3], -1)


def _groups_last(x: Array, groups: int) -> Array:
    """[..., C] to [..., C / groups, groups]."""
    return x.reshape(*x.shape[:3], groups, -1).swapaxes(3, 4)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _of_groups(x: Array, taps: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """Maps [N, H, W, inputs, groups] and taps [kh, kw, inputs, outputs, groups] to [N, h, w, outputs, groups]."""
    return over_ranges(materialize(framed(x, padding)), taps.shape, strides, dilation, over_channels(taps))


def _of_groups_jvp(strides: Pair, padding: Pads, dilation: Pair, primals: Any, tangents: Any) -> Any:
    pixels = materialize(framed(primals[0], padding))

    def in_taps(_: Array, dtaps: Array) -> Array:
        return in_columns(pixels, dtaps, strides, dilation, lambda x, taps: jnp.sum(x[:, :, :, :, None] * taps, 3))

    return bilinear_jvp(
        lambda _, taps: over_ranges(pixels, taps.shape, strides, dilation, over_channels(taps)),
        lambda dx, taps: _scattered_groups(materialize(dx), taps, strides, padding, dilation),
        in_taps,
        primals,
        tangents,
    )


_of_groups.defjvp(_of_groups_jvp, symbolic_zeros=True)


def _scattered_groups(x: Array, taps: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution, for its transpose with respect to x."""

    def product(pixels: Array, i: int, j: int) -> Array:
        # The transpose of one output's sum over channels is that output times a vector for each channel.
        each = (broadcast_to_rank(taps[i, j, :, o], pixels.ndim) for o in range(taps.shape[3]))
        return jnp.stack([jnp.sum(pixels * tap, 3) for tap in each], 3)

    return scattered(x, taps.shape, strides, padding, dilation, product)
