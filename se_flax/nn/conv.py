"""Convolution, as checkpoints of other frameworks need it: PyTorch's symmetric padding beside TensorFlow's SAME."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.errors import UserError
from se_flax.functional import check_map
from se_flax.lowering.convolution import convolve
from se_flax.lowering.deferred_conv import DeferredConv, defer_conv
from se_flax.lowering.sharding import gathered
from se_flax.lowering.xla import xla_convolution

Array = jax.Array
Dtype = Any


@functools.cache
def normal_fan_out(scale: float) -> nn.initializers.Initializer:
    """Normal with variance scale / (kernel area * features): fan out, He et al. 2015, equation 14.

    Same numbers as Flax's `variance_scaling(scale, "fan_out", "normal")`, but drawn in one dimension and reshaped: XLA
    takes up to three times as long to compile random bits of four axes, and compiles each shape once.

    Args:
      scale: 2 if a ReLU follows.

    Returns:
      An initialiser of kernels [kh, kw, C / groups, features], float32 by default.
    """

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        row = jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
        return row * jnp.sqrt(scale / (math.prod(shape[:-2]) * shape[-1])).astype(dtype)

    # Flax also gives shapes as lists, which are not hashable.
    return lambda key, shape, dtype=jnp.float32: draw(key, tuple(shape), dtype)


# Initialisation of the ResNets in torchvision and timm.
he_normal_fan_out = normal_fan_out(2.0)


class Conv(nn.Module):
    """Convolution of images [N, H, W, C], signals [N, L, C] or volumes [N, D, H, W, C].

    Attributes:
      features: output channels.
      kernel_size: one number for all spatial axes, or one per axis: (height, width).
      strides: of all spatial axes.
      groups: number of groups that the input and output channels are split into.
      dilation: of all spatial axes.
      padding: `"symmetric"` pads (k - 1) / 2 * dilation on both sides, as PyTorch networks do; `"SAME"` pads as
        TensorFlow does (more at the end when the total is odd); or an explicit ((top, bottom), (left, right)).
      use_bias: adds a bias.
      kernel_init: initialiser of the kernel [kh, kw, features_in / groups, features].
      bias_init: initialiser of the bias [features].
      dtype: of the arithmetic; None takes the input's. Parameters are float32.

    Raises:
      UserError: the input has another rank.
    """

    features: int
    kernel_size: int | tuple[int, ...] = 3
    strides: int = 1
    groups: int = 1
    dilation: int = 1
    padding: str | Sequence[tuple[int, int]] = "symmetric"
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = he_normal_fan_out
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    dtype: Dtype = None

    @nn.compact
    def weights(self, channels: int, axes: int) -> tuple[Array, Array | None]:
        """The float32 kernel and bias for an input with so many channels and spatial axes."""
        size = (self.kernel_size,) * axes if isinstance(self.kernel_size, int) else self.kernel_size
        kernel = self.param("kernel", self.kernel_init, (*size, channels // self.groups, self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        return kernel, bias

    def __call__(self, x: Array, *, in_float32: bool = False) -> Array:
        """Convolves.

        Args:
          x: [N, H, W, C].
          in_float32: compute this call in float32, whatever `dtype`.

        Returns:
          [N, h, w, features].
        """
        x = check_map(x, "a convolution")
        axes = x.ndim - 2
        if not isinstance(self.kernel_size, int) and len(self.kernel_size) != axes:
            raise UserError(
                f"got kernel_size={tuple(self.kernel_size)} for a map of shape {tuple(x.shape)}; give one number per "
                f"spatial axis, {axes}, or a single one for all"
            )
        kernel, bias = self.weights(x.shape[-1], axes)
        padding = self.padding
        if padding == "symmetric":
            padding = [((k - 1) // 2 * self.dilation,) * 2 for k in kernel.shape[:-2]]
        dtype = jnp.float32 if in_float32 else self.dtype or x.dtype
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        settings = (self.strides,) * axes, padding, (self.dilation,) * axes, self.groups
        # `init` runs eagerly, and compiling takes most of its time: XLA's convolution is one operation to compile.
        y = xla_convolution(x, kernel, *settings) if self.is_initializing() else convolve(x, kernel, *settings)
        return y if bias is None else y + jax.lax.broadcast_to_rank(gathered(bias).astype(dtype), y.ndim)

    @property
    def is_pointwise(self) -> bool:
        """Whether the convolution is 1x1 without stride or padding: mean(conv(x)) is then conv(mean(x))."""
        adds_no_pixels = self.padding in ("symmetric", "SAME", "VALID")
        return self.kernel_size in (1, (1, 1)) and self.strides == 1 and adds_no_pixels

    def widens(self, x: Array) -> bool:
        """Whether a 1x1 convolution gives at least twice the channels of x, so that `deferred` saves memory traffic."""
        pixels = x.shape[1] * x.shape[2] if x.ndim == 4 else 0
        dense = self.is_pointwise and self.groups == 1 and not self.use_bias
        return dense and pixels > 1 and self.features >= 2 * x.shape[-1]

    def deferred(self, x: Array) -> DeferredConv:
        """The output, not stored on a TPU; only if the convolution `widens` and a training `BatchNorm` reads it."""
        kernel, _ = self.weights(x.shape[-1], 2)
        dtype = self.dtype or x.dtype
        return defer_conv(x.astype(dtype), kernel[0, 0].astype(dtype))
