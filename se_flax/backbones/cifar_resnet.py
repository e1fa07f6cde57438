"""Residual networks for 32-pixel images (He et al. 2016, section 4.2; pre-activation: He et al. 2016b).

SE-ResNet-110 and SE-ResNet-164 are the CIFAR networks of Hu et al. 2020, tables 4 and 5. Wide and Shake-Shake networks
are the same network with other blocks (`wide_resnet`, `shake`).
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from se_flax.attention import SqueezeExcite
from se_flax.nn.network import Path, StagedNetwork, numbered_blocks
from se_flax.nn.residual import BasicBlock, ModuleDef, Placement, PreActBottleneck, pad_channels, project_linear
from se_flax.variant import Variant

Array = jax.Array


class CifarResNet(StagedNetwork, kw_only=True):
    """3x3 stem at full resolution, three stages whose width doubles while their map halves.

    Attention is in every block of `stages`. Beside the attributes of `StagedNetwork`:

    Attributes:
      depth: blocks per stage (n of the paper: 6n + 2 layers with basic blocks, 9n + 2 with bottlenecks).
      width: features of the first stage's blocks.
      block: class or partial of a residual block, such as `BasicBlock` or `PreActBottleneck`.
      placement: where in a block the attention is, see `nn.residual.Placement`.
      downsample: shortcut where the shape changes: `pad_channels` (option A, no parameters), `project_linear` or
        `project`.
      stem: features of the stem.
      stem_norm: a norm follows the stem; if not, it follows the last block, as blocks that start with a norm need it.
      stem_act: likewise the activation.
      drop_in_blocks: dropout is between the convolutions of every block (`wide_resnet.PreActBasicBlock`), not before
        the classifier.
      zero_init_last: each block starts as the identity (not used by pre-activation blocks).
    """

    depth: int
    width: int = 16
    block: ModuleDef = BasicBlock
    placement: str | Placement = Placement.STANDARD
    downsample: Callable[..., Array] = pad_channels
    stem: int = 16
    stem_norm: bool = True
    stem_act: bool = True
    num_classes: int = 10
    drop_in_blocks: bool = False
    zero_init_last: bool = False

    classifier_init = staticmethod(nn.initializers.he_normal())
    head_path = ("linear",)
    stem_path = ("conv1",)

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The residual blocks."""
        return numbered_blocks((self.depth,) * 3)

    @property
    def head_drop_rate(self) -> float:
        """Dropout rate before the classifier."""
        return 0.0 if self.drop_in_blocks else self.drop_rate

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The three stages' maps (strides 1, 2, 4)."""
        parts, maps = self.parts(), {}
        conv, norm = parts["conv"], parts["norm"]
        dropout = {"drop_rate": self.drop_rate} if self.drop_in_blocks else {}

        x = conv(self.stem, 3, name="conv1")(x)
        x = norm(name="bn1")(x, train=train) if self.stem_norm else x
        x = self.act(x) if self.stem_act else x
        rates = iter(self.drop_path_rates(3 * self.depth))
        for stage, attention in enumerate(self.attention_by_stage(3)):
            for i in range(self.depth):
                x = self.block(
                    self.width * 2**stage,
                    **parts,
                    strides=2 if i == 0 and stage > 0 else 1,
                    attention=attention,
                    placement=Placement.parse(self.placement),
                    downsample=self.downsample,
                    drop_path_rate=next(rates),
                    zero_init_last=self.zero_init_last,
                    **dropout,
                    name=f"layer{stage + 1}_{i}",
                )(x, train=train)
            if stage == 2:
                x = x if self.stem_norm else norm(name="bn")(x, train=train)
                x = x if self.stem_act else self.act(x)
            maps[f"layer{stage + 1}"] = x
        return maps


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
