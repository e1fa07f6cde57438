"""MobileNet v2, with squeeze-and-excitation and with efficient channel attention (Sandler et al. 2018, table 2).

Wang et al. 2020 (ECA-Net, table 3) compare the three. Their gates act on the output of each of the seventeen blocks,
before the sum: their released code says so for ECA, and with r = 8 it gives the 3.40M parameters that they print for SE
(their M is 2^20). Gates on the depthwise maps, MnasNet's place, would make several million.
"""

from functools import partial
from typing import Any

from se_flax.attention import ECA
from se_flax.backbones.efficientnet import EfficientNet
from se_flax.backbones.mobilenetv1 import SE, SETTINGS
from se_flax.nn.mobile_table import NetworkTable, inverted, separable
from se_flax.variant import Variant, Weights

AT_END: dict[str, Any] = {"attends": True, "attention_last": True}

# Sandler et al. 2018, table 2.
LAYOUT: NetworkTable = (
    (separable(16, **AT_END),),
    (inverted(24, 2, strides=2, **AT_END),),
    (inverted(32, 3, strides=2, **AT_END),),
    (inverted(64, 4, strides=2, **AT_END),),
    (inverted(96, 3, **AT_END),),
    (inverted(160, 3, strides=2, **AT_END),),
    (inverted(320, **AT_END),),
)
MOBILENET = partial(EfficientNet, layout=LAYOUT, **SETTINGS)
SE_8 = partial(SE, reduction=8.0)
# Not the paper's rule for the kernel's size: the released code takes 1 below 96 channels and 3 from there on.
ECA_BY_STAGE = (*(partial(ECA, kernel_size=1),) * 4, *(partial(ECA, kernel_size=3),) * 3)

_WANG = "Wang et al. 2020, table 3; released code"

VARIANTS: dict[str, Variant] = {
    "mobilenetv2_100": Variant(
        MOBILENET,
        3_504_872,
        224,
        "Sandler et al. 2018, table 2; timm",
        (Weights("ra_in1k", "timm/mobilenetv2_100.ra_in1k"),),
    ),
    "se_mobilenetv2_100": Variant(partial(MOBILENET, attention=SE_8), 3_563_492, 224, "Wang et al. 2020, table 3"),
    "eca_mobilenetv2_100": Variant(partial(MOBILENET, attention=ECA_BY_STAGE), 3_504_903, 224, _WANG),
}
