"""XLA's own convolution."""

from typing import Any

import jax

Array = jax.Array


def native(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Any, dilation: tuple[int, int], groups: int
) -> Array:
    """XLA's own convolution; arguments and result as for `se_flax.convolution.convolve`."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
