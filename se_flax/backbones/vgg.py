"""VGG with batch norm (Simonyan and Zisserman 2015, table 1) in timm's layout, and with SE (Hu et al. 2020)."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from se_flax.attention import SqueezeExcite
from se_flax.errors import UserError
from se_flax.nn.network import ModuleDef, Network, Path, check_side
from se_flax.nn.pooling import max_pool
from se_flax.variant import Variant

Array = jax.Array

WINDOW = 7
"""Side of the map that the first hidden layer takes in."""


def at_least(x: Array, side: int) -> Array:
    """Adaptive average-pooling of maps that are smaller than `side`, as in PyTorch; others are unchanged.

    Pixel i of the result is the mean of the pixels that the i-th of `side` equal intervals touches.

    Args:
      x: [N, H, W, C].
      side: that height and width have at least.

    Returns:
      [N, max(H, side), max(W, side), C].

    Raises:
      UserError: H or W is symbolic (jax.export) and not known to be at least `side`.
    """
    for axis, einsum in ((1, "oh,nhwc->nowc"), (2, "ow,nhwc->nhoc")):
        size = x.shape[axis]
        try:
            is_small = size < side
        except jax.errors.InconclusiveDimensionOperation:
            raise UserError(
                f"got images of symbolic height or width, and a VGG's last map of {side} or more pixels takes another "
                "program than a smaller one; give jax.export.symbolic_shape constraints such as "
                f'["h >= {32 * side}", "w >= {32 * side}"]'
            ) from None
        if is_small:
            touched = np.zeros((side, size), np.float32)
            for i in range(side):
                first, end = i * size // side, -(-(i + 1) * size // side)
                touched[i, first:end] = 1 / (end - first)
            x = jnp.einsum(einsum, touched.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)
    return x


class HiddenLayers(nn.Module):
    """The two layers before the classifier, as convolutions over maps of 7x7 pixels or more.

    Attributes:
      features: of both.
      conv: convolution.
      act: activation.
      drop_rate: dropout between them.
    """

    features: int
    conv: ModuleDef
    act: Callable[[Array], Array]
    drop_rate: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, max(H - 6, 1), max(W - 6, 1), features]."""
        x = self.conv(self.features, WINDOW, padding="VALID", name="fc1")(at_least(x, WINDOW))
        x = nn.Dropout(self.drop_rate, deterministic=not train)(self.act(x))
        return self.act(self.conv(self.features, 1, name="fc2")(x))


class VGG(Network, kw_only=True):
    """Five groups of 3x3 convolutions with a max-pooling after each, and two hidden layers before the classifier.

    Attention is after every convolution's activation; dropout after both hidden layers (Simonyan and Zisserman 2015,
    section 3.1). With `num_classes=0` the call returns the last hidden layer. Beside the attributes of `Network`:

    Attributes:
      depths: convolutions per group.
      widths: features per group.
      hidden: features of the two hidden layers.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    hidden: int = 4096
    drop_rate: float = 0.5

    head_path = ("head", "fc")
    stem_path = ("features_0",)

    @property
    def block_paths(self) -> tuple[Path, ...]:
        """Every layer but the first and the last is a block: a convolution with its norm, a hidden layer."""
        convolutions = [(f"features_{number}",) for group in self._numbers() for number in group]
        return (*convolutions[1:], ("pre_logits", "fc1"), ("pre_logits", "fc2"))

    def _numbers(self) -> list[list[int]]:
        """Torch's numbers of the convolutions in every group.

        Torch counts convolution, norm, activation and pooling in one list.
        """
        before = [3 * sum(self.depths[:group]) + group for group in range(len(self.depths))]
        return [[start + 3 * i for i in range(depth)] for start, depth in zip(before, self.depths, strict=True)]

    def trunk(self, x: Array, train: bool) -> dict[str, Array]:
        """The map of every group before its pooling, and the last one's after it (strides 1, 2, 4, 8, 16, 32)."""
        if len(self.widths) != len(self.depths):
            raise UserError(f"got depths={self.depths} and widths={self.widths}; give one of each per group")
        check_side(x, 2 ** len(self.depths))
        parts, maps = self.parts(), {}
        for group, (numbers, width) in enumerate(zip(self._numbers(), self.widths, strict=True), start=1):
            for i, number in enumerate(numbers):
                x = parts["conv"](width, 3, use_bias=True, name=f"features_{number}")(x)
                x = self.act(parts["norm"](name=f"features_{number + 1}")(x, train=train))
                if self.attention is not None:
                    x = self.attention(name=f"se{group}_{i}")(x, train=train)
            maps[f"group{group}"] = x
            x = max_pool(x, 2, 2, 0)
        return maps | {"pool": x}

    def pooled(self, x: Array, train: bool) -> Array:
        """The hidden layers and the mean of their positions; returns float32 [N, hidden]."""
        conv = partial(self.conv, use_bias=True, dtype=self.dtype)
        x = HiddenLayers(self.hidden, conv, self.act, self.drop_rate, name="pre_logits")(x, train=train)
        return super().pooled(x, train)


VGG16 = partial(VGG, depths=(2, 2, 3, 3, 3))

_SIMONYAN = "Simonyan and Zisserman 2015, table 1, with batch norm; torchvision and timm"
_HU = "Hu et al. 2020, section 3.3 and table 2; count: torchvision's and the formula for SE"

VARIANTS: dict[str, Variant] = {
    "vgg11_bn": Variant(partial(VGG, depths=(1, 1, 2, 2, 2)), 132_868_840, 224, _SIMONYAN),
    "vgg13_bn": Variant(partial(VGG, depths=(2, 2, 2, 2, 2)), 133_053_736, 224, _SIMONYAN),
    "vgg16_bn": Variant(VGG16, 138_365_992, 224, _SIMONYAN),
    "vgg19_bn": Variant(partial(VGG, depths=(2, 2, 4, 4, 4)), 143_678_248, 224, _SIMONYAN),
    "se_vgg16_bn": Variant(partial(VGG16, attention=SqueezeExcite), 138_596_784, 224, _HU),
}
