"""Norm, activation and channel attention as one step, in the fewest passes over the feature map.

Let m be the mean of a convolution's output u over the spatial axes. A batch norm is the affine function a * u + b per
channel. If the attention depends only on the mean of the normalised map, which is a * m + b, then norm and gate s are
one affine function per image and channel, (s * a) * u + s * b: the attention costs no pass over the map. For an
activation between norm and attention, `se_flax.lowering.gated_norm` has the fused implementation. Only this module
combines them: norms return their coefficients, attention modules their gates, and blocks call the two functions below.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from se_flax.lowering.deferred_conv import DeferredConv
from se_flax.lowering.dispatch import Function, share_computation
from se_flax.lowering.gated_norm import gate_after_act
from se_flax.lowering.sharding import has_explicit_axes
from se_flax.nn.attention_base import ChannelAttention
from se_flax.nn.conv import Conv
from se_flax.nn.norm import BatchNorm

Array = jax.Array
Activation = Callable[[Array], Array]


def norm_act_attend(
    norm: Any,
    attention: Any,
    x: Array | DeferredConv,
    *,
    train: bool,
    act: Activation | None = None,
    base_channels: int | None = None,
    input_mean: Callable[[], Array] | None = None,
) -> Array:
    """attention(act(norm(x))).

    Args:
      norm: called as `norm(x, train=train)`.
      attention: attention module, or None.
      x: [N, H, W, C].
      train: the norm uses the batch's statistics.
      act: activation between norm and attention; None for none.
      base_channels: channel count that the attention's reduction refers to; None for C.
      input_mean: returns x's mean over the spatial axes, float32 [N, 1, 1, C], without a pass over x. Used only if the
        norm was folded into the convolution; otherwise the norm makes that pass anyway.

    Returns:
      [N, H, W, C].
    """
    if not (isinstance(norm, BatchNorm) and isinstance(attention, ChannelAttention) and attention.squeezes_mean):
        normalised: Array = norm(x, train=train)
        y = normalised if act is None else act(normalised)
        return y if attention is None else attention(y, train=train, base_channels=base_channels)
    dtype = norm.dtype or x.dtype
    x, factor, offset, means = norm.coefficients(x, train=train, per_image=act is None)
    gates_of = partial(attention.gates_of, train=train, base_channels=base_channels)
    u: Any = x.written() if isinstance(x, DeferredConv) and means is None else x
    if factor is None or offset is None:  # the norm was folded into the convolution before it
        u = u.astype(jnp.float32)
        u = u if act is None else act(u)
        z = input_mean() if input_mean is not None and act is None else attention.pool(u)
        return (u * gates_of(z)).astype(dtype)
    if act is not None:
        gates = gates_of(attention.pool(u, factor, offset, Function(act)))
        return gate_after_act(u, factor, offset, gates, act, dtype)
    assert means is not None
    gates = gates_of(means)
    factor, offset = (jax.lax.broadcast_to_rank(each, gates.ndim) for each in (factor, offset))
    return norm.affine(x, gates * factor, gates * offset)


def conv_norm_attend(
    conv: Any, norm: Any, attention: Any, x: Array, *, train: bool, base_channels: int | None = None
) -> Array:
    """attention(norm(conv(x))) for a convolution whose output nothing else reads.

    A 1x1 convolution saves passes over its output: the output's mean is the convolution of the input's mean, and with
    `BatchNorm.defer_conv` training on a TPU does not store the output (`se_flax.lowering.deferred_conv`).

    Args:
      conv: convolution.
      norm: as for `norm_act_attend`.
      attention: likewise.
      x: input of the convolution, [N, H, W, C].
      train: the norm uses the batch's statistics.
      base_channels: as for `norm_act_attend`.

    Returns:
      [N, h, w, features].
    """
    if not isinstance(conv, Conv):
        return norm_act_attend(norm, attention, conv(x), train=train, base_channels=base_channels)
    if train:
        defers = isinstance(norm, BatchNorm) and norm.defer_conv and conv.widens(x)
        defers = defers and not has_explicit_axes(x, conv.weights(x.shape[-1], 2)[0])
        y = conv.deferred(x) if defers else conv(x)
        return norm_act_attend(norm, attention, y, train=train, base_channels=base_channels)
    if attention is not None:
        x = share_computation(x)  # consumers: the convolution and the mean

    def input_mean() -> Array:
        return conv(jnp.mean(x, (1, 2), keepdims=True, dtype=jnp.float32), in_float32=True)

    known = input_mean if conv.is_pointwise else None
    return norm_act_attend(norm, attention, conv(x), train=train, base_channels=base_channels, input_mean=known)
