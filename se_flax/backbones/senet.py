"""SENet's original release (Hu et al. 2020, appendix; Caffe), in the layout of timm's `legacy_` networks.

They are the networks of `resnet.py` with Caffe's conventions: the stem's layers nest under `layer0`, max-pooling pads
after the last pixel only, the stride of a bottleneck is in its first 1x1, and the submodules are called `se_module` and
`last_linear`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from se_flax.attention import SqueezeExcite
from se_flax.backbones.resnet import D18, D26, D34, D50, D101, D152, SENET, ResNet
from se_flax.nn.network import reads_images
from se_flax.nn.norm_attention import norm_act_attend
from se_flax.nn.pooling import caffe_max_pool
from se_flax.nn.residual import Block, Bottleneck, ModuleDef, Placement
from se_flax.variant import Variant

Array = jax.Array


class CaffeStem(nn.Module):
    """Convolutions, the first at stride 2, each with norm and activation: `conv1`, `bn1`, `conv2`, ...

    Attributes:
      widths: of the convolutions.
      kernel_size: of all of them.
      conv: convolution.
      norm: batch norm.
      act: activation.
    """

    widths: tuple[int, ...]
    kernel_size: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x images [N, H, W, C]. Returns: [N, H / 2, W / 2, widths[-1]]."""
        for i, width in enumerate(self.widths, start=1):
            x = self.conv(width, self.kernel_size, strides=2 if i == 1 else 1, name=f"conv{i}")(x)
            x = self.act(self.norm(name=f"bn{i}")(x, train=train))
        return x


@reads_images("layer0", "conv1")
def caffe_stem(
    x: Array, features: int, *, train: bool, widths: tuple[int, ...] = (64,), kernel_size: int = 7, **parts: Any
) -> Array:
    """`CaffeStem` under the name `layer0`, called as `resnet.stem_7x7` is.

    Args:
      x: images [N, H, W, C].
      features: of the network's first stage.
      train: the norms use the batch's statistics.
      widths: of the convolutions at 64 features; scaled with `features`.
      kernel_size: of all of them.
      **parts: `conv`, `norm` and `act` of the network.

    Returns:
      [N, H / 2, W / 2, widths[-1] * features / 64].
    """
    scaled = tuple(width * features // 64 for width in widths)
    return CaffeStem(scaled, kernel_size, **parts, name="layer0")(x, train=train)


def caffe_max_pooling(x: Array, **parts: Any) -> Array:
    """3x3 max-pooling at stride 2, padded after the last row and column only, as in Caffe.

    Args:
      x: [N, H, W, C].
      **parts: of the network; not needed.

    Returns:
      [N, H / 2, W / 2, C], halves rounded down except that a map of one pixel keeps it.
    """
    del parts
    return caffe_max_pool(x)


class CaffeBasicBlock(Block):
    """Two 3x3 convolutions, each with norm *and* activation: attention sees a branch without negative values.

    timm's `legacy_seresnet18` and `34` were trained so; the released Caffe models have bottlenecks only.
    """

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        y = self.attend(x, Placement.PRE, train)
        y = self.conv(self.features, 3, strides=self.conv_strides, name="conv1")(y)
        y = self.norm(name="bn1")(y, train=train)
        y = self.low_pass(self.act(self.attend(y, Placement.AFTER_3X3, train)))
        y = self.conv(self.features, 3, name="conv2")(y)
        y = norm_act_attend(
            self.last_norm(name="bn2"), self.attention_at(Placement.STANDARD), y, train=train, act=self.act
        )
        return self.add(x, y, train)


CAFFE: dict[str, Any] = {
    "stem": caffe_stem,
    "pool": caffe_max_pooling,
    "attention": SqueezeExcite,
    "attention_name": "se_module",
    "classifier_name": "last_linear",
    "zero_init_last": False,
}
BASIC = partial(ResNet, block=CaffeBasicBlock, **CAFFE)
MSRA = partial(ResNet, block=Bottleneck, stride_first=True, **CAFFE)
RESNEXT = partial(ResNet, block=Bottleneck, groups=32, base_width=4, **CAFFE)
SENET_154 = partial(SENET, **{**CAFFE, "stem": partial(caffe_stem, widths=(64, 64, 128), kernel_size=3)}, depths=D152)

_TIMM = "Hu et al. 2020, table 1, trained by timm"
_HU = "Hu et al. 2020, tables 1 and 2; released Caffe model"
_HU_154 = "Hu et al. 2020, appendix; released Caffe model"

VARIANTS: dict[str, Variant] = {
    "legacy_seresnet18": Variant(partial(BASIC, depths=D18), 11_778_592, 224, _TIMM),
    "legacy_seresnet34": Variant(partial(BASIC, depths=D34), 21_958_868, 224, _TIMM),
    "legacy_seresnet50": Variant(partial(MSRA, depths=D50), 28_088_024, 224, _HU),
    "legacy_seresnet101": Variant(partial(MSRA, depths=D101), 49_326_872, 224, _HU),
    "legacy_seresnet152": Variant(partial(MSRA, depths=D152), 66_821_848, 224, _HU),
    "legacy_seresnext26_32x4d": Variant(partial(RESNEXT, depths=D26), 16_790_280, 224, _TIMM),
    "legacy_seresnext50_32x4d": Variant(partial(RESNEXT, depths=D50), 27_559_896, 224, _HU),
    "legacy_seresnext101_32x4d": Variant(partial(RESNEXT, depths=D101), 48_955_416, 224, _HU),
    "legacy_senet154": Variant(SENET_154, 115_088_984, 224, _HU_154),
}
