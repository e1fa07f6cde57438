"""Names, channels and strides of the feature maps that a network returns with `return_features=True`."""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.zoo import create_model, get_variant

# In pixels; a multiple of every network's stride.
_STEP = 256


@dataclass(frozen=True)
class FeatureInfo:
    """A feature map of a network.

    Attributes:
      name: of the map in the named tuple that the network returns, after the torch module that makes it.
      channels: of the map.
      stride: pixels of the image per pixel of the map, along height and width.
    """

    name: str
    channels: int
    stride: int


def feature_info(model: nn.Module | str, image_size: int | None = None) -> tuple[FeatureInfo, ...]:
    """Name, channels and stride of every feature map of `return_features=True`, without running the network.

    Args:
      model: a network, or the name of one of `se_flax.list_models()`.
      image_size: height and width of the images for the trace; None takes the size that a named network was designed
        for, and 224 for a module.

    Returns:
      One entry per map, finest first.

    Raises:
      UserError: the name is unknown, or the images are too small for the network.

    Examples:
      >>> import se_flax
      >>> [(info.name, info.channels, info.stride) for info in se_flax.feature_info("resnet18")]
      [('stem', 64, 2), ('layer1', 64, 4), ('layer2', 128, 8), ('layer3', 256, 16), ('layer4', 512, 32)]
    """
    if isinstance(model, str):
        image_size = image_size or get_variant(model).input_size
        model = create_model(model)

    def maps(side: int) -> Any:
        images = jax.ShapeDtypeStruct((1, side, side, getattr(model, "in_channels", 3)), jnp.float32)
        call = functools.partial(model.init_with_output, return_features=True)
        return jax.eval_shape(lambda key, images: call(key, images)[0][1], jax.random.key(0), images)

    # Convolutions without padding remove the same border at every size: the difference of two sizes gives the stride.
    side = image_size or 224
    smaller, larger = maps(side), maps(side + _STEP)
    return tuple(
        FeatureInfo(name, a.shape[-1], _STEP // (b.shape[1] - a.shape[1]))
        for name, a, b in zip(smaller._fields, smaller, larger, strict=True)
    )
