"""Convolution with scaled weight standardisation, for networks without norms (Brock et al. 2021)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.lowering.sharding import gathered
from se_flax.nn.conv import Conv

Array = jax.Array


class ScaledStdConv(Conv):
    """Convolution whose kernel is standardised over its inputs and scaled (Brock et al. 2021a, section 4.3, eq. 5).

    W = gain * gamma * (V - mean(V)) / sqrt(fan_in * (var(V) + epsilon)), mean and variance over each output's inputs.

    Parameters: `kernel` V, `gain` [features], `bias` [features].

    Attributes:
      gamma: factor that restores the variance behind the activation before this convolution (appendix D).
      epsilon: added to the variance.
      gain_init: initialiser of the gain.
    """

    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    gamma: float = 1.0
    epsilon: float = 1e-5
    gain_init: nn.initializers.Initializer = nn.initializers.ones_init()

    @nn.compact
    def weights(self, channels: int, axes: int) -> tuple[Array, Array | None]:
        """The float32 kernel as it is used, and the bias, for an input with so many channels and spatial axes."""
        size = (self.kernel_size,) * axes if isinstance(self.kernel_size, int) else self.kernel_size
        shape = (*size, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        gain = gathered(self.param("gain", self.gain_init, (self.features,), jnp.float32))
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        inputs = tuple(range(kernel.ndim - 1))
        centred = kernel - jnp.mean(kernel, inputs, keepdims=True)
        var = jnp.mean(jnp.square(centred), inputs, keepdims=True)
        scale = jax.lax.broadcast_to_rank(gain, kernel.ndim) * (self.gamma / math.sqrt(math.prod(shape[:-1])))
        return centred * (jax.lax.rsqrt(var + self.epsilon) * scale), bias
