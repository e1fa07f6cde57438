"""Batch norm after a 1x1 convolution without materialising the convolution's output (TPU training).

The map x [pixels, I], the convolution y = x W with W [I, C], and the norm behind it, v = a * y + b. A bottleneck's last
convolution makes four channels of one, so every pass over y costs four over x, and none is needed:

- the statistics are mean(x) W and, for the mean square, diag(W' G W) with the products of all pairs of x's channels,
  G = x' x / pixels;
- v is written in the pass that makes y, since a and b are known by then;
- with v's gradient g, the gradient of a is the sum over W * (x' g), of which x' g is W's own gradient;
- what the statistics send back, a multiple of y per channel, reaches x as x (W D W') with a diagonal D: a product of
  the small map with a small matrix.

So y is neither written nor kept. Only with a gate per image (a [N, 1, 1, C]) y is needed once more, for the gate's
gradient, and is made again in the pass that sums it up. To the convolution's three products this adds I / C of one for
G, as much for the way back, and with a gate one more.

That is how a norm with `defer_conv` does it on a TPU, where products are cheap beside passes over memory. On a CPU the
passes saved cost less than the products, and on a GPU it was not measured; there y is a map like any other.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import broadcast_to_rank

from se_flax.lowering.convolution import convolve
from se_flax.lowering.dispatch import by_platform

Array = jax.Array

# Of float32 numbers a TPU multiplies the leading half only, unless told otherwise; a variance is a small difference.
_EXACT = jax.lax.Precision.HIGHEST


class DeferredConv(NamedTuple):
    """The output of a 1x1 convolution, and what it is the product of.

    Attributes:
      output: [N, H, W, C]; on a TPU an unused placeholder of zeros, removed as dead code.
      x: [N, H, W, I].
      kernel: [I, C], of the same dtype.
    """

    output: Array
    x: Array
    kernel: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        return self.output.shape

    @property
    def dtype(self) -> Any:
        """Of the output."""
        return self.output.dtype

    def written(self) -> Array:
        """The output [N, H, W, C] in memory, for whoever needs all of it."""
        return _convolved(self.x, self.kernel)


def defer_conv(x: Array, kernel: Array) -> DeferredConv:
    """The 1x1 convolution of x, for a norm behind it.

    Args:
      x: [N, H, W, I].
      kernel: [I, C], of the same dtype.

    Returns:
      To be used with the functions of this module.
    """

    def absent(x: Array, kernel: Array) -> Array:
        return jnp.zeros((*x.shape[:-1], kernel.shape[-1]), x.dtype)

    return DeferredConv(by_platform(x, kernel, tpu=absent, default=_convolved), x, kernel)


def _convolved(x: Array, kernel: Array) -> Array:
    return convolve(x, kernel[None, None], (1, 1), "VALID", (1, 1), 1)


def image_means(y: Array | DeferredConv) -> Array:
    """Means over the spatial axes: float32 [N, 1, 1, C] of y [N, H, W, C]."""
    return _by_form(y, _means_through, _image_means)


def moments(y: Array | DeferredConv, means: Array | None = None) -> tuple[Array, Array]:
    """Mean and mean square of every channel.

    Args:
      y: [..., C].
      means: y's `image_means` if they are there; the sums over the images come last then.

    Returns:
      Two float32 [C].
    """
    if means is not None:
        axes = tuple(range(means.ndim - 1))
        squares = _by_form(y, _squares_through, lambda y: jnp.mean(_image_means(jnp.square(_wide(y))), axes))
        return jnp.mean(means, axes), squares
    return _by_form(y, _moments_through, _moments)


def affine(y: Array | DeferredConv, factor: Array | None, offset: Array | None, dtype: Any) -> Array:
    """The affine function factor * y + offset, computed in float32.

    Args:
      y: [..., C]; [N, H, W, C] where the others have an axis of images.
      factor: float32 [C] or [N, 1, 1, C]; None for the identity.
      offset: likewise.
      dtype: of the result.

    Returns:
      The shape of y.
    """
    if factor is None or offset is None:
        return (y.written() if isinstance(y, DeferredConv) else y).astype(dtype)

    def plain(y: Array, factor: Array, offset: Array) -> Array:
        return _affine(_wide(y), factor, offset).astype(dtype)

    return _by_form(y, partial(_affine_through, dtype), plain, factor, offset)


def _by_form(y: Array | DeferredConv, through: Callable[..., Any], plain: Callable[..., Any], *rest: Array) -> Any:
    if not isinstance(y, DeferredConv):
        return plain(y, *rest)
    return by_platform(
        *y,
        *rest,
        tpu=lambda _, x, kernel, *rest: through(x, kernel, *rest),
        default=lambda output, x, kernel, *rest: plain(output, *rest),
    )


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _affine(y: Array, factor: Array, offset: Array) -> Array:
    return y * broadcast_to_rank(factor, y.ndim) + broadcast_to_rank(offset, y.ndim)


def _image_means(y: Array) -> Array:
    return jnp.mean(_wide(y), tuple(range(1, y.ndim - 1)), keepdims=True)


def _moments(y: Array) -> tuple[Array, Array]:
    axes, wide = tuple(range(y.ndim - 1)), _wide(y)
    return jnp.mean(wide, axes), jnp.mean(jnp.square(wide), axes)


def _means_through(x: Array, kernel: Array) -> Array:
    return jnp.matmul(_image_means(x), _wide(kernel), precision=_EXACT)


def _squares_through(x: Array, kernel: Array) -> Array:
    wide = _wide(kernel)
    return jnp.sum(wide * jnp.matmul(_channel_products(x), wide, precision=_EXACT), 0)


def _moments_through(x: Array, kernel: Array) -> tuple[Array, Array]:
    mean = jnp.matmul(jnp.mean(_wide(x), (0, 1, 2)), _wide(kernel), precision=_EXACT)
    return mean, _squares_through(x, kernel)


def _times(x: Array, matrix: Array) -> Array:
    return jax.lax.dot_general(x, matrix.astype(x.dtype), (((3,), (0,)), ((), ())), preferred_element_type=x.dtype)


def _pixel_products(a: Array, b: Array, precision: Any = None) -> Array:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    axes = ((0, 1, 2), (0, 1, 2))
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=wide)


@jax.custom_vjp
def _channel_products(x: Array) -> Array:
    """Means over the pixels of the products of all pairs of channels: float32 [I, I] of x [N, H, W, I]."""
    return _pixel_products(x, x, _EXACT) / (x.size // x.shape[-1])


def _channel_products_forward(x: Array) -> tuple[Array, Array]:
    return _channel_products(x), x


def _channel_products_backward(x: Array, gradient: Array) -> tuple[Array]:
    # Differentiation on its own makes two products of it, one for each factor.
    return (_times(x, (gradient + gradient.T) / (x.size // x.shape[-1])),)


_channel_products.defvjp(_channel_products_forward, _channel_products_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine_through(dtype: Any, x: Array, kernel: Array, factor: Array, offset: Array) -> Array:
    return _affine(_wide(_times(x, kernel)), factor, offset).astype(dtype)


def _affine_forward(dtype: Any, x: Array, kernel: Array, factor: Array, offset: Array) -> tuple[Array, Any]:
    return _affine_through(dtype, x, kernel, factor, offset), (x, kernel, factor)


def _affine_backward(dtype: Any, saved: Any, gradient: Array) -> tuple[Array, ...]:
    del dtype
    x, kernel, factor = saved
    return (_per_channel_backward if factor.ndim == 1 else _per_image_backward)(x, kernel, factor, gradient)


def _per_channel_backward(x: Array, kernel: Array, factor: Array, gradient: Array) -> tuple[Array, ...]:
    gradient = gradient.astype(x.dtype)
    wide, products = _wide(kernel), _pixel_products(x, gradient)
    factor = broadcast_to_rank(factor, 2)
    of_x = _times(gradient, (wide * factor).T)
    of_kernel = (products * factor).astype(kernel.dtype)
    return of_x, of_kernel, jnp.sum(wide * products, 0), jnp.sum(_wide(gradient), (0, 1, 2))


def _per_image_backward(x: Array, kernel: Array, factor: Array, gradient: Array) -> tuple[Array, ...]:
    wide = _wide(gradient)
    # Without the barrier the compiler sees that this is the forward's product and keeps that until here.
    again = _times(x, jax.lax.optimization_barrier(kernel))
    of_factor = jnp.sum(_wide(again) * wide, (1, 2), keepdims=True)
    scaled = (wide * factor).astype(x.dtype)
    of_kernel = _pixel_products(x, scaled).astype(kernel.dtype)
    return _times(scaled, kernel.T), of_kernel, of_factor, jnp.sum(wide, (1, 2), keepdims=True)


_affine_through.defvjp(_affine_forward, _affine_backward)
