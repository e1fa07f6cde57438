"""ResNet-50 with Linen's own layers: the baseline for the memory traffic of a training step.

It is the network of Flax's ImageNet example: stride in the 3x3 (v1.5), `nn.Conv` and `nn.BatchNorm` in the dtype of the
computation, `nn.relu`, the last scale of each block initialised to zero.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class Bottleneck(nn.Module):
    """Bottleneck block: 1x1, 3x3, 1x1 and the shortcut."""

    features: int
    strides: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, 4 * features]."""
        y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.features, (3, 3), (self.strides, self.strides))(y)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.features, (1, 1), (self.strides, self.strides), name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class PlainResNet50(nn.Module):
    """ResNet-50; its call is that of the zoo's networks."""

    num_classes: int = 1000
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, 3]; train. Returns: logits, float32 [N, num_classes]."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)
        x = conv(64, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, depth in enumerate((3, 4, 6, 3)):
            for i in range(depth):
                x = Bottleneck(64 * 2**stage, 2 if stage and i == 0 else 1, conv, norm)(x)
        x = nn.Dense(self.num_classes, dtype=self.dtype)(jnp.mean(x, (1, 2)))
        return x.astype(jnp.float32)
