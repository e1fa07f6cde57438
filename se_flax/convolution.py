"""2-D convolution that knows where it runs: TPU and GPU keep XLA's own, a CPU gets a form that it is fast at."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import jax

from se_flax.cpu_convolution import Pads, Pair, convolve_on_cpu, native

Array = jax.Array
Padding = str | Sequence[tuple[int, int]]
Form = Callable[[Array, Array], Array]


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
    on_cpu, elsewhere = _forms(tuple(strides), ((top, bottom), (left, right)), tuple(dilation), groups)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


@lru_cache(maxsize=1024)
def _forms(strides: Pair, padding: Pads, dilation: Pair, groups: int) -> tuple[Form, Form]:
    """The convolution on a CPU and elsewhere.

    The same functions for the same settings: JAX traces and differentiates those once for all maps of a shape, which
    takes a quarter off the tracing of SE-ResNet-50's training step.
    """

    def on_cpu(x: Array, kernel: Array) -> Array:
        return convolve_on_cpu(x, kernel, strides, padding, dilation, groups)

    def elsewhere(x: Array, kernel: Array) -> Array:
        return native(x, kernel, strides, padding, dilation, groups)

    return on_cpu, elsewhere
