"""Channel attention as Linen modules over `se_flax.functional`, from a feature map to one of the same shape and dtype.

Maps are images [N, H, W, C], signals [N, L, C] or volumes [N, D, H, W, C], in short [N, ..., C]. Another rank raises a
`UserError`. Parameters do not depend on the rank, except for CBAM's spatial kernel. The map of one image, [H, W, C],
has the rank of a signal [N, L, C], so it needs `batch_axis=False`, as in a call under `jax.vmap`.

Every module is called as `module(x, train=False)` and takes `base_channels`, the channel count that a reduction refers
to if it is not the map's (in EfficientNet's blocks it is that of the block's input). Thanks to this uniform call any
attention fits any backbone: `create_model("resnet50", attention=ECA)`.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax import functional as F
from se_flax.errors import UserError
from se_flax.lowering.sharding import gathered
from se_flax.nn.attention_base import ChannelAttention, Initializer, PointwiseParams, he_normal
from se_flax.nn.conv import Conv
from se_flax.nn.norm import BatchNorm, LayerNorm

Array = jax.Array


class SqueezeExcite(ChannelAttention):
    """Squeeze-and-excitation: x * gate(W2 act(W1 squeeze(x))) (Hu et al. 2020, section 3).

    Parameters: `<names[0]>/kernel` [1, 1, C, M], `<names[1]>/kernel` [1, 1, M, C], their biases; `bn` with a `norm`.

    Attributes:
      reduction: hidden width M = C / reduction, the paper's r. Ignored when `fraction` or `width` is given.
      fraction: M = C * fraction.
      width: M itself.
      rounding: of M, see `functional.reduced_width`.
      squeeze: `mean`, `max`, `none` (both layers act on every pixel: the paper's NoSqueeze) or a function.
      activation: between the layers, by name or as a function.
      gate: `sigmoid`, `tanh`, `relu`, `hard_sigmoid` or a function.
      use_bias: biases in both layers. The released networks have biases; the paper's ablations (section 6) do not.
      kernel_init: initialiser of both kernels.
      bias_init: initialiser of both biases.
      names: of the two layers, to match the names in checkpoints of other projects.
      norm: norm class or partial after the first layer, as in ReXNet (Han et al. 2021, released code); None for none.
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
    norm: Callable[..., Any] | None = None
    dtype: Any = None

    def hidden_width(self, channels: int) -> int:
        """Hidden width M for `channels` base channels."""
        if self.width is not None:
            return self.width
        if self.fraction is not None:
            return F.reduced_width(channels, fraction=self.fraction, rounding=self.rounding)
        return F.reduced_width(channels, reduction=self.reduction, rounding=self.rounding)

    @property
    def squeezes_mean(self) -> bool:
        """As in `ChannelAttention`."""
        return self.squeeze == "mean"

    @property
    def norms_gates(self) -> bool:
        """As in `ChannelAttention`."""
        return self.norm is not None

    def descriptor(self, x: Array, mask: Array | None = None) -> Array:
        """Args: as `__call__`. Returns: float32 [N, 1, 1, C]; the shape of x without a squeeze."""
        return F.squeeze(x, self.squeeze, mask)

    @nn.compact
    def gates(self, z: Array, *, base_channels: int | None = None, train: bool = False) -> Array:
        """The gates of a descriptor.

        Args:
          z: float32 descriptor of the map's rank, such as [N, 1, 1, C]; for `squeeze="none"`, of the map's shape.
          base_channels: channel count that the reduction refers to; None for C.
          train: the `norm` uses the batch's statistics.

        Returns:
          float32, the shape of z.
        """
        channels = z.shape[-1]
        hidden = self.hidden_width(base_channels or channels)
        layer = (self.use_bias, self.kernel_init, self.bias_init)
        reduce_ = PointwiseParams(*layer, name=self.names[0])(channels, hidden)
        expand = PointwiseParams(*layer, name=self.names[1])(hidden, channels)
        if self.norm is None:
            return F.excite(z, *reduce_, *expand, activation=self.activation, gate=self.gate)
        y = self.norm(name="bn")(F.pointwise(gathered(z, -1), *reduce_), train=train)
        y = F.lookup(F.ACTIVATIONS, self.activation, "activation")(y)
        return F.lookup(F.GATES, self.gate, "gate")(F.pointwise(y, *expand))


class EffectiveSE(ChannelAttention):
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
    def gates(self, z: Array, *, base_channels: int | None = None) -> Array:
        """Args: z float32, such as [N, 1, 1, C]. Returns: the gates, of the same shape."""
        del base_channels
        layer = PointwiseParams(self.use_bias, self.kernel_init, self.bias_init, name="fc")
        kernel, bias = layer(z.shape[-1], z.shape[-1])
        return F.lookup(F.GATES, self.gate, "gate")(F.pointwise(z, kernel, bias))


class _ChannelKernel(nn.Module):
    """Kernel [k, 1, 1] of a one-channel 1-D convolution (length, in, out), returned as [k]."""

    size: int
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> Array:
        return gathered(self.param("kernel", self.kernel_init, (self.size, 1, 1), jnp.float32))[:, 0, 0]


class ECA(ChannelAttention):
    """Efficient channel attention: a short convolution along the channels (Wang et al. 2020, section 3.2).

    Parameters: `conv/kernel` [k, 1, 1].

    Attributes:
      kernel_size: k, odd; None derives it from the channel count by the paper's rule.
      gamma: slope of that rule.
      b: offset of that rule.
      from_base: the rule takes `base_channels`, for networks whose channels were pruned but not their ECA kernels.
      gate: by name or as a function.
      kernel_init: initialiser of the kernel.
      dtype: accepted for uniformity; the gate is always float32.

    Raises:
      UserError: the gate is unknown, or the kernel size is not odd and positive.
    """

    kernel_size: int | None = None
    gamma: float = 2.0
    b: float = 1.0
    from_base: bool = False
    gate: str | F.Elementwise = "sigmoid"
    kernel_init: Initializer = he_normal
    dtype: Any = None

    @nn.compact
    def gates(self, z: Array, *, base_channels: int | None = None) -> Array:
        """Args: z float32, such as [N, 1, 1, C]. Returns: the gates, of the same shape."""
        channels = base_channels if self.from_base and base_channels else z.shape[-1]
        size = F.eca_kernel_size(channels, self.gamma, self.b) if self.kernel_size is None else self.kernel_size
        if size < 1 or size % 2 == 0:
            raise UserError(
                f"got kernel_size={size} for ECA; give an odd positive number, or None for the paper's rule"
            )
        kernel = _ChannelKernel(size, self.kernel_init, name="conv")()
        return F.lookup(F.GATES, self.gate, "gate")(F.channel_conv(z, kernel))


class CBAM(ChannelAttention):
    """Convolutional block attention: a channel gate, then a spatial gate (Woo et al. 2018, section 3).

    Parameters: `fc1`, `fc2` as in `SqueezeExcite`; `spatial_conv/kernel` [7, 7, 2, 1], with one axis of 7 per spatial
    axis of the map; `spatial_bn`.

    Attributes:
      reduction: hidden width of the shared MLP = C / reduction.
      rounding: of that width.
      use_bias: biases in the MLP, as in the authors' code.
      kernel_size: of the spatial convolution.
      gate: non-linearity of both gates.
      momentum: of the batch norm after the spatial convolution, Flax's convention (0.99 is the authors' 0.01).
      axis_name: mapped device axis over which that norm averages its statistics; None: each replica uses its own.
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

    squeezes_mean = False

    def setup(self) -> None:
        """The layers; their widths are known when they are called."""
        self.fc1, self.fc2 = (PointwiseParams(self.use_bias, self.kernel_init) for _ in range(2))
        self.spatial_conv = Conv(1, self.kernel_size, kernel_init=self.kernel_init)
        self.spatial_bn = BatchNorm(momentum=self.momentum, axis_name=self.axis_name)

    def descriptor(self, x: Array, mask: Array | None = None) -> Array:
        """Args: as `__call__`. Returns: float32 [2, N, 1, 1, C], the means and the maxima."""
        return F.squeeze_mean_max(x, mask)

    def gates(self, z: Array, *, base_channels: int | None = None) -> Array:
        """The channel gates. Args: z float32 [2, N, 1, 1, C]. Returns: float32 [N, 1, 1, C]."""
        channels = z.shape[-1]
        hidden = F.reduced_width(base_channels or channels, reduction=self.reduction, rounding=self.rounding)
        return F.excite_mean_max(z, *self.fc1(channels, hidden), *self.fc2(hidden, channels), gate=self.gate)

    def attend(
        self, x: Array, *, train: bool = False, base_channels: int | None = None, mask: Array | None = None
    ) -> Array:
        """Args: as `ChannelAttention`; train: the spatial batch norm uses the batch's statistics.

        With a mask, the channel squeeze leaves padding out, and padding is zero for the spatial convolution.

        Returns:
          The shape of x.
        """
        x = super().attend(x, base_channels=base_channels, mask=mask)
        x = x if mask is None else x * F.mask_of(x, mask).astype(x.dtype)
        logits = self.spatial_bn(self.spatial_conv(F.spatial_descriptor(x)), train=train)
        return F.scale(x, F.lookup(F.GATES, self.gate, "gate")(logits))


class ScSE(ChannelAttention):
    """Concurrent spatial and channel squeeze-and-excitation, scSE (Roy et al. 2018, section 2.3).

    One gate per channel as in `SqueezeExcite` and one per pixel from a 1x1 convolution, both applied to the same map.

    Parameters: `fc1`, `fc2` as in `SqueezeExcite`; `conv/kernel` [1, 1, C, 1], `conv/bias`.

    Attributes:
      reduction: hidden width of the channel gate = C / reduction; 2 in the paper.
      rounding: of that width.
      combine: `add` (the paper) or `max` (its journal version, Roy et al. 2019) of the two gated maps.
      gate: non-linearity of both gates.
      use_bias: biases in all layers.
      kernel_init: initialiser of the kernels.
      dtype: accepted for uniformity; both gates are float32.

    Raises:
      UserError: `combine` is unknown.
    """

    reduction: float = 2.0
    rounding: str | Callable[[float], int] = "floor"
    combine: str = "add"
    gate: str | F.Elementwise = "sigmoid"
    use_bias: bool = True
    kernel_init: Initializer = he_normal
    dtype: Any = None

    squeezes_mean = False

    def setup(self) -> None:
        """The layers; their widths are known when they are called."""
        self.fc1, self.fc2, self.conv = (PointwiseParams(self.use_bias, self.kernel_init) for _ in range(3))

    def gates(self, z: Array, *, base_channels: int | None = None) -> Array:
        """The channel gates. Args: z float32, such as [N, 1, 1, C]. Returns: of the same shape."""
        channels = z.shape[-1]
        hidden = F.reduced_width(base_channels or channels, reduction=self.reduction, rounding=self.rounding)
        return F.excite(z, *self.fc1(channels, hidden), *self.fc2(hidden, channels), gate=self.gate)

    def attend(
        self, x: Array, *, train: bool = False, base_channels: int | None = None, mask: Array | None = None
    ) -> Array:
        """Args: as `ChannelAttention`. Returns: the shape and dtype of x."""
        if self.combine not in ("add", "max"):
            raise UserError(f"got combine={self.combine!r} for ScSE; give add or max")
        x = F.check_map(x, "ScSE")
        by_channel = super().attend(x, base_channels=base_channels, mask=mask)
        logits = F.pointwise(x, *self.conv(x.shape[-1], 1))
        by_pixel = F.scale(x, F.lookup(F.GATES, self.gate, "gate")(logits))
        return by_channel + by_pixel if self.combine == "add" else jnp.maximum(by_channel, by_pixel)


class _ContextMlp(nn.Module):
    """Two 1x1 convolutions with a layer norm between them; parameters `fc1`, `norm`, `fc2`."""

    activation: str | F.Elementwise
    kernel_init: Initializer

    @nn.compact
    def __call__(self, z: Array, hidden: int) -> Array:
        channels = z.shape[-1]
        fc1, fc2 = (PointwiseParams(kernel_init=self.kernel_init, name=name) for name in ("fc1", "fc2"))
        z = LayerNorm(1e-6, name="norm")(F.pointwise(z, *fc1(channels, hidden)))
        z = F.lookup(F.ACTIVATIONS, self.activation, "activation")(z)
        return F.pointwise(z, *fc2(hidden, channels))


class GlobalContext(ChannelAttention):
    """Global context attention: the squeeze is a softmax-weighted mean (Cao et al. 2019, section 3.3: GC block).

    As in timm, the context gates the map (the paper adds it). Parameters: `conv_attn` (kernel [1, 1, C, 1], bias) and
    `mlp_scale` with `fc1`, `norm` (a layer norm) and `fc2`.

    Attributes:
      reduction: hidden width M = C / reduction. Ignored when `fraction` is given.
      fraction: M = C * fraction.
      rounding: of M, see `functional.reduced_width`.
      activation: between the layers, by name or as a function.
      gate: by name or as a function.
      kernel_init: initialiser of the kernels.
      dtype: accepted for uniformity; context and gate are always float32.
    """

    reduction: float = 8.0
    fraction: float | None = None
    rounding: str | Callable[[float], int] = "nearest"
    activation: str | F.Elementwise = "relu"
    gate: str | F.Elementwise = "sigmoid"
    kernel_init: Initializer = he_normal
    dtype: Any = None

    squeezes_mean = False

    def setup(self) -> None:
        """The layers; their widths are known when they are called."""
        self.conv_attn = PointwiseParams(kernel_init=self.kernel_init)
        self.mlp_scale = _ContextMlp(self.activation, self.kernel_init)

    def descriptor(self, x: Array, mask: Array | None = None) -> Array:
        """The context: softmax-weighted mean over the pixels. Args: as `__call__`. Returns: float32 [N, 1, 1, C]."""
        x = F.check_map(x, "GlobalContext")
        n, *_, channels = x.shape
        pixels = x.astype(jnp.float32).reshape(n, math.prod(x.shape[1:-1]), channels)
        logits = F.pointwise(pixels, *self.conv_attn(channels, 1))
        where = None if mask is None else F.mask_of(x, mask).reshape(logits.shape) > 0
        weights = jax.nn.softmax(logits, axis=1, where=where)
        context = jnp.einsum("npc,npo->noc", pixels, weights, precision=jax.lax.Precision.HIGHEST)
        return context.reshape(n, *(1 for _ in F.spatial_axes(x)), channels)

    def gates(self, z: Array, *, base_channels: int | None = None) -> Array:
        """Args: z float32, such as [N, 1, 1, C]. Returns: the gates, of the same shape."""
        share: dict[str, Any] = {"reduction": self.reduction} if self.fraction is None else {"fraction": self.fraction}
        hidden = F.reduced_width(base_channels or z.shape[-1], **share, rounding=self.rounding)
        return F.lookup(F.GATES, self.gate, "gate")(self.mlp_scale(z, hidden))
