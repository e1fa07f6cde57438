"""Fused batch norm, activation and channel gate with custom derivatives, for blocks that squeeze after the activation.

Let u be the feature map, v = a * u + b its norm, z = f(v) the activation, m = mean(z) over H and W the squeeze, s(m)
the gate, and y = s * z. The gate depends on all of z, so at least one pass over u is needed besides that for y. The
custom VJPs add no others, where automatic differentiation would:

- the squeeze's gradient needs the means of f'(v) and f'(v) * u, which the forward pass over u computes too;
- the gradients of gate, factor and offset are sums over the map, and one pass over u and the gradient of y computes all
  of them per image; only these sums are added once the gradient of the gate is known.

XLA does not fuse these loops on a CPU, where plain differentiation is faster and is used.

Gradients and derivatives of gradients (Hessian-vector products in either order) work everywhere. Forward derivatives of
the functions themselves (`jax.jvp`, `jax.jacfwd`) work on a CPU only.
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
    # Broadcast per image: the backward pass then sums over H and W only, and over the images afterwards.
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


def _act_and_derivative(act: Activation, v: Array) -> tuple[Array, Array]:
    return jax.jvp(act, (v,), (jnp.ones_like(v),))


def _affine(u: Array, factor: Array, offset: Array) -> Array:
    return u.astype(jnp.float32) * broadcast_to_rank(factor, u.ndim) + broadcast_to_rank(offset, u.ndim)


def _plain_squeeze(act: Activation, u: Array, factor: Array, offset: Array) -> Array:
    return _mean(act(_affine(u, factor, offset)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _squeeze(act: Activation, u: Array, factor: Array, offset: Array) -> Array:
    return _plain_squeeze(act, u, factor, offset)


def _squeeze_forward(act: Activation, u: Array, factor: Array, offset: Array) -> tuple[Array, Any]:
    u32 = u.astype(jnp.float32)
    z, d_act = _act_and_derivative(act, _affine(u, factor, offset))
    return _mean(z), (u, factor, offset, _mean(d_act), _mean(d_act * u32))


def _squeeze_backward(act: Activation, saved: Any, gradient: Array) -> tuple[Array, Array, Array]:
    u, factor, offset, mean_d_act, mean_d_act_u = saved
    _, d_act = _act_and_derivative(act, _affine(u, factor, offset))
    pixels = u.shape[1] * u.shape[2]
    du = (gradient / pixels * broadcast_to_rank(factor, u.ndim) * d_act).astype(u.dtype)
    dfactor, doffset = (jnp.sum(gradient * x, (0, 1, 2)) for x in (mean_d_act_u, mean_d_act))
    return matched(du, u), matched(dfactor, factor), matched(doffset, offset)


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
    u32, gradient = u.astype(jnp.float32), gradient.astype(jnp.float32)
    z, d_act = _act_and_derivative(act, u32 * factor + offset)
    inner = gradient * d_act
    du = (gates * factor * inner).astype(u.dtype)
    gradients = du, gates * _sum(inner * u32), gates * _sum(inner), _sum(gradient * z)
    return tuple(matched(dx, x) for dx, x in zip(gradients, saved, strict=True))


_gate.defvjp(_gate_forward, _gate_backward)
