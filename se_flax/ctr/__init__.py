"""Click prediction: squeeze-and-excitation over the feature fields of tabular data instead of channels of an image.

Networks take ids, int32 [batch, fields]: row numbers of one embedding table in which every field has its own range.
"""

from se_flax.ctr import functional
from se_flax.ctr.layers import FIBINET_SE, BilinearInteraction, SqueezeExciteFields
from se_flax.ctr.models import FM, FiBiNET, LogisticRegression

__all__ = [
    "FIBINET_SE",
    "FM",
    "BilinearInteraction",
    "FiBiNET",
    "LogisticRegression",
    "SqueezeExciteFields",
    "functional",
]
