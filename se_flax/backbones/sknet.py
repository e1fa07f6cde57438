"""Selective kernel networks (Li et al. 2019), in the layouts of timm's SK-ResNets.

A selective kernel convolution has two branches, a 3x3 and a dilated 3x3 in place of a 5x5, weighed per image and
channel. Only `skresnext50_32x4d` is the paper's SKNet-50; in the others each branch reads half of the input channels,
so that their size is close to a plain ResNet's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax import functional as F
from se_flax.backbones.resnet import AVERAGED, D18, D34, D50, DEEP, ResNet
from se_flax.nn.attention_base import Attention
from se_flax.nn.branches import weigh_branches
from se_flax.nn.residual import Block, ConvNorm, ModuleDef, Placement
from se_flax.variant import Variant

Array = jax.Array


class SelectiveAttention(Attention):
    """Fuse and select (Li et al. 2019, section 3.1): `nn.branches.weigh_branches` as one submodule.

    Attributes:
      width: of the hidden layer, the paper's d.
      norm: batch norm.
      act: activation.
    """

    width: int
    norm: ModuleDef
    act: Callable[[Array], Array] = jax.nn.relu

    @nn.compact
    def __call__(self, branches: list[Array], *, train: bool = False) -> Array:
        """Args: branches R maps [N, H, W, C]. Returns: [N, H, W, C]."""
        return weigh_branches(branches, self.width, norm=self.norm, act=self.act, train=train)


class SelectiveKernel(nn.Module):
    """Selective kernel convolution (Li et al. 2019, section 3.1).

    Attributes:
      features: output channels, of every branch and of the whole.
      conv: convolution.
      norm: batch norm.
      act: activation.
      strides: of the branches.
      groups: of the branches.
      dilations: one branch per number; 2 gives a 3x3 kernel the reach of a 5x5.
      split: each branch sees its share of the input channels instead of all.
      reduction: hidden width of the choice = features / reduction, rounded to `divisor`.
      divisor: what that width is a multiple of, and at least (the paper's L).
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array] = jax.nn.relu
    strides: int = 1
    groups: int = 1
    dilations: tuple[int, ...] = (1, 2)
    split: bool = True
    reduction: float = 16.0
    divisor: int = 8

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        count = len(self.dilations)
        inputs = jnp.split(x, count, axis=-1) if self.split else [x] * count
        branches = [
            ConvNorm(
                self.features,
                self.conv,
                self.norm,
                kernel_size=3,
                strides=self.strides,
                groups=self.groups,
                dilation=dilation,
                act=self.act,
                name=f"paths_{i}",
            )(branch, train=train)
            for i, (branch, dilation) in enumerate(zip(inputs, self.dilations, strict=True))
        ]
        width = F.round_to_multiple(self.features / self.reduction, self.divisor)
        return SelectiveAttention(width, self.norm, self.act, name="attn")(branches, train=train)


class SelectiveBlock(Block):
    """Base class of blocks with a selective kernel.

    Attributes:
      kernel: `SelectiveKernel` or a partial of it.
    """

    kernel: ModuleDef = SelectiveKernel

    @nn.nowrap
    def select(self, width: int, **kwargs: Any) -> Any:
        """The selective kernel, which carries the block's stride."""
        return self.kernel(width, self.conv, self.norm, self.act, strides=self.conv_strides, **kwargs)

    @nn.nowrap
    def plain(self, width: int, kernel_size: int, last: bool, name: str) -> Any:
        """A nested convolution and norm; the last of the branch has no activation."""
        norm = self.norm
        if last and self.zero_init_last:
            norm = partial(norm, scale_init=nn.initializers.zeros_init())
        return ConvNorm(width, self.conv, norm, kernel_size, act=None if last else self.act, name=name)

    @nn.nowrap
    def merge(self, x: Array, y: Array, train: bool) -> Array:
        """Attention, then the block's end."""
        return self.add(x, self.attend(y, Placement.STANDARD, train), train)


class SelectiveBasicBlock(SelectiveBlock):
    """A selective kernel, then a 3x3 convolution."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        y = self.select(self.features, name="conv1")(self.attend(x, Placement.PRE, train), train=train)
        y = self.low_pass(self.attend(y, Placement.AFTER_3X3, train))
        y = self.plain(self.features, 3, last=True, name="conv2")(y, train=train)
        return self.merge(x, y, train)


class SelectiveBottleneck(SelectiveBlock):
    """1x1, selective kernel, 1x1 (Li et al. 2019, section 3.2: the SK unit)."""

    expansion = 4

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, 4 * features]."""
        width = self.features * self.base_width // 64 * self.groups
        y = self.attend(x, Placement.PRE, train)
        y = self.plain(width, 1, last=False, name="conv1")(y, train=train)
        y = self.select(width, groups=self.groups, name="conv2")(y, train=train)
        y = self.low_pass(self.attend(y, Placement.AFTER_3X3, train))
        y = self.plain(self.features * self.expansion, 1, last=True, name="conv3")(y, train=train)
        return self.merge(x, y, train)


SK = partial(ResNet, block=SelectiveBottleneck, zero_init_last=False)
SK_BASIC = partial(SK, block=partial(SelectiveBasicBlock, kernel=partial(SelectiveKernel, reduction=8.0, divisor=16)))
SK_PAPER = partial(SelectiveKernel, split=False, divisor=32)
SK_RESNEXT = partial(SK, block=partial(SelectiveBottleneck, kernel=SK_PAPER), groups=32, base_width=4)

_LI = "Li et al. 2019, table 1"
_SPLIT = "Li et al. 2019, with split input channels; timm"

VARIANTS: dict[str, Variant] = {
    "skresnet18": Variant(partial(SK_BASIC, depths=D18), 11_958_056, 224, _SPLIT),
    "skresnet34": Variant(partial(SK_BASIC, depths=D34), 22_282_376, 224, _SPLIT),
    "skresnet50": Variant(partial(SK, depths=D50), 25_803_160, 224, _SPLIT),
    "skresnet50d": Variant(partial(SK, depths=D50, stem=DEEP, downsample=AVERAGED), 25_822_392, 224, _SPLIT),
    "skresnext50_32x4d": Variant(partial(SK_RESNEXT, depths=D50), 27_479_784, 224, _LI),
}
