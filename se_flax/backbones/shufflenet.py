"""ShuffleNet v1 with and without squeeze-and-excitation (Zhang et al. 2018, table 1; Hu et al. 2020, table 3).

Attention sits on the residual branch of every unit, before the sum or concatenation, with r = 16: 2,484,533 parameters
beside 1,865,728. Hu et al. print 2.4M and 1.8M, which is both cut off after the first digit (or a count in units of
2^20); gates on the units' outputs would make 2.6M. Their 140 and 142 MFLOPs are multiply-adds with the shortcuts' means
and sums (139.6M) and with the gates' pooling too (141.8M).
"""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import SqueezeExcite
from se_flax.errors import UserError
from se_flax.lowering.sharding import gathered
from se_flax.nn.network import Path, StagedNetwork, numbered_blocks
from se_flax.nn.norm_attention import norm_act_attend
from se_flax.nn.pooling import max_pool
from se_flax.nn.residual import Block, Placement
from se_flax.variant import Variant

Array = jax.Array


def channel_shuffle(x: Array, groups: int) -> Array:
    """Sends the channels of every group to all groups of the next convolution (Zhang et al. 2018, section 3.1).

    Args:
      x: [N, H, W, C].
      groups: of the convolutions; divides C.

    Returns:
      [N, H, W, C]: of C = groups * n channels, number i * n + j became number j * groups + i.
    """
    *shape, channels = x.shape
    return gathered(x, -1).reshape(*shape, groups, channels // groups).swapaxes(-1, -2).reshape(x.shape)


class ShuffleUnit(Block):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1 (Zhang et al. 2018, figure 2b and c).

    With a stride, the branch makes the channels that the input does not have, and the shortcut is a 3x3 mean. The
    bottleneck has a quarter of the unit's channels.

    Attributes:
      first_groups: of the first 1x1; 1 in the network's first unit, whose input is narrow.
    """

    first_groups: int = 1

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        hidden, strided = self.features // 4, self.strides > 1
        y = self.attend(x, Placement.PRE, train)
        y = self.conv(hidden, 1, groups=self.first_groups, name="conv1")(y)
        y = channel_shuffle(self.act(self.norm(name="bn1")(y, train=train)), self.groups)
        y = self.conv(hidden, 3, strides=self.strides, groups=hidden, name="conv2")(y)
        y = norm_act_attend(self.norm(name="bn2"), self.attention_at(Placement.AFTER_3X3), y, train=train)
        missing = self.features - x.shape[-1] if strided else self.features
        y = self.conv(missing, 1, groups=self.groups, name="conv3")(y)
        y = self.drop(
            norm_act_attend(self.norm(name="bn3"), self.attention_at(Placement.STANDARD), y, train=train), train
        )
        if strided:
            x = nn.avg_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        x = self.attend(x, Placement.IDENTITY, train)
        return self.attend(self.act(jnp.concatenate([x, y], -1) if strided else x + y), Placement.POST, train)


class ShuffleNet(StagedNetwork, kw_only=True):
    """3x3 convolution and max-pooling, three stages of units.

    Attention is in every unit of `stages`. Beside the attributes of `StagedNetwork`:

    Attributes:
      groups: of the 1x1 convolutions.
      widths: output channels of the stages; the paper chooses them by `groups` so that the cost stays: 144, 200, 240,
        272 and 384 in the first stage for 1, 2, 3, 4 and 8 groups, and twice as many in each of the next.
      depths: units per stage.
      stem: features of the first convolution.
      placement: where in a unit the attention is, see `nn.residual.Placement`.
    """

    groups: int = 3
    widths: tuple[int, ...] = (240, 480, 960)
    depths: tuple[int, ...] = (4, 8, 4)
    stem: int = 24
    placement: str | Placement = Placement.STANDARD

    head_path = ("fc",)
    stem_path = ("conv1",)

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The units."""
        return numbered_blocks(self.depths)

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The maps of the first convolution (stride 2), its pooling (4) and the three stages (8, 16, 32)."""
        self._check_groups()
        parts = self.parts()
        x = parts["conv"](self.stem, 3, strides=2, name="conv1")(x)
        x = self.act(parts["norm"](name="bn1")(x, train=train))
        maps = {"stem": x, "pool": (x := max_pool(x))}
        rates = self.drop_path_rates(sum(self.depths))
        attentions = self.attention_by_stage(len(self.depths))
        index = 0
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for i in range(depth):
                x = ShuffleUnit(
                    width,
                    **parts,
                    strides=2 if i == 0 else 1,
                    attention=attentions[stage],
                    placement=Placement.parse(self.placement),
                    groups=self.groups,
                    first_groups=self.groups if index else 1,
                    drop_path_rate=rates[index],
                    name=f"layer{stage + 1}_{i}",
                )(x, train=train)
                index += 1
            maps[f"layer{stage + 1}"] = x
        return maps

    def _check_groups(self) -> None:
        if len(self.widths) != len(self.depths):
            raise UserError(f"got widths={self.widths} for {len(self.depths)} stages; give one width per stage")
        # What the grouped convolutions make: the bottleneck, and in strided units what the input lacks.
        for before, width in itertools.pairwise((self.stem, *self.widths)):
            hidden, missing = width // 4, width - before
            if hidden % self.groups or missing <= 0 or missing % self.groups:
                raise UserError(
                    f"got groups={self.groups} for units of {width} channels, which make {hidden} and {missing}; "
                    "groups must divide both: give widths that fit, such as groups=3, widths=(240, 480, 960)"
                )


SE = SqueezeExcite

VARIANTS: dict[str, Variant] = {
    "shufflenet_g3_100": Variant(ShuffleNet, 1_865_728, 224, "Zhang et al. 2018, table 1: 1x, g = 3"),
    "se_shufflenet_g3_100": Variant(partial(ShuffleNet, attention=SE), 2_484_533, 224, "Hu et al. 2020, table 3"),
}
