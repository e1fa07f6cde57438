"""Fused batch norm, activation and channel gate with custom derivatives, for blocks that squeeze after the activation.

The map u, its norm v = a * u + b, the activation z = f(v), the squeeze m = mean(z) over H and W, the gate s(m), and
y = s * z. The gate needs all of z, so one read of u more than the norm and the activation make is the least. The rest
can be had for nothing, and differentiation on its own does not find it:

- the squeeze's gradient needs the means of f'(v) and f'(v) * u, which the forward read gives as well;
- what the gate's, the factor's and the offset's gradients sum over the map, one read of u and of y's gradient gives
  together, per image; only sums of sums are left when the gate's own gradient has been found.

On a CPU the loops are not fused so, and plain differentiation is faster.

Gradients and derivatives of gradients (Hessian-vector products in either order) can be taken everywhere; the forward
derivative of the functions themselves (`jax.jvp`, `jax.jacfwd`) on a CPU only, where they are the plain ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import broadcast_to_rank

from se_flax.lowering.dispatch import by_platform, memoized_partial
from se_flax.lowering.sharding import matched

Array = jax.Array
Activation = Callable[[Array], Array]


def squeeze_after_act(u: Array, factor: Array, offset: Array, act: Activation) -> Array:
    """Means over H and W of act(factor * u + offset).

    Args:
      u: map [N, H, W, C].
      factor: float32 [C].
      offset: float32 [C].
      act: elementwise.

    Returns:
      float32 [N, 1, 1, C].
    """
    return by_platform(
        u, factor, offset, cpu=memoized_partial(_plain_squeeze, act), default=memoized_partial(_squeeze, act)
    )


def gate_after_act(u: Array, factor: Array, offset: Array, gates: Array, act: Activation, dtype: Any) -> Array:
    """The gated activation, gates * act(factor * u + offset), computed in float32.

    Args:
      u: map [N, H, W, C].
      factor: float32 [C].
      offset: float32 [C].
      gates: float32 [N, 1, 1, C].
      act: elementwise.
      dtype: of the result.

    Returns:
      [N, H, W, C].
    """
    # One copy per image, so that the sums of the backward pass end before the images are added up.
    factor, offset = (jnp.broadcast_to(x, gates.shape) for x in (factor, offset))
    return by_platform(
        u,
        factor,
        offset,
        gates,
        cpu=memoized_partial(_plain_gate, act, dtype),
        default=memoized_partial(_gate, act, dtype),
    )


def _mean(x: Array) -> Array:
    return jnp.mean(x, (1, 2), keepdims=True)


def _sum(x: Array) -> Array:
    return jnp.sum(x, (1, 2), keepdims=True)


def _with_slope(act: Activation, v: Array) -> tuple[Array, Array]:
    return jax.jvp(act, (v,), (jnp.ones_like(v),))


def _affine(u: Array, factor: Array, offset: Array) -> Array:
    return u.astype(jnp.float32) * broadcast_to_rank(factor, u.ndim) + broadcast_to_rank(offset, u.ndim)


def _plain_squeeze(act: Activation, u: Array, factor: Array, offset: Array) -> Array:
    return _mean(act(_affine(u, factor, offset)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _squeeze(act: Activation, u: Array, factor: Array, offset: Array) -> Array:
    return _plain_squeeze(act, u, factor, offset)


def _squeeze_forward(act: Activation, u: Array, factor: Array, offset: Array) -> tuple[Array, Any]:
    wide = u.astype(jnp.float32)
    z, slope = _with_slope(act, _affine(u, factor, offset))
    return _mean(z), (u, factor, offset, _mean(slope), _mean(slope * wide))


def _squeeze_backward(act: Activation, saved: Any, gradient: Array) -> tuple[Array, Array, Array]:
    u, factor, offset, slope, slope_u = saved
    _, local = _with_slope(act, _affine(u, factor, offset))
    pixels = u.shape[1] * u.shape[2]
    of_u = (gradient / pixels * broadcast_to_rank(factor, u.ndim) * local).astype(u.dtype)
    of_factor, of_offset = (jnp.sum(gradient * x, (0, 1, 2)) for x in (slope_u, slope))
    return matched(of_u, u), matched(of_factor, factor), matched(of_offset, offset)


_squeeze.defvjp(_squeeze_forward, _squeeze_backward)


def _plain_gate(act: Activation, dtype: Any, u: Array, factor: Array, offset: Array, gates: Array) -> Array:
    return (gates * act(u.astype(jnp.float32) * factor + offset)).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gate(act: Activation, dtype: Any, u: Array, factor: Array, offset: Array, gates: Array) -> Array:
    return _plain_gate(act, dtype, u, factor, offset, gates)


def _gate_forward(act: Activation, dtype: Any, *operands: Array) -> tuple[Array, Any]:
    return _plain_gate(act, dtype, *operands), operands


def _gate_backward(act: Activation, dtype: Any, saved: Any, gradient: Array) -> tuple[Array, ...]:
    del dtype
    u, factor, offset, gates = saved
    wide, gradient = u.astype(jnp.float32), gradient.astype(jnp.float32)
    z, slope = _with_slope(act, wide * factor + offset)
    inner = gradient * slope
    of_u = (gates * factor * inner).astype(u.dtype)
    gradients = of_u, gates * _sum(inner * wide), gates * _sum(inner), _sum(gradient * z)
    return tuple(matched(of_x, x) for of_x, x in zip(gradients, saved, strict=True))


_gate.defvjp(_gate_forward, _gate_backward)
