"""XLA's own convolution."""

from typing import Any

import jax

Array = jax.Array


def xla_convolution(
    x: Array, kernel: Array, strides: tuple[int, ...], padding: Any, dilation: tuple[int, ...], groups: int
) -> Array:
    """XLA's own convolution; arguments and result as for `se_flax.lowering.convolution.convolve`."""
    spatial = tuple(range(1, x.ndim - 1))
    dimensions = jax.lax.ConvDimensionNumbers(
        (0, x.ndim - 1, *spatial), (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)), (0, x.ndim - 1, *spatial)
    )
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=dimensions,
        feature_group_count=groups,
    )
