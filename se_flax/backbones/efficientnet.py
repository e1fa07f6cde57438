"""EfficientNet V1 and V2, with the variants that timm publishes (Tan and Le 2019 and 2021).

MnasNet, MixNet and TinyNet (`mnasnet.py`) are the same network class; MobileNetV3 has another head.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax

from se_flax.attention import GlobalContext, SqueezeExcite
from se_flax.backbones import pruned_widths
from se_flax.errors import UserError
from se_flax.functional import ACTIVATIONS, round_to_multiple
from se_flax.nn.conv import Conv, he_normal_fan_out
from se_flax.nn.mobile import InvertedResidual, ModuleDef, fan_out_init
from se_flax.nn.mobile_table import (
    NetworkTable,
    change,
    fused,
    inverted,
    plain,
    scale_depth,
    scale_width,
    separable,
    start_with_space_to_depth,
)
from se_flax.nn.network import Path, StagedNetwork, numbered_blocks
from se_flax.nn.norm import BatchNorm, EvoNormS0, GroupNorm, LayerNorm
from se_flax.nn.pooling import blur_pool
from se_flax.variant import Variant

Array = jax.Array
Attention = ModuleDef | None


def attention_by_row(
    attention: Attention | tuple[Attention, ...], layout: NetworkTable, stages: Sequence[int] | None
) -> list[list[Attention]]:
    """Which attention every row of the table carries.

    Args:
      attention: one for all stages, or one (or None) for each.
      layout: the network's table.
      stages: numbers of the stages that carry it, in all their blocks: 1 is the stem, 2 the first stage (torch's
        `blocks.0`), as in EfficientNet's table 1. None: where the published network has it.

    Returns:
      For every stage, for every row, the attention or None.

    Raises:
      UserError: a stage that the network does not have, or not one attention per stage.
    """
    each = attention if isinstance(attention, tuple) else (attention,) * len(layout)
    if len(each) != len(layout):
        raise UserError(f"got {len(each)} attentions for {len(layout)} stages; give one for all, or one for each")
    every = range(2, 2 + len(layout))
    wrong = sorted(set(stages or ()) - set(every))
    if wrong:
        raise UserError(
            f"got attention stages {tuple(stages or ())}, but {wrong[0]} is not a stage of blocks; allowed: "
            f"{', '.join(map(str, every))} (2 is torch's blocks.0)"
        )
    return [
        [one if (number in stages if stages is not None else row.attends) else None for row in stage]
        for number, stage, one in zip(every, layout, each, strict=True)
    ]


class EfficientNet(StagedNetwork, kw_only=True):
    """Stem of stride 2, stages of mobile blocks, and a 1x1 convolution before the pooling.

    Beside the attributes of `StagedNetwork`:

    Attributes:
      layout: the stages' blocks.
      stem: features of the stem.
      head: features of the last 1x1 convolution; 0 leaves it out.
      attention: attention class or partial, a tuple with one (or None) per stage, or None.
      stages: which stages carry it, in all their blocks: 2 (torch's `blocks.0`) and up; None for those that the
        published network has it in. Blocks that are a single convolution carry none.
      linear_norm: norm where no activation follows; None takes `norm`.
      act: activation; a row of the table may have its own.
      antialias: takes over the stride of the blocks, see `nn.mobile.MobileBlock`.
      from_expanded: the SE ratio is relative to the expanded channels, not to the block's input.
    """

    layout: NetworkTable
    stem: int = 32
    head: int = 1280
    attention: Attention | tuple[Attention, ...] = None  # type: ignore[assignment]
    linear_norm: ModuleDef | None = None
    act: Callable[[Array], Array] = jax.nn.silu
    antialias: Callable[[Array], Array] | None = None
    from_expanded: bool = False

    ATTENTION_BY_STAGE: ClassVar[bool] = True
    classifier_init = staticmethod(nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform"))
    head_path = ("classifier",)
    stem_path = ("conv_stem",)

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The mobile blocks."""
        depths = [sum(row.repeats for row in stage) for stage in self.layout]
        return numbered_blocks(depths, "blocks_{}_{}", first=0)

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The last map of every resolution before the 1x1 convolution (strides 2, 4, 8, 16, 32)."""
        parts = self.parts() | {
            "linear_norm": None if self.linear_norm is None else partial(self.linear_norm, dtype=self.dtype),
            "antialias": self.antialias,
            "from_expanded": self.from_expanded,
        }
        attentions = attention_by_row(self.attention, self.layout, self.stages)
        total, index = sum(row.repeats for stage in self.layout for row in stage), 0
        x = parts["conv"](self.stem, 3, strides=2, kernel_init=fan_out_init(), name="conv_stem")(x)
        x = self.act(parts["norm"](name="bn1")(x, train=train))
        maps = {"stem": x}
        for number, stage in enumerate(self.layout):
            block = 0
            for row, attention in zip(stage, attentions[number], strict=True):
                for i in range(row.repeats):
                    x = row.block(
                        row.features,
                        **parts | {"act": row.act or self.act},
                        strides=row.strides if i == 0 else 1,
                        attention=attention,
                        drop_path_rate=self.drop_path_rate * index / total,
                        name=f"blocks_{number}_{block}",
                    )(x, train=train)
                    block, index = block + 1, index + 1
            if not stage[0].downsamples:
                maps.popitem()
            maps[f"blocks_{number}"] = x
        return maps

    def pooled(self, x: Array, train: bool) -> Array:
        """Last convolution and mean; returns float32 [N, head], or the last stage's features without a head."""
        if self.head:
            parts = self.parts()
            x = parts["conv"](self.head, 1, kernel_init=fan_out_init(), name="conv_head")(x)
            x = self.act(parts["norm"](name="bn2")(x, train=train))
        return super().pooled(x, train)


SE = partial(
    SqueezeExcite,
    fraction=0.25,
    rounding="nearest",
    activation="silu",
    names=("conv_reduce", "conv_expand"),
    kernel_init=he_normal_fan_out,
)
TF: dict[str, Any] = {"conv": partial(Conv, padding="SAME"), "norm": partial(BatchNorm, epsilon=1e-3)}
"""Convolution and norm of networks whose weights come from TensorFlow."""


def v1_layout(experts: int = 0) -> NetworkTable:
    """EfficientNet-B0 (Tan and Le 2019, table 1).

    Args:
      experts: kernels per convolution in the last three stages (Yang et al. 2019, section 4.1: CondConv); 0 for one.
    """
    mix = {"experts": experts, "attends": True} if experts else {"attends": True}
    return (
        (separable(16, attends=True),),
        (inverted(24, 2, strides=2, attends=True),),
        (inverted(40, 2, kernel=5, strides=2, attends=True),),
        (inverted(80, 3, strides=2, attends=True),),
        (inverted(112, 3, kernel=5, **mix),),
        (inverted(192, 4, kernel=5, strides=2, **mix),),
        (inverted(320, 1, **mix),),
    )


def x_layout(expand: float = 6.0) -> NetworkTable:
    """EfficientNet-X-B0 (Li et al. 2021, section 4.2), before space to depth.

    Args:
      expand: of the second to fourth stage; 6 in the paper, 4 in EfficientNet-H.
    """
    base = v1_layout()
    return (
        base[0],
        (fused(24, 2, strides=2, expand=expand, attends=True, act=jax.nn.relu),),
        (fused(40, 2, kernel=5, strides=2, expand=expand, attends=True, act=jax.nn.relu),),
        (inverted(80, 3, strides=2, expand=expand, attends=True),),
        *base[4:],
    )


def v2_layout(*rows: tuple[int, int]) -> NetworkTable:
    """EfficientNetV2 (Tan and Le 2021, table 4): convolutions, two fused stages, and MBConv with attention.

    Args:
      *rows: features and repeats of every stage.
    """
    (c0, n0), (c1, n1), (c2, n2), (c3, n3), *rest = rows
    strides = (1, 2, 1)
    return (
        (plain(c0, n0, skip=True),),
        (fused(c1, n1, strides=2),),
        (fused(c2, n2, strides=2),),
        (inverted(c3, n3, strides=2, expand=4, attends=True),),
        *((inverted(c, n, strides=s, attends=True),) for (c, n), s in zip(rest, strides, strict=False)),
    )


V2_B0 = v2_layout((16, 1), (32, 2), (48, 2), (96, 3), (112, 5), (192, 8))
V2_S = v2_layout((24, 2), (48, 4), (64, 4), (128, 6), (160, 9), (256, 15))
V2_M = v2_layout((24, 3), (48, 5), (80, 5), (160, 7), (176, 14), (304, 18), (512, 5))
V2_L = v2_layout((32, 4), (64, 7), (96, 7), (192, 10), (224, 19), (384, 25), (640, 7))
V2_XL = v2_layout((32, 4), (64, 8), (96, 8), (192, 16), (256, 24), (512, 32), (640, 8))
# Drawn from the paper's figures before its code came out: no plain convolutions, a wider end.
V2_RW = ((fused(24, 2, expand=1),), *V2_S[1:5], (inverted(272, 15, strides=2, attends=True),))
TEST = (
    (plain(16, skip=True),),
    (fused(24, strides=2),),
    (fused(32, strides=2),),
    (inverted(48, strides=2, expand=4, attends=True),),
    (inverted(64, strides=2, expand=4, attends=True),),
)

SCALES: dict[str, tuple[float, float]] = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
    "b8": (2.2, 3.6),
    "l2": (4.3, 5.3),
}
"""Width and depth multipliers (Tan and Le 2019, section 4 and released code; L2: Xie et al. 2020, table 7)."""


def scaled(
    layout: NetworkTable,
    width: float = 1.0,
    depth: float | tuple[float, ...] = 1.0,
    *,
    stem: int = 32,
    head: int = 1280,
    divisor: int = 8,
    limit: float = 0.9,
    **attributes: Any,
) -> partial[EfficientNet]:
    """An EfficientNet of scaled width and depth, with squeeze-and-excitation.

    Args:
      layout: the table at scale 1.
      width: multiplier of all channels, stem and head included.
      depth: multiplier of the blocks per stage, or one per stage.
      stem: features of the stem at scale 1.
      head: of the last convolution at scale 1.
      divisor: channels are multiples of it.
      limit: as in `functional.round_to_multiple`.
      **attributes: of the network.
    """
    return partial(
        EfficientNet,
        layout=scale_depth(scale_width(layout, width, divisor, limit), depth),
        stem=round_to_multiple(stem * width, divisor, limit),
        head=round_to_multiple(head * width, divisor, limit),
        **{"attention": SE, **attributes},
    )


def v1(size: str, **settings: Any) -> partial[EfficientNet]:
    """EfficientNet V1 of a named size; `settings` as in `scaled`."""
    return scaled(v1_layout(), *SCALES[size], **settings)


def v2(size: str, **settings: Any) -> partial[EfficientNet]:
    """EfficientNetV2 of V1's size; `settings` as in `scaled`. Channels are rounded to the nearest multiple of eight."""
    return scaled(V2_B0, *SCALES[size], limit=0.0, **settings)


def grouped(size: str, group_size: int, **settings: Any) -> partial[EfficientNet]:
    """EfficientNet V1 of a named size with grouped instead of depthwise convolutions; `settings` as in `scaled`."""
    return scaled(change(v1_layout(), group_size=group_size), *SCALES[size], **settings)


def pruned(widths: Sequence[Sequence[tuple[int, int, int]]], **attributes: Any) -> partial[EfficientNet]:
    """A pruned EfficientNet V1.

    Args:
      widths: per stage, per block: expanded channels, hidden width of the attention, output channels.
      **attributes: of the network.
    """
    layout = []
    for (base,), blocks in zip(v1_layout(), widths, strict=True):
        rows = []
        for i, (hidden, squeezed, features) in enumerate(blocks):
            # The attention's reduction is a quarter of its base.
            settings: dict[str, Any] = {"attention_base": 4 * squeezed}
            if base.block.func is InvertedResidual:  # type: ignore[attr-defined]
                settings["hidden"] = hidden
            block, strides = partial(base.block, **settings), base.strides if i == 0 else 1
            rows.append(dataclasses.replace(base, block=block, features=features, repeats=1, strides=strides))
        layout.append(tuple(rows))
    last = layout[-1][-1].features
    return partial(
        EfficientNet, layout=tuple(layout), stem=widths[0][0][0], head=4 * last, attention=SE, **{**TF, **attributes}
    )


def x(size: str, width: float | None = None, expand: float = 6.0) -> partial[EfficientNet]:
    """EfficientNet-X of a named size, or of its depth and another width."""
    own_width, depth = SCALES[size]
    net = scaled(x_layout(expand), width or own_width, depth, attention=(SE, SE_RELU, SE_RELU, SE, SE, SE, SE))
    return partial(net, layout=start_with_space_to_depth(net.keywords["layout"]))


def condconv(size: str, experts: int, **attributes: Any) -> partial[EfficientNet]:
    """EfficientNet V1 of a named size with conditionally parameterised convolutions."""
    return scaled(v1_layout(experts), *SCALES[size], **attributes)


SE_RELU = partial(SE, activation="relu")
GC = partial(GlobalContext, fraction=0.25, activation="silu")
GN8, GN16 = partial(GroupNorm, group_size=8), partial(GroupNorm, group_size=16)
EVO: dict[str, Any] = {
    "norm": EvoNormS0,
    "linear_norm": partial(EvoNormS0, nonlinear=False),
    "act": ACTIVATIONS["identity"],
}
TEST_SIZES: dict[str, Any] = {"stem": 24, "head": 256, "limit": 0.0}
RW_M = (1.2, 1.2, 1.2, 1.2, 1.6, 1.6)

_V1 = "Tan and Le 2019, table 1 and section 4; timm's padding and epsilon"
_TF = "Tan and Le 2019, table 1 and section 4; TensorFlow's padding and epsilon"
_CC = "Yang et al. 2019, section 4.1 (CondConv-EfficientNet)"
_X = "Li et al. 2021, section 4.2 (EfficientNet-X)"
_V2 = "Tan and Le 2021, table 4; timm's padding and epsilon"
_TF_V2 = "Tan and Le 2021, table 4; TensorFlow's padding and epsilon"
_TF_V2_B = "Tan and Le 2021, section 4.3 and released code; TensorFlow's padding and epsilon"
_RW = "timm, after Tan and Le 2021"
_PRUNED = "Aflalo et al. 2020, table 2; TensorFlow's padding and epsilon"
_TIMM = "timm"

VARIANTS: dict[str, Variant] = {
    "efficientnet_b0": Variant(v1("b0"), 5_288_548, 224, _V1),
    "efficientnet_b1": Variant(v1("b1"), 7_794_184, 240, _V1),
    "efficientnet_b2": Variant(v1("b2"), 9_109_994, 256, _V1),
    "efficientnet_b3": Variant(v1("b3"), 12_233_232, 288, _V1),
    "efficientnet_b4": Variant(v1("b4"), 19_341_616, 320, _V1),
    "efficientnet_b5": Variant(v1("b5"), 30_389_784, 448, _V1),
    "efficientnet_b6": Variant(v1("b6"), 43_040_704, 528, _V1),
    "efficientnet_b7": Variant(v1("b7"), 66_347_960, 600, _V1),
    "efficientnet_b8": Variant(v1("b8"), 87_413_142, 672, _V1),
    "efficientnet_l2": Variant(v1("l2"), 480_309_308, 800, _V1),
    "tf_efficientnet_b0": Variant(v1("b0", **TF), 5_288_548, 224, _TF),
    "tf_efficientnet_b1": Variant(v1("b1", **TF), 7_794_184, 240, _TF),
    "tf_efficientnet_b2": Variant(v1("b2", **TF), 9_109_994, 260, _TF),
    "tf_efficientnet_b3": Variant(v1("b3", **TF), 12_233_232, 300, _TF),
    "tf_efficientnet_b4": Variant(v1("b4", **TF), 19_341_616, 380, _TF),
    "tf_efficientnet_b5": Variant(v1("b5", **TF), 30_389_784, 456, _TF),
    "tf_efficientnet_b6": Variant(v1("b6", **TF), 43_040_704, 528, _TF),
    "tf_efficientnet_b7": Variant(v1("b7", **TF), 66_347_960, 600, _TF),
    "tf_efficientnet_b8": Variant(v1("b8", **TF), 87_413_142, 672, _TF),
    "tf_efficientnet_l2": Variant(v1("l2", **TF), 480_309_308, 475, _TF),
    "efficientnet_b1_pruned": Variant(pruned(pruned_widths.EFFICIENTNET_B1), 6_331_916, 240, _PRUNED),
    "efficientnet_b2_pruned": Variant(pruned(pruned_widths.EFFICIENTNET_B2), 8_309_737, 260, _PRUNED),
    "efficientnet_b3_pruned": Variant(pruned(pruned_widths.EFFICIENTNET_B3), 9_855_020, 300, _PRUNED),
    "efficientnet_blur_b0": Variant(v1("b0", antialias=blur_pool), 5_288_548, 224, _TIMM),
    "efficientnet_b0_gn": Variant(v1("b0", norm=GN8), 5_288_548, 224, _TIMM),
    "efficientnet_b0_g8_gn": Variant(grouped("b0", 8, norm=GN8), 6_562_660, 224, _TIMM),
    "efficientnet_b0_g16_evos": Variant(grouped("b0", 16, divisor=16), 8_107_756, 224, _TIMM),
    "efficientnet_b3_gn": Variant(v1("b3", divisor=16, norm=GN16), 11_733_784, 288, _TIMM),
    "efficientnet_b3_g8_gn": Variant(grouped("b3", 8, divisor=16, norm=GN16), 14_251_432, 288, _TIMM),
    "efficientnet_cc_b0_4e": Variant(condconv("b0", 4), 13_314_116, 224, _CC),
    "efficientnet_cc_b0_8e": Variant(condconv("b0", 8), 24_013_284, 224, _CC),
    "efficientnet_cc_b1_8e": Variant(condconv("b1", 8), 39_715_968, 240, _CC),
    "tf_efficientnet_cc_b0_4e": Variant(condconv("b0", 4, **TF), 13_314_116, 224, _CC),
    "tf_efficientnet_cc_b0_8e": Variant(condconv("b0", 8, **TF), 24_013_284, 224, _CC),
    "tf_efficientnet_cc_b1_8e": Variant(condconv("b1", 8, **TF), 39_715_968, 240, _CC),
    "efficientnet_x_b3": Variant(x("b3"), 13_299_652, 288, _X),
    "efficientnet_x_b5": Variant(x("b5"), 33_439_614, 448, _X),
    "efficientnet_h_b5": Variant(x("b5", width=1.92, expand=4.0), 45_884_172, 448, _TIMM),
    "efficientnetv2_s": Variant(scaled(V2_S, stem=24), 21_458_488, 288, _V2),
    "efficientnetv2_m": Variant(scaled(V2_M, stem=24), 54_139_356, 320, _V2),
    "efficientnetv2_l": Variant(scaled(V2_L), 118_515_272, 384, _V2),
    "efficientnetv2_xl": Variant(scaled(V2_XL), 208_119_808, 384, _V2),
    "tf_efficientnetv2_s": Variant(scaled(V2_S, stem=24, **TF), 21_458_488, 300, _TF_V2),
    "tf_efficientnetv2_m": Variant(scaled(V2_M, stem=24, **TF), 54_139_356, 384, _TF_V2),
    "tf_efficientnetv2_l": Variant(scaled(V2_L, **TF), 118_515_272, 384, _TF_V2),
    "tf_efficientnetv2_xl": Variant(scaled(V2_XL, **TF), 208_119_808, 384, _TF_V2),
    "tf_efficientnetv2_b0": Variant(v2("b0", **TF), 7_139_704, 192, _TF_V2_B),
    "tf_efficientnetv2_b1": Variant(v2("b1", **TF), 8_141_052, 192, _TF_V2_B),
    "tf_efficientnetv2_b2": Variant(v2("b2", **TF), 10_096_086, 208, _TF_V2_B),
    "tf_efficientnetv2_b3": Variant(v2("b3", **TF), 14_358_406, 240, _TF_V2_B),
    "efficientnetv2_rw_t": Variant(scaled(V2_S, 0.8, 0.9, stem=24), 13_649_388, 224, _RW),
    "gc_efficientnetv2_rw_t": Variant(scaled(V2_S, 0.8, 0.9, stem=24, attention=GC), 13_677_713, 224, _RW),
    "efficientnetv2_rw_s": Variant(scaled(V2_RW, stem=24, head=1792), 23_941_296, 288, _RW),
    "efficientnetv2_rw_m": Variant(scaled(V2_RW, 1.2, RW_M, stem=24, head=1792), 53_236_442, 320, _RW),
    "test_efficientnet": Variant(scaled(TEST, **TEST_SIZES), 356_196, 160, _TIMM),
    "test_efficientnet_gn": Variant(scaled(TEST, **TEST_SIZES, norm=GN8), 356_196, 160, _TIMM),
    "test_efficientnet_ln": Variant(scaled(TEST, **TEST_SIZES, norm=LayerNorm), 356_196, 160, _TIMM),
    "test_efficientnet_evos": Variant(scaled(TEST, **TEST_SIZES, **EVO), 357_292, 160, _TIMM),
}
