"""VoVNet-V2 (Lee and Park 2020): one-shot aggregation of all layers of a block, then effective SE; timm's names."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import ECA, EffectiveSE
from se_flax.functional import ACTIVATIONS
from se_flax.nn.network import Path, StagedNetwork
from se_flax.nn.norm import EvoNormS0
from se_flax.nn.norm_attention import conv_norm_attend
from se_flax.nn.pooling import caffe_max_pool
from se_flax.nn.residual import ConvNorm, ModuleDef, drop_path
from se_flax.variant import Variant

Array = jax.Array


class SeparableConvNorm(nn.Module):
    """Depthwise 3x3, 1x1, norm and activation, as submodules `conv_dw`, `conv_pw` and `bn`; else as `ConvNorm`."""

    features: int
    conv: ModuleDef
    norm: ModuleDef
    kernel_size: int = 3
    strides: int = 1
    act: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        size, groups = self.kernel_size, x.shape[-1]
        x = self.conv(groups, size, strides=self.strides, groups=groups, name="conv_dw")(x)
        x = conv_norm_attend(self.conv(self.features, 1, name="conv_pw"), self.norm(name="bn"), None, x, train=train)
        return x if self.act is None else self.act(x)


class Aggregation(nn.Module):
    """One-shot aggregation: layers in a row, all outputs and the input joined by a 1x1 (section 3.1, figure 3b).

    Attributes:
      features: output channels.
      width: of the layers in the row.
      layers: how many of them.
      unit: class or partial of such a layer.
      reduces: a 1x1 convolution brings an input of another width to that of the layers first.
      conv: convolution.
      norm: norm.
      act: activation.
      attention: attention class or partial, after the 1x1; None for none.
      adds: the block's input is added to its output (section 3.1, figure 3c).
      drop_path_rate: probability of dropping the output (stochastic depth).
    """

    features: int
    width: int
    layers: int
    unit: ModuleDef
    reduces: bool
    conv: ModuleDef
    norm: ModuleDef
    act: Any
    attention: ModuleDef | None = None
    adds: bool = False
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H, W, features]."""
        parts: dict[str, Any] = {"conv": self.conv, "norm": self.norm, "act": self.act}
        y, outputs = x, [x]
        if self.reduces and x.shape[-1] != self.width:
            y = ConvNorm(self.width, **parts, name="conv_reduction")(y, train=train)
        for i in range(self.layers):
            y = self.unit(self.width, **parts, kernel_size=3, name=f"conv_mid_{i}")(y, train=train)
            outputs.append(y)
        attention = None if self.attention is None else self.attention(name="attn")
        joined = jnp.concatenate(outputs, -1)
        y = ConvNorm(self.features, **parts, name="conv_concat")(joined, train=train, attention=attention)
        if train and self.drop_path_rate:
            y = drop_path(y, self.drop_path_rate, self.make_rng("dropout"))
        return x + y if self.adds else y


class AggregationStage(nn.Module):
    """A stage: blocks in turn, under `blocks_0`, `blocks_1`, ...; where `pools`, after max-pooling at stride 2."""

    blocks: tuple[ModuleDef, ...]
    pools: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, h, w, features]."""
        x = caffe_max_pool(x) if self.pools else x
        for i, block in enumerate(self.blocks):
            x = block(name=f"blocks_{i}")(x, train=train)
        return x


class VoVNet(StagedNetwork, kw_only=True):
    """Three 3x3 convolutions and four stages of aggregations; attention is in the last block of a stage.

    Beside the attributes of `StagedNetwork`:

    Attributes:
      widths: of the layers in the blocks of every stage.
      features: output channels of the stages.
      depths: blocks per stage.
      block_layers: 3x3 layers in a block.
      stem: features of the first three convolutions, of strides 2, 1 and 2.
      unit: class or partial of the layers, `ConvNorm` or `SeparableConvNorm`.
    """

    widths: tuple[int, ...] = (128, 160, 192, 224)
    features: tuple[int, ...] = (256, 512, 768, 1024)
    depths: tuple[int, ...] = (1, 1, 1, 1)
    block_layers: int = 5
    stem: tuple[int, int, int] = (64, 64, 128)
    unit: ModuleDef = ConvNorm

    head_path = ("head", "fc")
    stem_path = ("stem_0", "conv")

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """The aggregations."""
        return tuple((f"stages_{s}", f"blocks_{i}") for s, depth in enumerate(self.depths) for i in range(depth))

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The maps of the stem's second convolution (stride 2) and of the four stages (4, 8, 16, 32)."""
        parts = self.parts()
        x = ConvNorm(self.stem[0], **parts, kernel_size=3, strides=2, name="stem_0")(x, train=train)
        maps = {"stem": (x := self.unit(self.stem[1], **parts, kernel_size=3, name="stem_1")(x, train=train))}
        x = self.unit(self.stem[2], **parts, kernel_size=3, strides=2, name="stem_2")(x, train=train)
        rates = iter(self.drop_path_rates(sum(self.depths)))
        attentions = self.attention_by_stage(len(self.depths))
        reduces = self.unit is SeparableConvNorm
        for s, (width, features, depth) in enumerate(zip(self.widths, self.features, self.depths, strict=True)):
            block = partial(Aggregation, features, width, self.block_layers, self.unit, reduces, **parts)
            blocks = tuple(
                partial(
                    block,
                    attention=attentions[s] if i == depth - 1 else None,
                    adds=i > 0,
                    drop_path_rate=next(rates),
                )
                for i in range(depth)
            )
            maps[f"stages_{s}"] = (x := AggregationStage(blocks, s > 0, name=f"stages_{s}")(x, train=train))
        return maps


V2 = partial(VoVNet, attention=EffectiveSE)
V19 = partial(V2, block_layers=3)
SLIM: dict[str, Any] = {"widths": (64, 80, 96, 112), "features": (112, 256, 384, 512)}
DW: dict[str, Any] = {"unit": SeparableConvNorm, "stem": (64, 64, 64)}
EVO: dict[str, Any] = {"norm": partial(EvoNormS0, groups=32), "act": ACTIVATIONS["identity"]}
_LEE = "Lee and Park 2020, table 1"

VARIANTS: dict[str, Variant] = {
    "ese_vovnet19b_slim_dw": Variant(partial(V19, **SLIM, **DW), 1_897_752, 224, "timm, after Lee and Park 2020"),
    "ese_vovnet19b_slim": Variant(partial(V19, **SLIM), 3_166_136, 224, "timm, after Lee and Park 2020"),
    "ese_vovnet19b_dw": Variant(partial(V19, **DW), 6_543_080, 224, "timm, after Lee and Park 2020"),
    "ese_vovnet39b": Variant(partial(V2, depths=(1, 1, 2, 2)), 24_568_936, 224, _LEE),
    "ese_vovnet57b": Variant(partial(V2, depths=(1, 1, 4, 3)), 38_608_936, 256, _LEE),
    "ese_vovnet99b": Variant(partial(V2, depths=(1, 3, 9, 3)), 63_199_272, 224, _LEE),
    "ese_vovnet39b_evos": Variant(partial(V2, depths=(1, 1, 2, 2), **EVO), 24_579_144, 224, "timm"),
    "eca_vovnet39b": Variant(partial(V2, depths=(1, 1, 2, 2), attention=ECA), 22_600_316, 224, "timm"),
}
