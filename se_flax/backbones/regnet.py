"""RegNet-Y (Radosavovic et al. 2020): widths by a quantised linear rule, grouped bottlenecks with SE; timm's names.

RegNet-Z has inverted bottlenecks (Dollár et al. 2021); RegNet-V is timm's RegNet-Y with norms before the convolutions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np

from se_flax.attention import SqueezeExcite
from se_flax.functional import round_to_multiple
from se_flax.lowering.dispatch import share_computation
from se_flax.nn.network import Path, StagedNetwork
from se_flax.nn.norm import GroupNorm
from se_flax.nn.residual import Block, ConvNorm, ModuleDef, Placement, Stage, project_linear, project_nested
from se_flax.variant import Variant

Array = jax.Array


class RegNetBlock(Block):
    """1x1, grouped 3x3, 1x1; the reduction of attention after the 3x3 is a share of the block's input."""

    downsample: ModuleDef | None = project_nested

    widening = 1

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        unit, inner = partial(ConvNorm, conv=self.conv), self.attention_at(Placement.AFTER_3X3)
        wide = partial(unit, self.features * self.widening, norm=self.norm, act=self.act)
        y = self.attend(x, Placement.PRE, train)
        y = wide(name="conv1")(y, train=train)
        middle = wide(kernel_size=3, strides=self.strides, groups=self.groups * self.widening, name="conv2")
        y = middle(y, train=train, attention=inner, base_channels=x.shape[-1])
        norm = self.last_norm if self.has_sum(x) else self.norm
        last = unit(self.features, norm=norm, name="conv3")
        return self.add(x, last(y, train=train, attention=self.attention_at(Placement.STANDARD)), train)

    @nn.nowrap
    def has_sum(self, x: Array) -> bool:
        """Whether the block adds its (perhaps projected) input to the branch."""
        del x
        return True


class InvertedRegNetBlock(RegNetBlock):
    """RegNet-Z's: four times wider inside, no activation at its end, a sum only where the shapes are equal."""

    downsample: ModuleDef | None = None

    widening = 4

    @nn.nowrap
    def has_sum(self, x: Array) -> bool:
        """Whether the block keeps the shape."""
        return self.strides == 1 and x.shape[-1] == self.features

    @nn.nowrap
    def add(self, x: Array, branch: Array, train: bool) -> Array:
        """As `Block.add`, without activation. IDENTITY attention is on the shortcut where there is one."""
        if self.has_sum(x):
            branch = self.attend(x, Placement.IDENTITY, train) + self.drop(branch, train)
        return self.attend(branch, Placement.POST, train)


class PreActRegNetBlock(Block):
    """RegNet-V's: norm and activation before each convolution; both branches start from the first of these.

    As in `nn.residual.PreActBottleneck` nothing follows the sum, and AFTER_3X3 attention precedes the next norm.
    """

    downsample: ModuleDef | None = project_linear

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        channels, inner = x.shape[-1], self.attention_at(Placement.AFTER_3X3)
        x = share_computation(self.act(self.norm(name="norm1")(x, train=train)))
        y = self.conv(self.features, 1, name="conv1")(self.attend(x, Placement.PRE, train))
        y = self.act(self.norm(name="norm2")(y, train=train))
        y = self.conv(self.features, 3, strides=self.strides, groups=self.groups, name="conv2")(y)
        y = y if inner is None else inner(y, train=train, base_channels=channels)
        y = self.act(self.norm(name="norm3")(y, train=train))
        y = self.conv(self.features, 1, name="conv3")(y)
        y = self.drop(self.attend(y, Placement.STANDARD, train), train)
        x = self.attend(self.shortcut(x, self.features, train), Placement.IDENTITY, train)
        return self.attend(x + y, Placement.POST, train)


def project_bare(x: Array, features: int, strides: int, *, conv: ModuleDef, **parts: Any) -> Array:
    """`project_linear` with the convolution as the submodule `downsample`. Returns: [N, h, w, features]."""
    del parts
    projected: Array = conv(features, 1, strides=strides, name="downsample")(x)
    return projected


class RegNet(StagedNetwork, kw_only=True):
    """3x3 convolution of stride 2 and four stages of stride 2.

    Beside the attributes of `StagedNetwork`:

    Attributes:
      layout: width, number of blocks and channels per group of every stage.
      stem: features of the first convolution.
      placement: where in a block the attention is, see `nn.residual.Placement`.
      block: class or partial of the residual blocks.
    """

    layout: tuple[tuple[int, int, int], ...]
    stem: int = 32
    placement: str | Placement = Placement.AFTER_3X3
    block: ModuleDef = RegNetBlock

    head_path = ("head", "fc")
    stem_path: ClassVar[Path] = ("stem", "conv")

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The residual blocks."""
        return tuple((f"s{s}", f"b{i}") for s, (_, depth, _) in enumerate(self.layout, 1) for i in range(1, depth + 1))

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The maps of the stem (stride 2) and the four stages (4, 8, 16, 32)."""
        parts = self.parts()
        maps = {"stem": (x := self.first(x, train))}
        rates = iter(self.drop_path_rates(sum(depth for _, depth, _ in self.layout)))
        attentions = self.attention_by_stage(len(self.layout))
        for s, ((width, depth, size), attention) in enumerate(zip(self.layout, attentions, strict=True), 1):
            given = parts | {"attention": attention, "placement": Placement.parse(self.placement)}
            block = partial(self.block, width, **given, groups=width // size)
            blocks = (partial(block, strides=1 if i else 2, drop_path_rate=next(rates)) for i in range(depth))
            maps[f"s{s}"] = (x := Stage(tuple(blocks), name=f"s{s}")(x, train=train))
        return maps

    @nn.nowrap
    def first(self, x: Array, train: bool) -> Array:
        """The stem; returns [N, H / 2, W / 2, stem]."""
        stem: Array = ConvNorm(self.stem, **self.parts(), kernel_size=3, strides=2, name="stem")(x, train=train)
        return stem


class RegNetV(RegNet, kw_only=True):
    """`RegNet` of pre-activation blocks: a bare convolution first, an activation after the last block."""

    act: Callable[[Array], Array] = jax.nn.silu
    block: ModuleDef = partial(PreActRegNetBlock, downsample=project_bare)

    stem_path: ClassVar[Path] = ("stem",)

    @nn.nowrap
    def first(self, x: Array, train: bool) -> Array:
        """The stem; returns [N, H / 2, W / 2, stem]."""
        del train
        stem: Array = self.parts()["conv"](self.stem, 3, strides=2, name="stem")(x)
        return stem

    def pooled(self, x: Array, train: bool) -> Array:
        """Activation and mean; returns float32 [N, C]."""
        return super().pooled(self.act(x), train)


class RegNetZ(RegNet, kw_only=True):
    """`RegNet` of inverted bottlenecks, with a 1x1 convolution or an activation after the last block.

    Attributes:
      head: features of the last 1x1 convolution; 0 leaves it out.
    """

    act: Callable[[Array], Array] = jax.nn.silu
    block: ModuleDef = InvertedRegNetBlock
    head: int = 0

    def pooled(self, x: Array, train: bool) -> Array:
        """Last convolution or activation, and mean; returns float32 [N, C]."""
        last = ConvNorm(self.head, **self.parts(), name="final_conv") if self.head else None
        return super().pooled(last(x, train=train) if last else self.act(x), train)


SE = partial(SqueezeExcite, fraction=0.25, rounding=round)
SE_SILU = partial(SE, activation="silu")


def nearest_multiple(width: int, group_size: int) -> int:
    """A width in whole groups, as the authors round it; torchvision keeps at least 90 % of it (`round_to_multiple`)."""
    return round(width / group_size) * group_size


def regnety(
    depth: int,
    w0: int,
    wa: float,
    wm: float,
    group_size: int,
    fit: Callable[[int, int], int] = nearest_multiple,
    network: type[RegNet] = RegNet,
    **attributes: Any,
) -> partial[RegNet]:
    """A RegNet by its depth, initial width, slope, multiplier and channels per group (section 3.3, eq. 2 to 4)."""
    exponents = np.round(np.log((w0 + wa * np.arange(depth)) / w0) / np.log(wm))
    widths, depths = np.unique(np.round(w0 * wm**exponents / 8).astype(int) * 8, return_counts=True)
    sizes = [min(group_size, int(width)) for width in widths]
    layout = [(fit(int(w), g), int(n), g) for w, n, g in zip(widths, depths, sizes, strict=True)]
    return partial(network, layout=tuple(layout), **{"attention": SE, **attributes})


v = partial(regnety, network=RegNetV, attention=SE_SILU)
z = partial(regnety, network=RegNetZ, attention=SE_SILU)
AVERAGES = partial(PreActRegNetBlock, downsample=partial(project_linear, average=True))
SGN: dict[str, Any] = {"norm": partial(GroupNorm, group_size=16), "act": jax.nn.silu, "attention": SE_SILU}
_Z = "timm, after Dollár et al. 2021"
_R = "Radosavovic et al. 2020, table 8; timm"

VARIANTS: dict[str, Variant] = {
    "regnety_002": Variant(regnety(13, 24, 36.44, 2.49, 8), 3_162_996, 224, _R),
    "regnety_004": Variant(regnety(16, 48, 27.89, 2.09, 8), 4_344_144, 224, _R),
    "regnety_006": Variant(regnety(15, 48, 32.54, 2.32, 16), 6_055_160, 224, _R),
    "regnety_008": Variant(regnety(14, 56, 38.84, 2.4, 16), 6_263_168, 224, _R),
    "regnety_008_tv": Variant(regnety(14, 56, 38.84, 2.4, 16, round_to_multiple), 6_432_512, 224, "torchvision; timm"),
    "regnety_016": Variant(regnety(27, 48, 20.71, 2.65, 24), 11_202_430, 224, _R),
    "regnety_032": Variant(regnety(21, 80, 42.63, 2.66, 24), 19_436_338, 224, _R),
    "regnety_040": Variant(regnety(22, 96, 31.41, 2.24, 64), 20_646_656, 224, _R),
    "regnety_040_sgn": Variant(regnety(22, 96, 31.41, 2.24, 64, **SGN), 20_646_656, 224, "timm"),
    "regnety_064": Variant(regnety(25, 112, 33.22, 2.27, 72), 30_583_252, 224, _R),
    "regnety_080": Variant(regnety(17, 192, 76.82, 2.19, 56), 39_180_068, 224, _R),
    "regnety_080_tv": Variant(
        regnety(17, 192, 76.82, 2.19, 56, round_to_multiple), 39_381_472, 224, "torchvision; timm"
    ),
    "regnety_120": Variant(regnety(19, 168, 73.36, 2.37, 112), 51_822_544, 224, _R),
    "regnety_160": Variant(regnety(18, 200, 106.23, 2.48, 112), 83_590_140, 224, _R),
    "regnety_320": Variant(regnety(20, 232, 115.89, 2.53, 232), 145_046_770, 224, _R),
    "regnety_640": Variant(regnety(20, 352, 147.48, 2.4, 328), 281_378_786, 224, "Goyal et al. 2022 (SEER); timm"),
    "regnety_1280": Variant(regnety(27, 456, 160.83, 2.52, 264), 644_812_894, 224, "Goyal et al. 2022 (SEER); timm"),
    "regnety_2560": Variant(regnety(27, 640, 230.83, 2.53, 373), 1_282_601_138, 224, "Goyal et al. 2022 (SEER); timm"),
    "regnetv_040": Variant(v(22, 96, 31.41, 2.24, 64), 20_640_640, 224, "timm"),
    "regnetv_064": Variant(v(25, 112, 33.22, 2.27, 72, block=AVERAGES), 30_576_052, 224, "timm"),
    "regnetz_005": Variant(z(21, 16, 10.7, 2.51, 4, head=1024), 7_122_742, 224, _Z),
    "regnetz_040": Variant(z(28, 48, 14.5, 2.226, 8), 27_116_800, 256, _Z),
    "regnetz_040_h": Variant(z(28, 48, 14.5, 2.226, 8, head=1536), 28_938_880, 256, _Z),
}
