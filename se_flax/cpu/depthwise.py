"""Depthwise convolutions on a CPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from se_flax.cpu.shifts import Pads, Pair, bilinear_jvp, framed, output_sides, over_ranges, over_taps, scattered, window
from se_flax.memory import written

Array = jax.Array

# Images whose products with the gradient are added in one pass, at least: a pass of more reads more and writes less.
_TERMS = 16


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def depthwise(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """A depthwise convolution as a sum over the kernel's taps of shifted maps times a vector.

    Args:
      x: [N, H, W, C].
      kernel: [kh, kw, 1, C].
      strides: as for `convolve_on_cpu`.
      padding: likewise.
      dilation: likewise.

    Returns:
      [N, h, w, C].
    """
    return over_ranges(
        framed(x, padding), kernel.shape, strides, dilation, lambda pixels, i, j: pixels * kernel[i, j, 0]
    )


def _depthwise_jvp(strides: Pair, padding: Pads, dilation: Pair, primals: Any, tangents: Any) -> Any:
    settings = strides, padding, dilation

    return bilinear_jvp(
        # Training stores what x is made of anyway, so there is nothing to hide from XLA.
        lambda x, kernel: _shifted(x, kernel, *settings),
        lambda dx, kernel: scattered(dx, kernel.shape, *settings, lambda pixels, i, j: pixels * kernel[i, j, 0]),
        lambda x, dkernel: _image_products(x, dkernel, *settings),
        primals,
        tangents,
    )


depthwise.defjvp(_depthwise_jvp, symbolic_zeros=True)


def _shifted(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution, of windows of rows and columns."""
    h, w = output_sides(x.shape[1:3], kernel.shape, strides, padding, dilation)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return over_taps(
        kernel.shape, lambda i, j: window(x, i * dilation[0], j * dilation[1], h, w, strides) * kernel[i, j, 0]
    )


def _image_products(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution, for its transpose in the kernel: products of images are added before pixels are.

    A sum over pixels alone would make XLA write every window of every image, which is nine to twenty-five times x.
    """
    n, channels = x.shape[0], x.shape[3]
    h, w = output_sides(x.shape[1:3], kernel.shape, strides, padding, dilation)

    # Without the checkpoint the windows would be kept for the gradient.
    @partial(jax.checkpoint, static_argnums=2)
    def some(x: Array, kernel: Array, together: int) -> Array:
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))

        def term(i: int, j: int) -> Array:
            tap = written(jnp.broadcast_to(kernel[i, j, 0], (together, h, w, channels)))
            met = window(x, i * dilation[0], j * dilation[1], h, w, strides)
            return jnp.concatenate([part * tap for part in jnp.split(met, x.shape[0] // together)])

        return over_taps(kernel.shape, term)

    together = max(n // _TERMS, 1)
    rest = n % together
    parts = [some(x[: n - rest], kernel, together)]
    return jnp.concatenate([*parts, some(x[n - rest :], kernel, rest)] if rest else parts)
