"""MnasNet, MixNet and TinyNet: EfficientNet's network with other tables.

Tan et al. 2019 (MnasNet), Tan and Le 2019b (MixNet), Han et al. 2020 (TinyNet).
"""

from functools import partial
from typing import Any

import jax

from se_flax.backbones.efficientnet import SE, SE_RELU, TF, EfficientNet, v1_layout
from se_flax.functional import round_to_multiple
from se_flax.nn.mobile_table import NetworkTable, inverted, scale_depth, scale_width, separable
from se_flax.variant import Variant

SILU, RELU = jax.nn.silu, jax.nn.relu
HALF = partial(SE, fraction=0.5)

MNASNET_A1: NetworkTable = (
    (separable(16, skip=False),),
    (inverted(24, 2, strides=2),),
    (inverted(40, 3, kernel=5, strides=2, expand=3, attends=True),),
    (inverted(80, 4, strides=2),),
    (inverted(112, 2, attends=True),),
    (inverted(160, 3, kernel=5, strides=2, attends=True),),
    (inverted(320),),
)
MNASNET_SMALL: NetworkTable = (
    (separable(8),),
    (inverted(16, strides=2, expand=3),),
    (inverted(16, 2, strides=2),),
    (inverted(32, 4, kernel=5, strides=2, attends=True),),
    (inverted(32, 3, attends=True),),
    (inverted(88, 3, kernel=5, strides=2, attends=True),),
    (inverted(144),),
)

# MixNet's pointwise convolutions are split into two groups in many blocks: before, after, or on both sides.
OUT: dict[str, Any] = {"project_kernel": (1, 1)}
BOTH: dict[str, Any] = {"expand_kernel": (1, 1), **OUT}
SWISH: dict[str, Any] = {"attends": True, "act": SILU}
K35, K357, K3579 = (3, 5), (3, 5, 7), (3, 5, 7, 9)

MIXNET_S: NetworkTable = (
    (separable(16),),
    (inverted(24, strides=2, **BOTH), inverted(24, expand=3, **BOTH)),
    (inverted(40, kernel=K357, strides=2, **SWISH), inverted(40, 3, kernel=K35, **BOTH, **SWISH)),
    (inverted(80, kernel=K357, strides=2, **OUT, **SWISH), inverted(80, 2, kernel=K35, **OUT, **SWISH)),
    (inverted(120, kernel=K357, **BOTH, **SWISH), inverted(120, 2, kernel=K3579, expand=3, **BOTH, **SWISH)),
    (
        inverted(200, kernel=(3, 5, 7, 9, 11), strides=2, **SWISH),
        inverted(200, 2, kernel=K3579, **OUT, **SWISH),
    ),
)
MIXNET_M: NetworkTable = (
    (separable(24),),
    (inverted(32, kernel=K357, strides=2, **BOTH), inverted(32, expand=3, **BOTH)),
    (inverted(40, kernel=K3579, strides=2, **SWISH), inverted(40, 3, kernel=K35, **BOTH, **SWISH)),
    (inverted(80, kernel=K357, strides=2, **SWISH), inverted(80, 3, kernel=K3579, **BOTH, **SWISH)),
    (inverted(120, **SWISH), inverted(120, 3, kernel=K3579, expand=3, **BOTH, **SWISH)),
    (inverted(200, kernel=K3579, strides=2, **SWISH), inverted(200, 3, kernel=K3579, **OUT, **SWISH)),
)


def mnasnet(layout: NetworkTable, width: float = 1.0, stem: int = 32) -> partial[EfficientNet]:
    """A MnasNet; the last convolution keeps its width."""
    stem = round_to_multiple(stem * width)
    return partial(EfficientNet, layout=scale_width(layout, width), stem=stem, attention=SE_RELU, act=RELU)


def mixnet(layout: NetworkTable, stem: int, width: float = 1.0, depth: float = 1.0, **attributes: Any) -> Any:
    """A MixNet; its squeeze-and-excitation has half the width of the block's input, in the fourth stage a quarter."""
    return partial(
        EfficientNet,
        layout=scale_depth(scale_width(layout, width), depth, round),
        stem=round_to_multiple(stem * width),
        head=1536,
        attention=(None, None, HALF, SE, HALF, HALF),
        act=RELU,
        **attributes,
    )


def tinynet(width: float, depth: float) -> partial[EfficientNet]:
    """A TinyNet; stem and head keep their widths."""
    return partial(EfficientNet, layout=scale_depth(scale_width(v1_layout(), width), depth, round), attention=SE)


_MNAS = "Tan et al. 2019, figure 7 (MnasNet-A1) and released code"
_MIX = "Tan and Le 2019b, figure 5"
_MIX_TF = "Tan and Le 2019b, figure 5; TensorFlow's padding and epsilon"
_TINY = "Han et al. 2020, table 1; timm"

VARIANTS: dict[str, Variant] = {
    "semnasnet_050": Variant(mnasnet(MNASNET_A1, 0.5), 2_082_006, 224, _MNAS),
    "semnasnet_075": Variant(mnasnet(MNASNET_A1, 0.75), 2_912_278, 224, _MNAS),
    "semnasnet_100": Variant(mnasnet(MNASNET_A1), 3_887_038, 224, _MNAS),
    "semnasnet_140": Variant(mnasnet(MNASNET_A1, 1.4), 6_105_992, 224, _MNAS),
    "mnasnet_small": Variant(mnasnet(MNASNET_SMALL, stem=8), 2_030_264, 224, _MNAS),
    "mixnet_s": Variant(mixnet(MIXNET_S, 16), 4_134_606, 224, _MIX),
    "mixnet_m": Variant(mixnet(MIXNET_M, 24), 5_014_382, 224, _MIX),
    "mixnet_l": Variant(mixnet(MIXNET_M, 24, 1.3), 7_329_252, 224, _MIX),
    "mixnet_xl": Variant(mixnet(MIXNET_M, 24, 1.6, 1.2), 11_896_768, 224, "timm, after Tan and Le 2019b"),
    "mixnet_xxl": Variant(mixnet(MIXNET_M, 24, 2.4, 1.3), 23_961_752, 224, "timm, after Tan and Le 2019b"),
    "tf_mixnet_s": Variant(mixnet(MIXNET_S, 16, **TF), 4_134_606, 224, _MIX_TF),
    "tf_mixnet_m": Variant(mixnet(MIXNET_M, 24, **TF), 5_014_382, 224, _MIX_TF),
    "tf_mixnet_l": Variant(mixnet(MIXNET_M, 24, 1.3, **TF), 7_329_252, 224, _MIX_TF),
    "tinynet_a": Variant(tinynet(1.0, 1.2), 6_187_972, 192, _TINY),
    "tinynet_b": Variant(tinynet(0.75, 1.1), 3_730_562, 188, _TINY),
    "tinynet_c": Variant(tinynet(0.54, 0.85), 2_457_234, 184, _TINY),
    "tinynet_d": Variant(tinynet(0.54, 0.695), 2_338_446, 152, _TINY),
    "tinynet_e": Variant(tinynet(0.51, 0.6), 2_042_972, 106, _TINY),
}
