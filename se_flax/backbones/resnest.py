"""ResNeSt: split-attention networks (Zhang et al. 2022), in the layouts of timm."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax import functional as F
from se_flax.backbones.resnet import AVERAGED, D26, D50, D101, D200, D269, DEEP, WIDE_DEEP, ResNet
from se_flax.nn.attention_base import Attention
from se_flax.nn.branches import weigh_branches
from se_flax.nn.residual import Bottleneck, ModuleDef, Placement
from se_flax.variant import Variant

Array = jax.Array


class SplitAttention(Attention):
    """3x3 convolution into `radix` splits per group, and their softmax-weighted sum (Zhang et al. 2022, section 3.1).

    Attributes:
      features: output channels; the convolution has `radix` times as many.
      conv: convolution.
      norm: batch norm.
      act: activation.
      strides: of the convolution.
      groups: cardinality, the paper's K.
      radix: splits per group, the paper's R; 1 leaves a gate per channel (a sigmoid).
      reduction: hidden width of the gate = features * radix / reduction, at least 32.
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array] = jax.nn.relu
    strides: int = 1
    groups: int = 1
    radix: int = 2
    reduction: float = 4.0

    not_attention = ("conv", "bn0")

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        width = max(32, F.round_to_multiple(x.shape[-1] * self.radix / self.reduction))
        x = self.conv(
            self.features * self.radix, 3, strides=self.strides, groups=self.groups * self.radix, name="conv"
        )(x)
        x = self.act(self.norm(name="bn0")(x, train=train))
        return weigh_branches(
            jnp.split(x, self.radix, axis=-1),
            width,
            norm=self.norm,
            act=self.act,
            groups=self.groups,
            use_bias=True,
            names=("fc1", "bn1", "fc2"),
            train=train,
        )


class SplitAttentionBottleneck(Bottleneck):
    """1x1, split attention, 1x1; a 3x3 mean takes the block's stride (Zhang et al. 2022, section 4.1).

    Attributes:
      radix: splits per group.
      average_first: the mean comes before the convolution instead of after it.
    """

    radix: int = 2
    average_first: bool = False

    @nn.nowrap
    def middle(self, y: Array, width: int, train: bool) -> Array:
        """Split attention with the strided mean before or after it."""
        if self.average_first:
            y = self.average(y)
        y = SplitAttention(width, self.conv, self.norm, self.act, groups=self.groups, radix=self.radix, name="conv2")(
            y, train=train
        )
        y = self.attend(y, Placement.AFTER_3X3, train)
        return y if self.average_first else self.average(y)

    @nn.nowrap
    def average(self, y: Array) -> Array:
        """Strided 3x3 mean that counts the padding's zeros, or the `antialias` that the block was given instead."""
        if self.strides == 1:
            return y
        if self.antialias is not None:
            return self.antialias(y)
        return nn.avg_pool(y, (3, 3), (self.strides,) * 2, [(1, 1), (1, 1)], count_include_pad=True)


SPLIT_4S2X = partial(SplitAttentionBottleneck, radix=4, average_first=True)
SPLIT_1S4X = partial(SplitAttentionBottleneck, radix=1, average_first=True)
RESNEST = partial(ResNet, block=SplitAttentionBottleneck, stem=DEEP, downsample=AVERAGED)
RESNEST_E = partial(RESNEST, stem=WIDE_DEEP)
RESNEST_4S2X40D = partial(RESNEST, block=SPLIT_4S2X, groups=2, base_width=40)
RESNEST_1S4X24D = partial(RESNEST, block=SPLIT_1S4X, groups=4, base_width=24)

_ZHANG = "Zhang et al. 2022, tables 1 to 3; timm"
_SMALL = "Zhang et al. 2022, shallower; GluonCV, timm"
_ABLATION = "Zhang et al. 2022, table 2; timm"

VARIANTS: dict[str, Variant] = {
    "resnest14d": Variant(partial(RESNEST, depths=(1, 1, 1, 1)), 10_611_688, 224, _SMALL),
    "resnest26d": Variant(partial(RESNEST, depths=D26), 17_069_448, 224, _SMALL),
    "resnest50d": Variant(partial(RESNEST, depths=D50), 27_483_240, 224, _ZHANG),
    "resnest101e": Variant(partial(RESNEST_E, depths=D101), 48_275_016, 256, _ZHANG),
    "resnest200e": Variant(partial(RESNEST_E, depths=D200), 70_201_544, 320, _ZHANG),
    "resnest269e": Variant(partial(RESNEST_E, depths=D269), 110_929_480, 416, _ZHANG),
    "resnest50d_4s2x40d": Variant(partial(RESNEST_4S2X40D, depths=D50), 30_417_592, 224, _ABLATION),
    "resnest50d_1s4x24d": Variant(partial(RESNEST_1S4X24D, depths=D50), 25_677_000, 224, _ABLATION),
}
