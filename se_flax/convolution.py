"""2-D convolution that knows where it runs: TPU and GPU keep XLA's own, a CPU gets a form that it is fast at."""

from collections.abc import Sequence

import jax

from se_flax.bound import bound
from se_flax.cpu.convolution import convolve_on_cpu
from se_flax.native import native

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
    sides = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], sides, strides, padding) if isinstance(padding, str) else padding
    (top, bottom), (left, right) = pads
    settings = {
        "strides": tuple(strides),
        "padding": ((top, bottom), (left, right)),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    return jax.lax.platform_dependent(
        x, kernel, cpu=bound(convolve_on_cpu, **settings), default=bound(native, **settings)
    )
