"""ResNet, ResNeXt, SENet and their variants (He et al. 2016; Xie et al. 2017; Hu et al. 2020, table 1).

Later variants are attributes of the same network: deep and tiered stems and a pooled shortcut (He et al. 2019:
ResNet-D), anti-aliasing (Zhang 2019), a convolution in place of the max-pooling (Bello et al. 2021: ResNet-RS), another
attention (Wang et al. 2020: ECA), pruned channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from se_flax.attention import ECA, SqueezeExcite
from se_flax.backbones import pruned_widths
from se_flax.errors import UserError
from se_flax.nn.network import Path, StagedNetwork, first_layer, numbered_blocks, reads_images
from se_flax.nn.pooling import max_pool
from se_flax.nn.residual import BasicBlock, Bottleneck, ModuleDef, Placement, average_by_2, project
from se_flax.variant import Variant

Array = jax.Array


@reads_images("conv1")
def stem_7x7(
    x: Array, features: int, *, conv: ModuleDef, norm: ModuleDef, act: Callable[[Array], Array], train: bool
) -> Array:
    """One 7x7 convolution at stride 2, norm and activation (He et al. 2016, table 1).

    Its layers, like those of every stem and pooling here, belong to the network that calls it and have torch's names.

    Args:
      x: images [N, H, W, C].
      features: of the network's first stage.
      conv: convolution, called as `conv(features, kernel_size, strides=..., name=...)`.
      norm: batch norm, called as `norm(name=...)(x, train=...)`.
      act: activation.
      train: the norms use the batch's statistics.

    Returns:
      [N, H / 2, W / 2, features].
    """
    x = conv(features, 7, strides=2, name="conv1")(x)
    return act(norm(name="bn1")(x, train=train))


@reads_images("conv1_0")
def deep_stem(
    x: Array,
    features: int,
    *,
    conv: ModuleDef,
    norm: ModuleDef,
    act: Callable[[Array], Array],
    train: bool,
    widths: tuple[int, ...] = (32, 32, 64),
) -> Array:
    """A stack of 3x3 convolutions, the first at stride 2 (He et al. 2019, figure 2b: ResNet-C).

    Args:
      x: images [N, H, W, C].
      features: of the network's first stage.
      conv: as in `stem_7x7`.
      norm: as in `stem_7x7`.
      act: activation.
      train: the norms use the batch's statistics.
      widths: of the convolutions at 64 features; scaled with `features`. Unequal ones make the tiered stem.

    Returns:
      [N, H / 2, W / 2, widths[-1] * features / 64].
    """
    *inner, last = (width * features // 64 for width in widths)
    strides = 2
    # Torch counts the activations of its list too: convolutions are 0, 3, 6, norms 1, 4.
    for i, width in enumerate(inner):
        x = conv(width, 3, strides=strides, name=f"conv1_{3 * i}")(x)
        x = act(norm(name=f"conv1_{3 * i + 1}")(x, train=train))
        strides = 1
    x = conv(last, 3, strides=strides, name=f"conv1_{3 * len(inner)}")(x)
    return act(norm(name="bn1")(x, train=train))


def max_pooling(x: Array, **parts: Any) -> Array:
    """3x3 max-pooling at stride 2 (He et al. 2016, table 1); `parts` of the network are ignored."""
    del parts
    return max_pool(x)


def mean_pooling(x: Array, **parts: Any) -> Array:
    """2x2 mean at stride 2, the stem pooling of timm's anti-aliased networks; an odd last row or column is left out."""
    del parts
    return nn.avg_pool(x, (2, 2), (2, 2))


def conv_pooling(x: Array, *, conv: ModuleDef, norm: ModuleDef, act: Callable[[Array], Array], train: bool) -> Array:
    """3x3 convolution at stride 2 in place of the pooling, with norm and activation (Bello et al. 2021, table 10).

    Args:
      x: [N, H, W, C].
      conv: as in `stem_7x7`.
      norm: as in `stem_7x7`.
      act: activation.
      train: the norm uses the batch's statistics.

    Returns:
      [N, H / 2, W / 2, C].
    """
    x = conv(x.shape[-1], 3, strides=2, name="maxpool_0")(x)
    return act(norm(name="maxpool_1")(x, train=train))


class ResNet(StagedNetwork, kw_only=True):
    """Residual network for 224-pixel images: stem, pooling, four stages.

    Attention is in every block of `stages`. Beside the attributes of `StagedNetwork`:

    Attributes:
      depths: blocks per stage.
      block: `BasicBlock`, `Bottleneck` or a partial of one.
      placement: where in a block the attention is, see `nn.residual.Placement`.
      stem: from the images to half their size: `stem_7x7`, or a partial of `deep_stem`; one of your own says by
        `reads_images` which of its layers the images go to.
      pool: between the stem and the first stage: `max_pooling`, `mean_pooling`, `conv_pooling`, or None.
      strides: of the stages. (1, 2, 2, 1) keeps the last stage at twice the usual resolution.
      downsample: shortcut where a block changes the shape: `project` or a partial of it.
      groups: of the 3x3 convolutions (ResNeXt's cardinality).
      base_width: channels per group at 64 features.
      stride_first: stride in a bottleneck's first 1x1 (the MSRA form that the paper's GFLOPs count) instead of its
        3x3 ("v1.5").
      width: features of the first stage.
      widths: of every bottleneck's three convolutions, per stage and block, in place of what `width`, `groups` and
        `base_width` give (pruned networks).
      zero_init_last: each block starts as the identity.
      attention_name: submodule name of the attention in its block.
      classifier_name: submodule name of the classifier.
    """

    depths: tuple[int, ...]
    block: ModuleDef
    placement: str | Placement = Placement.STANDARD
    stem: Callable[..., Array] = stem_7x7
    pool: Callable[..., Array] | None = max_pooling
    strides: tuple[int, ...] = (1, 2, 2, 2)
    downsample: Callable[..., Array] = project
    groups: int = 1
    base_width: int = 64
    stride_first: bool = False
    width: int = 64
    widths: tuple[tuple[tuple[int, int, int], ...], ...] | None = None
    zero_init_last: bool = True
    attention_name: str = "se"
    classifier_name: str = "fc"

    @property
    def head_path(self) -> Path:
        """`classifier_name`."""
        return (self.classifier_name,)

    @property
    def stem_path(self) -> Path:
        """The path that the stem declares."""
        return first_layer(self.stem)

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The residual blocks."""
        return numbered_blocks(self.depths)

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The maps of the stem (stride 2) and the four stages (4, 8, 16, 32); of stages at one resolution, the last."""
        self._check_stages()
        parts = self.parts()
        x = self.stem(x, self.width, **parts, train=train)
        maps = {"stem": x}
        if self.pool is not None:
            x = self.pool(x, **parts, train=train)
        rates = iter(self.drop_path_rates(sum(self.depths)))
        attentions = self.attention_by_stage(len(self.depths))
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                pruned = {} if self.widths is None else {"widths": self.widths[stage][i]}
                x = self.block(
                    self.width * 2**stage,
                    **parts,
                    strides=self.strides[stage] if i == 0 else 1,
                    attention=attentions[stage],
                    placement=Placement.parse(self.placement),
                    attention_name=self.attention_name,
                    downsample=self.downsample,
                    groups=self.groups,
                    base_width=self.base_width,
                    stride_first=self.stride_first,
                    drop_path_rate=next(rates),
                    zero_init_last=self.zero_init_last,
                    name=f"layer{stage + 1}_{i}",
                    **pruned,
                )(x, train=train)
            if x.shape[1:3] == maps[next(reversed(maps))].shape[1:3]:
                maps.popitem()
            maps[f"layer{stage + 1}"] = x
        return maps

    def _check_stages(self) -> None:
        if len(self.strides) != len(self.depths):
            raise UserError(f"got strides={self.strides} for {len(self.depths)} stages; give one stride per stage")
        if self.widths is not None and tuple(map(len, self.widths)) != tuple(self.depths):
            raise UserError(
                f"got depths={self.depths}, but widths for {tuple(map(len, self.widths))} blocks; a pruned network has "
                "one triple of widths per block: change both, or take the network that it was pruned from"
            )


DEEP = partial(deep_stem, widths=(32, 32, 64))
WIDE_DEEP = partial(deep_stem, widths=(64, 64, 128))
TIERED = partial(deep_stem, widths=(24, 32, 64))
AVERAGED = partial(project, average=True)
SMOOTH_BOTTLENECK = partial(Bottleneck, antialias=average_by_2)

SE = SqueezeExcite
# timm rounds the hidden width to a multiple of eight, which shows only where blocks are narrower than 128 channels.
SE_OF_8 = partial(SqueezeExcite, rounding="multiple_of_8_any")
SE_QUARTER = partial(SqueezeExcite, reduction=4.0)
PRUNED_ECA = partial(ECA, from_base=True)

BASIC = partial(ResNet, block=BasicBlock)
BOTTLENECK = partial(ResNet, block=Bottleneck)
RESNEXT = partial(BOTTLENECK, groups=32, base_width=4)
RESNEXT_32X8D = partial(BOTTLENECK, groups=32, base_width=8)
MSRA = partial(BOTTLENECK, stride_first=True)
RESNET_D = partial(BOTTLENECK, stem=DEEP, downsample=AVERAGED)
RESNET_T = partial(BOTTLENECK, stem=TIERED, downsample=AVERAGED)
RESNEXT_D = partial(RESNEXT, stem=DEEP, downsample=AVERAGED)
RESNEXT_T = partial(RESNEXT, stem=TIERED, downsample=AVERAGED)
RESNEXT_D_32X8D = partial(RESNEXT_32X8D, stem=DEEP, downsample=AVERAGED)
SMOOTH_D = partial(RESNET_D, block=SMOOTH_BOTTLENECK, pool=mean_pooling)
SMOOTH_RESNEXT_D = partial(RESNEXT_D_32X8D, block=SMOOTH_BOTTLENECK, pool=mean_pooling)
RS = partial(RESNET_D, pool=conv_pooling, attention=SE_QUARTER)
SENET = partial(
    ResNet,
    block=partial(Bottleneck, reduce_first=2),
    downsample=partial(project, kernel_size=3),
    groups=64,
    base_width=4,
    drop_rate=0.2,
)

D18, D34, D50, D101, D152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
D26, D200, D269 = (2, 2, 2, 2), (3, 24, 36, 3), (3, 30, 48, 8)

_HE = "He et al. 2016, table 1; stride as in torchvision and timm"
_MSRA = "He et al. 2016, table 1; stride as in the released Caffe models"
_HU = "Hu et al. 2020, table 1; timm"
_HU_MSRA = "Hu et al. 2020, tables 1 and 2; released Caffe model's stride"
_HU_154 = "Hu et al. 2020, appendix; stem named as in timm's port from Gluon"
_XIE = "Xie et al. 2017, table 1"
_WANG = "Wang et al. 2020, table 3"
_D = "He et al. 2019, figure 2 (ResNet-D), with attention; timm"
_AA = "ResNet-D with 2x2 means for its strides (after Zhang 2019), with attention; timm"
_PRUNED = "ResNet-D with ECA, pruned as in Aflalo et al. 2020; timm"
_RS = "Bello et al. 2021, table 10; timm"

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
    "ecaresnet50": Variant(partial(BOTTLENECK, depths=D50, attention=ECA), 25_557_118, 224, _WANG),
    "seresnext101_32x8d": Variant(partial(RESNEXT_32X8D, depths=D101, attention=SE), 93_569_048, 224, _HU),
    "seresnext101_64x4d": Variant(
        partial(BOTTLENECK, depths=D101, groups=64, base_width=4, attention=SE), 88_232_984, 224, _HU
    ),
    "senet154": Variant(partial(SENET, depths=D152, stem=WIDE_DEEP, attention=SE), 115_088_984, 224, _HU_154),
    "seresnet50t": Variant(partial(RESNET_T, depths=D50, attention=SE), 28_104_720, 224, _D),
    "seresnet152d": Variant(partial(RESNET_D, depths=D152, attention=SE), 66_841_080, 256, _D),
    "seresnet200d": Variant(partial(RESNET_D, depths=D200, attention=SE), 71_855_096, 224, _D),
    "seresnet269d": Variant(partial(RESNET_D, depths=D269, attention=SE), 113_672_760, 224, _D),
    "seresnext26d_32x4d": Variant(partial(RESNEXT_D, depths=D26, attention=SE), 16_809_512, 224, _D),
    "seresnext26t_32x4d": Variant(partial(RESNEXT_T, depths=D26, attention=SE), 16_806_976, 224, _D),
    "seresnext101d_32x8d": Variant(partial(RESNEXT_D_32X8D, depths=D101, attention=SE), 93_588_280, 224, _D),
    "seresnetaa50d": Variant(partial(SMOOTH_D, depths=D50, attention=SE), 28_107_256, 224, _AA),
    "seresnextaa101d_32x8d": Variant(partial(SMOOTH_RESNEXT_D, depths=D101, attention=SE), 93_588_280, 224, _AA),
    "seresnextaa201d_32x8d": Variant(
        partial(SMOOTH_RESNEXT_D, depths=(3, 24, 36, 4), stem=WIDE_DEEP, attention=SE), 149_394_904, 320, _AA
    ),
    "ecaresnet26t": Variant(partial(RESNET_T, depths=D26, attention=ECA), 16_011_916, 256, _D),
    "ecaresnet50t": Variant(partial(RESNET_T, depths=D50, attention=ECA), 25_573_814, 224, _D),
    "ecaresnet50d": Variant(partial(RESNET_D, depths=D50, attention=ECA), 25_576_350, 224, _D),
    "ecaresnet101d": Variant(partial(RESNET_D, depths=D101, attention=ECA), 44_568_563, 224, _D),
    "ecaresnet200d": Variant(partial(RESNET_D, depths=D200, attention=ECA), 64_693_400, 224, _D),
    "ecaresnet269d": Variant(partial(RESNET_D, depths=D269, attention=ECA), 102_093_077, 320, _D),
    "ecaresnet50d_pruned": Variant(
        partial(RESNET_D, depths=D50, attention=PRUNED_ECA, widths=pruned_widths.ECARESNET50D), 19_939_713, 224, _PRUNED
    ),
    "ecaresnet101d_pruned": Variant(
        partial(RESNET_D, depths=D101, attention=PRUNED_ECA, widths=pruned_widths.ECARESNET101D),
        24_876_040,
        224,
        _PRUNED,
    ),
    "ecaresnetlight": Variant(
        partial(BOTTLENECK, depths=(1, 1, 11, 3), downsample=AVERAGED, attention=ECA), 30_162_046, 224, _D
    ),
    "ecaresnext26t_32x4d": Variant(partial(RESNEXT_T, depths=D26, attention=ECA), 15_406_220, 224, _D),
    "ecaresnext50t_32x4d": Variant(partial(RESNEXT_T, depths=D50, attention=ECA), 25_045_686, 224, _D),
    "resnetrs50": Variant(partial(RS, depths=D50), 35_691_912, 160, _RS),
    "resnetrs101": Variant(partial(RS, depths=D101), 63_618_696, 192, _RS),
    "resnetrs152": Variant(partial(RS, depths=D152), 86_621_576, 256, _RS),
    "resnetrs200": Variant(partial(RS, depths=D200), 93_209_992, 256, _RS),
    "resnetrs270": Variant(partial(RS, depths=(4, 29, 53, 4)), 129_861_448, 256, _RS),
    "resnetrs350": Variant(partial(RS, depths=(4, 36, 72, 4)), 163_956_168, 288, _RS),
    "resnetrs420": Variant(partial(RS, depths=(4, 44, 87, 4)), 191_891_656, 320, _RS),
}
