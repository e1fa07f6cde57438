"""2-D convolution that knows where it runs: one function, lowered by platform and shape.

TPU and GPU keep XLA's convolution. On a CPU XLA computes a depthwise convolution with a loop far slower than the
machine; as a sum of shifted products it runs at memory speed, forward and backward.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array
Padding = str | Sequence[tuple[int, int]]


def convolve(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Padding, dilation: tuple[int, int], groups: int
) -> Array:
    """Convolution (cross-correlation, as everywhere in deep learning).

    Args:
      x: [N, H, W, C].
      kernel: [kh, kw, C / groups, features], of the same dtype.
      strides: along H and W.
      padding: `"SAME"`, `"VALID"` or ((top, bottom), (left, right)).
      dilation: spacing of the kernel's taps along H and W.
      groups: input and output channels are split in so many groups.

    Returns:
      [N, h, w, features], of the same dtype.
    """

    def native(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=strides,
            padding=padding,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    depthwise = groups > 1 and kernel.shape[2] == 1 and kernel.shape[3] == groups
    if not depthwise or kernel.shape[:2] == (1, 1):
        return native(x, kernel)

    def shifted(x: Array, kernel: Array) -> Array:
        return shifted_products(x, kernel, strides, padding, dilation)

    return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=native)


def shifted_products(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Padding, dilation: tuple[int, int]
) -> Array:
    """Depthwise convolution as a sum over the kernel's taps of shifted maps times a vector.

    Args:
      x: [N, H, W, C].
      kernel: [kh, kw, 1, C].
      strides: as for `convolve`.
      padding: likewise.
      dilation: likewise.

    Returns:
      [N, h, w, C].
    """
    size = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    x = jnp.pad(x, ((0, 0), *(tuple(pair) for pair in padding), (0, 0)))
    h, w = ((side - k) // s + 1 for side, k, s in zip(x.shape[1:3], size, strides, strict=True))
    total = None
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            top, left = i * dilation[0], j * dilation[1]
            window = jax.lax.slice(
                x,
                (0, top, left, 0),
                (x.shape[0], top + (h - 1) * strides[0] + 1, left + (w - 1) * strides[1] + 1, x.shape[3]),
                (1, *strides, 1),
            )
            term = window * kernel[i, j, 0]
            total = term if total is None else total + term
    assert total is not None
    return total
