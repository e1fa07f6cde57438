"""Convolutions for a CPU, where XLA's own are slow: by shape, the form that was measured to be the fastest.

| convolution | forward and input's gradient | kernel's gradient |
|---|---|---|
| 1x1 | matrix product | matrix product |
| depthwise | sum of shifted products | likewise |
| grouped | dense ones of 32 channels, zeros between groups | as for dense ones |
| dense | XLA's | matrix product of patches, some images at a time |

`benchmarks/convolution.py` measures them beside XLA's.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Pair = tuple[int, int]
Pads = tuple[tuple[int, int], tuple[int, int]]

# Channels of the dense convolutions that a grouped one is made of: fewer make XLA's loops slow, more add zeros.
_BLOCK = 32
# Bytes of the patches that are laid out at a time: more than a core's cache holds costs more than another product.
_PATCHES = 14 << 20


def keeps_native(kernel: tuple[int, ...], groups: int) -> bool:
    """Whether nothing is gained over XLA's convolution: each channel times a number, in several groups."""
    return groups > 1 and kernel[:2] == (1, 1)


def convolve_on_cpu(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair, groups: int) -> Array:
    """The convolution of `se_flax.convolution.convolve`, for a CPU.

    Args:
      x: [N, H, W, C].
      kernel: [kh, kw, C / groups, features].
      strides: along H and W.
      padding: ((top, bottom), (left, right)).
      dilation: of the kernel's taps.
      groups: of channels.

    Returns:
      [N, h, w, features].
    """
    if groups == 1:
        one = kernel.shape[:2] == (1, 1)
        return pointwise(x, kernel, strides, padding) if one else dense(x, kernel, strides, padding, dilation)
    if kernel.shape[2] == 1 and kernel.shape[3] == groups:
        return shifted_products(x, kernel, strides, padding, dilation)
    return grouped(x, kernel, strides, padding, dilation, groups)


def pointwise(x: Array, kernel: Array, strides: Pair, padding: Pads) -> Array:
    """A 1x1 convolution as a matrix product; arguments as for `convolve_on_cpu`."""
    if padding != ((0, 0), (0, 0)):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return _matrix_product(x[:, :: strides[0], :: strides[1]], kernel[0, 0])


def _matrix_product(x: Array, matrix: Array) -> Array:
    # Two axes each: in the gradient XLA copies maps of four axes into another order first.
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])


# --- Dense ------------------------------------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def dense(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """XLA's convolution, with a kernel's gradient that is a matrix product; arguments as for `convolve_on_cpu`.

    The derivative is written as a forward one, which JAX transposes for the gradient: both modes work.
    """
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _dense_jvp(strides: Pair, padding: Pads, dilation: Pair, primals: Any, tangents: Any) -> Any:
    (x, kernel), (dx, dkernel) = primals, tangents
    zero = jax.custom_derivatives.SymbolicZero
    y = dense(x, kernel, strides, padding, dilation)
    parts = []
    if not isinstance(dx, zero):
        parts.append(dense(dx, kernel, strides, padding, dilation))
    if not isinstance(dkernel, zero):
        parts.append(_patch_products(x, dkernel, strides, padding, dilation))
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


dense.defjvp(_dense_jvp, symbolic_zeros=True)


def _patch_products(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution as products of patches and kernel, for its transpose in the kernel."""
    n, height, width, channels = x.shape
    kh, kw, _, features = kernel.shape
    h, w = output_sides((height, width), kernel.shape, strides, padding, dilation)
    per_image = max(1, h * w * kh * kw * channels * x.dtype.itemsize)
    images = max(i for i in range(1, n + 1) if n % i == 0 and i * per_image <= max(_PATCHES, per_image))
    matrix = kernel.reshape(-1, features)

    # Without the checkpoint the patches of all images would be kept for the gradient.
    @jax.checkpoint
    def some(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        patches = [_window(x, i * dilation[0], j * dilation[1], h, w, strides) for i in range(kh) for j in range(kw)]
        return _matrix_product(jnp.concatenate(patches, -1), matrix)

    if images == n:
        return some(x)
    y = jax.lax.map(some, x.reshape(n // images, images, height, width, channels))
    return y.reshape(n, h, w, features)


def output_sides(sides: tuple[int, ...], kernel: tuple[int, ...], strides: Pair, padding: Pads, dilation: Pair) -> Pair:
    """Height and width of a convolution's output."""
    h, w = (
        (side + sum(pads) - (k - 1) * d - 1) // s + 1
        for side, pads, k, d, s in zip(sides, padding, kernel[:2], dilation, strides, strict=True)
    )
    return h, w


def _window(x: Array, top: int, left: int, h: int, w: int, strides: Pair) -> Array:
    """Every stride-th pixel of padded maps, h x w of them."""
    stop = (x.shape[0], top + (h - 1) * strides[0] + 1, left + (w - 1) * strides[1] + 1, x.shape[3])
    return jax.lax.slice(x, (0, top, left, 0), stop, (1, *strides, 1))


# --- Grouped ----------------------------------------------------------------------------------------------------------


def grouped(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair, groups: int) -> Array:
    """Groups side by side in dense convolutions of about 32 channels; arguments as for `convolve_on_cpu`."""
    kh, kw, width, features = kernel.shape
    out = features // groups
    fitting = [m for m in range(1, groups + 1) if groups % m == 0 and m * width <= max(_BLOCK, width)]
    together = max(fitting)
    blocks = groups // together
    spread = kernel.reshape(kh, kw, 1, width, blocks, together, out)
    spread = spread * jnp.eye(together, dtype=kernel.dtype).reshape(together, 1, 1, together, 1)
    spread = spread.reshape(kh, kw, together * width, blocks, together * out)
    parts = [
        dense(part, spread[..., i, :], strides, padding, dilation)
        for i, part in enumerate(jnp.split(x, blocks, axis=-1))
    ]
    return jnp.concatenate(parts, -1)


# --- Depthwise --------------------------------------------------------------------------------------------------------


def shifted_products(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """Depthwise convolution as a sum over the kernel's taps of shifted maps times a vector.

    Args:
      x: [N, H, W, C].
      kernel: [kh, kw, 1, C].
      strides: as for `convolve_on_cpu`.
      padding: likewise.
      dilation: likewise.

    Returns:
      [N, h, w, C].
    """
    h, w = output_sides(x.shape[1:3], kernel.shape, strides, padding, dilation)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    total = None
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            term = _window(x, i * dilation[0], j * dilation[1], h, w, strides) * kernel[i, j, 0]
            total = term if total is None else total + term
    assert total is not None
    return total
