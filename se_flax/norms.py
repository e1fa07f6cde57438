"""Norms without batch statistics, called like `layers.BatchNorm`: `norm(name=...)(x, train=train)`.

They normalise each image by itself, so training and evaluation are the same computation and nothing is recorded.
Statistics are float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import broadcast_to_rank

from se_flax.errors import UserError
from se_flax.sharding import gathered

Array = jax.Array


def check_spread(module: nn.Module, count: int, values: str, remedy: str) -> None:
    """Refuses statistics of a single value: it is its own mean, and a norm's output is its bias whatever the image.

    Args:
      module: the norm that is being called.
      count: values that its mean and variance are taken of.
      values: where there is one, in words.
      remedy: what to do, in words.

    Raises:
      UserError: there is one value.
    """
    if count == 1 and not module.is_initializing():
        where = f" at {'/'.join(module.path)}" if module.path else ""
        raise UserError(
            f"{type(module).__name__}{where} has {values} to normalise by, so that the difference from the mean, the "
            f"variance and every gradient through them are zero; {remedy}"
        )


def group_moments(x: Array, group_size: int) -> tuple[Array, Array]:
    """Mean and (biased) variance over the pixels and over each group of adjacent channels.

    Args:
      x: map [N, H, W, C].
      group_size: channels per group; divides C.

    Returns:
      float32 mean and variance [N, 1, 1, C], the same within a group.

    Raises:
      UserError: the groups do not fit the channels.
    """
    x = jnp.asarray(x)
    n, h, w, channels = x.shape
    if group_size < 1 or channels % group_size:
        raise UserError(f"got group_size={group_size} for {channels} channels; it must divide them")
    grouped = gathered(x, -1).astype(jnp.float32).reshape(n, h, w, channels // group_size, group_size)
    mean = jnp.mean(grouped, axis=(1, 2, 4), keepdims=True)
    # Two passes: there is no running statistic to save a pass for, and this never goes negative.
    var = jnp.mean(jnp.square(grouped - mean), axis=(1, 2, 4), keepdims=True)
    return tuple(jnp.repeat(m[..., 0], group_size, axis=-1) for m in (mean, var))  # type: ignore[return-value]


def _check_group(module: Any, x: Array) -> None:
    pixels = x.shape[1] * x.shape[2]
    check_spread(
        module, pixels * module.group_size, "one value per group", "give larger images, or more channels per group"
    )


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He 2018, section 3.1).

    Attributes:
      group_size: channels per group.
      epsilon: added to the variance.
      scale_init: initialiser of the scale.
      dtype: of the output; None takes the input's.
    """

    group_size: int = 8
    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Normalises.

        Args:
          x: [N, H, W, C].
          train: no effect.

        Returns:
          The shape of x.

        Raises:
          UserError: groups that do not fit the channels, or hold a single value (one channel of a map of one pixel).
        """
        del train
        x = jnp.asarray(x)
        scale = self.param("scale", self.scale_init, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
        scale, bias = (broadcast_to_rank(gathered(p), x.ndim) for p in (scale, bias))
        _check_group(self, x)
        mean, var = group_moments(x, self.group_size)
        y = (x.astype(jnp.float32) - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.astype(self.dtype or x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation of every pixel over its channels (Ba et al. 2016, section 3; per pixel as in ConvNeXt).

    Attributes:
      epsilon: added to the variance.
      scale_init: initialiser of the scale.
      dtype: of the output; None takes the input's.
    """

    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Normalises.

        Args:
          x: [..., C].
          train: no effect.

        Returns:
          The shape of x.

        Raises:
          UserError: a single channel.
        """
        del train
        x = jnp.asarray(x)
        scale = self.param("scale", self.scale_init, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
        scale, bias = (broadcast_to_rank(gathered(p), x.ndim) for p in (scale, bias))
        check_spread(self, x.shape[-1], "one channel", "give a map of more channels, or leave the norm out")
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        var = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y = y * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.astype(self.dtype or x.dtype)


class EvoNormS0(nn.Module):
    """EvoNorm-S0: x sigmoid(v x) / std over a group, scaled and shifted (Liu et al. 2020, table 2).

    Norm and activation in one: a network built with it takes `act=functional.ACTIVATIONS["identity"]`, and this module
    with `nonlinear=False` where a norm is not followed by an activation.

    Attributes:
      group_size: channels per group.
      epsilon: added to the variance.
      nonlinear: False leaves only scale and shift, without normalisation (as timm does).
      scale_init: initialiser of the scale.
      dtype: of the output; None takes the input's.
    """

    group_size: int = 8
    epsilon: float = 1e-5
    nonlinear: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Normalises and activates.

        Args:
          x: [N, H, W, C].
          train: no effect.

        Returns:
          The shape of x.

        Raises:
          UserError: as `GroupNorm`.
        """
        del train
        x = jnp.asarray(x)
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        scale, bias = (broadcast_to_rank(gathered(p), x.ndim) for p in (scale, bias))
        y = x.astype(jnp.float32)
        if self.nonlinear:
            v = broadcast_to_rank(gathered(self.param("v", nn.initializers.ones_init(), shape, jnp.float32)), x.ndim)
            _check_group(self, x)
            _, var = group_moments(x, self.group_size)
            y = y * jax.nn.sigmoid(y * v) * jax.lax.rsqrt(var + self.epsilon)
        return (y * scale + bias).astype(self.dtype or x.dtype)
