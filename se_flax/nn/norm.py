"""Norms, called as `norm(name=...)(x, train=train)`. Statistics are float32.

`BatchNorm` differs from Linen's where checkpoints need it: the running variance is the unbiased estimate, as in
PyTorch, and a variance is never negative. The other norms normalise each image by itself, so training and evaluation
are the same.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import broadcast_to_rank

from se_flax.arrays import check_array
from se_flax.errors import UserError
from se_flax.lowering.deferred_conv import DeferredConv, affine, image_means, moments
from se_flax.lowering.sharding import gathered

Array = jax.Array
Dtype = Any


def check_spread(module: nn.Module, count: int, values: str, remedy: str) -> None:
    """Refuses statistics over a single value: the norm's output would be its bias, whatever the image.

    Args:
      module: the norm.
      count: number of values that its mean and variance are over.
      values: the single value, in words, for the message.
      remedy: what to do, in words, for the message.

    Raises:
      UserError: `count` is 1.
    """
    if count == 1 and not module.is_initializing():
        where = f" at {'/'.join(module.path)}" if module.path else ""
        raise UserError(
            f"{type(module).__name__}{where} has {values} to normalise by, so that the difference from the mean, the "
            f"variance and every gradient through them are zero; {remedy}"
        )


class Coefficients(NamedTuple):
    """A norm as an affine function per channel, factor * x + offset, not applied yet.

    Attributes:
      x: input of the norm.
      factor: float32 [C]; None for the identity (a norm that was folded into its convolution).
      offset: likewise.
      means: mean of factor * x + offset over the spatial axes, float32 [N, 1, 1, C]; None unless asked for.
    """

    x: Array | DeferredConv
    factor: Array | None
    offset: Array | None
    means: Array | None


class BatchNorm(nn.Module):
    """Batch normalisation over N, H, W (Ioffe and Szegedy 2015, algorithm 1).

    Statistics are computed in float32. The running variance is updated with the unbiased estimate (n / (n - 1)), as in
    PyTorch but not in TensorFlow, so that training of a PyTorch network continues with the same statistics. The
    difference matters for small batches only (n counts pixels too).

    Attributes:
      epsilon: added to the variance.
      momentum: share of the running average that is kept, the convention of Flax and TensorFlow. PyTorch's 0.1 is 0.9
        here.
      axis_name: mapped device axis over which the batch statistics are averaged while training; None: each replica
        uses its own.
      defer_conv: where possible, training on a TPU does not store the output of a 1x1 convolution before this norm:
        fewer passes over memory for more multiply-adds, see `se_flax.lowering.deferred_conv`. The results are the same.
      use_scale: a scale is learned; if not it is 1, and there is no such parameter.
      scale_init: initialiser of the scale.
      dtype: of the output; None takes the input's.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    axis_name: str | None = None
    defer_conv: bool = False
    use_scale: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
    dtype: Dtype = None

    def __call__(self, x: Array | DeferredConv, *, train: bool = False) -> Array:
        """Normalises.

        Args:
          x: float [N, ..., C], or a convolution's deferred output.
          train: use and record the batch's statistics.

        Returns:
          The shape of x.

        Raises:
          UserError: another rank or dtype; training with a single value per channel (one image of one pixel over all
            devices that share the statistics).
        """
        x, factor, offset, _ = self.coefficients(x, train=train)
        return self.affine(x, factor, offset)

    def affine(self, x: Array | DeferredConv, factor: Array | None, offset: Array | None) -> Array:
        """Applies factor * x + offset, in this norm's dtype; factor and offset are [C], or [N, 1, 1, C] with gates."""
        return affine(x, factor, offset, self.dtype or x.dtype)

    @nn.compact
    def coefficients(self, x: Array | DeferredConv, *, train: bool = False, per_image: bool = False) -> Coefficients:
        """The norm of x as an affine function per channel.

        Args:
          x: [..., C], or [N, H, W, C] with `per_image`, or a convolution's deferred output.
          train: use and record the batch's statistics.
          per_image: also return each image's mean after the norm, from the same pass over x.

        Returns:
          The coefficients, with x.
        """
        x = x if isinstance(x, DeferredConv) else check_array(x, "BatchNorm", "[N, ..., C]")
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape, jnp.float32) if self.use_scale else 1.0
        bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        means = image_means(x) if per_image else None
        if train:
            mean, var, count = self._batch_statistics(x, means)
            if not self.is_initializing():
                unbiased = var * (count / max(count - 1, 1))
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        factor = gathered(scale * jax.lax.rsqrt(var + self.epsilon))
        offset = gathered(bias - mean * factor)
        if means is not None:
            means = means * broadcast_to_rank(factor, means.ndim) + broadcast_to_rank(offset, means.ndim)
        return Coefficients(x, factor, offset, means)

    def _batch_statistics(self, x: Array | DeferredConv, pooled: Array | None) -> tuple[Array, Array, int]:
        across = self.axis_name if not self.is_initializing() else None
        count = math.prod(x.shape[:-1])
        if across is not None:
            count *= jax.lax.axis_size(across)
        check_spread(
            self,
            count,
            "one value per channel (one image, one pixel)",
            "train with more images per device and micro-batch, larger images, or statistics over all devices "
            "(axis_name; in the training program parallel.batch_norm=global)",
        )
        if not isinstance(x, DeferredConv) and x.size == x.shape[0] * x.shape[-1]:
            # One vector per image varies little beside its mean: the difference of moments would cancel. Two passes
            # over vectors cost nothing.
            axes, x32 = tuple(range(x.ndim - 1)), x.astype(jnp.promote_types(x.dtype, jnp.float32))
            mean = _replica_mean(jnp.mean(x32, axes, keepdims=True), across)
            return mean.reshape(-1), _replica_mean(jnp.mean(jnp.square(x32 - mean), axes), across), count
        mean, square = _replica_mean(moments(x, pooled), across)
        # Both moments in one pass over the map. Rounding can make the variance of a constant channel slightly
        # negative, and its root NaN.
        return mean, jnp.maximum(square - jnp.square(mean), 0.0), count


def _replica_mean(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def group_moments(x: Array, group_size: int) -> tuple[Array, Array]:
    """Mean and (biased) variance over the pixels and over each group of adjacent channels.

    Args:
      x: map [N, H, W, C].
      group_size: channels per group; divides C.

    Returns:
      float32 mean and variance [N, 1, 1, C], the same within a group.

    Raises:
      UserError: x has another rank or dtype, or `group_size` does not divide C.
    """
    x = check_array(x, "group_moments", "[N, H, W, C]")
    n, h, w, channels = x.shape
    if group_size < 1 or channels % group_size:
        raise UserError(f"got group_size={group_size} for {channels} channels; it must divide them")
    grouped = gathered(x, -1).astype(jnp.float32).reshape(n, h, w, channels // group_size, group_size)
    mean = jnp.mean(grouped, axis=(1, 2, 4), keepdims=True)
    # Not the difference of moments: this is never negative.
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
          UserError: x has another rank or dtype; `group_size` does not divide C, or a group holds a single value (one
            channel of one pixel).
        """
        del train
        x = check_array(x, "GroupNorm", "[N, H, W, C]")
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
          UserError: x has another dtype or a single channel.
        """
        del train
        x = check_array(x, "LayerNorm", "[..., C]")
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

    The module is norm and activation in one: give a network `act=functional.ACTIVATIONS["identity"]` with it, and use
    `nonlinear=False` for norms without a following activation.

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
        x = check_array(x, "EvoNormS0", "[N, H, W, C]")
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
