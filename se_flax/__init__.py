"""Squeeze-and-excitation networks in JAX and Flax.

model = se_flax.create_model("seresnet50", num_classes=10)
variables = jax.jit(model.init)(key, images)
logits = jax.jit(model.apply)(variables, images)
"""

import importlib
from typing import TYPE_CHECKING, Any

from se_flax import functional
from se_flax.analysis.costs import Costs, LayerCosts, costs
from se_flax.analysis.features import FeatureInfo, feature_info
from se_flax.attention import CBAM, ECA, EffectiveSE, ScSE, SqueezeExcite
from se_flax.checkpoints.keras import from_keras, to_keras
from se_flax.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained
from se_flax.checkpoints.torch import from_timm, to_timm
from se_flax.checkpoints.torchvision import from_torchvision
from se_flax.ctr.layers import SqueezeExciteFields
from se_flax.errors import UserError
from se_flax.export.folding import fuse
from se_flax.images.preprocess import Preprocess
from se_flax.nn.conv import Conv
from se_flax.nn.head import CosineClassifier
from se_flax.nn.norm import BatchNorm
from se_flax.nn.residual import Placement
from se_flax.variant import Variant, Weights
from se_flax.version import __version__
from se_flax.zoo import create_model, get_variant, list_models

if TYPE_CHECKING:
    from se_flax.export.nnx import from_nnx, to_nnx
    from se_flax.export.serving import export_pretrained

# Imported when first asked for: flax.nnx would make the import of this package slower for everybody.
_LATE = {"export_pretrained": "export.serving", "from_nnx": "export.nnx", "to_nnx": "export.nnx"}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'se_flax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"se_flax.{_LATE[name]}"), name)


__all__ = [
    "CBAM",
    "ECA",
    "BatchNorm",
    "Conv",
    "Costs",
    "CosineClassifier",
    "EffectiveSE",
    "FeatureInfo",
    "LayerCosts",
    "Placement",
    "Preprocess",
    "Pretrained",
    "ScSE",
    "SqueezeExcite",
    "SqueezeExciteFields",
    "UserError",
    "Variant",
    "Weights",
    "__version__",
    "costs",
    "create_model",
    "export_pretrained",
    "feature_info",
    "from_keras",
    "from_nnx",
    "from_timm",
    "from_torchvision",
    "functional",
    "fuse",
    "get_variant",
    "list_models",
    "load_pretrained",
    "save_pretrained",
    "to_keras",
    "to_nnx",
    "to_timm",
]
