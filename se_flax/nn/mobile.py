"""Inverted residual blocks of the mobile networks: MobileNet, MnasNet, EfficientNet and similar.

A block receives convolution, norm, activation and attention, as the blocks in `se_flax.nn.residual` do. Its layers have
timm's names: `conv_pw`, `conv_dw`, `conv_pwl`, `bn1`, `bn2`, `bn3`, `se`.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.functional import round_to_multiple
from se_flax.lowering.convolution import convolve
from se_flax.lowering.sharding import has_explicit_axes
from se_flax.nn.conv import normal_fan_out
from se_flax.nn.head import Dense
from se_flax.nn.norm_attention import norm_act_attend
from se_flax.nn.residual import drop_path

Array = jax.Array
ModuleDef = Callable[..., Any]


def fan_out_init(groups: int = 1) -> nn.initializers.Initializer:
    """Normal with variance 2 / (kernel area * output channels / groups), as in TensorFlow's mobile networks.

    Args:
      groups: of the convolution. For a depthwise one the variance is 2 / kernel area.
    """
    return normal_fan_out(2.0 * groups)


def mixed_conv(
    conv: ModuleDef, features: int, kernel: int | tuple[int, ...], x: Array, *, name: str, groups: int = 1, **kw: Any
) -> Array:
    """Convolution, with one or several kernel sizes (Tan and Le 2019b, section 3.1: MixConv).

    The channels are split evenly over the kernel sizes, with the remainder in the first part. The parts are named
    `<name>_0`, `<name>_1`, ...

    Args:
      conv: convolution class or partial.
      features: output channels.
      kernel: one size, or one per part.
      x: [N, H, W, C].
      name: of the submodule.
      groups: of the convolution; with several kernels 1 or C (depthwise).
      **kw: further arguments of `conv`.

    Returns:
      [N, h, w, features].
    """
    if isinstance(kernel, int):
        return conv(features, kernel, groups=groups, kernel_init=fan_out_init(groups), name=name, **kw)(x)

    def split(total: int) -> list[int]:
        part = total // len(kernel)
        return [total - part * (len(kernel) - 1)] + [part] * (len(kernel) - 1)

    outputs, start = [], 0
    for i, (size, width, out) in enumerate(zip(kernel, split(x.shape[-1]), split(features), strict=True)):
        part = jax.lax.slice_in_dim(x, start, start + width, axis=-1)
        part_groups = width if groups > 1 else 1
        init = fan_out_init(part_groups)
        outputs.append(conv(out, size, groups=part_groups, kernel_init=init, name=f"{name}_{i}", **kw)(part))
        start += width
    return jnp.concatenate(outputs, axis=-1)


class CondConv(nn.Module):
    """Convolution with a kernel per image, a weighted sum of experts (Yang et al. 2019, section 3, equation 1).

    Parameters: `experts` [E, kh, kw, C_in / groups, C_out].

    Attributes:
      features: output channels.
      kernel_size: side of the kernel.
      experts: number of experts E.
      strides: of both axes.
      groups: as in `nn.conv.Conv`.
      padding: `symmetric` or `SAME`, as in `nn.conv.Conv`.
      dtype: of the arithmetic; None takes the input's.
    """

    features: int
    kernel_size: int
    experts: int
    strides: int = 1
    groups: int = 1
    padding: str = "symmetric"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, routing: Array) -> Array:
        """Args: x [N, H, W, C]; routing [N, E], the experts' weights. Returns: [N, h, w, features]."""
        n, h, w, channels = x.shape
        size = (self.kernel_size, self.kernel_size)
        init = nn.initializers.variance_scaling(2.0 * self.groups, "fan_out", "normal", batch_axis=0)
        shape = (self.experts, *size, channels // self.groups, self.features)
        experts = self.param("experts", init, shape, jnp.float32)
        dtype = self.dtype or x.dtype
        padding = "SAME" if self.padding == "SAME" else [((self.kernel_size - 1) // 2,) * 2] * 2
        strides = (self.strides, self.strides)
        x = x.astype(dtype)
        if not isinstance(n, int) or n == 0 or has_explicit_axes(x, experts):
            # One group per image (below) needs a batch that is concrete, not empty, and not sharded over explicit axes.
            # Otherwise sum the experts' outputs instead of their kernels.
            weights = jnp.split(routing.astype(dtype), self.experts, axis=1)
            maps = (convolve(x, kernel.astype(dtype), strides, padding, (1, 1), self.groups) for kernel in experts)
            return functools.reduce(
                jnp.add, [y * weight[:, :, None, None] for y, weight in zip(maps, weights, strict=True)]
            )
        kernels = jnp.einsum("ne,ehwio->nhwio", routing.astype(jnp.float32), experts).astype(dtype)
        if self.kernel_size == 1 and self.strides == 1 and self.groups == 1:
            return jnp.einsum("nhwi,nio->nhwo", x, jnp.squeeze(kernels, (1, 2)))
        # Images become groups of channels of a batch of one, so that each has its own kernel.
        folded = x.transpose(1, 2, 0, 3).reshape(1, h, w, n * channels)
        kernel = kernels.transpose(1, 2, 3, 0, 4).reshape(*size, channels // self.groups, n * self.features)
        y = convolve(folded, kernel, strides, padding, (1, 1), self.groups * n)
        return y.reshape(*y.shape[1:3], n, self.features).transpose(2, 0, 1, 3)


class MobileBlock(nn.Module):
    """Base class of the mobile blocks.

    Attributes:
      features: output channels.
      conv: convolution, called as `conv(features, kernel_size, strides=..., groups=..., name=...)`.
      norm: batch norm, called as `norm(name=...)(x, train=...)`.
      act: activation.
      linear_norm: norm without a following activation; None takes `norm`. It differs from `norm` if norm and activation
        are one module (`nn.norm.EvoNormS0`).
      strides: of the block.
      kernel: kernel size, or the sizes of a mixed depthwise convolution.
      attention: attention class or partial, or None.
      attention_base: channel count that the attention's reduction refers to; None: see `from_expanded`.
      from_expanded: the reduction refers to the channels that the attention acts on (MobileNetV3) instead of the
        block's input channels (MnasNet, EfficientNet).
      attention_last: attention acts on the branch's output, before the sum, instead of the depthwise convolution's.
      skip: adds the block's input if the shapes are equal.
      group_size: channels per group of the spatial convolution; 1 is depthwise.
      antialias: downsampling after norm and activation in place of a stride of 2 (`nn.pooling.blur_pool`); None leaves
        the stride in the convolution.
      drop_path_rate: probability of dropping the branch (stochastic depth).
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array] = jax.nn.relu
    linear_norm: ModuleDef | None = None
    strides: int = 1
    kernel: int | tuple[int, ...] = 3
    attention: ModuleDef | None = None
    attention_base: int | None = None
    from_expanded: bool = False
    attention_last: bool = False
    skip: bool = True
    group_size: int = 1
    antialias: Callable[[Array], Array] | None = None
    drop_path_rate: float = 0.0

    @nn.nowrap
    def activate(self, x: Array, name: str, train: bool, act: Callable[[Array], Array] | None = None) -> Array:
        """Norm and activation."""
        return (act or self.act)(self.norm(name=name)(x, train=train))

    @property
    def conv_strides(self) -> int:
        """Stride of the convolution: 1 with `antialias`."""
        return self.strides if self.antialias is None else 1

    @nn.nowrap
    def blur(self, x: Array) -> Array:
        """Applies `antialias` if the block has a stride."""
        return x if self.antialias is None or self.strides == 1 else self.antialias(x)

    @nn.nowrap
    def activate_attend(self, x: Array, name: str, in_channels: int, train: bool) -> Array:
        """Norm, activation, anti-aliased downsampling, and attention unless `attention_last`."""
        if self.attention is None or self.attention_last:
            return self.blur(self.activate(x, name, train))
        attention, base = self.attention(name="se"), self._attention_base(x, in_channels)
        if self.antialias is not None and self.strides > 1:
            return attention(self.blur(self.activate(x, name, train)), train=train, base_channels=base)
        return norm_act_attend(self.norm(name=name), attention, x, train=train, base_channels=base, act=self.act)

    @nn.nowrap
    def close(self, x: Array, y: Array, name: str, train: bool, act: Callable[[Array], Array] | None = None) -> Array:
        """The end of the block: last norm, `act` if given, attention if `attention_last`, residual sum."""
        norm = (self.norm if act else self.linear_norm or self.norm)(name=name)
        attention = self.attention(name="se") if self.attention is not None and self.attention_last else None
        base = self._attention_base(y, x.shape[-1])
        y = norm_act_attend(norm, attention, y, train=train, act=act, base_channels=base)
        return self.add(x, y, train)

    @nn.nowrap
    def _attention_base(self, x: Array, in_channels: int) -> int:
        return self.attention_base or (x.shape[-1] if self.from_expanded else in_channels)

    @nn.nowrap
    def add(self, x: Array, branch: Array, train: bool) -> Array:
        """The residual sum if the block has one, with stochastic depth on the branch."""
        if not self.skip or self.strides != 1 or x.shape != branch.shape:
            return branch
        if train and self.drop_path_rate > 0.0:
            branch = drop_path(branch, self.drop_path_rate, self.make_rng("dropout"))
        return x + branch


class ConvBlock(MobileBlock):
    """One convolution with norm and activation (EfficientNetV2's first stage, MobileNetV3's last). No attention."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        y = mixed_conv(self.conv, self.features, self.kernel, x, strides=self.conv_strides, name="conv")
        return self.add(x, self.blur(self.activate(y, "bn1", train)), train)


class DepthwiseSeparable(MobileBlock):
    """Depthwise and pointwise convolution (Howard et al. 2017, section 3.1); an inverted residual that expands by 1.

    Attributes:
      project_act: adds an activation after the pointwise convolution (MobileNetV1, LCNet).
      space_to_depth: starts with a 2x2 convolution of stride 2 to four times the channels and halves the depthwise
        kernel (Li et al. 2021, section 4.2: EfficientNet-X).
    """

    project_act: bool = False
    space_to_depth: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / s, W / s, features], s = strides, doubled by `space_to_depth`."""
        y, kernel, kw = x, self.kernel, {}
        if self.space_to_depth:
            assert isinstance(kernel, int)
            y = self.conv(4 * x.shape[-1], 2, strides=2, padding="SAME", kernel_init=fan_out_init(), name="conv_s2d")(y)
            y = self.activate(y, "bn_s2d", train)
            kernel = (kernel + 1) // 2
            kw = {"padding": "SAME"} if kernel % 2 == 0 else {}
        width = y.shape[-1]
        groups = width // self.group_size
        y = mixed_conv(self.conv, width, kernel, y, strides=self.conv_strides, groups=groups, name="conv_dw", **kw)
        y = self.activate_attend(y, "bn1", x.shape[-1], train)
        y = mixed_conv(self.conv, self.features, 1, y, name="conv_pw")
        return self.close(x, y, "bn2", train, self.act if self.project_act else None)


class InvertedResidual(MobileBlock):
    """Expand, depthwise convolution, attention, project (Sandler et al. 2018, section 3.3; MBConv).

    Attributes:
      expand: expanded channels over input channels; the product is rounded to a multiple of eight.
      hidden: number of expanded channels; None derives it from `expand`.
      expand_kernel: kernel size of the expansion; `(1, 1)` splits the channels in two parts (MixNet).
      project_kernel: kernel size of the projection, likewise.
      experts: experts per convolution (`CondConv`); 0 for an ordinary convolution.
    """

    expand: float = 6.0
    hidden: int | None = None
    expand_kernel: int | tuple[int, ...] = 1
    project_kernel: int | tuple[int, ...] = 1
    experts: int = 0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        in_channels = x.shape[-1]
        hidden = self.hidden or round_to_multiple(in_channels * self.expand)
        if self.experts:
            init = nn.initializers.variance_scaling(1 / 6, "fan_avg", "uniform")
            pooled = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
            routing = jax.nn.sigmoid(Dense(self.experts, kernel_init=init, name="routing_fn")(pooled))

            def conv(features: int, kernel: Any, y: Array, *, name: str, groups: int = 1, strides: int = 1) -> Array:
                # The network binds padding and dtype to its `conv`.
                bound = {k: v for k, v in getattr(self.conv, "keywords", {}).items() if k in ("padding", "dtype")}
                layer = CondConv(features, kernel, self.experts, strides=strides, groups=groups, name=name, **bound)
                return layer(y, routing)
        else:
            conv = partial(mixed_conv, self.conv)

        y = self.activate(conv(hidden, self.expand_kernel, x, name="conv_pw"), "bn1", train)
        groups = hidden // self.group_size
        y = conv(hidden, self.kernel, y, strides=self.conv_strides, groups=groups, name="conv_dw")
        y = self.activate_attend(y, "bn2", in_channels, train)
        return self.close(x, conv(self.features, self.project_kernel, y, name="conv_pwl"), "bn3", train)


class FusedInvertedResidual(MobileBlock):
    """Expansion and depthwise convolution fused into one (Tan and Le 2021, section 3.2: Fused-MBConv).

    Attributes:
      expand: expanded channels over input channels, as in `InvertedResidual`.
    """

    expand: float = 4.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        hidden = round_to_multiple(x.shape[-1] * self.expand)
        y = mixed_conv(self.conv, hidden, self.kernel, x, strides=self.conv_strides, name="conv_exp")
        y = self.activate_attend(y, "bn1", x.shape[-1], train)
        return self.close(x, mixed_conv(self.conv, self.features, 1, y, name="conv_pwl"), "bn2", train)
