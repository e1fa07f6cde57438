"""Channel attention as Linen modules over `se_flax.functional`: NHWC in, NHWC out, same shape and dtype.

Every module is called as `module(x, train=False)` and takes `base_channels`, the channel count that a reduction is a
share of where that is not the map's own (EfficientNet's blocks reduce relative to their input). That uniform call is
what lets any attention go into any backbone: `create_model("resnet50", attention=ECA)`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax import functional as F
from se_flax.errors import UserError
from se_flax.layers import BatchNorm, Conv

Array = jax.Array
Initializer = nn.initializers.Initializer

he_normal = nn.initializers.he_normal()


class _Pointwise(nn.Module):
    """Parameters of a 1x1 convolution, kernel [1, 1, C_in, C_out] as checkpoints hold them, returned as [C_in, C_out]."""

    features: int
    use_bias: bool
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, channels: int) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", self.kernel_init, (1, 1, channels, self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        return kernel[0, 0], bias


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: x * gate(W2 act(W1 squeeze(x))) (Hu et al. 2020, section 3).

    Parameters: `<names[0]>/kernel` [1, 1, C, M], `<names[1]>/kernel` [1, 1, M, C], and their biases.

    Attributes:
      reduction: hidden width M = C / reduction, the paper's r. Ignored when `fraction` or `width` is given.
      fraction: M = C * fraction.
      width: M outright.
      rounding: of M, see `functional.reduced_width`.
      squeeze: `mean`, `max`, `none` (both layers act on every pixel: the paper's NoSqueeze) or a function.
      activation: between the layers, by name or as a function.
      gate: `sigmoid`, `tanh`, `relu`, `hard_sigmoid` or a function.
      use_bias: biases in both layers. The released networks have them; the paper's ablations (section 6) do not.
      kernel_init: initialiser of both kernels.
      bias_init: initialiser of both biases.
      names: of the two layers, so that checkpoints of other projects fit without a table.
      dtype: accepted for uniformity; the gate is always float32 and the output has the input's dtype.

    Raises:
      UserError: unknown squeeze, activation, gate or rounding; a reduction or fraction that is not positive.
    """

    reduction: float = 16.0
    fraction: float | None = None
    width: int | None = None
    rounding: str | Callable[[float], int] = "floor"
    squeeze: str | F.Elementwise = "mean"
    activation: str | F.Elementwise = "relu"
    gate: str | F.Elementwise = "sigmoid"
    use_bias: bool = True
    kernel_init: Initializer = he_normal
    bias_init: Initializer = nn.initializers.zeros_init()
    names: tuple[str, str] = ("fc1", "fc2")
    dtype: Any = None

    def hidden_width(self, channels: int) -> int:
        """Hidden width M for `channels` base channels."""
        if self.width is not None:
            return self.width
        if self.fraction is not None:
            return F.reduced_width(channels, fraction=self.fraction, rounding=self.rounding)
        return F.reduced_width(channels, reduction=self.reduction, rounding=self.rounding)

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, base_channels: int | None = None) -> Array:
        """Gates a map.

        Args:
          x: [N, H, W, C].
          train: no effect; part of the uniform call.
          base_channels: what the reduction is a share of; C when None.

        Returns:
          [N, H, W, C] of x's dtype.
        """
        del train
        channels = x.shape[-1]
        hidden = self.hidden_width(base_channels or channels)
        layer = (self.use_bias, self.kernel_init, self.bias_init)
        reduce_ = _Pointwise(hidden, *layer, name=self.names[0])(channels)
        expand = _Pointwise(channels, *layer, name=self.names[1])(hidden)
        z = F.squeeze(x, self.squeeze)
        return F.scale(x, F.excite(z, *reduce_, *expand, activation=self.activation, gate=self.gate))


class EffectiveSE(nn.Module):
    """Effective squeeze-and-excitation: one full layer, hard gate (Lee and Park 2020, section 3.3: eSE of VoVNetV2).

    Parameters: `fc/kernel` [1, 1, C, C], `fc/bias` [C].

    Attributes:
      gate: by name or as a function.
      use_bias: adds the bias.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
      dtype: accepted for uniformity; the gate is always float32.
    """

    gate: str | F.Elementwise = "hard_sigmoid"
    use_bias: bool = True
    kernel_init: Initializer = he_normal
    bias_init: Initializer = nn.initializers.zeros_init()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, base_channels: int | None = None) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H, W, C] of x's dtype."""
        del train, base_channels
        channels = x.shape[-1]
        kernel, bias = _Pointwise(channels, self.use_bias, self.kernel_init, self.bias_init, name="fc")(channels)
        logits = jnp.matmul(F.squeeze(x), kernel, precision=jax.lax.Precision.HIGHEST)
        return F.scale(x, F.lookup(F.GATES, self.gate, "gate")(logits if bias is None else logits + bias))


class _ChannelKernel(nn.Module):
    """Kernel [k, 1, 1] of a one-channel 1-D convolution (length, in, out), returned as [k]."""

    size: int
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", self.kernel_init, (self.size, 1, 1), jnp.float32)[:, 0, 0]


class ECA(nn.Module):
    """Efficient channel attention: a short convolution along the channels (Wang et al. 2020, section 3.2).

    Parameters: `conv/kernel` [k, 1, 1].

    Attributes:
      kernel_size: k, odd; None takes the paper's rule from the channel count.
      gamma: slope of that rule.
      b: offset of that rule.
      gate: by name or as a function.
      kernel_init: initialiser of the kernel.
      dtype: accepted for uniformity; the gate is always float32.

    Raises:
      UserError: unknown gate, or a kernel size that is not odd and positive.
    """

    kernel_size: int | None = None
    gamma: float = 2.0
    b: float = 1.0
    gate: str | F.Elementwise = "sigmoid"
    kernel_init: Initializer = he_normal
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, base_channels: int | None = None) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H, W, C] of x's dtype."""
        del train, base_channels
        size = F.eca_kernel_size(x.shape[-1], self.gamma, self.b) if self.kernel_size is None else self.kernel_size
        if size < 1 or size % 2 == 0:
            raise UserError(
                f"got kernel_size={size} for ECA; give an odd positive number, or None for the paper's rule"
            )
        kernel = _ChannelKernel(size, self.kernel_init, name="conv")()
        return F.scale(x, F.lookup(F.GATES, self.gate, "gate")(F.channel_conv(F.squeeze(x), kernel)))


class CBAM(nn.Module):
    """Convolutional block attention: a channel gate, then a spatial gate (Woo et al. 2018, section 3).

    Parameters: `fc1`, `fc2` as in `SqueezeExcite`; `spatial_conv/kernel` [7, 7, 2, 1]; `spatial_bn`.

    Attributes:
      reduction: hidden width of the shared MLP = C / reduction.
      rounding: of that width.
      use_bias: biases in the MLP, as in the authors' code.
      kernel_size: side of the spatial kernel.
      gate: of both gates.
      momentum: of the batch norm after the spatial convolution, Flax's convention (0.99 is the authors' 0.01).
      axis_name: mapped device axis over which that norm averages its statistics; None: each replica its own.
      kernel_init: initialiser of the kernels.
      dtype: accepted for uniformity; both gates are float32.
    """

    reduction: float = 16.0
    rounding: str | Callable[[float], int] = "floor"
    use_bias: bool = True
    kernel_size: int = 7
    gate: str | F.Elementwise = "sigmoid"
    momentum: float = 0.99
    axis_name: str | None = None
    kernel_init: Initializer = he_normal
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, base_channels: int | None = None) -> Array:
        """Args: x [N, H, W, C]; train: the spatial batch norm uses the batch's statistics. Returns: the shape of x."""
        channels = x.shape[-1]
        hidden = F.reduced_width(base_channels or channels, reduction=self.reduction, rounding=self.rounding)
        layer = (self.use_bias, self.kernel_init, nn.initializers.zeros_init())
        reduce_ = _Pointwise(hidden, *layer, name="fc1")(channels)
        expand = _Pointwise(channels, *layer, name="fc2")(hidden)
        x = F.scale(x, F.channel_gate_mean_max(x, *reduce_, *expand, gate=self.gate))
        logits = Conv(1, self.kernel_size, kernel_init=self.kernel_init, name="spatial_conv")(F.spatial_descriptor(x))
        logits = BatchNorm(momentum=self.momentum, axis_name=self.axis_name, name="spatial_bn")(logits, train=train)
        return F.scale(x, F.lookup(F.GATES, self.gate, "gate")(logits))
