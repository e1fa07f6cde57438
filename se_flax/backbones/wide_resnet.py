"""Wide residual networks for 32-pixel images (Zagoruyko & Komodakis 2016), with and without squeeze-and-excitation.

WRN-16-8 is a CIFAR network of Hu et al. 2020, tables 4 and 5. WRN-(6n + 4)-k has n blocks in each of three stages of
16k, 32k and 64k features; its dropout (0.3 on CIFAR) is between the convolutions of every block, with none before the
classifier.
"""

from functools import partial

import flax.linen as nn
import jax

from se_flax.attention import SqueezeExcite
from se_flax.backbones.cifar_resnet import PRE_ACTIVATION
from se_flax.nn.residual import Block, Placement
from se_flax.variant import Variant

Array = jax.Array


class PreActBasicBlock(Block):
    """Norm and activation before each of two 3x3 convolutions (Zagoruyko & Komodakis 2016, figure 1c and d).

    Where the shape changes, the shortcut starts from the pre-activated input, as in the authors' code.

    Attributes:
      drop_rate: dropout between the convolutions.
    """

    drop_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        changes = self.strides != 1 or x.shape[-1] != self.features
        y = self.attend(x, Placement.PRE, train)
        y = self.act(self.norm(name="bn1")(y, train=train))
        # With PRE attention the shortcut must not see the gate: it is the block's input that is projected.
        projected = y if changes and self.placement is not Placement.PRE else x
        y = self.conv(self.features, 3, strides=self.strides, name="conv1")(y)
        y = self.act(self.norm(name="bn2")(self.attend(y, Placement.AFTER_3X3, train), train=train))
        y = nn.Dropout(self.drop_rate, deterministic=not train)(y)
        y = self.conv(self.features, 3, name="conv2")(y)
        y = self.drop(self.attend(y, Placement.STANDARD, train), train)
        x = self.attend(self.shortcut(projected, self.features, train), Placement.IDENTITY, train)
        return self.attend(x + y, Placement.POST, train)


SE = SqueezeExcite
WIDE = partial(PRE_ACTIVATION, block=PreActBasicBlock, drop_in_blocks=True)
WRN_16_8 = partial(WIDE, depth=2, width=8 * 16)
WRN_28_10 = partial(WIDE, depth=4, width=10 * 16)

_WIDE = "Zagoruyko & Komodakis 2016, table 1"
_HU = "Hu et al. 2020, section 5.1"
_HU_TOO = "Zagoruyko & Komodakis 2016, table 1, with attention as in Hu et al. 2020"

VARIANTS: dict[str, Variant] = {
    "wrn16_8": Variant(WRN_16_8, 10_961_370, 32, _WIDE),
    "wrn28_10": Variant(WRN_28_10, 36_479_194, 32, _WIDE),
    "se_wrn16_8": Variant(partial(WRN_16_8, attention=SE), 11_049_290, 32, _HU),
    "se_wrn28_10": Variant(partial(WRN_28_10, attention=SE), 36_752_754, 32, _HU_TOO),
}
