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
# Of pixels, and the row and column of the tap that they meet.
TapProduct = Callable[[Array, int, int], Array]

# Pixels whose products are added in one loop: more hide the cost of writing the sums, and of fewer a cache holds all.
_TERMS = 32


def bilinear_jvp(product: Product, in_x: Product, in_kernel: Product, primals: Any, tangents: Any) -> Any:
    """Value and derivative of a product, each of the derivative's terms in the form whose transpose is fast."""
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
    """Every stride-th pixel of maps [N, H, W, ...] from (top, left) on, without padding: [N, h, w, ...]."""
    channels = x.shape[3:]
    start, steps = (0, top, left, *(0 for _ in channels)), (1, *strides, *(1 for _ in channels))
    stop = (x.shape[0], top + (h - 1) * strides[0] + 1, left + (w - 1) * strides[1] + 1, *channels)
    # A slice, as indexing would become a gather where the batch's size is symbolic.
    return jax.lax.slice(x, start, stop, steps)


def framed(x: Array, padding: Pads) -> Array:
    """Maps [N, H, W, ...] with their padding, and a row below it, in which the last range of `over_ranges` ends."""
    (top, bottom), sides = padding
    return jnp.pad(x, ((0, 0), (top, bottom + 1), sides, *((0, 0),) * (x.ndim - 3)))


def over_ranges(x: Array, kernel: tuple[int, ...], strides: Pair, dilation: Pair, product: TapProduct) -> Array:
    """Sum over the taps of a kernel of this shape: `product` of the pixels [N, L, ...] that a tap meets, and the tap.

    Pixels of the `framed` maps are numbered row by row, and those that a tap meets are the range from the first one on.
    2-D windows would expose x itself as the centre tap, and XLA would recompute or store x's producer; flat ranges do
    not.
    """
    n, height, wide = x.shape[:3]
    h, w = output_sides((height - 1, wide), kernel, strides, ((0, 0), (0, 0)), dilation)
    down = (h - 1) * strides[0] + 1
    pixels = x.reshape(n, -1, *x.shape[3:])

    def term(i: int, j: int) -> Array:
        first = i * dilation[0] * wide + j * dilation[1]
        return product(jax.lax.slice_in_dim(pixels, first, first + down * wide, axis=1), i, j)

    y = over_taps(kernel, term)
    return window(y.reshape(n, down, wide, *y.shape[2:]), 0, 0, h, w, strides)


def over_channels(taps: Array) -> TapProduct:
    """A product for `over_ranges`: pixels [N, L, C, ...] and taps [kh, kw, C, ...] to sums over C, [N, L, ...]."""

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
    """The same sum of pixels [N, h, w, ...], products before shifts, of maps without their padding.

    Transposed, shifts come before products, a loop without branches. With a stride, a tap meets the pixels of one phase
    alone, so that every phase has its own taps, and no products with the gaps between the outputs' places.
    """
    sides = output_sides(x.shape[1:3], kernel, strides, padding, dilation)
    places = list(zip(kernel[:2], dilation, strides, strict=True))
    reach = [(k - 1) * d // s for k, d, s in places]
    # Pixels of a phase, along each side.
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
    """The same sum over `framed` maps, for its transpose in the taps.

    Transposed, one loop adds the products of a few rows and columns of the output, for all taps of a row at once, and
    what is left to be added is small: a sum over all pixels alone would make XLA write the map's windows.

    Args:
      x: [N, H, W, ...].
      taps: [kh, kw, ...].
      strides: as for `over_ranges`.
      dilation: likewise.
      product: of pixels [N, rows, kw, ...] and taps of the same axes in front; bilinear, place by place.

    Returns:
      [N, h, w, ...].
    """
    kh, kw = taps.shape[:2]
    n, height, wide = x.shape[:3]
    h, w = output_sides((height - 1, wide), taps.shape, strides, ((0, 0), (0, 0)), dilation)
    together = max(d for d in range(1, h + 1) if h % d == 0 and (d == 1 or d * w <= _TERMS))
    count, steps = h // together, (together * strides[0], dilation[1])

    # Without the checkpoint all the pixels that taps meet would be kept for the gradient.
    @jax.checkpoint
    def whole(x: Array, taps: Array) -> Array:
        # The taps at every place where they get a sum of their own.
        places = (n, count, *taps.shape[1:])
        spread = {
            (i, first): materialize(jnp.broadcast_to(taps[i], places))
            for i in range(kh)
            for first in range(0, w, _TERMS)
        }

        def term(row: int, column: int, i: int) -> Array:
            top, left = row * strides[0] + i * dilation[0], column * strides[1]
            met = window(x, top, left, count, kw, steps)
            return product(met, spread[i, column - column % _TERMS])

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
