"""ReXNet (Han et al. 2021): mobile blocks of linearly growing width, whose shortcut covers their first channels.

The attention is squeeze-and-excitation with a batch norm between its layers, before the activation of the depthwise
convolution. The names are timm's.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import SqueezeExcite
from se_flax.functional import round_to_multiple
from se_flax.nn.conv import he_normal_fan_out
from se_flax.nn.mobile import fan_out_init
from se_flax.nn.network import Path, StagedNetwork
from se_flax.nn.norm import BatchNorm
from se_flax.nn.residual import ConvNorm, ModuleDef, drop_path
from se_flax.variant import Variant

Array = jax.Array


class ReXNetBlock(nn.Module):
    """Expand, depthwise convolution, attention, activation, project (Han et al. 2021, released code).

    Attributes:
      features: output channels.
      conv: as in `nn.residual.Block`.
      norm: as in `nn.residual.Block`.
      act: activation of the expansion.
      inner_act: activation of the depthwise convolution, after the attention.
      strides: of the block.
      hidden: expanded channels; None for no expansion.
      attention: attention class or partial, or None.
      drop_path_rate: probability of dropping the branch (stochastic depth).
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array] = jax.nn.silu
    inner_act: Callable[[Array], Array] = jax.nn.relu6
    strides: int = 1
    hidden: int | None = None
    attention: ModuleDef | None = None
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        width = self.hidden or x.shape[-1]
        attention = None if self.attention is None else self.attention(name="se")
        dense, spatial = (partial(self.conv, kernel_init=fan_out_init(groups)) for groups in (1, width))
        unit = partial(ConvNorm, norm=self.norm)
        y = unit(width, dense, act=self.act, name="conv_exp")(x, train=train) if self.hidden else x
        middle = unit(width, spatial, kernel_size=3, strides=self.strides, groups=width, name="conv_dw")
        y = self.inner_act(middle(y, train=train, attention=attention))
        y = unit(self.features, dense, name="conv_pwl")(y, train=train)
        new = self.features - x.shape[-1]
        if self.strides > 1 or new < 0:
            return y
        if train and self.drop_path_rate > 0.0:
            y = drop_path(y, self.drop_path_rate, self.make_rng("dropout"))
        # The block's new channels have no shortcut.
        return y + jnp.pad(x, [(0, 0)] * 3 + [(0, new)])


class ReXNet(StagedNetwork, kw_only=True):
    """Stem of stride 2, stages of `ReXNetBlock`s, and a 1x1 convolution before the pooling.

    Beside the attributes of `StagedNetwork`:

    Attributes:
      widths: channels of every block, stage by stage.
      strides: of the stages.
      stem: features of the stem.
      head: features of the last 1x1 convolution.
      divisor: expanded channels, six times the block's input (none in the first stage), are multiples of it.
      stages: which stages carry attention; None for the third and later ones, as published.
      act: activation of all convolutions but the depthwise ones.
      inner_act: activation of the depthwise convolutions.
    """

    widths: tuple[tuple[int, ...], ...]
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2)
    stem: int = 32
    head: int = 1280
    divisor: int = 1
    act: Callable[[Array], Array] = jax.nn.silu
    inner_act: Callable[[Array], Array] = jax.nn.relu6

    head_path = ("head", "fc")
    stem_path = ("stem", "conv")

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The mobile blocks and the last convolution."""
        return tuple((f"features_{i}",) for i in range(sum(map(len, self.widths)) + 1))

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The last map of every resolution before the 1x1 convolution (strides 2, 4, 8, 16, 32)."""
        parts = self.parts()
        reads = parts | {"conv": partial(parts["conv"], kernel_init=fan_out_init())}
        x = ConvNorm(self.stem, **reads, kernel_size=3, strides=2, name="stem")(x, train=train)
        maps = {"stem": x}
        attentions = self.attention_by_stage(len(self.widths))
        rates = iter(self.drop_path_rates(sum(map(len, self.widths))))
        index = 0
        for stage, (widths, strides, attention) in enumerate(zip(self.widths, self.strides, attentions, strict=True)):
            if strides == 1:
                maps.popitem()
            for i, width in enumerate(widths):
                hidden = round_to_multiple(6 * x.shape[-1], self.divisor) if stage else None
                x = ReXNetBlock(
                    width,
                    **parts,
                    inner_act=self.inner_act,
                    strides=1 if i else strides,
                    hidden=hidden,
                    attention=attention,
                    drop_path_rate=next(rates),
                    name=f"features_{index}",
                )(x, train=train)
                index += 1
            maps[f"features_{index - 1}"] = x
        return maps

    @nn.nowrap
    def attention_by_stage(self, count: int) -> list[ModuleDef | None]:
        """As in `StagedNetwork`, but only from the third stage on where `stages` is None."""
        everywhere = super().attention_by_stage(count)
        return everywhere if self.stages is not None else [None, None, *everywhere[2:]]

    def pooled(self, x: Array, train: bool) -> Array:
        """Last convolution and mean; returns float32 [N, head]."""
        parts = self.parts()
        parts |= {"conv": partial(parts["conv"], kernel_init=fan_out_init())}
        name = "_".join(self.block_paths[-1])
        return super().pooled(ConvNorm(self.head, **parts, name=name)(x, train=train), train)


def rounded(value: float, divisor: int) -> int:
    """Whole part of a width, as a multiple of a divisor."""
    return round_to_multiple(int(value), divisor)


DEPTHS = (1, 2, 2, 3, 3, 5)


def rexnet(width: float = 1.0, divisor: int = 1) -> partial[ReXNet]:
    """A ReXNet of scaled width: 16 channels, and in every block 180 / 16 more (Han et al. 2021, released code).

    Args:
      width: multiplier of all channels.
      divisor: all channels are multiples of it.
    """
    total = sum(DEPTHS)
    channels = [16 + 180 / total * i for i in range(total)]
    rounded_widths = iter(round_to_multiple(round(c * width), divisor) for c in channels)
    widths = tuple(tuple(next(rounded_widths) for _ in range(depth)) for depth in DEPTHS)
    hidden = partial(rounded, divisor=divisor)
    se = partial(SqueezeExcite, fraction=1 / 12, rounding=hidden, norm=BatchNorm, kernel_init=he_normal_fan_out)
    stem, head = (round_to_multiple(c * width, divisor) for c in (32, 1280))
    return partial(ReXNet, widths=widths, stem=stem, head=head, divisor=divisor, attention=se)


_P = "Han et al. 2021, released code; timm"
_R = "timm, after Han et al. 2021"

VARIANTS: dict[str, Variant] = {
    "rexnet_100": Variant(rexnet(), 4_796_873, 224, _P),
    "rexnet_130": Variant(rexnet(1.3), 7_557_091, 224, _P),
    "rexnet_150": Variant(rexnet(1.5), 9_728_593, 224, _P),
    "rexnet_200": Variant(rexnet(2.0), 16_366_620, 224, _P),
    "rexnet_300": Variant(rexnet(3.0), 34_708_792, 224, _P),
    "rexnetr_100": Variant(rexnet(1.0, 8), 4_883_304, 224, _R),
    "rexnetr_130": Variant(rexnet(1.3, 8), 7_608_080, 224, _R),
    "rexnetr_150": Variant(rexnet(1.5, 8), 9_782_256, 224, _R),
    "rexnetr_200": Variant(rexnet(2.0, 8), 16_522_432, 224, _R),
    "rexnetr_300": Variant(rexnet(3.0, 16), 34_810_008, 224, _R),
}
