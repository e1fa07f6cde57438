"""TResNet (Ridnik et al. 2021): space-to-depth stem, blurred strides, SE in the first three stages; timm's names."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import SqueezeExcite
from se_flax.errors import UserError
from se_flax.nn.network import Path, StagedNetwork, numbered_blocks
from se_flax.nn.pooling import avg_pool, blur_pool
from se_flax.nn.residual import Block, ConvNorm, ModuleDef, Placement
from se_flax.variant import Variant

Array = jax.Array
Activation = Callable[[Array], Array]

# The authors' inplace norms have leaky ReLUs: a small slope in the blocks, PyTorch's default in the stem.
LEAKY, STEM_LEAKY = partial(jax.nn.leaky_relu, negative_slope=1e-3), partial(jax.nn.leaky_relu, negative_slope=1e-2)
BLUR = partial(blur_pool, mode="reflect")


def project_averaged(x: Array, features: int, strides: int, *, conv: ModuleDef, norm: ModuleDef, train: bool) -> Array:
    """Shortcut: mean over 2x2 if strided, 1x1 convolution, norm; as `downsample_1`, or `downsample_0` at stride 1."""
    x = avg_pool(x, strides, strides) if strides > 1 else x
    return ConvNorm(features, conv, norm, name=f"downsample_{int(strides > 1)}")(x, train=train)


class TBasicBlock(Block):
    """Two 3x3 convolutions, the first with a leaky ReLU and, if strided, a blur (section 2.2 and figure 2)."""

    downsample: ModuleDef | None = project_averaged
    antialias: Activation | None = BLUR
    inner_act: Activation = LEAKY

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        unit = partial(ConvNorm, self.features, self.conv, kernel_size=3)
        y = self.attend(x, Placement.PRE, train)
        first = unit(norm=self.norm, strides=self.conv_strides, act=self.inner_act, name="conv1")
        y = self.low_pass(first(y, train=train, attention=self.attention_at(Placement.AFTER_3X3)))
        y = unit(norm=self.last_norm, name="conv2")(y, train=train, attention=self.attention_at(Placement.STANDARD))
        return self.add(x, y, train)


class TBottleneck(TBasicBlock):
    """1x1, 3x3, 1x1, with attention after the 3x3 and its blur, whose hidden width is a share of half the output's."""

    placement: Placement = Placement.AFTER_3X3

    expansion = 4

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, 4 * features]."""
        unit = partial(ConvNorm, conv=self.conv)
        wide = partial(unit, self.features, norm=self.norm, act=self.inner_act)
        y = wide(name="conv1")(self.attend(x, Placement.PRE, train), train=train)
        y = self.low_pass(wide(kernel_size=3, strides=self.conv_strides, name="conv2")(y, train=train))
        y = self.attend(y, Placement.AFTER_3X3, train, base_channels=2 * self.features)
        last = unit(self.features * self.expansion, norm=self.last_norm, name="conv3")
        return self.add(x, last(y, train=train, attention=self.attention_at(Placement.STANDARD)), train)


def space_to_depth(x: Array, size: int = 4) -> Array:
    """Every size x size square of pixels as one pixel.

    Args:
      x: [N, H, W, C].
      size: side of the square.

    Returns:
      [N, H / size, W / size, size * size * C]; channels by row, column and channel in the square.

    Raises:
      UserError: the height or width is no multiple of `size`.
    """
    height, width = x.shape[1:3]
    if any(isinstance(side, int) and side % size for side in (height, width)):
        raise UserError(
            f"got images of {height} x {width} pixels; this network takes squares of {size} x {size} pixels as one: "
            f"give a height and a width that are multiples of {size}"
        )
    # Slices and no reshape, which has no rule for sharded axes.
    return jnp.concatenate([_every(_every(x, 1, i, size), 2, j, size) for i in range(size) for j in range(size)], -1)


def _every(x: Array, axis: int, start: int, step: int) -> Array:
    """Entries `start`, `start + step`, ... of an axis whose length is a multiple of `step`."""
    return jax.lax.slice_in_dim(x, start, x.shape[axis] - (step - 1 - start), step, axis)


class Body(nn.Module):
    """The convolution of the stem and the stages, in one submodule as in the checkpoints.

    Attributes:
      stem: class or partial of the convolution.
      stages: blocks of every stage, classes or partials.
    """

    stem: ModuleDef
    stages: tuple[tuple[ModuleDef, ...], ...]

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> dict[str, Array]:
        """Args: x images [N, H, W, C]. Returns: the maps of the stages by name, [N, h, w, c]."""
        x, maps = self.stem(name="conv1")(space_to_depth(x), train=train), {}
        for number, blocks in enumerate(self.stages, 1):
            for i, block in enumerate(blocks):
                x = block(name=f"layer{number}_{i}")(x, train=train)
            maps[f"layer{number}"] = x
        return maps


class TResNet(StagedNetwork, kw_only=True):
    """Space to depth, 3x3 convolution, and four stages of blocks.

    Beside the attributes of `StagedNetwork`:

    Attributes:
      depths: blocks per stage.
      width: features of the first stage.
      block_classes: class of the blocks of every stage.
      inner_act: activation inside the blocks; `act` follows their sums.
      stem_act: activation of the stem.
    """

    depths: tuple[int, ...]
    width: int = 64
    block_classes: tuple[ModuleDef, ...] = (TBasicBlock, TBasicBlock, TBottleneck, TBottleneck)
    stages: tuple[int, ...] | None = (2, 3, 4)
    inner_act: Activation = LEAKY
    stem_act: Activation = STEM_LEAKY

    head_path = ("head", "fc")
    stem_path = ("body", "conv1", "conv")

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The residual blocks."""
        return tuple(("body", *path) for path in numbered_blocks(self.depths))

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The maps of the four stages (strides 4, 8, 16, 32)."""
        parts = self.parts()
        stem = partial(ConvNorm, self.width, **{**parts, "act": self.stem_act}, kernel_size=3)
        attentions = self.attention_by_stage(len(self.depths))
        rates, stages = iter(self.drop_path_rates(sum(self.depths))), []
        for stage, (depth, block) in enumerate(zip(self.depths, self.block_classes, strict=True)):
            block = partial(
                block, self.width * 2**stage, **parts, inner_act=self.inner_act, attention=attentions[stage]
            )
            strides = (2 if stage and i == 0 else 1 for i in range(depth))
            stages.append(tuple(partial(block, strides=each, drop_path_rate=next(rates)) for each in strides))
        return Body(stem, tuple(stages), name="body")(x, train=train)


def at_least_64(width: float) -> int:
    """Rounds a hidden width down, to 64 or more."""
    return max(int(width), 64)


SE = partial(SqueezeExcite, fraction=0.25, rounding=at_least_64)
V1 = partial(TResNet, attention=SE)
V2 = partial(V1, block_classes=(TBottleneck,) * 4)
_R = "Ridnik et al. 2021, table 2; timm"

VARIANTS: dict[str, Variant] = {
    "tresnet_m": Variant(partial(V1, depths=(3, 4, 11, 3)), 31_389_032, 224, _R),
    "tresnet_l": Variant(partial(V1, depths=(4, 5, 18, 3), width=76), 55_989_256, 224, _R),
    "tresnet_xl": Variant(partial(V1, depths=(4, 5, 24, 3), width=83), 78_436_244, 224, _R),
    "tresnet_v2_l": Variant(partial(V2, depths=(3, 4, 23, 3)), 46_174_824, 224, "released model; timm"),
}
