"""Channel attention as Linen modules over `se_flax.functional`: NHWC in, NHWC out, same shape and dtype.

Every module is called as `module(x, train=False)` and takes `base_channels`, the channel count that a reduction is a
share of where that is not the map's own (EfficientNet's blocks reduce relative to their input). That uniform call is
what lets any attention go into any backbone: `create_model("resnet50", attention=ECA)`.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax import functional as F
from se_flax.bound import Function
from se_flax.errors import UserError
from se_flax.layers import BatchNorm, Conv
from se_flax.norms import LayerNorm

Array = jax.Array
Initializer = nn.initializers.Initializer

he_normal = nn.initializers.he_normal()


class _Pointwise(nn.Module):
    """Parameters of a 1x1 convolution: kernel [1, 1, C_in, C_out] as checkpoints hold it, returned as [C_in, C_out]."""

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

    @property
    def from_mean(self) -> bool:
        """Whether the gate is a function of the channels' means alone, as `BatchNorm` needs to take it in."""
        return self.squeeze == "mean"

    @nn.compact
    def gates(self, z: Array, *, base_channels: int | None = None) -> Array:
        """The gates of squeezed channels.

        Args:
          z: float32 [N, 1, 1, C], or [N, H, W, C] without a squeeze.
          base_channels: what the reduction is a share of; C when None.

        Returns:
          float32, the shape of z.
        """
        channels = z.shape[-1]
        hidden = self.hidden_width(base_channels or channels)
        layer = (self.use_bias, self.kernel_init, self.bias_init)
        reduce_ = _Pointwise(hidden, *layer, name=self.names[0])(channels)
        expand = _Pointwise(channels, *layer, name=self.names[1])(hidden)
        return F.excite(z, *reduce_, *expand, activation=self.activation, gate=self.gate)

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
        return F.scale(x, self.gates(F.squeeze(x, self.squeeze), base_channels=base_channels))


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

    from_mean = True

    @nn.compact
    def gates(self, z: Array, *, base_channels: int | None = None) -> Array:
        """Args: z float32 [N, 1, 1, C]. Returns: the gates, of the same shape."""
        del base_channels
        kernel, bias = _Pointwise(z.shape[-1], self.use_bias, self.kernel_init, self.bias_init, name="fc")(z.shape[-1])
        return F.lookup(F.GATES, self.gate, "gate")(_affine(z, kernel, bias))

    def __call__(self, x: Array, *, train: bool = False, base_channels: int | None = None) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H, W, C] of x's dtype."""
        del train, base_channels
        return F.scale(x, self.gates(F.squeeze(x)))


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
      from_base: the rule takes `base_channels`: a network pruned after training keeps the kernels of its old widths.
      gate: by name or as a function.
      kernel_init: initialiser of the kernel.
      dtype: accepted for uniformity; the gate is always float32.

    Raises:
      UserError: unknown gate, or a kernel size that is not odd and positive.
    """

    kernel_size: int | None = None
    gamma: float = 2.0
    b: float = 1.0
    from_base: bool = False
    gate: str | F.Elementwise = "sigmoid"
    kernel_init: Initializer = he_normal
    dtype: Any = None

    from_mean = True

    @nn.compact
    def gates(self, z: Array, *, base_channels: int | None = None) -> Array:
        """Args: z float32 [N, 1, 1, C]. Returns: the gates, of the same shape."""
        channels = base_channels if self.from_base and base_channels else z.shape[-1]
        size = F.eca_kernel_size(channels, self.gamma, self.b) if self.kernel_size is None else self.kernel_size
        if size < 1 or size % 2 == 0:
            raise UserError(
                f"got kernel_size={size} for ECA; give an odd positive number, or None for the paper's rule"
            )
        kernel = _ChannelKernel(size, self.kernel_init, name="conv")()
        return F.lookup(F.GATES, self.gate, "gate")(F.channel_conv(z, kernel))

    def __call__(self, x: Array, *, train: bool = False, base_channels: int | None = None) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H, W, C] of x's dtype."""
        del train
        return F.scale(x, self.gates(F.squeeze(x), base_channels=base_channels))


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


def norm_attend(
    norm: Any,
    attention: Any,
    x: Array,
    *,
    train: bool,
    base_channels: int | None = None,
    act: F.Elementwise | None = None,
    squeezed: Callable[[], Array] | None = None,
) -> Array:
    """Norm, activation and attention, in one where the norm can take the others in (`BatchNorm` with a gate).

    Args:
      norm: called as `norm(x, train=train)`.
      attention: attention module.
      x: [N, H, W, C].
      train: the norm uses the batch's statistics.
      base_channels: what a reduction is a share of; C when None.
      act: activation between norm and attention; None for none.
      squeezed: see `BatchNorm`.

    Returns:
      [N, H, W, C].
    """
    if isinstance(norm, BatchNorm) and getattr(attention, "from_mean", False):
        functions = {
            "gate": partial(attention.gates, base_channels=base_channels),
            "act": act,
            "squeezed": squeezed,
        }
        given = {name: Function(function) for name, function in functions.items() if function is not None}
        return norm(x, train=train, **given)
    x = norm(x, train=train)
    return attention(x if act is None else act(x), train=train, base_channels=base_channels)


def _affine(z: Array, kernel: Array, bias: Array | None) -> Array:
    y = jnp.matmul(z, kernel, precision=jax.lax.Precision.HIGHEST)
    return y if bias is None else y + bias


class _ContextMlp(nn.Module):
    """Two 1x1 convolutions with a layer norm between them; parameters `fc1`, `norm`, `fc2`."""

    hidden: int
    activation: str | F.Elementwise
    kernel_init: Initializer

    @nn.compact
    def __call__(self, z: Array) -> Array:
        layer = (True, self.kernel_init, nn.initializers.zeros_init())
        channels = z.shape[-1]
        z = LayerNorm(1e-6, name="norm")(_affine(z, *_Pointwise(self.hidden, *layer, name="fc1")(channels)))
        z = F.lookup(F.ACTIVATIONS, self.activation, "activation")(z)
        return _affine(z, *_Pointwise(channels, *layer, name="fc2")(self.hidden))


class GlobalContext(nn.Module):
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

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, base_channels: int | None = None) -> Array:
        """Args: x [N, H, W, C]; base_channels: what the width is a share of. Returns: [N, H, W, C] of x's dtype."""
        del train
        x = jnp.asarray(x)
        n, h, w, channels = x.shape
        share: dict[str, Any] = {"reduction": self.reduction} if self.fraction is None else {"fraction": self.fraction}
        hidden = F.reduced_width(base_channels or channels, **share, rounding=self.rounding)
        query = _Pointwise(1, True, self.kernel_init, nn.initializers.zeros_init(), name="conv_attn")(channels)
        pixels = x.astype(jnp.float32).reshape(n, h * w, channels)
        weights = jax.nn.softmax(_affine(pixels, *query), axis=1)
        context = jnp.einsum("npc,npo->noc", pixels, weights, precision=jax.lax.Precision.HIGHEST)[:, None]
        logits = _ContextMlp(hidden, self.activation, self.kernel_init, name="mlp_scale")(context)
        return F.scale(x, F.lookup(F.GATES, self.gate, "gate")(logits))


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
    """Sum of branches, each weighed per image and channel (Li et al. 2019; Zhang et al. 2022; section 3.1 of both).

    The weights come from the mean of the branches' sum by two layers as in squeeze-and-excitation, and compete in a
    softmax over the branches. A single branch competes with nothing: its weight is a sigmoid.

    Its layers belong to the module that calls it: `<names[0]>/kernel` [1, 1, C / groups, width], `<names[1]>` a batch
    norm, `<names[2]>/kernel` [1, 1, width / groups, R * C], and biases.

    Args:
      branches: R maps [N, H, W, C].
      width: of the hidden layer.
      norm: batch norm between the layers, called as `norm(name=..., dtype=...)(z, train=...)`.
      train: the norm uses the batch's statistics.
      act: activation after it.
      groups: channel groups K that are gated apart (ResNeSt's cardinality).
      use_bias: biases in both layers.
      names: of the two layers and the norm between them.

    Returns:
      [N, H, W, C] of the branches' dtype.
    """
    count, channels = len(branches), branches[0].shape[-1]
    layer = (use_bias, he_normal, nn.initializers.zeros_init())

    def grouped(z: Array, features: int, name: str) -> Array:
        kernel, bias = _Pointwise(features, *layer, name=name)(z.shape[-1] // groups)
        z = z.reshape(z.shape[0], groups, -1)
        # A grouped kernel holds the outputs of all groups side by side, each over its own group's inputs.
        kernel = kernel.reshape(z.shape[-1], groups, features // groups)
        out = jnp.einsum("ngc,cgm->ngm", z, kernel, precision=jax.lax.Precision.HIGHEST).reshape(-1, features)
        return out if bias is None else out + bias

    z = functools.reduce(jnp.add, [jnp.squeeze(F.squeeze(branch), (1, 2)) for branch in branches])
    z = grouped(z, width, names[0])
    z = act(norm(name=names[1], dtype=jnp.float32)(z, train=train))
    logits = grouped(z, count * channels, names[2]).reshape(-1, groups, count, channels // groups)
    gates = jax.nn.softmax(logits, axis=2) if count > 1 else jax.nn.sigmoid(logits)
    gates = jnp.moveaxis(gates, 2, 0).reshape(count, -1, 1, 1, channels)
    return functools.reduce(jnp.add, [F.scale(branch, gate) for branch, gate in zip(branches, gates, strict=True)])
