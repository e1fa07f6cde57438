"""Dense convolutions on a CPU."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from se_flax.lowering.cpu.shifts import (
    Pads,
    Pair,
    bilinear_jvp,
    framed,
    output_sides,
    over_channels,
    over_ranges,
    window,
)
from se_flax.lowering.xla import xla_convolution

Array = jax.Array

# Bytes of im2col patches per matrix product: patches beyond a core's cache cost more than another product.
_PATCHES = 10 << 20
# Channels, and bytes of a map and its gradient, up to which XLA's kernel gradient is as fast as that by im2col.
_FEW_CHANNELS, _SMALL_MAPS = 64, 10 << 20
# im2col is faster from so many input channels per output pixel on: there the kernel is most of the memory traffic, and
# XLA's convolution reads a kernel more slowly than its matrix product does.
_FEW_PIXELS = 8
# XLA runs a matrix product of M rows (7 x 7 pixels of one image) on one core if M is in this range and K and N are at
# least so large; with one row more it uses all cores, so M is padded.
_SINGLE_CORE_M, _MIN_K, _MIN_N = range(33, 52), 512, 1024
# Input channels, and kernel values per output feature, up to which a sum over taps beats XLA's convolution.
_THIN, _THIN_TAPS = 3, 27


def pointwise(x: Array, kernel: Array, strides: Pair, padding: Pads) -> Array:
    """A 1x1 convolution as a matrix product; arguments as for `convolve_on_cpu`."""
    if padding != ((0, 0), (0, 0)):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # Not by indexing, which becomes a gather for a symbolic batch size.
    return _matrix_product(jax.lax.slice(x, (0,) * 4, x.shape, (1, *strides, 1)), kernel[0, 0])


def _matrix_product(x: Array, matrix: Array) -> Array:
    # 2-D operands: for 4-D ones XLA's gradient transposes the map first.
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if isinstance(count, int) and count in _SINGLE_CORE_M and matrix.shape[0] >= _MIN_K and matrix.shape[1] >= _MIN_N:
        product = jnp.pad(rows, ((0, _SINGLE_CORE_M.stop - count), (0, 0))) @ matrix
        product = jax.lax.slice_in_dim(product, 0, count)
    else:
        product = rows @ matrix
    return product.reshape(*x.shape[:-1], matrix.shape[1])


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def dense(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """XLA's convolution or a faster implementation, with a custom JVP: see the package's table.

    Arguments as for `convolve_on_cpu`. JAX transposes the JVP for the gradient, so both modes work.
    """
    if is_thin(kernel.shape):
        return thin(x, kernel, strides, padding, dilation)
    sides = output_sides(x.shape[1:3], kernel.shape, strides, padding, dilation)
    if math.prod(sides) * _FEW_PIXELS <= kernel.shape[2]:
        return _of_patches(x, kernel, strides, padding, dilation)
    return xla_convolution(x, kernel, strides, padding, dilation, 1)


def is_thin(kernel: tuple[int, ...]) -> bool:
    """Whether a kernel of this shape has so few input channels and taps that `thin` beats XLA's convolution."""
    return kernel[2] <= _THIN and math.prod(kernel[:3]) <= _THIN_TAPS


def thin(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """A convolution with few input channels as a sum of products of an input value and a vector over the features.

    Arguments as for `convolve_on_cpu`.
    """
    return over_ranges(framed(x, padding), kernel.shape, strides, dilation, over_channels(kernel))


def _dense_jvp(strides: Pair, padding: Pads, dilation: Pair, primals: Any, tangents: Any) -> Any:
    settings = strides, padding, dilation

    def in_x(dx: Array, kernel: Array) -> Array:
        # With a stride, XLA's input gradient is a dilated convolution, which multiplies the inserted zeros.
        return xla_convolution(dx, kernel, *settings, 1) if strides == (1, 1) else _of_patches(dx, kernel, *settings)

    return bilinear_jvp(
        lambda x, kernel: dense(x, kernel, *settings),
        in_x,
        lambda x, dkernel: _for_kernel(x, dkernel, *settings),
        primals,
        tangents,
    )


dense.defjvp(_dense_jvp, symbolic_zeros=True)


def _for_kernel(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution, in the implementation whose transpose with respect to the kernel is fast."""
    sides = output_sides(x.shape[1:3], kernel.shape, strides, padding, dilation)
    numbers = x.size + x.shape[0] * math.prod(sides) * kernel.shape[3]
    if max(kernel.shape[2:]) <= _FEW_CHANNELS and numbers * x.dtype.itemsize <= _SMALL_MAPS:
        return xla_convolution(x, kernel, strides, padding, dilation, 1)
    return _patch_products(x, kernel, strides, padding, dilation)


def _of_patches(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution by im2col: one matrix product of patches and kernel."""
    sides = output_sides(x.shape[1:3], kernel.shape, strides, padding, dilation)
    patches = _patches(jnp.pad(x, ((0, 0), *padding, (0, 0))), kernel.shape, sides, strides, dilation)
    return _matrix_product(patches, kernel.reshape(-1, kernel.shape[3]))


def _patch_products(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution by im2col in several products, for its transpose with respect to the kernel.

    Where the stride allows it, a patch is one row of taps, and the kernel's rows are columns of the product. The
    transpose then stores kw copies of x and kh of the gradient; whole patches would be kh * kw copies of x.
    """
    n, height, width, channels = x.shape
    kh, kw, _, features = kernel.shape
    h, w = output_sides((height, width), kernel.shape, strides, padding, dilation)
    by_row = strides[0] == 1 and kw * channels + kh * features < kh * kw * channels
    across = [j * dilation[1] for j in range(kw)]
    down = [i * dilation[0] for i in range(kh)]
    if by_row:
        tall = height + sum(padding[0])
        matrix = kernel.transpose(1, 2, 0, 3).reshape(kw * channels, kh * features)
        per_image = tall * w * sum(matrix.shape) * x.dtype.itemsize
    else:
        per_image = h * w * math.prod(kernel.shape[:3]) * x.dtype.itemsize
    images = max(i for i in range(1, n + 1) if n % i == 0 and i * per_image <= max(_PATCHES, per_image))

    # Without `jax.checkpoint` the patches of all images would be stored for the gradient.
    @jax.checkpoint
    def some(x: Array) -> Array:
        if not by_row:
            return _of_patches(x, kernel, strides, padding, dilation)
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        rows = [window(x, 0, left, tall, w, strides) for left in across]
        products = jnp.split(_matrix_product(jnp.concatenate(rows, -1), matrix), kh, -1)
        terms = [window(y, top, 0, h, w, (1, 1)) for y, top in zip(products, down, strict=True)]
        return sum(terms[1:], terms[0])

    return _in_parts(some, x, images)


def _patches(x: Array, kernel: tuple[int, ...], sides: Pair, strides: Pair, dilation: Pair) -> Array:
    """im2col: the patch under a kernel of this shape at every output pixel of padded maps, [N, h, w, kh * kw * C]."""
    h, w = sides
    down, across = ([i * d for i in range(k)] for k, d in zip(kernel[:2], dilation, strict=True))
    if kernel[2] > _THIN:
        return jnp.concatenate([window(x, top, left, h, w, strides) for top in down for left in across], -1)
    # Copies of a few channels are slow. Joining the taps of a row first makes the second copies longer.
    rows = jnp.concatenate([window(x, 0, left, x.shape[1], w, (1, strides[1])) for left in across], -1)
    return jnp.concatenate([window(rows, top, 0, h, w, (strides[0], 1)) for top in down], -1)


def _in_parts(function: Callable[[Array], Array], x: Array, images: int) -> Array:
    """Applies a function to so many images at a time."""
    if images == x.shape[0]:
        return function(x)
    y = jax.lax.map(function, x.reshape(-1, images, *x.shape[1:]))
    return y.reshape(x.shape[0], *y.shape[2:])
