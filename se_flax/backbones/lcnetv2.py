"""PP-LCNetV2 (PaddleClas 2022): depthwise separable convolutions for CPUs, trained with parallel depthwise branches.

`se_flax.fuse` turns the branches into one convolution. The names are timm's; the source is the authors' documentation
(PaddleClas, `docs/en/models/PP-LCNetV2_en.md`) and released code.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import SqueezeExcite
from se_flax.functional import round_to_multiple
from se_flax.nn.conv import Conv, he_normal_fan_out
from se_flax.nn.network import Path, StagedNetwork, attention_stages, numbered_blocks
from se_flax.nn.parallel import ParallelBlock
from se_flax.nn.residual import ConvNorm, ModuleDef, drop_path
from se_flax.variant import Variant

Array = jax.Array


class LCNetV2Block(ParallelBlock):
    """Depthwise convolution, attention, and one or two 1x1 convolutions, with an activation after each.

    Attributes:
      features: output channels.
      conv: as in `nn.residual.Block`.
      norm: as in `nn.residual.Block`.
      act: activation.
      strides: of the block.
      kernel: of the depthwise convolution.
      branches: the depthwise convolution is a sum of those of all odd kernels up to `kernel`; without 1 at a stride.
      split: two 1x1 convolutions, by way of half of the output channels.
      skip: adds the block's input if the shapes are equal.
      attention: attention class or partial, or None.
      drop_path_rate: probability of dropping the branch (stochastic depth).
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array] = jax.nn.relu
    strides: int = 1
    kernel: int = 3
    branches: bool = False
    split: bool = False
    skip: bool = False
    attention: ModuleDef | None = None
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        channels, unit = x.shape[-1], partial(ConvNorm, conv=self.conv, norm=self.norm)
        attention = None if self.attention is None else self.attention(name="se")
        spatial = partial(unit, channels, strides=self.strides, groups=channels)
        if self.branches:
            kernels = range(self.kernel, 0 if self.strides == 1 else 1, -2)
            layers = [spatial(kernel_size=k, name=f"dw_conv_list_{i}") for i, k in enumerate(kernels)]
            y = self.act(self.add_branches(x, *layers, train=train))
            y = y if attention is None else attention(y, train=train)
        else:
            layer = spatial(kernel_size=self.kernel, act=self.act, name="dw_conv")
            y = layer(x, train=train, attention=attention)
        widths = {"pw_conv": self.features}
        if self.split:
            widths = {"pw_conv_0": self.features // 2, "pw_conv_1": self.features}
        for name, width in widths.items():
            y = unit(width, act=self.act, name=name)(y, train=train)
        if not self.skip or x.shape != y.shape:
            return y
        if train and self.drop_path_rate > 0.0:
            y = drop_path(y, self.drop_path_rate, self.make_rng("dropout"))
        return x + y


class LCNetV2Stage(NamedTuple):
    """A stage: output channels, blocks, and what its blocks have, see `LCNetV2Block`; attention where published."""

    features: int
    depth: int
    kernel: int = 3
    branches: bool = False
    split: bool = False
    skip: bool = False
    attends: bool = False


class LCNetV2(StagedNetwork, kw_only=True):
    """Stem of a convolution and a block, four stages of stride 2, and a convolution after the pooling.

    Beside the attributes of `StagedNetwork`:

    Attributes:
      layout: the stages.
      stem: features of the stem's convolution and of its block.
      head: features of the convolution after the pooling.
      stages: which stages carry attention; None for the one that has it as published, 4 (torch's `stages.2`).
    """

    layout: tuple[LCNetV2Stage, ...]
    stem: tuple[int, int] = (32, 64)
    head: int = 1280

    head_path = ("classifier",)
    stem_path = ("stem_0", "conv")

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The blocks of the stages."""
        return numbered_blocks([stage.depth for stage in self.layout], "stages_{}_{}", first=0)

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The maps of the four stages (strides 4, 8, 16, 32)."""
        parts, maps = self.parts(), {}
        x = ConvNorm(self.stem[0], **parts, kernel_size=3, strides=2, name="stem_0")(x, train=train)
        x = LCNetV2Block(self.stem[1], **parts, name="stem_1")(x, train=train)
        chosen = attention_stages(self.stages, len(self.layout))
        rates = iter(self.drop_path_rates(len(self.block_paths)))
        for number, stage in enumerate(self.layout):
            attends = stage.attends if self.stages is None else number + 2 in chosen
            for i in range(stage.depth):
                x = LCNetV2Block(
                    stage.features,
                    **parts,
                    strides=1 if i else 2,
                    kernel=stage.kernel,
                    branches=stage.branches,
                    split=stage.split,
                    skip=stage.skip,
                    attention=self.attention if attends else None,
                    drop_path_rate=next(rates),
                    name=f"stages_{number}_{i}",
                )(x, train=train)
            maps[f"stages_{number}"] = x
        return maps

    def pooled(self, x: Array, train: bool) -> Array:
        """Mean, last convolution and activation; returns float32 [N, head]."""
        del train
        x = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        return jnp.squeeze(self.act(Conv(self.head, 1, name="conv_head")(x)), (1, 2))


SE = partial(SqueezeExcite, fraction=0.25, kernel_init=he_normal_fan_out)


def lcnetv2(width: float, depth: int) -> partial[LCNetV2]:
    """A PP-LCNetV2 of scaled width, and the depth of its third stage."""

    def scaled(channels: int) -> int:
        return round_to_multiple(channels * width)

    layout = (
        LCNetV2Stage(scaled(128), 2),
        LCNetV2Stage(scaled(256), 2),
        LCNetV2Stage(scaled(512), depth, 5, branches=True, split=True, attends=True),
        LCNetV2Stage(scaled(1024), 2, 5, branches=True, skip=True),
    )
    return partial(LCNetV2, layout=layout, stem=(scaled(32), scaled(64)), attention=SE)


_P = "PaddleClas, PP-LCNetV2 and released code; timm"

VARIANTS: dict[str, Variant] = {
    "lcnetv2_small": Variant(lcnetv2(0.75, 4), 4_128_552, 224, _P),
    "lcnetv2_base": Variant(lcnetv2(1.0, 6), 6_687_208, 224, _P),
    "lcnetv2_large": Variant(lcnetv2(1.25, 8), 10_542_120, 224, _P),
}
