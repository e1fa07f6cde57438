"""MobileNet v1 with and without squeeze-and-excitation (Howard et al. 2017, table 1; Hu et al. 2020, table 3).

Hu et al. print 4.7M parameters for SE-MobileNet. That is a gate on the output of each of the thirteen blocks, after the
pointwise convolution, with r = 16: 4,718,044 parameters. Gates on the depthwise maps would make 4.6M (r = 16) or 4.9M
(r = 8).
"""

from functools import partial
from typing import Any

import jax

from se_flax.attention import SqueezeExcite
from se_flax.backbones.efficientnet import EfficientNet
from se_flax.nn.conv import he_normal_fan_out
from se_flax.nn.mobile_table import BlockRow, NetworkTable, separable
from se_flax.variant import Variant, Weights

SE = partial(SqueezeExcite, names=("conv_reduce", "conv_expand"), kernel_init=he_normal_fan_out)
SETTINGS: dict[str, Any] = {"act": jax.nn.relu6, "from_expanded": True}
"""Of both MobileNets: attention's reduction is a share of the map that it acts on."""


def _blocks(features: int, repeats: int = 1, strides: int = 1) -> BlockRow:
    settings: dict[str, Any] = {"attends": True, "attention_last": True, "project_act": True, "skip": False}
    return separable(features, repeats, 3, strides, **settings)


# Howard et al. 2017, table 1.
LAYOUT: NetworkTable = (
    (_blocks(64),),
    (_blocks(128, 2, strides=2),),
    (_blocks(256, 2, strides=2),),
    (_blocks(512, 6, strides=2),),
    (_blocks(1024, 2, strides=2),),
)
MOBILENET = partial(EfficientNet, layout=LAYOUT, head=0, **SETTINGS)

_HALF = (0.5, 0.5, 0.5)
_RA4 = Weights(
    "ra4_e3600_r224_in1k",
    "timm/mobilenetv1_100.ra4_e3600_r224_in1k",
    mean=_HALF,
    std=_HALF,
    test_image_size=256,
    test_crop=0.95,
)

VARIANTS: dict[str, Variant] = {
    "mobilenetv1_100": Variant(MOBILENET, 4_231_976, 224, "Howard et al. 2017, table 1; timm", (_RA4,)),
    "se_mobilenetv1_100": Variant(partial(MOBILENET, attention=SE), 4_718_044, 224, "Hu et al. 2020, table 3"),
}
