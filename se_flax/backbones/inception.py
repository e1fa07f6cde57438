"""BN-Inception (Ioffe and Szegedy 2015, figure 5) and SE-BN-Inception, as the authors of SENet released it (Caffe).

Inception-v3 and Inception-ResNet-v2 (`inception_v3.py`, `inception_resnet_v2.py`) are the same network class with other
tables.
"""

from functools import partial

import flax.linen as nn
import jax

from se_flax.attention import SqueezeExcite
from se_flax.backbones.senet import caffe_max_pooling
from se_flax.nn.inception import Mixed, MixedModule, Pool, Step, Unit, apply_unit, average_3x3
from se_flax.nn.network import Network, Path, check_side
from se_flax.nn.pooling import max_pool
from se_flax.variant import Variant

Array = jax.Array
Layout = tuple[tuple[Unit | Mixed | Pool, ...], ...]
"""What a network consists of, one group per resolution."""


class Inception(Network, kw_only=True):
    """A chain of units, poolings and modules of parallel branches, then the pooling and classifier of `Network`.

    Attention is on the output of every module. Beside the attributes of `Network`:

    Attributes:
      layout: the chain, one group per resolution, the finest first.
      smallest: side of the smallest images that leave a pixel behind convolutions without padding.
      classifier_name: submodule name of the classifier.
      drop_path_rate: stochastic depth rate of the last residual module; it falls linearly to 0 at the first one.
    """

    layout: Layout
    smallest: int = 1
    classifier_name: str = "fc"
    drop_path_rate: float = 0.0

    @property
    def head_path(self) -> Path:
        """`classifier_name`."""
        return (self.classifier_name,)

    @property
    def stem_path(self) -> Path:
        """The convolution of the first unit."""
        return (next(entry.name for entry in self.layout[0] if isinstance(entry, Unit)), "conv")

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """Every module of branches, and the first unit or module at every resolution but the stem's.

        So the units at one resolution are a block where no module comes before them, as in timm.
        """
        groups = [[entry for entry in group if isinstance(entry, Unit | Mixed)] for group in self.layout[1:]]
        return tuple((e.name,) for group in groups for i, e in enumerate(group) if i == 0 or isinstance(e, Mixed))

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The last map of every group, named after its last unit or module (strides 2, 4, 8, 16, 32)."""
        check_side(x, self.smallest)
        parts, maps, index = self.parts(), {}, 0
        residual = sum(isinstance(e, Mixed) and e.scale is not None for group in self.layout for e in group)
        for group in self.layout:
            name = ""
            for entry in group:
                if isinstance(entry, Unit):
                    name, x = entry.name, apply_unit(entry, x, **parts, train=train)
                elif isinstance(entry, Mixed):
                    module = MixedModule(
                        entry.branches,
                        **parts,
                        attention=self.attention,
                        scale=entry.scale,
                        activated=entry.activated,
                        drop_path_rate=self.drop_path_rate * index / max(residual - 1, 1),
                        name=entry.name,
                    )
                    name, x = entry.name, module(x, train=train)
                    index += entry.scale is not None
                else:
                    x = entry(x)
            maps[name] = x
        return maps


def max_pooling_to_half(x: Array) -> Array:
    """3x3 max-pooling at stride 2 without padding at the start, [N, H, W, C] to [N, ceil(H / 2), ceil(W / 2), C].

    On even sides it is Caffe's. On odd sides Caffe's result is a pixel smaller than that of the strided convolutions in
    the other branches, so that Caffe's network refuses such images; here the padding is two pixels instead of one.
    """
    return nn.max_pool(x, (3, 3), (2, 2), [(0, 1 + dim % 2 if isinstance(dim, int) else 2) for dim in x.shape[1:3]])


def module(
    name: str, one: int, three: tuple[int, int], double: tuple[int, int], pool: Pool, projection: int, strides: int = 1
) -> Mixed:
    """A row of the paper's table: 1x1, 3x3, two 3x3, and pooling.

    Args:
      name: of the submodule.
      one: features of the 1x1 convolution; 0 leaves the branch out.
      three: of the 1x1 and the 3x3 convolution.
      double: of the 1x1 and both 3x3 convolutions.
      pool: of the last branch.
      projection: features of the 1x1 convolution after it; 0 for none.
      strides: of the last convolution of the two 3x3 branches.
    """
    branches: tuple[tuple[Step, ...], ...] = (
        (Unit("conv_3x3_reduce", three[0]), Unit("conv_3x3", three[1], 3, strides)),
        (
            Unit("double_3x3_reduce", double[0]),
            Unit("double_3x3_a", double[1], 3),
            Unit("double_3x3_b", double[1], 3, strides),
        ),
        (pool, Unit("pool_proj", projection)) if projection else (pool,),
    )
    return Mixed(name, ((Unit("conv_1x1", one),), *branches) if one else branches)


BN_INCEPTION: Layout = (
    (Unit("conv1", 64, 7, 2),),
    (caffe_max_pooling, Unit("conv2_reduce", 64), Unit("conv2", 192, 3)),
    (
        caffe_max_pooling,
        module("inception_3a", 64, (64, 64), (64, 96), average_3x3, 32),
        module("inception_3b", 64, (64, 96), (64, 96), average_3x3, 64),
    ),
    (
        module("inception_3c", 0, (128, 160), (64, 96), max_pooling_to_half, 0, strides=2),
        module("inception_4a", 224, (64, 96), (96, 128), average_3x3, 128),
        module("inception_4b", 192, (96, 128), (96, 128), average_3x3, 128),
        module("inception_4c", 160, (128, 160), (128, 160), average_3x3, 128),
        module("inception_4d", 96, (128, 192), (160, 192), average_3x3, 128),
    ),
    (
        module("inception_4e", 0, (128, 192), (192, 256), max_pooling_to_half, 0, strides=2),
        module("inception_5a", 352, (192, 320), (160, 224), average_3x3, 128),
        module("inception_5b", 352, (192, 320), (192, 224), partial(max_pool, strides=1), 128),
    ),
)

NETWORK = partial(Inception, layout=BN_INCEPTION)

_IOFFE = "Ioffe and Szegedy 2015, figure 5; widths and rounding of the released Caffe model"
_HU = "Hu et al. 2020, table 2; released Caffe model"

VARIANTS: dict[str, Variant] = {
    "bn_inception": Variant(NETWORK, 11_285_224, 224, _IOFFE),
    "se_bn_inception": Variant(partial(NETWORK, attention=SqueezeExcite), 11_931_622, 224, _HU),
}
