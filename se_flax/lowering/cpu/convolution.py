"""Choice of a convolution's implementation on a CPU, by its shape."""

import jax

from se_flax.lowering.cpu import winograd
from se_flax.lowering.cpu.dense import dense, pointwise
from se_flax.lowering.cpu.depthwise import depthwise
from se_flax.lowering.cpu.grouped import grouped
from se_flax.lowering.cpu.narrow import is_narrow, narrow
from se_flax.lowering.cpu.shifts import Pads, Pair

Array = jax.Array


def convolve_on_cpu(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair, groups: int) -> Array:
    """The convolution of `se_flax.lowering.convolution.convolve`, for a CPU.

    Args:
      x: [N, H, W, C].
      kernel: [kh, kw, C / groups, features].
      strides: along H and W.
      padding: ((top, bottom), (left, right)).
      dilation: spacing of the kernel's taps along H and W.
      groups: number of channel groups.

    Returns:
      [N, h, w, features].
    """
    if groups == 1 and kernel.shape[:2] == (1, 1):
        return pointwise(x, kernel, strides, padding)
    if groups == 1 and winograd.is_worth_it(x, kernel, strides, dilation):
        return winograd.convolve(x, kernel, padding)
    if groups == 1:
        return dense(x, kernel, strides, padding, dilation)
    if kernel.shape[2] == 1 and kernel.shape[3] == groups:
        return depthwise(x, kernel, strides, padding, dilation)
    if is_narrow(kernel, groups):
        return narrow(x, kernel, strides, padding, dilation, groups)
    return grouped(x, kernel, strides, padding, dilation, groups)
