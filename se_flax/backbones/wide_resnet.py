"""Wide residual networks for 32-pixel images (Zagoruyko & Komodakis 2016), with and without squeeze-and-excitation.

WRN-16-8 is a CIFAR network of Hu et al. 2020, tables 4 and 5.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import SqueezeExcite
from se_flax.backbones.resnet import attention_stages
from se_flax.blocks import Block, ModuleDef, Placement, project_linear
from se_flax.errors import UserError
from se_flax.layers import BatchNorm, Conv, check_images, classify
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


class WideResNet(nn.Module):
    """3x3 stem of 16 features, three stages of 16k, 32k and 64k, norm, activation, mean, classifier (table 1).

    Attributes:
      layers: depth as the paper counts it, 6n + 4 for n blocks per stage.
      widen: k.
      num_classes: width of the classifier; 0 leaves it out, and the call returns the pooled features.
      attention: attention class or partial in every block of `stages`; None for none.
      stages: which stages carry it: 2, 3, 4 (1 is the stem); None for all.
      placement: where in a block it sits, see `blocks.Placement`.
      conv: convolution class or partial.
      norm: batch-norm class or partial.
      act: activation.
      classifier: class or partial of the last layer, called as `classifier(num_classes, kernel_init=..., name=...)`.
      drop_rate: dropout between the convolutions of every block, where the paper has it (0.3 on CIFAR); there is none
        before the classifier.
      drop_path_rate: stochastic depth of the last block; earlier ones linearly less.
      in_channels: of the images.
      dtype: of the arithmetic; parameters, statistics, gates and logits are float32.
    """

    layers: int
    widen: int
    num_classes: int = 10
    attention: ModuleDef | None = None
    stages: tuple[int, ...] | None = None
    placement: str | Placement = Placement.STANDARD
    conv: ModuleDef = Conv
    norm: ModuleDef = BatchNorm
    act: Callable[[Array], Array] = jax.nn.relu
    classifier: ModuleDef = nn.Dense
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
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
          float32 logits [N, num_classes]; with `return_features`, also a list of the three stages' maps [N, h, w, c]
          (strides 1, 2, 4).

        Raises:
          UserError: images of the wrong rank, channel count or dtype; an unknown placement or stage; a depth that is
            not 6n + 4.
        """
        check_images(images, self.in_channels)
        depth, rest = divmod(self.layers - 4, 6)
        if rest or depth < 1:
            raise UserError(f"got layers={self.layers}; a wide residual network has 6n + 4, such as 16, 22 or 28")
        attending = attention_stages(self.stages, 3)
        conv, norm = partial(self.conv, dtype=self.dtype), partial(self.norm, dtype=self.dtype)

        x = conv(16, 3, name="conv1")(images.astype(self.dtype or images.dtype))
        features = []
        for stage in range(3):
            for i in range(depth):
                x = PreActBasicBlock(
                    16 * self.widen * 2**stage,
                    conv=conv,
                    norm=norm,
                    act=self.act,
                    strides=2 if i == 0 and stage > 0 else 1,
                    attention=self.attention if stage + 2 in attending else None,
                    placement=Placement.parse(self.placement),
                    downsample=project_linear,
                    drop_rate=self.drop_rate,
                    drop_path_rate=self.drop_path_rate * (stage * depth + i) / (3 * depth - 1),
                    name=f"layer{stage + 1}_{i}",
                )(x, train=train)
            if stage == 2:
                x = self.act(norm(name="bn")(x, train=train))
            features.append(x)

        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        x = classify(x, self.classifier, self.num_classes, name="linear", kernel_init=nn.initializers.he_normal())
        return (x, features) if return_features else x


SE = SqueezeExcite

_WIDE = "Zagoruyko & Komodakis 2016, table 1"
_HU = "Hu et al. 2020, section 5.1"
_HU_TOO = "Zagoruyko & Komodakis 2016, table 1, with attention as in Hu et al. 2020"

VARIANTS: dict[str, Variant] = {
    "wrn16_8": Variant(partial(WideResNet, layers=16, widen=8), 10_961_370, 32, _WIDE),
    "wrn28_10": Variant(partial(WideResNet, layers=28, widen=10), 36_479_194, 32, _WIDE),
    "se_wrn16_8": Variant(partial(WideResNet, layers=16, widen=8, attention=SE), 11_049_290, 32, _HU),
    "se_wrn28_10": Variant(partial(WideResNet, layers=28, widen=10, attention=SE), 36_752_754, 32, _HU_TOO),
}
