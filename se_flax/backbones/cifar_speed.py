"""Networks for 32-pixel images that train in minutes: airbench94 (Jordan 2024), with and without attention.

"94% on CIFAR-10 in 3.29 Seconds on a Single GPU", section 3 and its code. The stem is meant to whiten patches of the
training images and to stay as it is (`optim.whiten_stem` of the training program).
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import SqueezeExcite
from se_flax.nn.network import ModuleDef, Network, Path, attention_stages, check_side
from se_flax.nn.norm import BatchNorm
from se_flax.nn.norm_attention import norm_act_attend
from se_flax.nn.pooling import max_pool
from se_flax.variant import Variant

Array = jax.Array

# PyTorch's initialisation of convolutions and dense layers: uniform in +-1 / sqrt(fan in).
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def identity_first(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Kernel whose first filters pass the input channels on (Jordan 2024, section 3.2); the others are random.

    Args:
      key: of the random filters, which are uniform in +-1 / sqrt(fan in).
      shape: (kh, kw, C, features).
      dtype: of the kernel.

    Returns:
      The kernel; filter i < min(C, features) is 1 at the middle of channel i and 0 elsewhere.
    """
    height, width, channels, features = shape
    passed = min(channels, features)
    kernel = uniform_fan_in(key, shape, dtype).at[..., :passed].set(0)
    return kernel.at[height // 2, width // 2, jnp.arange(passed), jnp.arange(passed)].set(1)


class ConvGroup(nn.Module):
    """3x3 convolution, max pooling by 2, norm, activation; 3x3 convolution, norm, attention, activation.

    Attributes:
      features: of both convolutions.
      conv: convolution class or partial.
      norm: batch-norm class or partial.
      act: activation.
      attention: attention class or partial, or None.
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    act: ModuleDef
    attention: ModuleDef | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H // 2, W // 2, features]."""
        conv = partial(self.conv, self.features, 3, kernel_init=identity_first)
        x = max_pool(conv(name="conv1")(x), 2, 2, padding=0)
        x = self.act(self.norm(name="norm1")(x, train=train))
        attention = None if self.attention is None else self.attention(name="se")
        # Before the activation, as in SE-ResNet: norm and gate are one affine function, and the squeeze is free.
        return self.act(norm_act_attend(self.norm(name="norm2"), attention, conv(name="conv2")(x), train=train))


class CifarSpeed(Network, kw_only=True):
    """2x2 convolution without padding, then groups of two convolutions that halve the map, and a global maximum.

    Beside the attributes of `Network`:

    Attributes:
      widths: features of the groups.
      stem: features of the first convolution: every patch of 2 x 2 x 3 values has 12 principal axes, each once with
        either sign.
      stages: numbers of the groups that carry attention, from 2 as in `StagedNetwork`; None for all.
      feature_scale: factor of the features before the classifier.
    """

    widths: tuple[int, ...] = (64, 256, 256)
    stem: int = 24
    stages: tuple[int, ...] | None = None
    feature_scale: float = 1 / 9
    num_classes: int = 10
    norm: ModuleDef = partial(BatchNorm, momentum=0.6, use_scale=False)
    act: ModuleDef = partial(jax.nn.gelu, approximate=False)

    classifier_init = staticmethod(uniform_fan_in)
    head_path = ("head",)
    stem_path = ("whiten",)

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The groups."""
        return tuple((f"layer{i}",) for i in range(1, len(self.widths) + 1))

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The maps of the groups (strides 2, 4, 8)."""
        check_side(x, 2 ** len(self.widths) + 1)
        parts, maps = self.parts(), {}
        stem = parts["conv"](self.stem, 2, padding="VALID", use_bias=True, kernel_init=uniform_fan_in, name="whiten")
        x = self.act(stem(x))
        chosen = attention_stages(self.stages, len(self.widths))
        for i, width in enumerate(self.widths, 1):
            attention = self.attention if i + 1 in chosen else None
            x = maps[f"layer{i}"] = ConvGroup(width, **parts, attention=attention, name=f"layer{i}")(x, train=train)
        return maps

    def pooled(self, x: Array, train: bool) -> Array:
        """Global maximum times `feature_scale`; float32 [N, C]."""
        del train
        return jnp.max(x, axis=(1, 2)).astype(jnp.float32) * self.feature_scale


_half = partial(CifarSpeed, widths=(32, 128, 128))
_JORDAN = "Jordan 2024, section 3, with a bias in the classifier"

VARIANTS: dict[str, Variant] = {
    "airbench94": Variant(CifarSpeed, 1_971_650, 32, _JORDAN),
    "se_airbench94": Variant(partial(CifarSpeed, attention=SqueezeExcite), 1_989_158, 32, f"{_JORDAN}, and SE"),
    "airbench94_050": Variant(_half, 497_538, 32, f"{_JORDAN}; widths of a half"),
    "se_airbench94_050": Variant(
        partial(_half, attention=SqueezeExcite), 502_068, 32, f"{_JORDAN}, and SE; half widths"
    ),
}
