"""Convolutions as sums of shifted maps, one term per kernel tap."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import broadcast_to_rank

from se_flax.lowering.dispatch import materialize

Array = jax.Array
Pair = tuple[int, int]
Pads = tuple[tuple[int, int], tuple[int, int]]
Product = Callable[[Array, Array], Array]
# Arguments: pixels, and the row and column of the tap that they are multiplied by.
TapProduct = Callable[[Array, int, int], Array]

# Pixels whose products are added in one loop. More amortise the writing of the sums; fewer fit in the cache.
_TERMS = 32


def bilinear_jvp(product: Product, in_x: Product, in_kernel: Product, primals: Any, tangents: Any) -> Any:
    """JVP of a bilinear product; `in_x` and `in_kernel` compute the same product, with transposes that are fast."""
    (x, kernel), (dx, dkernel) = primals, tangents
    terms = [
        term(*operands)
        for term, operands, tangent in ((in_x, (dx, kernel), dx), (in_kernel, (x, dkernel), dkernel))
        if not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    ]
    y = product(x, kernel)
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def output_sides(sides: tuple[int, ...], kernel: tuple[int, ...], strides: Pair, padding: Pads, dilation: Pair) -> Pair:
    """Height and width of a convolution's output."""
    h, w = (
        (side + sum(pads) - (k - 1) * d - 1) // s + 1
        for side, pads, k, d, s in zip(sides, padding, kernel[:2], dilation, strides, strict=True)
    )
    return h, w


def window(x: Array, top: int, left: int, h: int, w: int, strides: Pair) -> Array:
    """Every stride-th pixel of maps [N, H, W, ...], from (top, left), without padding: [N, h, w, ...]."""
    channels = x.shape[3:]
    start, steps = (0, top, left, *(0 for _ in channels)), (1, *strides, *(1 for _ in channels))
    stop = (x.shape[0], top + (h - 1) * strides[0] + 1, left + (w - 1) * strides[1] + 1, *channels)
    # Not by indexing, which becomes a gather for a symbolic batch size.
    return jax.lax.slice(x, start, stop, steps)


def framed(x: Array, padding: Pads) -> Array:
    """Pads maps [N, H, W, ...], with one row more at the bottom, in which the last range of `over_ranges` ends."""
    (top, bottom), sides = padding
    return jnp.pad(x, ((0, 0), (top, bottom + 1), sides, *((0, 0),) * (x.ndim - 3)))


def over_ranges(x: Array, kernel: tuple[int, ...], strides: Pair, dilation: Pair, product: TapProduct) -> Array:
    """Sum over a kernel's taps of `product` of the tap and the pixels [N, L, ...] that it is multiplied by.

    In the row-major order of the `framed` maps, a tap's pixels are one contiguous range (for strides, with pixels to
    skip). 2-D windows would expose x itself as the centre tap, and XLA would recompute or store x's producer; flat
    ranges do not.
    """
    n, height, padded_width = x.shape[:3]
    h, w = output_sides((height - 1, padded_width), kernel, strides, ((0, 0), (0, 0)), dilation)
    down = (h - 1) * strides[0] + 1
    pixels = x.reshape(n, -1, *x.shape[3:])

    def term(i: int, j: int) -> Array:
        first = i * dilation[0] * padded_width + j * dilation[1]
        return product(jax.lax.slice_in_dim(pixels, first, first + down * padded_width, axis=1), i, j)

    y = over_taps(kernel, term)
    return window(y.reshape(n, down, padded_width, *y.shape[2:]), 0, 0, h, w, strides)


def over_channels(taps: Array) -> TapProduct:
    """`product` for `over_ranges`: pixels [N, L, C, ...] times taps [kh, kw, C, ...], summed over C: [N, L, ...]."""

    def product(pixels: Array, i: int, j: int) -> Array:
        terms = [
            jax.lax.slice_in_dim(pixels, c, c + 1, axis=2) * broadcast_to_rank(taps[i, j, c], pixels.ndim)
            for c in range(taps.shape[2])
        ]
        return sum(terms[1:], terms[0])

    return product


def scattered(
    x: Array, kernel: tuple[int, ...], strides: Pair, padding: Pads, dilation: Pair, product: TapProduct
) -> Array:
    """The same sum over unpadded maps, with the products before the shifts: [N, h, w, ...].

    In its transpose the shifts come before the products, which is a loop without branches. With a stride, each tap is
    multiplied by the pixels of one phase (row and column modulo the stride) only, so no inserted zeros are multiplied.
    """
    sides = output_sides(x.shape[1:3], kernel, strides, padding, dilation)
    places = list(zip(kernel[:2], dilation, strides, strict=True))
    reach = [(k - 1) * d // s for k, d, s in places]
    # Height and width of a phase.
    counts = [side + r for side, r in zip(sides, reach, strict=True)]
    zero = jnp.zeros((), x.dtype)

    def pad(x: Array, edges: list[tuple[int, int, int]]) -> Array:
        return jax.lax.pad(x, zero, ((0, 0, 0), *edges, *((0, 0, 0),) * (x.ndim - 3)))

    lengths = zip(padding, counts, strides, x.shape[1:3], strict=True)
    x = pad(x, [(low, count * s - low - length, 0) for (low, _), count, s, length in lengths])
    n, rest = x.shape[0], x.shape[3:]
    phases = x.reshape(n, counts[0], strides[0], counts[1], strides[1], *rest)

    def term(i: int, j: int) -> Array:
        (down, row), (across, column) = (divmod(tap * d, s) for tap, (_, d, s) in zip((i, j), places, strict=True))
        phase = jax.lax.index_in_dim(jax.lax.index_in_dim(phases, column, 4, keepdims=False), row, 2, keepdims=False)
        backwards = zip(reach, (down, across), strict=True)
        return pad(product(phase, i, j), [(r - back, back, 0) for r, back in backwards])

    return window(over_taps(kernel, term), reach[0], reach[1], sides[0], sides[1], (1, 1))


def in_columns(x: Array, taps: Array, strides: Pair, dilation: Pair, product: Product) -> Array:
    """The same sum over `framed` maps, for its transpose with respect to the taps.

    In the transpose, one loop adds the products of a few rows and columns of the output, for all taps of a row at once;
    the partial sums are small. For a single sum over all pixels XLA would materialise the map's windows.

    Args:
      x: [N, H, W, ...].
      taps: [kh, kw, ...].
      strides: as for `over_ranges`.
      dilation: likewise.
      product: of pixels [N, rows, kw, ...] and taps with the same leading axes; bilinear and elementwise over these.

    Returns:
      [N, h, w, ...].
    """
    kh, kw = taps.shape[:2]
    n, height, padded_width = x.shape[:3]
    h, w = output_sides((height - 1, padded_width), taps.shape, strides, ((0, 0), (0, 0)), dilation)
    together = max(d for d in range(1, h + 1) if h % d == 0 and (d == 1 or d * w <= _TERMS))
    count, steps = h // together, (together * strides[0], dilation[1])

    # Without `jax.checkpoint` the windows of all taps would be stored for the gradient.
    @jax.checkpoint
    def whole(x: Array, taps: Array) -> Array:
        # One copy of the taps per partial sum of the gradient.
        shape = (n, count, *taps.shape[1:])
        copies = {
            (i, first): materialize(jnp.broadcast_to(taps[i], shape))
            for i in range(kh)
            for first in range(0, w, _TERMS)
        }

        def term(row: int, column: int, i: int) -> Array:
            top, left = row * strides[0] + i * dilation[0], column * strides[1]
            pixels_of_taps = window(x, top, left, count, kw, steps)
            return product(pixels_of_taps, copies[i, column - column % _TERMS])

        def pixels(row: int, column: int) -> Array:
            terms = [term(row, column, i) for i in range(kh)]
            return jnp.sum(sum(terms[1:], terms[0]), 2)

        rows = [jnp.stack([pixels(row, column) for column in range(w)], 2) for row in range(together)]
        y = jnp.stack(rows, 2)
        return y.reshape(n, h, w, *y.shape[4:])

    return whole(x, taps)


def over_taps(kernel: tuple[int, ...], term: Callable[[int, int], Array]) -> Array:
    """Sum of `term(i, j)` over rows and columns of a kernel."""
    terms = [term(i, j) for i in range(kernel[0]) for j in range(kernel[1])]
    return sum(terms[1:], terms[0])
