"""Convolutions for a CPU, where XLA's own are slow: by shape, the form that was measured to be the fastest.

| convolution | forward | input's gradient | kernel's gradient |
|---|---|---|---|
| 1x1 | matrix product | likewise | likewise |
| depthwise | sum of shifted products | likewise | products summed over images, then over pixels |
| grouped | up to sixteen dense ones, zeros between groups | likewise | likewise |
| dense, 3x3, of many channels | matrix products of transformed tiles (Winograd's) | likewise | likewise |
| dense | XLA's | XLA's; with a stride, product of patches | product of patches and rows of the gradient |
| dense, of a small map | matrix product of patches | as above | as above |
| dense, of up to three channels | sum of shifted products | as above | as above |

`benchmarks/convolution.py` measures them beside XLA's.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from se_flax import winograd
from se_flax.memory import written

Array = jax.Array
Pair = tuple[int, int]
Pads = tuple[tuple[int, int], tuple[int, int]]
Product = Callable[[Array, Array], Array]

# Of the dense convolutions that a grouped one is made of: the fewest channels, as fewer make XLA's loops slow and more
# add zeros; and the most convolutions, as every one has to be compiled.
_BLOCK, _PIECES = 16, 16
# Images whose products with the gradient are added in one pass, at least: a pass of more reads more and writes less.
_TERMS = 16
# Bytes of the patches that are laid out at a time: more than a core's cache holds costs more than another product.
_PATCHES = 10 << 20
# Input channels per pixel of the output from which on patches are the faster form: there the kernel is most of the
# traffic, and XLA's convolution reads it more slowly than its product does.
_FEW_PIXELS = 8
# Rows that XLA gives to one core where a matrix has at least so many rows and columns, while one row more would keep
# several busy: 7 x 7 pixels of one image.
_ONE_CORES, _TALL, _WIDE = range(33, 52), 512, 1024
# Channels, and tiles of 2 x 2 pixels, from which on a 3x3 kernel's transforms cost less than the products they save.
_TRANSFORMED, _TILES = 64, 128
# Input channels, and numbers per output feature, up to which a sum over them beats XLA's convolution.
_THIN, _THIN_TAPS = 3, 27


def native(x: Array, kernel: Array, strides: Pair, padding: Any, dilation: Pair, groups: int) -> Array:
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
    if groups == 1 and kernel.shape[:2] == (1, 1):
        return pointwise(x, kernel, strides, padding)
    if groups == 1 and _is_for_winograd(x, kernel, strides, dilation):
        return winograd.convolve(x, kernel, padding)
    if groups == 1:
        return dense(x, kernel, strides, padding, dilation)
    if kernel.shape[2] == 1 and kernel.shape[3] == groups:
        return depthwise(x, kernel, strides, padding, dilation)
    return grouped(x, kernel, strides, padding, dilation, groups)


def pointwise(x: Array, kernel: Array, strides: Pair, padding: Pads) -> Array:
    """A 1x1 convolution as a matrix product; arguments as for `convolve_on_cpu`."""
    if padding != ((0, 0), (0, 0)):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # A slice whatever the batch: indexing would become a gather where its size is symbolic.
    return _matrix_product(jax.lax.slice(x, (0,) * 4, x.shape, (1, *strides, 1)), kernel[0, 0])


def _matrix_product(x: Array, matrix: Array) -> Array:
    # Two axes each: in the gradient XLA copies maps of four axes into another order first.
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if isinstance(count, int) and count in _ONE_CORES and matrix.shape[0] >= _TALL and matrix.shape[1] >= _WIDE:
        product = jnp.pad(rows, ((0, _ONE_CORES.stop - count), (0, 0))) @ matrix
        product = jax.lax.slice_in_dim(product, 0, count)
    else:
        product = rows @ matrix
    return product.reshape(*x.shape[:-1], matrix.shape[1])


def _bilinear_jvp(product: Product, in_x: Product, in_kernel: Product, primals: Any, tangents: Any) -> Any:
    """Value and derivative of a product, each of the derivative's terms in the form whose transpose is fast."""
    (x, kernel), (dx, dkernel) = primals, tangents
    terms = [
        term(*operands)
        for term, operands, tangent in ((in_x, (dx, kernel), dx), (in_kernel, (x, dkernel), dkernel))
        if not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    ]
    y = product(x, kernel)
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


# --- Dense ------------------------------------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def dense(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """XLA's convolution or a faster form, with a kernel's gradient that is a matrix product.

    Arguments as for `convolve_on_cpu`.

    The derivative is written as a forward one, which JAX transposes for the gradient: both modes work.
    """
    if is_thin(kernel.shape):
        return thin(x, kernel, strides, padding, dilation)
    sides = output_sides(x.shape[1:3], kernel.shape, strides, padding, dilation)
    if math.prod(sides) * _FEW_PIXELS <= kernel.shape[2]:
        return _of_patches(x, kernel, strides, padding, dilation)
    return native(x, kernel, strides, padding, dilation, 1)


def _is_for_winograd(x: Array, kernel: Array, strides: Pair, dilation: Pair) -> bool:
    """Whether a kernel is 3x3, each pixel's, and its products so many that sixteen for 36 are worth the transforms.

    Not for less than float32, as the transforms' sums would be rounded. Grouped convolutions' parts do not gain.
    """
    if kernel.shape[:2] != (3, 3) or not strides == dilation == (1, 1) or x.dtype.itemsize < 4:
        return False
    images = x.shape[0] if isinstance(x.shape[0], int) else 1  # symbolic: one at least
    return min(kernel.shape[2:]) >= _TRANSFORMED and images * math.prod(x.shape[1:3]) >= 4 * _TILES


def is_thin(kernel: tuple[int, ...]) -> bool:
    """Whether a kernel of this shape has so few channels and taps that XLA's convolution has little to multiply."""
    return kernel[2] <= _THIN and math.prod(kernel[:3]) <= _THIN_TAPS


def thin(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """A convolution of few channels as a sum of numbers times vectors of all features.

    Arguments as for `convolve_on_cpu`.
    """

    def product(window: Array, i: int, j: int) -> Array:
        terms = [jax.lax.slice_in_dim(window, c, c + 1, axis=2) * kernel[i, j, c] for c in range(kernel.shape[2])]
        return sum(terms[1:], terms[0])

    return _over_windows(x, kernel.shape, strides, padding, dilation, product)


def _dense_jvp(strides: Pair, padding: Pads, dilation: Pair, primals: Any, tangents: Any) -> Any:
    settings = strides, padding, dilation

    def in_x(dx: Array, kernel: Array) -> Array:
        # With a stride, XLA's gradient is a convolution of a map with gaps, and multiplies the gaps.
        return native(dx, kernel, *settings, 1) if strides == (1, 1) else _of_patches(dx, kernel, *settings)

    return _bilinear_jvp(
        lambda x, kernel: dense(x, kernel, *settings),
        in_x,
        lambda x, dkernel: _patch_products(x, dkernel, *settings),
        primals,
        tangents,
    )


dense.defjvp(_dense_jvp, symbolic_zeros=True)


def _of_patches(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution as one product of patches and kernel."""
    sides = output_sides(x.shape[1:3], kernel.shape, strides, padding, dilation)
    patches = _patches(jnp.pad(x, ((0, 0), *padding, (0, 0))), kernel.shape, sides, strides, dilation)
    return _matrix_product(patches, kernel.reshape(-1, kernel.shape[3]))


def _patch_products(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution as products of patches and kernel, for its transpose in the kernel.

    Where the stride allows it, patches are of one row, and the kernel's rows are the product's columns: the transpose
    then lays out kw copies of x and kh of the gradient where whole patches are kh * kw copies of x.
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

    # Without the checkpoint the patches of all images would be kept for the gradient.
    @jax.checkpoint
    def some(x: Array) -> Array:
        if not by_row:
            return _of_patches(x, kernel, strides, padding, dilation)
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        rows = [_window(x, 0, left, tall, w, strides) for left in across]
        products = jnp.split(_matrix_product(jnp.concatenate(rows, -1), matrix), kh, -1)
        terms = [_window(y, top, 0, h, w, (1, 1)) for y, top in zip(products, down, strict=True)]
        return sum(terms[1:], terms[0])

    return _in_parts(some, x, images)


def _patches(x: Array, kernel: tuple[int, ...], sides: Pair, strides: Pair, dilation: Pair) -> Array:
    """What a kernel of this shape meets at every place of padded maps: [N, h, w, kh * kw * C]."""
    down, across = ([i * d for i in range(k)] for k, d in zip(kernel[:2], dilation, strict=True))
    return jnp.concatenate([_window(x, top, left, *sides, strides) for top in down for left in across], -1)


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
    """Groups side by side in dense convolutions.

    Arguments as for `convolve_on_cpu`.
    """
    kh, kw, width, features = kernel.shape
    out = features // groups
    block = max(_BLOCK, width, groups * width // _PIECES)
    fitting = [m for m in range(1, groups + 1) if groups % m == 0 and m * width <= block]
    together = max(fitting)
    blocks = groups // together
    apart = kernel.reshape(kh, kw, width, blocks, together, out).transpose(4, 0, 1, 2, 3, 5)
    spread = _on_diagonal(apart).transpose(2, 3, 0, 4, 5, 1, 6)
    spread = spread.reshape(kh, kw, together * width, blocks, together * out)

    def part(x: Array, kernel: Array) -> Array:
        # Written, and so are their gradients: every reader would take what the whole map is made of apart again.
        x = written(x)
        one = (kh, kw) == (1, 1)
        y = pointwise(x, kernel, strides, padding) if one else dense(x, kernel, strides, padding, dilation)
        return written(y)

    parts = [part(some, spread[..., i, :]) for i, some in enumerate(jnp.split(x, blocks, axis=-1))]
    return jnp.concatenate(parts, -1)


def _on_diagonal(x: Array) -> Array:
    """x[i] at [i, i] and zeros elsewhere; [t, ...] to [t, t, ...].

    Written row by row with one item's room too much, the items come to lie one further in every row. A product with the
    identity would do, but its gradient is a sum, on which XLA crashes for some shapes (32 channels in two groups).
    """
    count = x.shape[0]
    rows = jnp.pad(x.reshape(count, -1), ((0, 0), (0, x.size)))
    return rows.reshape(-1)[: count * x.size].reshape(count, *x.shape)


# --- Depthwise --------------------------------------------------------------------------------------------------------


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
    return _over_windows(x, kernel.shape, strides, padding, dilation, lambda window, i, j: window * kernel[i, j, 0])


def _depthwise_jvp(strides: Pair, padding: Pads, dilation: Pair, primals: Any, tangents: Any) -> Any:
    settings = strides, padding, dilation

    return _bilinear_jvp(
        # Training stores what x is made of anyway, so there is nothing to hide from XLA.
        lambda x, kernel: _shifted(x, kernel, *settings),
        lambda dx, kernel: _scattered(dx, kernel, *settings),
        lambda x, dkernel: _image_products(x, dkernel, *settings),
        primals,
        tangents,
    )


depthwise.defjvp(_depthwise_jvp, symbolic_zeros=True)


def _shifted(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution, of windows of rows and columns."""
    h, w = output_sides(x.shape[1:3], kernel.shape, strides, padding, dilation)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return _over_taps(
        kernel.shape, lambda i, j: _window(x, i * dilation[0], j * dilation[1], h, w, strides) * kernel[i, j, 0]
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
            window = _window(x, i * dilation[0], j * dilation[1], h, w, strides)
            return jnp.concatenate([part * tap for part in jnp.split(window, x.shape[0] // together)])

        return _over_taps(kernel.shape, term)

    together = max(n // _TERMS, 1)
    rest = n % together
    parts = [some(x[: n - rest], kernel, together)]
    return jnp.concatenate([*parts, some(x[n - rest :], kernel, rest)] if rest else parts)


def _scattered(x: Array, kernel: Array, strides: Pair, padding: Pads, dilation: Pair) -> Array:
    """The same convolution, products before shifts: transposed, shifts before products, a loop without branches."""
    shape = x.shape[1:3]
    reach = [(k - 1) * d for k, d in zip(kernel.shape[:2], dilation, strict=True)]

    def shifted(i: int, j: int) -> Array:
        back = [i * dilation[0], j * dilation[1]]
        edges = [(r - b, b, 0) for r, b in zip(reach, back, strict=True)]
        return jax.lax.pad(x * kernel[i, j, 0], jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))

    frame = _over_taps(kernel.shape, shifted)
    sides = output_sides(shape, kernel.shape, strides, padding, dilation)
    first = [r - low for r, (low, _) in zip(reach, padding, strict=True)]
    last = [f + (side - 1) * s for f, side, s in zip(first, sides, strides, strict=True)]
    # Padding that is wider than the kernel reaches: outputs that no input touches.
    wider = [(max(0, -f), max(0, t + 1 - side - r)) for f, t, side, r in zip(first, last, shape, reach, strict=True)]
    frame = jnp.pad(frame, ((0, 0), *wider, (0, 0)))
    return _window(frame, first[0] + wider[0][0], first[1] + wider[1][0], *sides, strides)


def _over_windows(
    x: Array,
    kernel: tuple[int, ...],
    strides: Pair,
    padding: Pads,
    dilation: Pair,
    product: Callable[[Array, int, int], Array],
) -> Array:
    """Sum over the taps of a kernel of this shape: `product` of the pixels [N, L, C] that a tap meets, and the tap.

    Pixels are numbered row by row, and those that a tap meets are the range from the first one on. As windows of rows
    and columns, XLA would see that the middle one is x itself, and compute what x is made of twice, or store it.
    """
    n, height, width, channels = x.shape
    h, w = output_sides((height, width), kernel, strides, padding, dilation)
    down, across = ((side - 1) * stride + 1 for side, stride in zip((h, w), strides, strict=True))
    (top, bottom), (left, right) = padding
    wide = left + width + right
    # The last range ends beyond the map. Slices, as indexing would become a gather where the batch's size is symbolic.
    pixels = jnp.pad(x, ((0, 0), (top, bottom + 1), (left, right), (0, 0))).reshape(n, -1, channels)

    def term(i: int, j: int) -> Array:
        first = i * dilation[0] * wide + j * dilation[1]
        return product(jax.lax.slice_in_dim(pixels, first, first + down * wide, axis=1), i, j)

    y = _over_taps(kernel, term)
    y = y.reshape(n, down, wide, y.shape[-1])
    return jax.lax.slice(y, (0,) * 4, (n, down, across, y.shape[-1]), (1, *strides, 1))


def _over_taps(kernel: tuple[int, ...], term: Callable[[int, int], Array]) -> Array:
    terms = [term(i, j) for i in range(kernel[0]) for j in range(kernel[1])]
    return sum(terms[1:], terms[0])


def _in_parts(function: Callable[[Array], Array], x: Array, images: int) -> Array:
    """A function of images, some of them at a time."""
    if images == x.shape[0]:
        return function(x)
    y = jax.lax.map(function, x.reshape(-1, images, *x.shape[1:]))
    return y.reshape(x.shape[0], *y.shape[2:])
