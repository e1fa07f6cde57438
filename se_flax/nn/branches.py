"""Attention over parallel branches, weighted by a softmax per channel (selective kernels, split attention)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from se_flax import functional as F
from se_flax.lowering.sharding import gathered
from se_flax.nn.attention_base import PointwiseParams

Array = jax.Array


def weigh_branches(
    branches: Sequence[Array],
    width: int,
    *,
    norm: Callable[..., Any],
    train: bool,
    act: F.Elementwise = jax.nn.relu,
    groups: int = 1,
    use_bias: bool = False,
    names: tuple[str, str, str] = ("fc_reduce", "bn", "fc_select"),
) -> Array:
    """Weighted sum of branches, one weight per image and channel (Li et al. 2019; Zhang et al. 2022; both section 3.1).

    Squeeze and excitation of the branches' sum give the logits; a softmax over the branches gives the weights. For a
    single branch the weight is a sigmoid.

    The layers are submodules of the calling module: `<names[0]>/kernel` [1, 1, C / groups, width], `<names[1]>` a batch
    norm, `<names[2]>/kernel` [1, 1, width / groups, R * C], and biases.

    Args:
      branches: R maps [N, H, W, C].
      width: of the hidden layer.
      norm: batch norm between the layers, called as `norm(name=..., dtype=...)(z, train=...)`.
      train: the norm uses the batch's statistics.
      act: activation after the norm.
      groups: channel groups K, each with its own excitation (ResNeSt's cardinality).
      use_bias: biases in both layers.
      names: of the first layer, the norm and the second layer.

    Returns:
      [N, H, W, C] of the branches' dtype.
    """
    count, (n, *_, channels) = len(branches), branches[0].shape

    def grouped(z: Array, features: int, name: str) -> Array:
        kernel, bias = PointwiseParams(use_bias, name=name)(z.shape[-1] // groups, features)
        z = z.reshape(n, groups, z.shape[-1] // groups)
        # The last axis of a grouped kernel holds the outputs of all groups, one group after the other.
        kernel = kernel.reshape(z.shape[-1], groups, features // groups)
        out = jnp.einsum("ngc,cgm->ngm", z, kernel, precision=jax.lax.Precision.HIGHEST).reshape(n, features)
        return out if bias is None else out + jax.lax.broadcast_to_rank(bias, out.ndim)

    z = functools.reduce(jnp.add, [jnp.squeeze(F.squeeze(branch), (1, 2)) for branch in branches])
    z = gathered(z, -1)
    z = grouped(z, width, names[0])
    z = act(norm(name=names[1], dtype=jnp.float32)(z, train=train))
    logits = grouped(z, count * channels, names[2]).reshape(n, groups, count, channels // groups)
    gates = jax.nn.softmax(logits, axis=2) if count > 1 else jax.nn.sigmoid(logits)
    gates = jnp.moveaxis(gates, 2, 0).reshape(count, n, 1, 1, channels)
    return functools.reduce(jnp.add, [F.scale(branch, gate) for branch, gate in zip(branches, gates, strict=True)])
