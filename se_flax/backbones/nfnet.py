"""Networks without norms (Brock et al. 2021): NFNet, NF-ResNet and NF-RegNet with SE or ECA; timm's names.

Two papers: a, "Characterizing signal propagation to close the performance gap in unnormalized ResNets"; b,
"High-performance large-scale image recognition without normalization".
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import ECA, SqueezeExcite
from se_flax.functional import round_to_multiple
from se_flax.lowering.dispatch import share_computation
from se_flax.nn.network import Path, StagedNetwork
from se_flax.nn.pooling import avg_pool, max_pool
from se_flax.nn.residual import ModuleDef, drop_path
from se_flax.nn.weight_standardised import ScaledStdConv
from se_flax.variant import Variant

Array = jax.Array
Activation = Callable[[Array], Array]

# Square root of 1 / variance of the activation of a standard normal number (paper a, appendix D).
GAMMA = {"relu": 1.7139588594436646, "silu": 1.7881293296813965, "gelu": 1.7015043497085571}
GELU = partial(jax.nn.gelu, approximate=False)


def scaled_gelu(x: Array) -> Array:
    """The exact GELU times its gamma, as in DeepMind's networks, whose convolutions have none."""
    return GELU(x) * GAMMA["gelu"]


class PooledConv(nn.Module):
    """Shortcut: mean over 2x2 if strided, then a 1x1 convolution, as the submodule `conv`."""

    features: int
    conv: ModuleDef
    strides: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        x = avg_pool(x, self.strides, self.strides) if self.strides > 1 else x
        y: Array = self.conv(self.features, 1, name="conv")(x)
        return y


class Stem(nn.Module):
    """Convolutions with activations between them.

    Attributes:
      layers: features, side of the kernel and stride of each.
      conv: convolution.
      act: activation.
      pools: max-pooling at stride 2 follows.
    """

    layers: tuple[tuple[int, int, int], ...]
    conv: ModuleDef
    act: Activation
    pools: bool

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Args: x images [N, H, W, C]. Returns: the last map at stride 2 and the output, [N, h, w, features]."""
        half = x
        for i, (features, size, strides) in enumerate(self.layers, 1):
            name = f"conv{i}" if len(self.layers) > 1 else "conv"
            x = self.conv(features, size, strides=strides, name=name)(self.act(x) if i > 1 else x)
            half = x if strides == 1 or i == 1 else half
        return half, max_pool(x) if self.pools else x


class NormFreeBlock(nn.Module):
    """Pre-activation bottleneck x + alpha * f(x / beta), f of unit variance (paper a, section 3; paper b, figure 3).

    Attributes:
      features: output channels.
      width: channels inside.
      conv: convolution.
      act: activation.
      strides: of the 3x3 convolution.
      groups: of the 3x3 convolutions.
      alpha: share of the branch.
      beta: expected standard deviation of the input.
      extra: a second 3x3 convolution.
      attention: attention class or partial, or None.
      inner: the attention is before the last convolution, as in NF-RegNet, and not after it.
      attention_gain: factor behind the attention, whose gates halve the map on average.
      skip_init: the branch has a learned factor that starts at 0, in place of the last gain.
      drop_path_rate: probability of dropping the branch.
    """

    features: int
    width: int
    conv: ModuleDef
    act: Activation
    strides: int
    groups: int
    alpha: float
    beta: float
    extra: bool
    attention: ModuleDef | None
    inner: bool
    attention_gain: float
    skip_init: bool
    drop_path_rate: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        y = share_computation(self.act(x) * jnp.asarray(1 / self.beta, x.dtype))
        if self.strides > 1 or x.shape[-1] != self.features:
            x = PooledConv(self.features, self.conv, self.strides, name="downsample")(y)
        y = self.conv(self.width, 1, name="conv1")(y)
        y = self.conv(self.width, 3, strides=self.strides, groups=self.groups, name="conv2")(self.act(y))
        if self.extra:
            y = self.conv(self.width, 3, groups=self.groups, name="conv2b")(self.act(y))
        y = self._attend(y, train, "attn") if self.inner else y
        gain_init = nn.initializers.ones_init() if self.skip_init else nn.initializers.zeros_init()
        y = self.conv(self.features, 1, gain_init=gain_init, name="conv3")(self.act(y))
        y = y if self.inner else self._attend(y, train, "attn_last")
        if train and self.drop_path_rate:
            y = drop_path(y, self.drop_path_rate, self.make_rng("dropout"))
        if self.skip_init:
            y = y * self.param("skipinit_gain", nn.initializers.zeros_init(), (), jnp.float32).astype(y.dtype)
        return x + y * jnp.asarray(self.alpha, y.dtype)

    @nn.nowrap
    def _attend(self, y: Array, train: bool, name: str) -> Array:
        if self.attention is None:
            return y
        attended: Array = self.attention(name=name)(y, train=train)
        return attended * jnp.asarray(self.attention_gain, y.dtype)


class NFNet(StagedNetwork, kw_only=True):
    """Stem, four stages of norm-free blocks and, in most, a 1x1 convolution before the last activation.

    `conv` must be a `ScaledStdConv`, with the `gamma` of `act`; there is no `norm`. Beside the attributes of
    `StagedNetwork`:

    Attributes:
      depths: blocks per stage.
      features: output channels of the stages.
      stem: features, side of the kernel and stride of the first convolutions.
      pools: max-pooling follows the stem.
      last: features of the last 1x1 convolution; 0 leaves it out.
      share: of the width inside a block in its output, or with `inner` in its input.
      group_size: channels per group of the 3x3 convolutions; 0 for one group.
      extra: every block has a second 3x3 convolution.
      inner: the attention is before a block's last convolution.
      skip_init: every branch has a learned factor.
      alpha: share of the branches.
      attention_gain: factor behind the attention.
    """

    depths: tuple[int, ...]
    features: tuple[int, ...] = (256, 512, 1536, 1536)
    stem: tuple[tuple[int, int, int], ...] = ((16, 3, 2), (32, 3, 1), (64, 3, 1), (128, 3, 2))
    pools: bool = False
    last: int = 3072
    share: float = 0.5
    group_size: int = 128
    extra: bool = True
    inner: bool = False
    skip_init: bool = False
    alpha: float = 0.2
    attention_gain: float = 2.0
    conv: ModuleDef = partial(ScaledStdConv, gamma=GAMMA["gelu"])
    norm: Any = None
    act: Activation = GELU

    head_path = ("head", "fc")

    @property
    def stem_path(self) -> Path:
        """The first convolution."""
        return ("stem", "conv1" if len(self.stem) > 1 else "conv")

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The residual blocks."""
        return tuple((f"stages_{s}_{i}",) for s, depth in enumerate(self.depths) for i in range(depth))

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The maps of the stem (stride 2) and the stages (4, 8, 16, 32), the last one behind the last convolution."""
        conv = partial(self.conv, dtype=self.dtype)
        half, x = Stem(self.stem, conv, self.act, self.pools, name="stem")(x)
        maps, variance = {"stem": half}, 1.0
        rates, attentions = iter(self.drop_path_rates(sum(self.depths))), self.attention_by_stage(len(self.depths))
        strided = self.pools or (self.stem[-1][2] > 1 and len(self.stem) > 1)
        for s, (depth, features) in enumerate(zip(self.depths, self.features, strict=True)):
            for i in range(depth):
                width, groups = self._width(x.shape[-1], features, first=s == i == 0)
                block = partial(NormFreeBlock, features, width, conv, self.act, groups=groups, alpha=self.alpha)
                block = partial(block, extra=self.extra, inner=self.inner, attention_gain=self.attention_gain)
                x = block(
                    strides=2 if i == 0 and (s > 0 or not strided) else 1,
                    beta=variance**0.5,
                    attention=attentions[s],
                    skip_init=self.skip_init,
                    drop_path_rate=next(rates),
                    name=f"stages_{s}_{i}",
                )(x, train=train)
                variance = (1.0 if i == 0 else variance) + self.alpha**2  # anew after a stage's first block
            maps[f"stages_{s}"] = x
        if self.last:
            maps[f"stages_{len(self.depths) - 1}"] = conv(self.last, 1, name="final_conv")(x)
        return maps

    @nn.nowrap
    def _width(self, before: int, after: int, first: bool) -> tuple[int, int]:
        """Channels inside a block, and groups; the network's first block has its input's, with `inner`."""
        width = round_to_multiple((before * (1 if first else self.share)) if self.inner else after * self.share)
        groups = width // self.group_size if self.group_size else 1
        return (self.group_size * groups if self.group_size else width), groups

    def pooled(self, x: Array, train: bool) -> Array:
        """Activation and mean; returns float32 [N, C]."""
        return super().pooled(self.act(x), train)


SE = partial(SqueezeExcite, fraction=0.5, rounding="multiple_of_8_any")
SE_QUARTER = partial(SE, fraction=0.25)
SILU: dict[str, Any] = {"act": jax.nn.silu, "conv": partial(ScaledStdConv, gamma=GAMMA["silu"])}
RELU: dict[str, Any] = {"act": jax.nn.relu, "conv": partial(ScaledStdConv, gamma=GAMMA["relu"])}
FULL = partial(NFNet, attention=SE)
DM = partial(FULL, act=scaled_gelu, conv=partial(ScaledStdConv, padding="SAME"), skip_init=True)
LIGHT = partial(NFNet, **SILU, share=0.25, group_size=64)
ECA_LIGHT = partial(LIGHT, attention=ECA)
RESNET = partial(
    NFNet,
    **RELU,
    features=(256, 512, 1024, 2048),
    stem=((64, 7, 2),),
    pools=True,
    last=0,
    share=0.25,
    group_size=0,
    extra=False,
)
SE_RESNET, ECA_RESNET = partial(RESNET, attention=partial(SE, fraction=1 / 16)), partial(RESNET, attention=ECA)
D26, D50, D101 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3)


def regnet(depths: tuple[int, ...], features: tuple[int, ...] = (48, 104, 208, 440)) -> partial[NFNet]:
    """NF-RegNet (paper a, appendix E.2) at timm's three quarters of the widths, in multiples of eight."""
    widths = tuple(round_to_multiple(0.75 * width) for width in features)
    last = round_to_multiple(0.75 * (1280 * features[-1] // 440))
    block: dict[str, Any] = {"share": 2.25, "group_size": 8, "extra": False, "inner": True}
    return partial(FULL, depths=depths, features=widths, stem=((widths[0], 3, 2),), last=last, **block, **SILU)


@functools.cache
def depths(scale: int) -> tuple[int, ...]:
    """Blocks per stage of F0 to F7 (paper b, table 1)."""
    return scale, 2 * scale, 6 * scale, 3 * scale


_B = "Brock et al. 2021b, table 1; timm"
_L = "timm, after Brock et al. 2021b"
_A = "Brock et al. 2021a, with attention; timm"

VARIANTS: dict[str, Variant] = {
    "dm_nfnet_f0": Variant(partial(DM, depths=depths(1)), 71_489_284, 192, "Brock et al. 2021b, released model"),
    "dm_nfnet_f1": Variant(partial(DM, depths=depths(2)), 132_634_256, 224, "Brock et al. 2021b, released model"),
    "dm_nfnet_f2": Variant(partial(DM, depths=depths(3)), 193_779_228, 256, "Brock et al. 2021b, released model"),
    "dm_nfnet_f3": Variant(partial(DM, depths=depths(4)), 254_924_200, 320, "Brock et al. 2021b, released model"),
    "dm_nfnet_f4": Variant(partial(DM, depths=depths(5)), 316_069_172, 384, "Brock et al. 2021b, released model"),
    "dm_nfnet_f5": Variant(partial(DM, depths=depths(6)), 377_214_144, 416, "Brock et al. 2021b, released model"),
    "dm_nfnet_f6": Variant(partial(DM, depths=depths(7)), 438_359_116, 448, "Brock et al. 2021b, released model"),
    "nfnet_f0": Variant(partial(FULL, depths=depths(1)), 71_489_272, 192, _B),
    "nfnet_f1": Variant(partial(FULL, depths=depths(2)), 132_634_232, 224, _B),
    "nfnet_f2": Variant(partial(FULL, depths=depths(3)), 193_779_192, 256, _B),
    "nfnet_f3": Variant(partial(FULL, depths=depths(4)), 254_924_152, 320, _B),
    "nfnet_f4": Variant(partial(FULL, depths=depths(5)), 316_069_112, 384, _B),
    "nfnet_f5": Variant(partial(FULL, depths=depths(6)), 377_214_072, 416, _B),
    "nfnet_f6": Variant(partial(FULL, depths=depths(7)), 438_359_032, 448, _B),
    "nfnet_f7": Variant(partial(FULL, depths=depths(8)), 499_503_992, 480, _B),
    "nfnet_l0": Variant(partial(LIGHT, depths=depths(1), last=2304, attention=SE_QUARTER), 35_074_488, 224, _L),
    "eca_nfnet_l0": Variant(partial(ECA_LIGHT, depths=depths(1), last=2304), 24_143_924, 224, _L),
    "eca_nfnet_l1": Variant(partial(ECA_LIGHT, depths=depths(2)), 41_407_728, 256, _L),
    "eca_nfnet_l2": Variant(partial(ECA_LIGHT, depths=depths(3)), 56_722_348, 320, _L),
    "eca_nfnet_l3": Variant(partial(ECA_LIGHT, depths=depths(4)), 72_036_968, 352, _L),
    "nf_regnet_b0": Variant(regnet((1, 3, 6, 6)), 8_764_288, 192, _A),
    "nf_regnet_b1": Variant(regnet((2, 4, 7, 7)), 10_223_984, 256, _A),
    "nf_regnet_b2": Variant(regnet((2, 4, 8, 8), (56, 112, 232, 488)), 14_314_608, 240, _A),
    "nf_regnet_b3": Variant(regnet((2, 5, 9, 9), (56, 128, 248, 528)), 18_593_832, 288, _A),
    "nf_regnet_b4": Variant(regnet((2, 6, 11, 11), (64, 144, 288, 616)), 30_210_816, 320, _A),
    "nf_regnet_b5": Variant(regnet((3, 7, 14, 14), (80, 168, 336, 704)), 49_741_728, 384, _A),
    "nf_seresnet26": Variant(partial(SE_RESNET, depths=D26), 17_395_976, 224, _A),
    "nf_seresnet50": Variant(partial(SE_RESNET, depths=D50), 28_088_024, 224, _A),
    "nf_seresnet101": Variant(partial(SE_RESNET, depths=D101), 49_326_872, 224, _A),
    "nf_ecaresnet26": Variant(partial(ECA_RESNET, depths=D26), 15_995_220, 224, _A),
    "nf_ecaresnet50": Variant(partial(ECA_RESNET, depths=D50), 25_557_118, 224, _A),
    "nf_ecaresnet101": Variant(partial(ECA_RESNET, depths=D101), 44_549_331, 224, _A),
    "test_nfnet": Variant(
        partial(LIGHT, depths=(1, 1, 1, 1), features=(32, 64, 96, 128), last=192, group_size=8, attention=SE_QUARTER),
        383_080,
        160,
        "timm",
    ),
}
