"""GhostNet V1, V2 and V3: half of the channels of a 1x1 convolution are depthwise convolutions of the other half.

Han et al. 2020 (GhostNet), Tang et al. 2022 (V2: decoupled fully connected attention), Liu et al. 2024 (V3: V2 trained
with parallel branches, which `se_flax.fuse` turns into one convolution each). The names are timm's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import SqueezeExcite
from se_flax.functional import round_to_multiple
from se_flax.lowering.dispatch import share_computation
from se_flax.nn.conv import Conv, he_normal_fan_out
from se_flax.nn.network import Path, StagedNetwork, attention_stages, check_side, numbered_blocks
from se_flax.nn.norm_attention import norm_act_attend
from se_flax.nn.parallel import Branch, ParallelBlock
from se_flax.nn.pooling import unpool_nearest
from se_flax.nn.residual import ConvNorm, ModuleDef, drop_path
from se_flax.variant import Variant

Array = jax.Array
Activation = Callable[[Array], Array]


def identity(x: Array) -> Array:
    """No activation."""
    return x


class GhostModule(ParallelBlock):
    """A 1x1 convolution to half of the channels, and a 3x3 depthwise one of these (Han et al. 2020, section 3.1).

    Attributes:
      features: output channels.
      conv: as in `nn.residual.Block`.
      norm: as in `nn.residual.Block`.
      act: activation of both halves.
      long_range: decoupled fully connected attention over rows and columns (Tang et al. 2022: DFC).
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    act: Activation = jax.nn.relu
    long_range: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H, W, features]."""
        half = -(-self.features // 2)
        first = share_computation(self.act(self.primary(x, half, train)))
        second = self.act(self.cheap(first, train))
        y = jnp.concatenate([first, second], -1)[..., : self.features]
        return self.gated(y, x, train)

    @nn.nowrap
    def primary(self, x: Array, features: int, train: bool) -> Array:
        """The 1x1 convolution with its norm; [N, H, W, features]."""
        x = self.conv(features, 1, name="primary_conv_0")(x)
        return self.norm(name="primary_conv_1")(x, train=train)

    @nn.nowrap
    def cheap(self, x: Array, train: bool) -> Array:
        """The depthwise convolution with its norm; the shape of x."""
        x = self.conv(x.shape[-1], 3, groups=x.shape[-1], name="cheap_operation_0")(x)
        return self.norm(name="cheap_operation_1")(x, train=train)

    @nn.nowrap
    def gated(self, output: Array, x: Array, train: bool) -> Array:
        """The output times a gate per pixel of x, from 1x5 and 5x1 kernels at half the resolution, if `long_range`."""
        if not self.long_range:
            return output
        y = nn.avg_pool(x, (2, 2), (2, 2))
        for i, (size, groups) in enumerate(((1, 1), ((1, 5), self.features), ((5, 1), self.features))):
            y = self.conv(self.features, size, groups=groups, name=f"short_conv_{2 * i}")(y)
            y = self.norm(name=f"short_conv_{2 * i + 1}")(y, train=train)
        return output * unpool_nearest(jax.nn.sigmoid(y), *x.shape[1:3])


class GhostModuleV3(GhostModule):
    """`GhostModule` trained with three convolutions in place of each, a pointwise one and a norm (Liu et al. 2024)."""

    @nn.nowrap
    def primary(self, x: Array, features: int, train: bool) -> Array:
        """The sum of the 1x1 convolutions; [N, H, W, features]."""
        unit = partial(ConvNorm, features, self.conv, self.norm, names=("conv", "bn1"))
        return self.add_branches(x, *(unit(name=f"primary_rpr_conv_{i}") for i in range(3)), train=train)

    @nn.nowrap
    def cheap(self, x: Array, train: bool) -> Array:
        """The sum of the depthwise convolutions, a scale and a norm of x; the shape of x."""
        unit = partial(ConvNorm, x.shape[-1], self.conv, self.norm, groups=x.shape[-1], names=("conv", "bn1"))
        spatial = (unit(kernel_size=3, name=f"cheap_rpr_conv_{i}") for i in range(3))
        skip = Branch(norm=self.norm(name="cheap_rpr_skip"))
        return self.add_branches(x, *spatial, unit(name="cheap_rpr_scale"), skip, train=train)


class GhostBottleneck(ParallelBlock):
    """Ghost module, depthwise convolution if the block has a stride, attention, ghost module (section 3.2, figure 3).

    Attributes:
      features: output channels.
      hidden: channels of the first ghost module.
      conv: as in `nn.residual.Block`.
      norm: as in `nn.residual.Block`.
      act: activation of the first ghost module; nothing else has one.
      strides: of the block.
      kernel: of the depthwise convolutions at a stride and on the shortcut.
      attention: attention class or partial, or None.
      ghost: class of the ghost modules.
      long_range: as in `GhostModule`, of the first one.
      drop_path_rate: probability of dropping the branch (stochastic depth).
    """

    features: int
    hidden: int
    conv: ModuleDef
    norm: ModuleDef
    act: Activation = jax.nn.relu
    strides: int = 1
    kernel: int = 3
    attention: ModuleDef | None = None
    ghost: ModuleDef = GhostModule
    long_range: bool = False
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        ghost = partial(self.ghost, conv=self.conv, norm=self.norm)
        attention = None if self.attention is None else self.attention(name="se")
        y = ghost(self.hidden, act=self.act, long_range=self.long_range, name="ghost1")(x, train=train)
        if self.strides > 1:
            y = self.downsample(y, attention, train)
        elif attention is not None:
            y = attention(y, train=train)
        y = ghost(self.features, act=identity, name="ghost2")(y, train=train)
        if train and self.drop_path_rate > 0.0:
            y = drop_path(y, self.drop_path_rate, self.make_rng("dropout"))
        return share_computation(y + self.shortcut(x, train))

    @nn.nowrap
    def downsample(self, x: Array, attention: Any, train: bool) -> Array:
        """Depthwise convolution, norm and attention; [N, H / strides, W / strides, C]."""
        channels = x.shape[-1]
        x = self.conv(channels, self.kernel, strides=self.strides, groups=channels, name="conv_dw")(x)
        return norm_act_attend(self.norm(name="bn_dw"), attention, x, train=train)

    @nn.nowrap
    def shortcut(self, x: Array, train: bool) -> Array:
        """The identity, or a depthwise and a pointwise convolution where the shape changes."""
        channels = x.shape[-1]
        if self.strides == 1 and channels == self.features:
            return x
        x = self.conv(channels, self.kernel, strides=self.strides, groups=channels, name="shortcut_0")(x)
        x = self.norm(name="shortcut_1")(x, train=train)
        x = self.conv(self.features, 1, name="shortcut_2")(x)
        return self.norm(name="shortcut_3")(x, train=train)


class GhostBottleneckV3(GhostBottleneck):
    """`GhostBottleneck` with three convolutions and a pointwise one at its stride, whose norms are their own."""

    ghost: ModuleDef = GhostModuleV3

    @nn.nowrap
    def downsample(self, x: Array, attention: Any, train: bool) -> Array:
        """The sum of the depthwise convolutions, and attention; [N, H / strides, W / strides, C]."""
        channels = x.shape[-1]
        settings: dict[str, Any] = {"strides": self.strides, "groups": channels, "names": ("conv", "bn1")}
        unit = partial(ConvNorm, channels, self.conv, self.norm, **settings)
        spatial = (unit(kernel_size=self.kernel, name=f"dw_rpr_conv_{i}") for i in range(3))
        y = self.add_branches(x, *spatial, unit(name="dw_rpr_scale"), train=train)
        return y if attention is None else attention(y, train=train)


class GhostRow(NamedTuple):
    """One block: kernel, hidden and output channels, whether it has attention as published, and strides."""

    kernel: int
    hidden: int
    features: int
    attends: bool
    strides: int


class GhostNet(StagedNetwork, kw_only=True):
    """Stem of stride 2, stages of ghost bottlenecks, a 1x1 convolution, and one after the pooling.

    The feature maps are timm's: the stem's convolution before its norm, and the stages with a stride, of which the last
    is not the last before the pooling. Beside the attributes of
    `StagedNetwork`:

    Attributes:
      layout: the stages' blocks.
      stem: features of the stem.
      last: features of the 1x1 convolution after the blocks.
      head: features of the convolution after the pooling.
      stages: which stages carry attention, in all their blocks: 2 (torch's `blocks.0`) and up; None for the blocks that
        the published network has it in.
      block: class or partial of the blocks.
      long_range_from: index of the first block with decoupled fully connected attention (V2 and V3: the third); None
        for no block.
    """

    layout: tuple[tuple[GhostRow, ...], ...]
    stem: int = 16
    last: int = 960
    head: int = 1280
    block: ModuleDef = GhostBottleneck
    long_range_from: int | None = None

    classifier_init = staticmethod(nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform"))
    head_path = ("classifier",)
    stem_path = ("conv_stem",)

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The bottlenecks, and the 1x1 convolution after them."""
        return numbered_blocks([*map(len, self.layout), 1], "blocks_{}_{}", first=0)

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The stem's convolution, and the map of every stage with a stride (strides 2, 4, 8, 16, 32)."""
        if self.long_range_from is not None:
            check_side(x, 33)
        parts = self.parts()
        x = parts["conv"](self.stem, 3, strides=2, name="conv_stem")(x)
        maps = {"conv_stem": x}
        x = self.act(parts["norm"](name="bn1")(x, train=train))
        for number in range(self._last_strided + 1):
            x = self.run_stage(number, x, train)
            if self.layout[number][0].strides > 1:
                maps[f"blocks_{number}"] = x
        return maps

    @property
    def _last_strided(self) -> int:
        return max(number for number, stage in enumerate(self.layout) if stage[0].strides > 1)

    @nn.nowrap
    def run_stage(self, number: int, x: Array, train: bool) -> Array:
        """The blocks of a stage. Args: its number from 0; x [N, H, W, C]. Returns: [N, h, w, features]."""
        chosen = attention_stages(self.stages, len(self.layout))
        rates = self.drop_path_rates(sum(map(len, self.layout)))
        index = sum(map(len, self.layout[:number]))
        for i, row in enumerate(self.layout[number]):
            attends = row.attends if self.stages is None else number + 2 in chosen
            long_range = self.long_range_from is not None and index + i >= self.long_range_from
            x = self.block(
                row.features,
                row.hidden,
                **self.parts(),
                strides=row.strides,
                kernel=row.kernel,
                attention=self.attention if attends else None,
                long_range=long_range,
                drop_path_rate=rates[index + i],
                name=f"blocks_{number}_{i}",
            )(x, train=train)
        return x

    def pooled(self, x: Array, train: bool) -> Array:
        """Further stages, 1x1 convolution, mean, last convolution and activation; returns float32 [N, head]."""
        for number in range(self._last_strided + 1, len(self.layout)):
            x = self.run_stage(number, x, train)
        name = "_".join(self.block_paths[-1])
        x = ConvNorm(self.last, **self.parts(), names=("conv", "bn1"), name=name)(x, train=train)
        x = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        return jnp.squeeze(self.act(Conv(self.head, 1, use_bias=True, name="conv_head")(x)), (1, 2))


SE = partial(
    SqueezeExcite,
    fraction=0.25,
    rounding=partial(round_to_multiple, divisor=4),
    gate="hard_sigmoid",
    names=("conv_reduce", "conv_expand"),
    kernel_init=he_normal_fan_out,
)

Table = tuple[tuple[tuple[int, int, int, int, int], ...], ...]
# Han et al. 2020, table 1: kernel, hidden channels, output channels, attention, strides.
LAYOUT: Table = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 1, 2),),
    ((5, 120, 40, 1, 1),),
    ((3, 240, 80, 0, 2),),
    ((3, 200, 80, 0, 1), (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 1, 1), (3, 672, 112, 1, 1)),
    ((5, 672, 160, 1, 2),),
    ((5, 960, 160, 0, 1), (5, 960, 160, 1, 1), (5, 960, 160, 0, 1), (5, 960, 160, 1, 1)),
)


def ghostnet(width: float = 1.0, table: Table = LAYOUT, **attributes: Any) -> partial[GhostNet]:
    """A GhostNet of scaled width.

    Args:
      width: multiplier of all channels, which are multiples of four.
      table: of the blocks, as `LAYOUT`.
      **attributes: of the network.
    """

    def scaled(channels: float) -> int:
        return round_to_multiple(channels * width, 4)

    layout = tuple(
        tuple(GhostRow(k, scaled(hidden), scaled(c), bool(se), s) for k, hidden, c, se, s in stage) for stage in table
    )
    settings: dict[str, Any] = {"layout": layout, "stem": scaled(16), "last": scaled(960), "attention": SE}
    return partial(GhostNet, **settings | attributes)


v2 = partial(ghostnet, long_range_from=2)
v3 = partial(v2, block=GhostBottleneckV3)

_V1 = "Han et al. 2020, table 1; timm"
_V2 = "Tang et al. 2022, released code; timm"
_V3 = "Liu et al. 2024, released code; timm"

VARIANTS: dict[str, Variant] = {
    "ghostnet_050": Variant(ghostnet(0.5), 2_587_292, 224, _V1),
    "ghostnet_100": Variant(ghostnet(), 5_182_508, 224, _V1),
    "ghostnet_130": Variant(ghostnet(1.3), 7_358_820, 224, _V1),
    "ghostnetv2_100": Variant(v2(), 6_156_908, 224, _V2),
    "ghostnetv2_130": Variant(v2(1.3), 8_960_404, 224, _V2),
    "ghostnetv2_160": Variant(v2(1.6), 12_392_698, 224, _V2),
    "ghostnetv3_050": Variant(v3(0.5), 3_395_384, 224, _V3),
    "ghostnetv3_100": Variant(v3(), 8_129_028, 224, _V3),
    "ghostnetv3_130": Variant(v3(1.3), 12_217_720, 224, _V3),
    "ghostnetv3_160": Variant(v3(1.6), 17_275_700, 224, _V3),
}
