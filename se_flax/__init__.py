"""Squeeze-and-excitation networks in JAX and Flax.

model = se_flax.create_model("seresnet50", num_classes=10)
variables = model.init(key, images)
logits = model.apply(variables, images)
"""

from se_flax import functional
from se_flax.attention import CBAM, ECA, EffectiveSE, SqueezeExcite
from se_flax.blocks import Placement
from se_flax.errors import UserError
from se_flax.fused import fuse
from se_flax.layers import BatchNorm, Conv
from se_flax.preprocess import Preprocess
from se_flax.variant import Variant, Weights
from se_flax.version import __version__
from se_flax.weights.keras import from_keras, to_keras
from se_flax.weights.pretrained import Pretrained, load_pretrained, save_pretrained
from se_flax.weights.torch import from_timm, to_timm
from se_flax.zoo import create_model, get_variant, list_models

__all__ = [
    "CBAM",
    "ECA",
    "BatchNorm",
    "Conv",
    "EffectiveSE",
    "Placement",
    "Preprocess",
    "Pretrained",
    "SqueezeExcite",
    "UserError",
    "Variant",
    "Weights",
    "__version__",
    "create_model",
    "from_keras",
    "from_timm",
    "functional",
    "fuse",
    "get_variant",
    "list_models",
    "load_pretrained",
    "save_pretrained",
    "to_keras",
    "to_timm",
]
