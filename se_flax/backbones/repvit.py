"""RepViT (Wang et al. 2024): depthwise token mixers, trained with parallel branches, and pointwise channel mixers.

`se_flax.fuse` turns the branches of a token mixer into one convolution. The names are timm's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from se_flax.attention import SqueezeExcite
from se_flax.lowering.dispatch import share_computation
from se_flax.nn.conv import he_normal_fan_out
from se_flax.nn.head import classify, own_dense
from se_flax.nn.network import Path, StagedNetwork
from se_flax.nn.norm_attention import norm_act_attend
from se_flax.nn.parallel import Branch, ParallelBlock
from se_flax.nn.residual import ConvNorm, ModuleDef, drop_path
from se_flax.variant import Variant

Array = jax.Array
Activation = Callable[[Array], Array]
NAMES = ("c", "bn")


def gelu(x: Array) -> Array:
    """GELU by the normal distribution function itself, not its approximation."""
    return jax.nn.gelu(x, approximate=False)


class TokenMixer(ParallelBlock):
    """Sum of a depthwise 3x3, a depthwise 1x1 convolution and the input (section 3.2).

    Attributes:
      conv: as in `nn.residual.Block`.
      norm: as in `nn.residual.Block`.
      norm_each: a norm after each convolution, as in the first release (M1 to M3); if not, after the 3x3 and the sum.
    """

    conv: ModuleDef
    norm: ModuleDef
    norm_each: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, attention: Any = None) -> Array:
        """Args: x [N, H, W, C]; train; attention: module applied last, or None. Returns: the shape of x."""
        unit = partial(ConvNorm, x.shape[-1], self.conv, self.norm, groups=x.shape[-1], names=NAMES)
        spatial: Any = unit(kernel_size=3, name="conv")
        if self.norm_each:
            x = self.add_branches(x, spatial, unit(name="conv1"), Branch(), train=train)
            return x if attention is None else attention(x, train=train)
        pointwise = Branch(self.conv(x.shape[-1], 1, groups=x.shape[-1], use_bias=True, name="conv1"))
        x = self.add_branches(x, spatial, pointwise, Branch(), train=train)
        return norm_act_attend(self.norm(name="bn"), attention, x, train=train)


class ChannelMixer(nn.Module):
    """The residual branch of two 1x1 convolutions.

    Attributes:
      expand: hidden channels over the input's.
      conv: as in `nn.residual.Block`.
      norm: as in `nn.residual.Block`.
      act: activation between the convolutions.
      drop_path_rate: probability of dropping the branch (stochastic depth).
    """

    expand: int
    conv: ModuleDef
    norm: ModuleDef
    act: Activation = gelu
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: x plus the branch."""
        unit = partial(ConvNorm, conv=self.conv, names=NAMES)
        last = partial(self.norm, scale_init=nn.initializers.zeros_init())  # starts as the identity
        y = unit(x.shape[-1] * self.expand, norm=self.norm, act=self.act, name="conv1")(x, train=train)
        y = unit(x.shape[-1], norm=last, name="conv2")(y, train=train)
        if train and self.drop_path_rate > 0.0:
            y = drop_path(y, self.drop_path_rate, self.make_rng("dropout"))
        return x + y


class RepViTBlock(nn.Module):
    """Token mixer, attention, channel mixer (section 3.2).

    Attributes:
      conv: as in `nn.residual.Block`.
      norm: as in `nn.residual.Block`.
      act: as in `ChannelMixer`.
      attention: attention class or partial, or None.
      expand: as in `ChannelMixer`.
      norm_each: as in `TokenMixer`.
      drop_path_rate: as in `ChannelMixer`.
    """

    conv: ModuleDef
    norm: ModuleDef
    act: Activation = gelu
    attention: ModuleDef | None = None
    expand: int = 2
    norm_each: bool = False
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: the shape of x."""
        attention = None if self.attention is None else self.attention(name="se")
        mixer = TokenMixer(self.conv, self.norm, self.norm_each, name="token_mixer")
        x = share_computation(mixer(x, train=train, attention=attention))
        return self.mix_channels("channel_mixer")(x, train=train)

    @nn.nowrap
    def mix_channels(self, name: str) -> ChannelMixer:
        """A channel mixer of this block."""
        return ChannelMixer(self.expand, self.conv, self.norm, self.act, self.drop_path_rate, name=name)


class RepViTDownsample(RepViTBlock):
    """A block, a strided depthwise and a pointwise convolution, and a channel mixer (section 3.3).

    Attributes:
      features: output channels.
    """

    features: int = 0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / 2, W / 2, features]."""
        same = (self.conv, self.norm, self.act, self.attention, self.expand, self.norm_each, self.drop_path_rate)
        x = RepViTBlock(*same, name="pre_block")(x, train=train)
        channels, unit = x.shape[-1], partial(ConvNorm, conv=self.conv, norm=self.norm, names=NAMES)
        x = unit(channels, kernel_size=3, strides=2, groups=channels, name="spatial_downsample")(x, train=train)
        x = share_computation(unit(self.features, name="channel_downsample")(x, train=train))
        return self.mix_channels("ffn")(x, train=train)


class RepViTStage(nn.Module):
    """Downsampling, except in the first stage, and blocks.

    Attributes:
      blocks: classes or partials.
      downsample: class or partial, or None.
    """

    blocks: tuple[ModuleDef, ...]
    downsample: ModuleDef | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, h, w, features]."""
        if self.downsample is not None:
            x = self.downsample(name="downsample")(x, train=train)
        for i, block in enumerate(self.blocks):
            x = block(name=f"blocks_{i}")(x, train=train)
        return x


class RepViTStem(nn.Module):
    """Two 3x3 convolutions of stride 2.

    Attributes:
      features: output channels.
      conv: as in `nn.residual.Block`.
      norm: as in `nn.residual.Block`.
      act: activation between them.
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    act: Activation = gelu

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / 4, W / 4, features]."""
        unit = partial(ConvNorm, conv=self.conv, norm=self.norm, kernel_size=3, strides=2, names=NAMES)
        x = unit(self.features // 2, act=self.act, name="conv1")(x, train=train)
        y: Array = unit(self.features, name="conv2")(x, train=train)
        return y


class TwoHeads(nn.Module):
    """The mean of two classifiers behind a norm each, for labels and for a teacher.

    Attributes:
      features: number of classes.
      norm: as in `nn.residual.Block`.
      classifier: class or partial of the dense layers.
      kernel_init: of their weights.
      train: the norms use the batch's statistics.
    """

    features: int
    norm: ModuleDef
    classifier: ModuleDef
    kernel_init: nn.initializers.Initializer
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x [N, C]. Returns: float32 [N, features]."""
        head = partial(NormedClassifier, self.features, self.norm, self.classifier, self.kernel_init, self.train)
        y: Array = (head(name="head")(x) + head(name="head_dist")(x)) / 2
        return y


class NormedClassifier(nn.Module):
    """A norm and a classifier. Attributes as in `TwoHeads`."""

    features: int
    norm: ModuleDef
    classifier: ModuleDef
    kernel_init: nn.initializers.Initializer
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x [N, C]. Returns: float32 [N, features]."""
        x = self.norm(name="bn")(x, train=self.train)
        y: Array = self.classifier(self.features, kernel_init=self.kernel_init, name="l")(x)
        return y


class RepViT(StagedNetwork, kw_only=True):
    """Stem of stride 4, four stages and two classifiers whose mean is the output.

    Every second block of the stages that carry attention has it, from the first on. Beside the attributes of
    `StagedNetwork`:

    Attributes:
      widths: channels of the stages.
      depths: blocks of the stages beside their downsampling.
      expand: hidden channels of the channel mixers over their input's.
      norm_each: as in `TokenMixer`.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    expand: int = 2
    norm_each: bool = False
    act: Activation = gelu

    classifier_init = staticmethod(nn.initializers.truncated_normal(0.02))
    head_path = ("head",)
    stem_path = ("stem", "conv1", "c")

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The downsamplings and the blocks."""
        stages = (((("downsample",) if s else ()), depth) for s, depth in enumerate(self.depths))
        return tuple(
            (f"stages_{s}", part)
            for s, (first, depth) in enumerate(stages)
            for part in (*first, *(f"blocks_{i}" for i in range(depth)))
        )

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The maps of the four stages (strides 4, 8, 16, 32)."""
        parts = self.parts()
        x = RepViTStem(self.widths[0], **parts, name="stem")(x, train=train)
        rates = iter(self.drop_path_rates(len(self.block_paths)))
        attentions, maps = self.attention_by_stage(len(self.widths)), {}
        parts |= {"expand": self.expand, "norm_each": self.norm_each}
        for s, (width, depth, attention) in enumerate(zip(self.widths, self.depths, attentions, strict=True)):
            first = partial(RepViTDownsample, **parts, features=width, drop_path_rate=next(rates)) if s else None
            blocks = (
                partial(RepViTBlock, **parts, attention=None if i % 2 else attention, drop_path_rate=next(rates))
                for i in range(depth)
            )
            maps[f"stages_{s}"] = (x := RepViTStage(tuple(blocks), first, name=f"stages_{s}")(x, train=train))
        return maps

    def classified(self, x: Array, train: bool) -> Array:
        """The mean of the two classifiers; returns float32 [N, num_classes]."""
        heads = partial(TwoHeads, norm=self.norm, classifier=own_dense(self.classifier), train=train)
        return classify(
            x,
            heads,
            self.num_classes,
            path=self.head_path,
            kernel_init=self.classifier_init,
            drop_rate=self.head_drop_rate,
            train=train,
        )


SE = partial(SqueezeExcite, fraction=0.25, rounding="multiple_of_8_any", kernel_init=he_normal_fan_out)


def repvit(width: int, *depths: int, **attributes: Any) -> partial[RepViT]:
    """A RepViT by the width of its first stage, which doubles from stage to stage, and its depths."""
    widths = tuple(width * 2**i for i in range(4))
    return partial(RepViT, widths=widths, depths=depths, **{"attention": SE, **attributes})


first_release = partial(repvit, norm_each=True)

_M = "Wang et al. 2024, released code; timm"
_FIRST = "first release of Wang et al. 2024's code; timm"

VARIANTS: dict[str, Variant] = {
    "repvit_m0_9": Variant(repvit(48, 2, 2, 14, 2), 5_489_328, 224, _M),
    "repvit_m1_0": Variant(repvit(56, 2, 2, 14, 2), 7_302_796, 224, _M),
    "repvit_m1_1": Variant(repvit(64, 2, 2, 12, 2), 8_802_912, 224, _M),
    "repvit_m1_5": Variant(repvit(64, 4, 4, 24, 4), 14_644_432, 224, _M),
    "repvit_m2_3": Variant(repvit(80, 6, 6, 34, 2), 23_688_792, 224, _M),
    "repvit_m1": Variant(first_release(48, 2, 2, 14, 2), 5_485_248, 224, _FIRST),
    "repvit_m2": Variant(first_release(64, 2, 2, 12, 2), 8_797_984, 224, _FIRST),
    "repvit_m3": Variant(first_release(64, 4, 4, 18, 2), 10_682_832, 224, _FIRST),
}
