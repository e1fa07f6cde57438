"""Convolution by platform: XLA's own on TPU and GPU, a faster implementation on a CPU.

`dispatch.by_platform` traces the implementations of all platforms, also of those that will not run. The implementations
for a CPU slice, reshape and loop over feature maps. They need a concrete height and width, and images that are not
sharded over explicit mesh axes; otherwise every platform gets XLA's convolution.
"""

from collections.abc import Sequence
from typing import Any

import jax

from se_flax.lowering.cpu.convolution import convolve_on_cpu
from se_flax.lowering.dispatch import by_platform, memoized_partial
from se_flax.lowering.sharding import has_explicit_axes, over_images
from se_flax.lowering.xla import xla_convolution

Array = jax.Array
Padding = str | Sequence[tuple[int, int]]


def convolve(
    x: Array, kernel: Array, strides: tuple[int, ...], padding: Padding, dilation: tuple[int, ...], groups: int
) -> Array:
    """Convolution (cross-correlation, as everywhere in deep learning) over one or more spatial axes.

    Args:
      x: [N, H, W, C], or with any other number of spatial axes.
      kernel: [kh, kw, C / groups, features], of the same dtype; one axis per spatial axis of x.
      strides: along the spatial axes.
      padding: `"SAME"`, `"VALID"` or ((top, bottom), (left, right)).
      dilation: spacing of the kernel's taps along the spatial axes.
      groups: number of groups that the input and output channels are split into.

    Returns:
      [N, h, w, features], of the same dtype. On explicit mesh axes only N is sharded, as in x.
    """
    sides = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:-2], dilation, strict=True)]
    pads = jax.lax.padtype_to_pads(x.shape[1:-1], sides, strides, padding) if isinstance(padding, str) else padding
    settings: dict[str, Any] = {
        "strides": tuple(strides),
        "padding": tuple((low, high) for low, high in pads),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    if has_explicit_axes(x, kernel):
        return over_images(memoized_partial(xla_convolution, **settings), x, kernel)
    if not _fits_cpu_forms(x):
        return xla_convolution(x, kernel, **settings)
    return by_platform(
        x,
        kernel,
        cpu=memoized_partial(convolve_on_cpu, **settings),
        default=memoized_partial(xla_convolution, **settings),
    )


def _fits_cpu_forms(x: Array) -> bool:
    """Whether x is [N, H, W, C] with concrete H, W and C, and not empty."""
    return x.ndim == 4 and all(isinstance(side, int) for side in x.shape[1:]) and 0 not in x.shape
