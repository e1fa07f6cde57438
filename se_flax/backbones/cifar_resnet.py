"""Residual networks for 32-pixel images (He et al. 2016, section 4.2; pre-activation: He et al. 2016b).

SE-ResNet-110 and SE-ResNet-164 are the CIFAR networks of Hu et al. 2020, tables 4 and 5. Wide and Shake-Shake networks
are the same frame around other blocks (`wide_resnet`, `shake`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import SqueezeExcite
from se_flax.backbones.resnet import attention_stages
from se_flax.nn.conv import Conv
from se_flax.nn.head import classify
from se_flax.nn.network import Network, Path, check_images, numbered_blocks
from se_flax.nn.norm import BatchNorm
from se_flax.nn.residual import BasicBlock, ModuleDef, Placement, PreActBottleneck, pad_channels, project_linear
from se_flax.variant import Variant

Array = jax.Array


class CifarResNet(Network):
    """3x3 stem at full resolution, three stages whose width doubles while their map halves, mean, classifier.

    Attributes:
      depth: blocks per stage (n of the paper: 6n + 2 layers with basic blocks, 9n + 2 with bottlenecks).
      width: features of the first stage's blocks.
      block: class or partial of a residual block, such as `BasicBlock` or `PreActBottleneck`.
      downsample: shortcut where the shape changes: `pad_channels` (option A, no parameters), `project_linear` or
        `project`.
      stem: features of the stem.
      stem_norm: a norm follows the stem; if not, it follows the last block, as blocks that start with a norm need it.
      stem_act: likewise the activation.
      num_classes: width of the classifier; 0 leaves it out, and the call returns the pooled features.
      attention: attention class or partial in every block of `stages`; None for none.
      stages: which stages carry it: 2, 3, 4 (1 is the stem); None for all.
      placement: where in a block it sits, see `blocks.Placement`.
      conv: convolution class or partial.
      norm: batch-norm class or partial.
      act: activation.
      classifier: class or partial of the last layer, called as `classifier(num_classes, kernel_init=..., name=...)`.
      drop_rate: dropout before the classifier.
      drop_in_blocks: it is between the convolutions of every block instead (`wide_resnet.PreActBasicBlock`).
      drop_path_rate: stochastic depth of the last block; earlier ones linearly less.
      zero_init_last: each block starts as the identity (not used by pre-activation blocks).
      in_channels: of the images.
      dtype: of the arithmetic; parameters, statistics, gates and logits are float32.
    """

    depth: int
    width: int = 16
    block: ModuleDef = BasicBlock
    downsample: Callable[..., Array] = pad_channels
    stem: int = 16
    stem_norm: bool = True
    stem_act: bool = True
    num_classes: int = 10
    attention: ModuleDef | None = None
    stages: tuple[int, ...] | None = None
    placement: str | Placement = Placement.STANDARD
    conv: ModuleDef = Conv
    norm: ModuleDef = BatchNorm
    act: Callable[[Array], Array] = jax.nn.relu
    classifier: ModuleDef = nn.Dense
    drop_rate: float = 0.0
    drop_in_blocks: bool = False
    drop_path_rate: float = 0.0
    zero_init_last: bool = False
    in_channels: int = 3
    dtype: Any = None

    @property
    def head_path(self) -> Path:
        """Torch's `linear`."""
        return ("linear",)

    @property
    def stem_path(self) -> Path:
        """The 3x3 convolution in front."""
        return ("conv1",)

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The residual blocks."""
        return numbered_blocks((self.depth,) * 3)

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False, return_features: bool = False) -> Any:
        """Classifies images.

        Args:
          images: float [N, H, W, in_channels], normalised.
          train: batch statistics, dropout, stochastic depth and the blocks' own noise are active (all but the first
            need an rng named `dropout`).
          return_features: return the map of every resolution as well.

        Returns:
          float32 logits [N, num_classes]; with `return_features`, also a list of the three stages' maps [N, h, w, c]
          (strides 1, 2, 4).

        Raises:
          UserError: images of the wrong rank, channel count or dtype; an unknown placement or stage; what the block
            refuses.
        """
        images = check_images(images, self.in_channels)
        attending = attention_stages(self.stages, 3)
        conv, norm = partial(self.conv, dtype=self.dtype), partial(self.norm, dtype=self.dtype)
        dropout = {"drop_rate": self.drop_rate} if self.drop_in_blocks else {}

        x = conv(self.stem, 3, name="conv1")(images.astype(self.dtype or images.dtype))
        x = norm(name="bn1")(x, train=train) if self.stem_norm else x
        x = self.act(x) if self.stem_act else x
        features = []
        for stage in range(3):
            for i in range(self.depth):
                index = stage * self.depth + i
                x = self.block(
                    self.width * 2**stage,
                    conv=conv,
                    norm=norm,
                    act=self.act,
                    strides=2 if i == 0 and stage > 0 else 1,
                    attention=self.attention if stage + 2 in attending else None,
                    placement=Placement.parse(self.placement),
                    downsample=self.downsample,
                    drop_path_rate=self.drop_path_rate * index / max(3 * self.depth - 1, 1),
                    zero_init_last=self.zero_init_last,
                    **dropout,
                    name=f"layer{stage + 1}_{i}",
                )(x, train=train)
            if stage == 2:
                x = x if self.stem_norm else norm(name="bn")(x, train=train)
                x = x if self.stem_act else self.act(x)
            features.append(x)

        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        x = classify(
            x,
            self.classifier,
            self.num_classes,
            name=self.head_path[-1],
            kernel_init=nn.initializers.he_normal(),
            drop_rate=0.0 if self.drop_in_blocks else self.drop_rate,
            train=train,
        )
        return (x, features) if return_features else x


SE = SqueezeExcite
PRE_ACTIVATION = partial(CifarResNet, downsample=project_linear, stem_norm=False, stem_act=False)
PRE_164 = partial(PRE_ACTIVATION, depth=18, block=PreActBottleneck)

_HE = "He et al. 2016, section 4.2, identity shortcuts (option A)"
_HE_B = "He et al. 2016b, section 3; 164 layers"
_HU = "Hu et al. 2020, section 5.1"

VARIANTS: dict[str, Variant] = {
    "resnet20": Variant(partial(CifarResNet, depth=3), 269_722, 32, _HE),
    "resnet32": Variant(partial(CifarResNet, depth=5), 464_154, 32, _HE),
    "resnet44": Variant(partial(CifarResNet, depth=7), 658_586, 32, _HE),
    "resnet56": Variant(partial(CifarResNet, depth=9), 853_018, 32, _HE),
    "resnet110": Variant(partial(CifarResNet, depth=18), 1_727_962, 32, _HE),
    "seresnet20": Variant(partial(CifarResNet, depth=3, attention=SE), 272_095, 32, _HU),
    "seresnet32": Variant(partial(CifarResNet, depth=5, attention=SE), 468_109, 32, _HU),
    "seresnet44": Variant(partial(CifarResNet, depth=7, attention=SE), 664_123, 32, _HU),
    "seresnet56": Variant(partial(CifarResNet, depth=9, attention=SE), 860_137, 32, _HU),
    "seresnet110": Variant(partial(CifarResNet, depth=18, attention=SE), 1_742_200, 32, _HU),
    "preresnet164": Variant(PRE_164, 1_703_258, 32, _HE_B),
    "sepreresnet164": Variant(partial(PRE_164, attention=SE), 1_905_362, 32, _HU),
}
