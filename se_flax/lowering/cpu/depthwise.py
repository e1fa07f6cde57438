"""Depthwise convolutions on a CPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import broadcast_to_rank

from se_flax.lowering.cpu.shifts import (
    Pads,
    Pair,
    TapProduct,
    bilinear_jvp,
    framed,
    in_columns,
    output_sides,
    over_ranges,
    over_taps,
    scattered,
    window,
)

Array = jax.Array


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def depthwise(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """A depthwise convolution: the sum over the kernel's taps of the shifted map times the tap's vector.

    Args:
      x: [N, H, W, C].
      kernel: [kh, kw, 1, C].
      strides: as for `convolve_on_cpu`.
      padding: likewise.
      dilation: likewise.

    Returns:
      [N, h, w, C].
    """
    return over_ranges(framed(x, padding), kernel.shape, strides, dilation, _tap_product(kernel))


def _tap_product(kernel: Array) -> TapProduct:
    """Pixels [N, L, C] times the tap's vector [C]."""
    return lambda pixels, i, j: pixels * broadcast_to_rank(kernel[i, j, 0], pixels.ndim)


def _depthwise_jvp(strides: Pair, padding: Pads, dilation: Pair, primals: Any, tangents: Any) -> Any:
    settings = strides, padding, dilation

    return bilinear_jvp(
        # 2-D windows, not `over_ranges`: training stores x anyway, so XLA does not recompute it.
        lambda x, kernel: _shifted(x, kernel, *settings),
        lambda dx, kernel: scattered(dx, kernel.shape, *settings, _tap_product(kernel)),
        lambda x, dkernel: in_columns(framed(x, padding), dkernel[:, :, 0], strides, dilation, jnp.multiply),
        primals,
        tangents,
    )


depthwise.defjvp(_depthwise_jvp, symbolic_zeros=True)


def _shifted(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution with 2-D windows."""
    h, w = output_sides(x.shape[1:3], kernel.shape, strides, padding, dilation)
    x, product = jnp.pad(x, ((0, 0), *padding, (0, 0))), _tap_product(kernel)
    return over_taps(
        kernel.shape, lambda i, j: product(window(x, i * dilation[0], j * dilation[1], h, w, strides), i, j)
    )
