"""ResNet, SE-ResNet and ResNeXt (He et al. 2016; Hu et al. 2020, table 1; Xie et al. 2017)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import ECA, SqueezeExcite
from se_flax.blocks import BasicBlock, Bottleneck, ModuleDef, Placement, project
from se_flax.errors import UserError
from se_flax.layers import BatchNorm, Conv, check_images, max_pool
from se_flax.variant import Variant

Array = jax.Array


def attention_stages(stages: Sequence[int] | None, count: int) -> frozenset[int]:
    """Checks which stages carry attention.

    Args:
      stages: the paper's numbers: 1 is the stem, 2 the first residual stage (conv2_x, torch's layer1). None: all.
      count: residual stages of the network.

    Returns:
      The stages' numbers.

    Raises:
      UserError: a stage that the network does not have.
    """
    every = range(2, 2 + count)
    if stages is None:
        return frozenset(every)
    wrong = sorted(set(stages) - set(every))
    if wrong:
        raise UserError(
            f"got attention stages {tuple(stages)}, but {wrong[0]} is not a residual stage; allowed: "
            f"{', '.join(map(str, every))} (the paper's numbers: 2 is conv2_x, torch's layer1)"
        )
    return frozenset(stages)


class ResNet(nn.Module):
    """Residual network for 224-pixel images: 7x7 stem, max-pooling, four stages, mean, classifier.

    Attributes:
      depths: blocks per stage.
      block: `BasicBlock` or `Bottleneck`.
      num_classes: width of the classifier; 0 leaves it out, and the call returns the pooled features.
      attention: attention class or partial in every block of `stages`; None for none.
      stages: which stages carry it, in the paper's numbers (2 to 5); None for all.
      placement: where in a block it sits, see `blocks.Placement`.
      groups: of the 3x3 convolutions (ResNeXt's cardinality).
      base_width: channels per group at 64 features.
      stride_first: stride in a bottleneck's first 1x1 (the MSRA form that the paper's GFLOPs count) instead of its
        3x3 ("v1.5", torchvision and timm).
      width: features of the first stage.
      conv: convolution class or partial.
      norm: batch-norm class or partial.
      act: activation.
      drop_rate: dropout before the classifier.
      drop_path_rate: stochastic depth of the last block; earlier ones linearly less (Huang et al. 2016, section 3).
      zero_init_last: each block starts as the identity.
      in_channels: of the images.
      dtype: of the arithmetic; parameters, statistics, gates and logits are float32.
    """

    depths: tuple[int, ...]
    block: ModuleDef
    num_classes: int = 1000
    attention: ModuleDef | None = None
    stages: tuple[int, ...] | None = None
    placement: str | Placement = Placement.STANDARD
    groups: int = 1
    base_width: int = 64
    stride_first: bool = False
    width: int = 64
    conv: ModuleDef = Conv
    norm: ModuleDef = BatchNorm
    act: Callable[[Array], Array] = jax.nn.relu
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    zero_init_last: bool = True
    in_channels: int = 3
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False, return_features: bool = False) -> Any:
        """Classifies images.

        Args:
          images: float [N, H, W, in_channels], normalised.
          train: batch statistics, dropout and stochastic depth are active (the last two need an rng named `dropout`).
          return_features: return the map of every resolution as well.

        Returns:
          float32 logits [N, num_classes]; with `return_features`, also a list of maps [N, h, w, c], finest first: the
          stem (stride 2) and the four stages (strides 4, 8, 16, 32).

        Raises:
          UserError: images of the wrong rank, channel count or dtype; an unknown placement or stage.
        """
        check_images(images, self.in_channels)
        attending = attention_stages(self.stages, len(self.depths))
        conv, norm = partial(self.conv, dtype=self.dtype), partial(self.norm, dtype=self.dtype)

        x = images.astype(self.dtype or images.dtype)
        x = conv(self.width, 7, strides=2, name="conv1")(x)
        x = self.act(norm(name="bn1")(x, train=train))
        features = [x]
        x = max_pool(x)
        total, index = sum(self.depths), 0
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                x = self.block(
                    self.width * 2**stage,
                    conv=conv,
                    norm=norm,
                    act=self.act,
                    strides=2 if i == 0 and stage > 0 else 1,
                    attention=self.attention if stage + 2 in attending else None,
                    placement=Placement.parse(self.placement),
                    downsample=project,
                    groups=self.groups,
                    base_width=self.base_width,
                    stride_first=self.stride_first,
                    drop_path_rate=self.drop_path_rate * index / max(total - 1, 1),
                    zero_init_last=self.zero_init_last,
                    name=f"layer{stage + 1}_{i}",
                )(x, train=train)
                index += 1
            features.append(x)

        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        x = nn.Dropout(self.drop_rate, deterministic=not train)(x)
        if self.num_classes:
            x = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="fc")(x)
        return (x, features) if return_features else x


BASIC = partial(ResNet, block=BasicBlock)
BOTTLENECK = partial(ResNet, block=Bottleneck)
RESNEXT = partial(BOTTLENECK, groups=32, base_width=4)
MSRA = partial(BOTTLENECK, stride_first=True)

SE = SqueezeExcite
# timm rounds the hidden width to a multiple of eight, which shows only where blocks are narrower than 128 channels.
SE_OF_8 = partial(SqueezeExcite, rounding="multiple_of_8_any")

D18, D34, D50, D101, D152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)

_HE = "He et al. 2016, table 1; stride as in torchvision and timm"
_MSRA = "He et al. 2016, table 1; stride as in the released Caffe models"
_HU = "Hu et al. 2020, table 1; timm"
_HU_MSRA = "Hu et al. 2020, tables 1 and 2; released Caffe model's stride"
_XIE = "Xie et al. 2017, table 1"

VARIANTS: dict[str, Variant] = {
    "resnet18": Variant(partial(BASIC, depths=D18), 11_689_512, 224, _HE),
    "resnet34": Variant(partial(BASIC, depths=D34), 21_797_672, 224, _HE),
    "resnet50": Variant(partial(BOTTLENECK, depths=D50), 25_557_032, 224, _HE),
    "resnet101": Variant(partial(BOTTLENECK, depths=D101), 44_549_160, 224, _HE),
    "resnet152": Variant(partial(BOTTLENECK, depths=D152), 60_192_808, 224, _HE),
    "msra_resnet50": Variant(partial(MSRA, depths=D50), 25_557_032, 224, _MSRA),
    "msra_resnet101": Variant(partial(MSRA, depths=D101), 44_549_160, 224, _MSRA),
    "msra_resnet152": Variant(partial(MSRA, depths=D152), 60_192_808, 224, _MSRA),
    "resnext50_32x4d": Variant(partial(RESNEXT, depths=D50), 25_028_904, 224, _XIE),
    "resnext101_32x4d": Variant(partial(RESNEXT, depths=D101), 44_177_704, 224, _XIE),
    "seresnet18": Variant(partial(BASIC, depths=D18, attention=SE_OF_8), 11_779_624, 224, _HU),
    "seresnet34": Variant(partial(BASIC, depths=D34, attention=SE_OF_8), 21_960_416, 224, _HU),
    "seresnet50": Variant(partial(BOTTLENECK, depths=D50, attention=SE), 28_088_024, 224, _HU),
    "seresnet101": Variant(partial(BOTTLENECK, depths=D101, attention=SE), 49_326_872, 224, _HU),
    "seresnet152": Variant(partial(BOTTLENECK, depths=D152, attention=SE), 66_821_848, 224, _HU),
    "msra_seresnet50": Variant(partial(MSRA, depths=D50, attention=SE), 28_088_024, 224, _HU_MSRA),
    "msra_seresnet101": Variant(partial(MSRA, depths=D101, attention=SE), 49_326_872, 224, _HU_MSRA),
    "msra_seresnet152": Variant(partial(MSRA, depths=D152, attention=SE), 66_821_848, 224, _HU_MSRA),
    "seresnext50_32x4d": Variant(partial(RESNEXT, depths=D50, attention=SE), 27_559_896, 224, _HU),
    "seresnext101_32x4d": Variant(partial(RESNEXT, depths=D101, attention=SE), 48_955_416, 224, _HU),
    "ecaresnet50": Variant(
        partial(BOTTLENECK, depths=D50, attention=ECA), 25_557_118, 224, "Wang et al. 2020, table 3"
    ),
}
