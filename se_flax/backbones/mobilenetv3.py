"""MobileNetV3, FBNetV3, HardCoRe-NAS and LCNet: networks with MobileNetV3's head.

Howard et al. 2019 (MobileNetV3), Dai et al. 2021 (FBNetV3), Nayman et al. 2021 (HardCoRe-NAS), Cui et al. 2021 (LCNet).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from se_flax.attention import SqueezeExcite
from se_flax.backbones.efficientnet import TF, EfficientNet
from se_flax.functional import hard_swish, round_to_multiple
from se_flax.nn.conv import Conv, he_normal_fan_out
from se_flax.nn.mobile import fan_out_init
from se_flax.nn.mobile_table import BlockRow, NetworkTable, inverted, plain, scale_depth, scale_width, separable
from se_flax.variant import Variant, Weights

Array = jax.Array
RELU = jax.nn.relu


class MobileNetV3(EfficientNet, kw_only=True):
    """`EfficientNet` whose last convolution follows the pooling (Howard et al. 2019, section 5.1 and figure 5).

    Mean, 1x1 convolution without norm, activation, classifier. With `num_classes=0` the call returns the activations
    of that convolution.

    Attributes:
      head_bias: bias in the head's convolution.
    """

    head_bias: bool = True
    from_expanded: bool = True
    act: Callable[[Array], Array] = hard_swish

    def pooled(self, x: Array, train: bool) -> Array:
        """Mean, last convolution and activation; returns float32 [N, head]."""
        del train
        x = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        conv = Conv(self.head, 1, use_bias=self.head_bias, kernel_init=fan_out_init(), name="conv_head")
        return jnp.squeeze(self.act(conv(x)), (1, 2))


SE = partial(
    SqueezeExcite,
    fraction=0.25,
    rounding="multiple_of_8",
    activation="relu",
    gate="hard_sigmoid",
    names=("conv_reduce", "conv_expand"),
    kernel_init=he_normal_fan_out,
)
SE_EXACT = partial(SE, rounding="nearest")
SE_HARD_SWISH = partial(SE_EXACT, activation="hard_swish")
SE_FBNET = partial(SE, rounding=partial(round_to_multiple, limit=0.95), activation="hard_swish")

# Howard et al. 2019, table 1: kernel, features, attention, activation, stride; the expanded widths 200 and 184 of the
# fourth stage are 2.5 and 2.3 times its input.
LARGE: NetworkTable = (
    (separable(16, act=RELU),),
    (inverted(24, strides=2, expand=4, act=RELU), inverted(24, expand=3, act=RELU)),
    (inverted(40, 3, kernel=5, strides=2, expand=3, act=RELU, attends=True),),
    (inverted(80, strides=2), inverted(80, expand=2.5), inverted(80, 2, expand=2.3)),
    (inverted(112, 2, attends=True),),
    (inverted(160, 3, kernel=5, strides=2, attends=True),),
    (plain(960, kernel=1),),
)
# Howard et al. 2019, table 2; 72 and 88 expanded channels.
SMALL: NetworkTable = (
    (separable(16, strides=2, act=RELU, attends=True),),
    (inverted(24, strides=2, expand=4.5, act=RELU), inverted(24, expand=3.67, act=RELU)),
    (inverted(40, kernel=5, strides=2, expand=4, attends=True), inverted(40, 2, kernel=5, attends=True)),
    (inverted(48, 2, kernel=5, expand=3, attends=True),),
    (inverted(96, 3, kernel=5, strides=2, attends=True),),
    (plain(576, kernel=1),),
)
# Before the authors' code came out: no skip in the first block, and see `SE_BY_STAGE`.
RW: NetworkTable = ((separable(16, act=RELU, skip=False),), *LARGE[1:])
SE_BY_STAGE = (None, None, SE_EXACT, None, SE_HARD_SWISH, SE_HARD_SWISH, None)


def mobilenetv3(
    layout: NetworkTable, width: float = 1.0, depth: float = 1.0, head: int = 1280, **attributes: Any
) -> Any:
    """A MobileNetV3 of scaled width and depth; the head keeps its width, and below 0.75 the stem too."""
    stem = 16 if width < 0.75 else round_to_multiple(16 * width)
    layout = scale_depth(scale_width(layout, width), depth)
    return partial(MobileNetV3, layout=layout, stem=stem, head=head, **{"attention": SE, **attributes})


small = partial(mobilenetv3, SMALL, head=1024)


def minimalistic(layout: NetworkTable, head: int) -> Any:
    """The authors' variant without attention, 5x5 kernels and hard swish, for hardware that is slow at those."""

    def smaller(row: BlockRow) -> BlockRow:
        assert isinstance(row.block, partial)
        return replace(row, block=partial(row.block, kernel=min(row.block.keywords["kernel"], 3)), act=None)

    stages = tuple(tuple(smaller(row) for row in stage) for stage in layout)
    return mobilenetv3(stages, head=head, attention=None, act=RELU, **TF)


def _fbnet(*rows: tuple[tuple[int, int, int, float, int], ...], first: BlockRow, last: int) -> NetworkTable:
    """FBNetV3's table: rows of (features, repeats, kernel, expand, stride); attention in stages 4, 6 and 7."""
    stages = [
        tuple(inverted(c, n, k, strides=s, expand=e, attends=i in (1, 3, 4)) for c, n, k, e, s in stage)
        for i, stage in enumerate(rows)
    ]
    return ((first,), *stages, (plain(last, kernel=1),))


FBNETV3_B = _fbnet(
    ((24, 1, 5, 4, 2), (24, 3, 5, 2, 1)),
    ((40, 1, 5, 5, 2), (40, 4, 5, 3, 1)),
    ((72, 1, 5, 5, 2), (72, 4, 3, 3, 1)),
    ((120, 1, 3, 5, 1), (120, 5, 5, 3, 1)),
    ((184, 1, 3, 6, 2), (184, 5, 5, 4, 1), (224, 1, 5, 6, 1)),
    first=separable(16, 2),
    last=1344,
)
FBNETV3_D = _fbnet(
    ((24, 1, 3, 5, 2), (24, 5, 3, 2, 1)),
    ((40, 1, 5, 4, 2), (40, 4, 3, 3, 1)),
    ((72, 1, 3, 5, 2), (72, 4, 3, 3, 1)),
    ((128, 1, 3, 5, 1), (128, 6, 5, 3, 1)),
    ((208, 1, 3, 6, 2), (208, 5, 5, 5, 1), (240, 1, 5, 6, 1)),
    first=separable(16, 2),
    last=1440,
)
FBNETV3_G = _fbnet(
    ((40, 1, 5, 4, 2), (40, 4, 5, 2, 1)),
    ((56, 1, 5, 4, 2), (56, 4, 5, 3, 1)),
    ((104, 1, 5, 5, 2), (104, 4, 3, 3, 1)),
    ((160, 1, 3, 5, 1), (160, 8, 5, 3, 1)),
    ((264, 1, 3, 6, 2), (264, 6, 5, 5, 1), (288, 2, 5, 6, 1)),
    first=separable(24, 3),
    last=1728,
)


def fbnetv3(layout: NetworkTable, stem: int) -> Any:
    """An FBNetV3; attention's reduction is a share of the block's input."""
    settings: dict[str, Any] = {"stem": stem, "head": 1984, "head_bias": False, "from_expanded": False}
    return partial(MobileNetV3, layout=layout, attention=SE_FBNET, **settings)


# Nayman et al. 2021, released code: per stage, per block, kernel, expansion, attention.
HARDCORENAS: dict[str, tuple[tuple[tuple[int, int, bool], ...], ...]] = {
    "a": (
        ((5, 3, False), (5, 3, True)),
        ((5, 3, False), (5, 6, True)),
        ((5, 6, True), (5, 6, True)),
        ((5, 6, True), (5, 6, True)),
        ((5, 6, True), (5, 6, True)),
    ),
    "b": (
        ((5, 3, False), (5, 3, True), (3, 3, False)),
        ((5, 3, False), (5, 3, False), (5, 3, False)),
        ((5, 3, False), (5, 3, False), (3, 3, False), (3, 3, False)),
        ((5, 3, False), (3, 3, False), (3, 3, False), (3, 3, False)),
        ((5, 6, True), (5, 6, True), (3, 3, True)),
    ),
    "c": (
        ((5, 3, False), (5, 3, True)),
        ((5, 3, False), (5, 3, False), (5, 3, False), (5, 3, False)),
        ((5, 4, False), (5, 6, True), (3, 3, False), (3, 3, False)),
        ((5, 6, True), (3, 3, False), (3, 3, False), (3, 3, False)),
        ((5, 6, True), (5, 6, True), (3, 3, True)),
    ),
    "d": (
        ((5, 3, True), (5, 3, True)),
        ((5, 3, True), (5, 4, True), (3, 3, True)),
        ((5, 4, True), (3, 3, True), (3, 3, True), (3, 3, True)),
        ((3, 4, True), (5, 4, True), (3, 3, True), (5, 3, True)),
        ((5, 6, True), (5, 6, True), (5, 6, True), (3, 6, True)),
    ),
    "e": (
        ((5, 3, True), (5, 3, True)),
        ((5, 6, True), (5, 4, True), (5, 4, True), (3, 3, True)),
        ((5, 4, True), (3, 6, True)),
        ((5, 6, True), (5, 6, True), (5, 6, True), (5, 3, True)),
        ((5, 6, True), (5, 6, True), (5, 6, True), (3, 6, True)),
    ),
    "f": (
        ((5, 3, True), (5, 3, True)),
        ((5, 6, True), (5, 6, True)),
        ((5, 6, True), (5, 6, True), (3, 3, True), (3, 3, True)),
        ((3, 6, True), (5, 6, True), (5, 6, True), (3, 3, True)),
        ((5, 6, True), (5, 6, True), (3, 6, True), (3, 6, True)),
    ),
}


def hardcorenas(name: str) -> Any:
    """One of the six HardCoRe-NAS networks, `a` to `f`."""
    outer = ((24, 2, RELU), (40, 2, RELU), (80, 2, None), (112, 1, None), (192, 2, None))
    stages = [
        tuple(
            inverted(features, kernel=k, strides=strides if i == 0 else 1, expand=e, attends=attends, act=act)
            for i, (k, e, attends) in enumerate(blocks)
        )
        for (features, strides, act), blocks in zip(outer, HARDCORENAS[name], strict=True)
    ]
    layout = ((separable(16, act=RELU),), *stages, (plain(960, kernel=1),))
    return partial(MobileNetV3, layout=layout, stem=32, attention=SE)


def _lcnet_blocks(
    features: int, repeats: int = 1, kernel: int = 3, strides: int = 1, attends: bool = False
) -> BlockRow:
    settings: dict[str, Any] = {"attends": attends, "project_act": True, "skip": False}
    return separable(features, repeats, kernel, strides, **settings)


# Cui et al. 2021, table 1.
LCNET: NetworkTable = (
    (_lcnet_blocks(32),),
    (_lcnet_blocks(64, 2, strides=2),),
    (_lcnet_blocks(128, 2, strides=2),),
    (_lcnet_blocks(256, strides=2), _lcnet_blocks(256, kernel=5)),
    (_lcnet_blocks(256, 4, kernel=5),),
    (_lcnet_blocks(512, 2, kernel=5, strides=2, attends=True),),
)


def lcnet(width: float) -> Any:
    """A PP-LCNet; the head keeps its width."""
    stem = round_to_multiple(16 * width)
    return partial(MobileNetV3, layout=scale_width(LCNET, width), stem=stem, attention=SE_EXACT)


def _minimal_weights(size: str) -> tuple[Weights]:
    """Not in `data/checkpoints.json`, which lists networks with attention."""
    half = (0.5, 0.5, 0.5)
    hub_id = f"timm/tf_mobilenetv3_{size}_minimal_100.in1k"
    return (Weights("in1k", hub_id, mean=half, std=half, interpolation="bilinear"),)


_V3 = "Howard et al. 2019, tables 1 and 2; timm's padding and epsilon"
_TF = "Howard et al. 2019, tables 1 and 2; TensorFlow's padding and epsilon"
_MINIMAL = "released code of Howard et al. 2019; TensorFlow's padding and epsilon"
_FB = "Dai et al. 2021, released code; timm"
_HARD = "Nayman et al. 2021, released code; timm"
_LC = "Cui et al. 2021, table 1; timm"

VARIANTS: dict[str, Variant] = {
    "mobilenetv3_large_075": Variant(mobilenetv3(LARGE, 0.75), 3_993_528, 224, _V3),
    "mobilenetv3_large_100": Variant(mobilenetv3(LARGE), 5_483_032, 224, _V3),
    "mobilenetv3_large_150d": Variant(mobilenetv3(LARGE, 1.5, 1.2), 14_622_320, 256, "timm"),
    "mobilenetv3_small_050": Variant(small(0.5), 1_593_224, 224, _V3),
    "mobilenetv3_small_075": Variant(small(0.75), 2_041_872, 224, _V3),
    "mobilenetv3_small_100": Variant(small(), 2_542_856, 224, _V3),
    "tf_mobilenetv3_large_075": Variant(mobilenetv3(LARGE, 0.75, **TF), 3_993_528, 224, _TF),
    "tf_mobilenetv3_large_100": Variant(mobilenetv3(LARGE, **TF), 5_483_032, 224, _TF),
    "tf_mobilenetv3_small_075": Variant(small(0.75, **TF), 2_041_872, 224, _TF),
    "tf_mobilenetv3_small_100": Variant(small(**TF), 2_542_856, 224, _TF),
    "tf_mobilenetv3_large_minimal_100": Variant(
        minimalistic(LARGE, 1280), 3_924_288, 224, _MINIMAL, _minimal_weights("large")
    ),
    "tf_mobilenetv3_small_minimal_100": Variant(
        minimalistic(SMALL, 1024), 2_044_736, 224, _MINIMAL, _minimal_weights("small")
    ),
    "mobilenetv3_rw": Variant(
        mobilenetv3(RW, attention=SE_BY_STAGE, head_bias=False, norm=TF["norm"]), 5_479_918, 224, "timm"
    ),
    "fbnetv3_b": Variant(fbnetv3(FBNETV3_B, 16), 8_598_464, 224, _FB),
    "fbnetv3_d": Variant(fbnetv3(FBNETV3_D, 24), 10_306_272, 224, _FB),
    "fbnetv3_g": Variant(fbnetv3(FBNETV3_G, 32), 16_623_888, 240, _FB),
    "hardcorenas_a": Variant(hardcorenas("a"), 5_260_232, 224, _HARD),
    "hardcorenas_b": Variant(hardcorenas("b"), 5_176_544, 224, _HARD),
    "hardcorenas_c": Variant(hardcorenas("c"), 5_521_224, 224, _HARD),
    "hardcorenas_d": Variant(hardcorenas("d"), 7_500_208, 224, _HARD),
    "hardcorenas_e": Variant(hardcorenas("e"), 8_070_992, 224, _HARD),
    "hardcorenas_f": Variant(hardcorenas("f"), 8_199_688, 224, _HARD),
    "lcnet_035": Variant(lcnet(0.35), 1_644_370, 224, _LC),
    "lcnet_050": Variant(lcnet(0.5), 1_880_856, 224, _LC),
    "lcnet_075": Variant(lcnet(0.75), 2_358_288, 224, _LC),
    "lcnet_100": Variant(lcnet(1.0), 2_953_800, 224, _LC),
    "lcnet_150": Variant(lcnet(1.5), 4_501_112, 224, _LC),
}
