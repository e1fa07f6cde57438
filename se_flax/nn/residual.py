"""Residual blocks. A block receives convolution, norm, activation and attention from its network.

The places for the attention are those of Hu et al. 2020, section 6.5 and figure 5; see `Placement`.
"""

import enum
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.errors import UserError, closest
from se_flax.lowering.dispatch import share_computation
from se_flax.nn.norm_attention import conv_norm_attend, norm_act_attend
from se_flax.nn.pooling import avg_pool

Array = jax.Array
ModuleDef = Callable[..., Any]


class Placement(enum.StrEnum):
    """Place of the attention in a residual block (Hu et al. 2020, section 6.5)."""

    STANDARD = "standard"
    """On the residual branch, before the sum."""
    PRE = "pre"
    """On the residual branch, before its first convolution (hidden width from the block's input channels)."""
    POST = "post"
    """After the ReLU that follows the sum."""
    IDENTITY = "identity"
    """On the shortcut, parallel to the residual branch."""
    AFTER_3X3 = "3x3"
    """After the (first) 3x3 convolution and its norm, inside the residual branch."""

    @classmethod
    def parse(cls, value: "str | Placement") -> "Placement":
        """Turns a name into a placement.

        Raises:
          UserError: no such placement.
        """
        names = [member.value for member in cls]
        if value not in names:
            raise UserError(f"unknown placement {value!r}; {closest(str(value), names)}")
        return cls(value)


class Block(nn.Module):
    """Base class of residual blocks: their parts, and attention at the place that `placement` names.

    Attributes:
      features: width of the block; its output has `features * expansion` channels.
      conv: convolution, called as `conv(features, kernel_size, strides=..., groups=..., name=...)`.
      norm: batch norm, called as `norm(name=...)(x, train=...)`.
      act: activation.
      strides: of the block.
      attention: attention class or partial, or None.
      placement: place of the attention.
      attention_name: name of the attention's submodule, as in checkpoints.
      downsample: shortcut of a block that changes the shape, `project` or `pad_channels`.
      groups: of the 3x3 convolution in a bottleneck.
      base_width: channels per group at 64 features (ResNeXt's d).
      stride_first: a bottleneck has its stride in the first 1x1 (He et al. 2016, MSRA's Caffe models) instead of the
        3x3 ("v1.5").
      antialias: downsampling by 2 after the 3x3 convolution and its activation, in place of the convolution's stride
        (Zhang 2019, section 3.2): `average_by_2`, `nn.pooling.blur_pool` or None.
      drop_path_rate: probability of dropping the branch (stochastic depth).
      zero_init_last: the last norm's scale is initialised to zero, so that a block starts as the identity (Goyal et al.
        2017, section 5.1).
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array] = jax.nn.relu
    strides: int = 1
    attention: ModuleDef | None = None
    placement: Placement = Placement.STANDARD
    attention_name: str = "se"
    downsample: ModuleDef | None = None
    groups: int = 1
    base_width: int = 64
    stride_first: bool = False
    antialias: Callable[[Array], Array] | None = None
    drop_path_rate: float = 0.0
    zero_init_last: bool = True

    expansion = 1

    @nn.nowrap
    def attend(self, x: Array, place: Placement, train: bool, base_channels: int | None = None) -> Array:
        """Attention on x if this is the attention's place, else x."""
        attention = self.attention_at(place)
        return x if attention is None else attention(x, train=train, base_channels=base_channels)

    @nn.nowrap
    def attention_at(self, place: Placement) -> Any:
        """The attention module if this is its place, else None."""
        if self.attention is None or place is not self.placement:
            return None
        return self.attention(name=self.attention_name)

    @nn.nowrap
    def low_pass(self, x: Array) -> Array:
        """Anti-aliased downsampling if the block has `antialias` and a stride, else x."""
        return self.antialias(x) if self.antialias is not None and self.strides > 1 else x

    @property
    def conv_strides(self) -> int:
        """Stride of the convolution: 1 with `antialias`, where `low_pass` downsamples."""
        return self.strides if self.antialias is None else 1

    @nn.nowrap
    def drop(self, branch: Array, train: bool) -> Array:
        """Stochastic depth on the residual branch while training."""
        if not train or self.drop_path_rate == 0.0:
            return branch
        return drop_path(branch, self.drop_path_rate, self.make_rng("dropout"))

    @nn.nowrap
    def shortcut(self, x: Array, features: int, train: bool) -> Array:
        """The identity, or `downsample` if the block changes the shape."""
        if self.downsample is None or (self.strides == 1 and x.shape[-1] == features):
            return x
        return self.downsample(x, features, self.strides, conv=self.conv, norm=self.norm, train=train)

    @nn.nowrap
    def add(self, x: Array, branch: Array, train: bool) -> Array:
        """The end of a block with an activation after the sum.

        Args:
          x: the block's input [N, H, W, C].
          branch: the residual branch's output [N, H / strides, W / strides, features].
          train: the norm of a projection uses the batch's statistics; stochastic depth is active.

        Returns:
          The block's output, of the branch's shape.
        """
        branch = self.drop(branch, train)
        x = self.attend(self.shortcut(x, branch.shape[-1], train), Placement.IDENTITY, train)
        return self.attend(share_computation(self.act(x + branch)), Placement.POST, train)

    @nn.nowrap
    def last_norm(self, **kwargs: Any) -> Any:
        """The norm that ends the residual branch."""
        if self.zero_init_last:
            kwargs["scale_init"] = nn.initializers.zeros_init()
        return self.norm(**kwargs)


class ConvNorm(nn.Module):
    """Convolution, norm and activation as one submodule, where checkpoints nest them so.

    Attributes:
      features: output channels.
      conv: as in `Block`.
      norm: as in `Block`.
      kernel_size: side of the kernel, or (height, width).
      strides: of the convolution.
      groups: of the convolution.
      dilation: of the convolution.
      act: activation; None for none.
      names: of the convolution and the norm in it.
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    kernel_size: int | tuple[int, int] = 1
    strides: int = 1
    groups: int = 1
    dilation: int = 1
    act: Callable[[Array], Array] | None = None
    names: tuple[str, str] = ("conv", "bn")

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, attention: Any = None, base_channels: int | None = None
    ) -> Array:
        """Applies convolution, norm, activation and attention.

        Args:
          x: [N, H, W, C].
          train: the norm uses the batch's statistics.
          attention: attention module of the block that calls this one, applied last; None for none.
          base_channels: channels that the attention's reduction is a share of; None for `features`.

        Returns:
          [N, H / strides, W / strides, features].
        """
        x = self.conv(
            self.features,
            self.kernel_size,
            strides=self.strides,
            groups=self.groups,
            dilation=self.dilation,
            name=self.names[0],
        )(x)
        norm = self.norm(name=self.names[1])
        return norm_act_attend(norm, attention, x, train=train, act=self.act, base_channels=base_channels)


class BasicBlock(Block):
    """Two 3x3 convolutions (He et al. 2016, figure 5 left)."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        y = self.attend(x, Placement.PRE, train)
        y = self.conv(self.features, 3, strides=self.conv_strides, name="conv1")(y)
        y = norm_act_attend(self.norm(name="bn1"), self.attention_at(Placement.AFTER_3X3), y, train=train)
        y = self.low_pass(self.act(y))
        y = self.conv(self.features, 3, name="conv2")(y)
        y = norm_act_attend(self.last_norm(name="bn2"), self.attention_at(Placement.STANDARD), y, train=train)
        return self.add(x, y, train)


class Bottleneck(Block):
    """1x1, 3x3, 1x1 (He et al. 2016, figure 5 right); grouped, ResNeXt's (Xie et al. 2017, figure 3c).

    Attributes:
      reduce_first: channels of the 3x3 over those of the first 1x1 (2 in SENet-154: Hu et al. 2020, appendix).
      widths: output channels of the three convolutions, for pruned networks; None derives them from `features`.
    """

    reduce_first: int = 1
    widths: tuple[int, int, int] | None = None

    expansion = 4

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, 4 * features]."""
        width = self.features * self.base_width // 64 * self.groups
        unpruned = self.features * self.expansion
        first, second, out = self.widths or (width // self.reduce_first, width, unpruned)
        y = self.attend(x, Placement.PRE, train)
        y = self.conv(first, 1, strides=self.conv_strides if self.stride_first else 1, name="conv1")(y)
        y = self.act(self.norm(name="bn1")(y, train=train))
        y = self.middle(y, second, train)
        last, norm = self.conv(out, 1, name="conv3"), self.last_norm(name="bn3")
        attention = self.attention_at(Placement.STANDARD)
        # The attention of a pruned network keeps its size from before the pruning.
        y = conv_norm_attend(last, norm, attention, y, train=train, base_channels=unpruned)
        return self.add(x, y, train)

    @nn.nowrap
    def middle(self, y: Array, width: int, train: bool) -> Array:
        """The 3x3 convolution with its norm and activation; subclasses override it."""
        strides = 1 if self.stride_first else self.conv_strides
        y = self.conv(width, 3, strides=strides, groups=self.groups, name="conv2")(y)
        y = norm_act_attend(self.norm(name="bn2"), self.attention_at(Placement.AFTER_3X3), y, train=train)
        return self.low_pass(self.act(y))


class PreActBottleneck(Block):
    """Norm and activation before each convolution, nothing after the sum (He et al. 2016b, figure 4e).

    The projection shortcut takes the pre-activated input, as in the authors' code. POST attention acts on the sum,
    which has no ReLU after it.
    """

    expansion = 4

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, 4 * features]."""
        out = self.features * self.expansion
        changes = self.strides != 1 or x.shape[-1] != out
        y = self.attend(x, Placement.PRE, train)
        y = self.act(self.norm(name="bn1")(y, train=train))
        # With PRE attention the block's input is projected, since y is gated.
        projected = y if changes and self.placement is not Placement.PRE else x
        y = self.conv(self.features, 1, strides=self.strides, name="conv1")(y)
        y = self.act(self.norm(name="bn2")(y, train=train))
        y = self.conv(self.features, 3, name="conv2")(y)
        y = self.act(self.norm(name="bn3")(self.attend(y, Placement.AFTER_3X3, train), train=train))
        y = self.conv(out, 1, name="conv3")(y)
        y = self.drop(self.attend(y, Placement.STANDARD, train), train)
        x = self.attend(self.shortcut(projected, out, train), Placement.IDENTITY, train)
        return self.attend(x + y, Placement.POST, train)


class Stage(nn.Module):
    """Blocks in turn, as submodules `b1`, `b2`, ..., where checkpoints nest them so.

    Attributes:
      blocks: classes or partials.
    """

    blocks: tuple[ModuleDef, ...]

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: the last block's output [N, h, w, features]."""
        for i, block in enumerate(self.blocks, 1):
            x = block(name=f"b{i}")(x, train=train)
        return x


def project(
    x: Array,
    features: int,
    strides: int,
    *,
    conv: ModuleDef,
    norm: ModuleDef | None,
    train: bool,
    average: bool = False,
    kernel_size: int = 1,
) -> Array:
    """Shortcut by a strided 1x1 convolution and norm (He et al. 2016, section 3.3, option B).

    The layers are submodules of the calling block, named as torch numbers them: `downsample_0` and `downsample_1`, or
    `downsample_1` and `downsample_2` if a pooling layer comes first.

    Args:
      x: [N, H, W, C].
      features: output channels.
      strides: of the convolution.
      conv: as in `Block`.
      norm: as in `Block`; None for none, as in pre-activation networks.
      train: the norm uses the batch's statistics.
      average: average-pool by the stride first and project at stride 1 (He et al. 2019, figure 2c: ResNet-D).
      kernel_size: of a strided convolution (3 in SENet-154: Hu et al. 2020, appendix); 1 otherwise.

    Returns:
      [N, h, w, features].
    """
    first = 0
    if average:
        x = avg_pool(x, strides, strides) if strides > 1 else x
        strides, first = 1, 1
    layer = conv(features, kernel_size if strides > 1 else 1, strides=strides, name=f"downsample_{first}")
    if norm is None:
        return layer(x)
    return conv_norm_attend(layer, norm(name=f"downsample_{first + 1}"), None, x, train=train)


def project_nested(x: Array, features: int, strides: int, *, conv: ModuleDef, norm: ModuleDef, train: bool) -> Array:
    """`project` with its layers in one submodule, `downsample/conv` and `downsample/bn`, as in RegNet's checkpoints."""
    return ConvNorm(features, conv, norm, strides=strides, name="downsample")(x, train=train)


def average_by_2(x: Array) -> Array:
    """Mean over 2x2 windows, the anti-aliasing of timm's `aa` networks; [N, H, W, C] to [N, H / 2, W / 2, C]."""
    return avg_pool(x, 2, 2)


def project_linear(x: Array, features: int, strides: int, **parts: Any) -> Array:
    """`project` without the norm: the shortcut of a pre-activation network (He et al. 2016b, section 4)."""
    return project(x, features, strides, **{**parts, "norm": None})


def pad_channels(x: Array, features: int, strides: int, **parts: Any) -> Array:
    """Shortcut without parameters: subsampling and zero channels (He et al. 2016, section 3.3, option A).

    Half of the zero channels come before the channels of x, half after. `parts` is not used.
    """
    del parts
    x = jax.lax.slice(x, (0,) * 4, x.shape, (1, strides, strides, 1))
    missing = features - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * 3 + [(missing // 2, missing - missing // 2)])


def drop_path(x: Array, rate: float, key: Array) -> Array:
    """Stochastic depth (Huang et al. 2016): zeroes a residual branch for random images and rescales it for the others.

    Args:
      x: branch [N, ...].
      rate: probability of dropping, below 1.
      key: PRNG key.

    Returns:
      Array like x, with the expectation of x.
    """
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)
