"""Batch norm after a 1x1 convolution without materialising the convolution's output (TPU training).

Let x [pixels, I] be the feature map, y = x W with W [I, C] the convolution, and v = a * y + b the norm. The last
convolution of a bottleneck has C = 4 I, so that a pass over y costs four over x. No pass over y is needed:

- the batch mean is mean(x) W; the mean square is diag(W' G W) with G = x' x / pixels, the second moments of x;
- y is computed and normalised in one pass, since a and b are known before it;
- with g, the gradient of v, the gradient of a is the sum over I of W * (x' g), and x' g is needed for W's gradient too;
- the gradient through the statistics, a multiple of y per channel, reaches x as x W D W' with a diagonal D: a product
  of the small map and a small matrix.

So y is neither materialised nor stored for the backward pass. Only with gates (a is [N, 1, 1, C]) the backward pass
computes y again, to sum the gradient of the gates. Beside the convolution's three matrix products this costs I / C of a
product for G, as much for G's gradient, and with gates one product more.

A norm with `defer_conv` does this on a TPU, where matrix products are cheap beside passes over memory. On a CPU the
products cost more than the passes saved; on a GPU it was not measured. There y is materialised as usual.
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

# By default a TPU rounds float32 factors to bfloat16: too coarse for a variance, the difference of two moments.
_EXACT = jax.lax.Precision.HIGHEST


class DeferredConv(NamedTuple):
    """The output of a 1x1 convolution, with its input and kernel.

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
        """Shape of the output."""
        return self.output.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the output."""
        return self.output.dtype

    def written(self) -> Array:
        """Computes the whole output [N, H, W, C]."""
        return _convolved(self.x, self.kernel)


def defer_conv(x: Array, kernel: Array) -> DeferredConv:
    """The 1x1 convolution of x, for a norm after it.

    Args:
      x: [N, H, W, I].
      kernel: [I, C], of the same dtype.

    Returns:
      The deferred output, for the functions of this module.
    """

    def absent(x: Array, kernel: Array) -> Array:
        return jnp.zeros((*x.shape[:-1], kernel.shape[-1]), x.dtype)

    return DeferredConv(by_platform(x, kernel, tpu=absent, default=_convolved), x, kernel)


def _convolved(x: Array, kernel: Array) -> Array:
    return convolve(x, kernel[None, None], (1, 1), "VALID", (1, 1), 1)


def image_means(y: Array | DeferredConv) -> Array:
    """Means of y [N, H, W, C] over the spatial axes, float32 [N, 1, 1, C]."""
    return _by_form(y, _means_through, _image_means)


def moments(y: Array | DeferredConv, means: Array | None = None) -> tuple[Array, Array]:
    """Mean and mean square of every channel.

    Args:
      y: [..., C].
      means: `image_means` of y, to derive the mean from; None computes it.

    Returns:
      Two float32 [C].
    """
    if means is not None:
        axes = tuple(range(means.ndim - 1))
        squares = _by_form(y, _squares_through, lambda y: jnp.mean(_image_means(jnp.square(_to_float32(y))), axes))
        return jnp.mean(means, axes), squares
    return _by_form(y, _moments_through, _moments)


def affine(y: Array | DeferredConv, factor: Array | None, offset: Array | None, dtype: Any) -> Array:
    """The affine function factor * y + offset, computed in float32.

    Args:
      y: [..., C]; [N, H, W, C] if factor and offset are per image.
      factor: float32 [C] or [N, 1, 1, C]; None for the identity.
      offset: likewise.
      dtype: of the result.

    Returns:
      The shape of y.
    """
    if factor is None or offset is None:
        return (y.written() if isinstance(y, DeferredConv) else y).astype(dtype)

    def plain(y: Array, factor: Array, offset: Array) -> Array:
        return _affine(_to_float32(y), factor, offset).astype(dtype)

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


def _to_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _affine(y: Array, factor: Array, offset: Array) -> Array:
    return y * broadcast_to_rank(factor, y.ndim) + broadcast_to_rank(offset, y.ndim)


def _image_means(y: Array) -> Array:
    return jnp.mean(_to_float32(y), tuple(range(1, y.ndim - 1)), keepdims=True)


def _moments(y: Array) -> tuple[Array, Array]:
    axes, y32 = tuple(range(y.ndim - 1)), _to_float32(y)
    return jnp.mean(y32, axes), jnp.mean(jnp.square(y32), axes)


def _means_through(x: Array, kernel: Array) -> Array:
    return jnp.matmul(_image_means(x), _to_float32(kernel), precision=_EXACT)


def _squares_through(x: Array, kernel: Array) -> Array:
    kernel = _to_float32(kernel)
    return jnp.sum(kernel * jnp.matmul(_channel_products(x), kernel, precision=_EXACT), 0)


def _moments_through(x: Array, kernel: Array) -> tuple[Array, Array]:
    mean = jnp.matmul(jnp.mean(_to_float32(x), (0, 1, 2)), _to_float32(kernel), precision=_EXACT)
    return mean, _squares_through(x, kernel)


def _matmul(x: Array, matrix: Array) -> Array:
    return jax.lax.dot_general(x, matrix.astype(x.dtype), (((3,), (0,)), ((), ())), preferred_element_type=x.dtype)


def _pixel_products(a: Array, b: Array, precision: Any = None) -> Array:
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    axes = ((0, 1, 2), (0, 1, 2))
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=dtype)


@jax.custom_vjp
def _channel_products(x: Array) -> Array:
    """Second moments of the channels, x' x / pixels: x [N, H, W, I] to float32 [I, I]."""
    return _pixel_products(x, x, _EXACT) / (x.size // x.shape[-1])


def _channel_products_forward(x: Array) -> tuple[Array, Array]:
    return _channel_products(x), x


def _channel_products_backward(x: Array, gradient: Array) -> tuple[Array]:
    # Automatic differentiation would make two matrix products, one per factor.
    return (_matmul(x, (gradient + gradient.T) / (x.size // x.shape[-1])),)


_channel_products.defvjp(_channel_products_forward, _channel_products_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine_through(dtype: Any, x: Array, kernel: Array, factor: Array, offset: Array) -> Array:
    return _affine(_to_float32(_matmul(x, kernel)), factor, offset).astype(dtype)


def _affine_forward(dtype: Any, x: Array, kernel: Array, factor: Array, offset: Array) -> tuple[Array, Any]:
    return _affine_through(dtype, x, kernel, factor, offset), (x, kernel, factor)


def _affine_backward(dtype: Any, saved: Any, gradient: Array) -> tuple[Array, ...]:
    del dtype
    x, kernel, factor = saved
    return (_per_channel_backward if factor.ndim == 1 else _per_image_backward)(x, kernel, factor, gradient)


def _per_channel_backward(x: Array, kernel: Array, factor: Array, gradient: Array) -> tuple[Array, ...]:
    gradient = gradient.astype(x.dtype)
    kernel32, products = _to_float32(kernel), _pixel_products(x, gradient)
    factor = broadcast_to_rank(factor, 2)
    dx = _matmul(gradient, (kernel32 * factor).T)
    dkernel = (products * factor).astype(kernel.dtype)
    return dx, dkernel, jnp.sum(kernel32 * products, 0), jnp.sum(_to_float32(gradient), (0, 1, 2))


def _per_image_backward(x: Array, kernel: Array, factor: Array, gradient: Array) -> tuple[Array, ...]:
    gradient = _to_float32(gradient)
    # Without the barrier XLA would recognise the forward pass's product and store it until here.
    y = _matmul(x, jax.lax.optimization_barrier(kernel))
    dfactor = jnp.sum(_to_float32(y) * gradient, (1, 2), keepdims=True)
    dy = (gradient * factor).astype(x.dtype)
    dkernel = _pixel_products(x, dy).astype(kernel.dtype)
    return _matmul(dy, kernel.T), dkernel, dfactor, jnp.sum(gradient, (1, 2), keepdims=True)


_affine_through.defvjp(_affine_forward, _affine_backward)
