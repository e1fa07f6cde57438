"""RepGhostNet (Chen et al. 2022): GhostNet whose modules add a norm to their depthwise convolution.

`se_flax.fuse` turns that sum into one convolution, as in the authors' network for inference. The names are timm's.
"""

from functools import partial

import flax.linen as nn
import jax

from se_flax.backbones.ghostnet import LAYOUT, GhostBottleneck, GhostModule, ghostnet
from se_flax.lowering.dispatch import share_computation
from se_flax.nn.parallel import Branch
from se_flax.variant import Variant

Array = jax.Array


class RepGhostModule(GhostModule):
    """A 1x1 convolution and the sum of its depthwise convolution and its norm."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H, W, features]."""
        y = share_computation(self.act(self.primary(x, self.features, train)))
        conv = self.conv(self.features, 3, groups=self.features, name="cheap_operation_0")
        spatial = Branch(conv, self.norm(name="cheap_operation_1"))
        y = self.act(self.add_branches(y, spatial, Branch(norm=self.norm(name="fusion_bn_0")), train=train))
        return self.gated(y, x, train)


# Released code: GhostNet's with half of its hidden channels, but 120 for 184.
HALVED = tuple(
    tuple((k, {184: 120}.get(hidden, hidden // 2), c, se, s) for k, hidden, c, se, s in stage) for stage in LAYOUT
)
repghost = partial(ghostnet, table=HALVED, block=partial(GhostBottleneck, ghost=RepGhostModule))

_R = "Chen et al. 2022, released code; timm"

VARIANTS: dict[str, Variant] = {
    "repghostnet_050": Variant(repghost(0.5), 2_313_968, 224, _R),
    "repghostnet_058": Variant(repghost(0.58), 2_546_388, 224, _R),
    "repghostnet_080": Variant(repghost(0.8), 3_278_968, 224, _R),
    "repghostnet_100": Variant(repghost(1.0), 4_073_604, 224, _R),
    "repghostnet_111": Variant(repghost(1.11), 4_539_984, 224, _R),
    "repghostnet_130": Variant(repghost(1.3), 5_478_612, 224, _R),
    "repghostnet_150": Variant(repghost(1.5), 6_575_336, 224, _R),
    "repghostnet_200": Variant(repghost(2.0), 9_796_124, 224, _R),
}
