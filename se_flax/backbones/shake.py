"""Shake-Shake networks for 32-pixel images (Gastaldi 2017), with and without squeeze-and-excitation.

A block has two residual branches. While training, their sum is replaced by a random mixture, alpha * b1 + (1 - alpha) *
b2, and its derivative by that of another mixture; in evaluation both weigh one half. The CIFAR-10 network starts its
branches with an activation (`ShakeBasicBlock`), the CIFAR-100 network is a ResNeXt-29 (`ShakeBottleneck`).

Hu et al. 2020 (tables 4 and 5) do not say where SE sits. Here one gate per block acts on the mixture of the branches,
which is the residual that is added to the shortcut: as in their ResNeXts, where one gate follows the aggregated
branches, and as their count of parameters has it (equation 5, one gate per block).
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.attention import SqueezeExcite
from se_flax.backbones.cifar_resnet import CifarResNet
from se_flax.errors import UserError, closest
from se_flax.nn.norm_attention import norm_act_attend
from se_flax.nn.residual import Block, ModuleDef, Placement, project
from se_flax.variant import Variant

Array = jax.Array

FORWARD = ("shake", "even")
BACKWARD = ("shake", "even", "keep")
LEVELS = ("image", "batch")


@jax.custom_vjp
def mix(first: Array, second: Array, forward: Array, backward: Array) -> Array:
    """Mixes two branches with one weight, and their gradients with another (Gastaldi 2017, figure 1).

    Args:
      first: [N, H, W, C].
      second: likewise.
      forward: alpha, broadcast against the branches; [N, 1, 1, 1] or [1, 1, 1, 1].
      backward: beta, likewise. Neither has a gradient.

    Returns:
      alpha * first + (1 - alpha) * second. For an incoming gradient g, the branches get beta * g and (1 - beta) * g.
    """
    del backward
    return forward * first + (1 - forward) * second


def _mix_forward(first: Array, second: Array, forward: Array, backward: Array) -> tuple[Array, tuple[Array, Array]]:
    return mix(first, second, forward, backward), (forward, backward)


def _mix_backward(weights: tuple[Array, Array], grad: Array) -> tuple[Array, Array, Array, Array]:
    forward, backward = weights
    return backward * grad, (1 - backward) * grad, jnp.zeros_like(forward), jnp.zeros_like(backward)


mix.defvjp(_mix_forward, _mix_backward)


def draw_weights(key: Array, forward: str, backward: str, level: str, batch: int) -> tuple[Array, Array]:
    """Alpha and beta of one block and step (Gastaldi 2017, section 2.1).

    Args:
      key: PRNG key.
      forward: `shake` (uniform in [0, 1]) or `even` (one half).
      backward: `shake` (uniform, drawn anew), `even` or `keep` (alpha).
      level: `image` draws for every image, `batch` once for all.
      batch: images.

    Returns:
      alpha and beta, float32 [batch, 1, 1, 1]; [1, 1, 1, 1] at the level of the batch.
    """
    shape = (batch if level == "image" else 1, 1, 1, 1)
    for_alpha, for_beta = jax.random.split(key)
    alpha = jax.random.uniform(for_alpha, shape) if forward == "shake" else jnp.full(shape, 0.5)
    if backward == "keep":
        return alpha, alpha
    return alpha, jax.random.uniform(for_beta, shape) if backward == "shake" else jnp.full(shape, 0.5)


class ShakeBlock(Block):
    """Base class of both blocks: a mixture of two branches.

    Attention at `standard` is on the mixture, at `3x3` in each branch.

    Attributes:
      forward: weights of the branches while training: `shake` (random) or `even` (one half).
      backward: weights of their gradients: `shake` (random, drawn anew), `even` or `keep` (the forward pass's).
      level: `image` draws for every image of a block and step, `batch` once for all (per replica).

    Raises:
      UserError: an unknown kind of noise or level.
    """

    forward: str = "shake"
    backward: str = "shake"
    level: str = "image"

    def __post_init__(self) -> None:
        for name, allowed in (("forward", FORWARD), ("backward", BACKWARD), ("level", LEVELS)):
            given = getattr(self, name)
            if given not in allowed:
                raise UserError(f"unknown {name} {given!r} of a Shake-Shake network; {closest(str(given), allowed)}")
        super().__post_init__()

    @nn.nowrap
    def residual(self, branch: type[Block], x: Array, train: bool) -> Array:
        """The residual: `branch1` and `branch2` of x, mixed, with attention and stochastic depth."""
        names = ("conv", "norm", "act", "strides", "groups", "base_width", "attention_name", "placement")
        parts = {name: getattr(self, name) for name in names}
        inside = self.attention if self.placement is Placement.AFTER_3X3 else None
        first, second = (
            branch(self.features, **parts, attention=inside, name=name)(x, train=train)
            for name in ("branch1", "branch2")
        )
        if train:
            settings = (self.forward, self.backward, self.level, x.shape[0])
            alpha, beta = (w.astype(first.dtype) for w in draw_weights(self.make_rng("dropout"), *settings))
            y = mix(first, second, alpha, beta)
        else:
            y = 0.5 * (first + second)
        return self.drop(self.attend(y, Placement.STANDARD, train), train)


class BasicBranch(Block):
    """Activation, 3x3, norm, activation, 3x3, norm (Gastaldi 2017, section 2.1)."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        y = self.conv(self.features, 3, strides=self.strides, name="conv1")(self.act(x))
        y = norm_act_attend(self.norm(name="bn1"), self.attention_at(Placement.AFTER_3X3), y, train=train)
        y = self.conv(self.features, 3, name="conv2")(self.act(y))
        return self.norm(name="bn2")(y, train=train)


class BottleneckBranch(Block):
    """1x1, grouped 3x3, 1x1 with norms, activations between them (Xie et al. 2017, figure 3c)."""

    expansion = 4

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, 4 * features]."""
        width = self.features * self.base_width // 64 * self.groups
        y = self.act(self.norm(name="bn1")(self.conv(width, 1, name="conv1")(x), train=train))
        y = self.conv(width, 3, strides=self.strides, groups=self.groups, name="conv2")(y)
        y = self.act(norm_act_attend(self.norm(name="bn2"), self.attention_at(Placement.AFTER_3X3), y, train=train))
        y = self.conv(self.features * self.expansion, 1, name="conv3")(y)
        return self.norm(name="bn3")(y, train=train)


def shifted_paths(
    x: Array,
    features: int,
    strides: int,
    *,
    conv: ModuleDef,
    norm: ModuleDef,
    act: Callable[[Array], Array],
    train: bool,
) -> Array:
    """Shortcut of two 1x1 convolutions that see different pixels (Gastaldi 2017, section 2.1).

    Args:
      x: [N, H, W, C].
      features: output channels; each path makes half of them.
      strides: every stride-th pixel is taken, in the second path of the map moved by one pixel down and right.
      conv: as in `Block`.
      norm: as in `Block`, of both halves together.
      act: activation that comes first.
      train: the norm uses the batch's statistics.

    Returns:
      [N, h, w, features].
    """
    x = act(x)
    moved = jnp.pad(x, [(0, 0), (1, 0), (1, 0), (0, 0)])[:, :-1, :-1]
    # Slices, whose sides jax.export knows to be those of a strided convolution; indexing gives them another formula.
    taken = [jax.lax.slice(y, (0,) * 4, y.shape, (1, strides, strides, 1)) for y in (x, moved)]
    paths = [conv(features // 2, 1, name=f"skip{i}")(y) for i, y in enumerate(taken, start=1)]
    return norm(name="skip_bn")(jnp.concatenate(paths, axis=-1), train=train)


class ShakeBasicBlock(ShakeBlock):
    """Two `BasicBranch`es; nothing after the sum."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, features]."""
        y = self.residual(BasicBranch, self.attend(x, Placement.PRE, train), train)
        if self.strides != 1 or x.shape[-1] != self.features:
            parts = {"conv": self.conv, "norm": self.norm, "act": self.act}
            x = shifted_paths(x, self.features, self.strides, **parts, train=train)
        x = self.attend(x, Placement.IDENTITY, train)
        return self.attend(x + y, Placement.POST, train)


class ShakeBottleneck(ShakeBlock):
    """Two `BottleneckBranch`es; an activation after the sum."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, H / strides, W / strides, 4 * features]."""
        y = self.residual(BottleneckBranch, self.attend(x, Placement.PRE, train), train)
        x = self.shortcut(x, self.features * BottleneckBranch.expansion, train)
        return self.attend(self.act(self.attend(x, Placement.IDENTITY, train) + y), Placement.POST, train)


SE = SqueezeExcite
SHAKE_26 = partial(CifarResNet, depth=4, width=96, block=ShakeBasicBlock, downsample=project, stem_act=False)
EVEN_29 = partial(
    CifarResNet,
    depth=3,
    width=64,
    block=partial(ShakeBottleneck, groups=4, backward="even"),
    downsample=project,
    stem=64,
    num_classes=100,
)

_26 = "Gastaldi 2017, table 1: Shake-Shake-Image 26 2x96d"
_29 = "Gastaldi 2017, table 2: Shake-Even-Image 29 2x4x64d, 100 classes"
_HU_10 = "Hu et al. 2020, table 4; one gate per block"
_HU_100 = "Hu et al. 2020, table 5; one gate per block, 100 classes"

VARIANTS: dict[str, Variant] = {
    "shake_shake26_2x96d": Variant(SHAKE_26, 26_192_922, 32, _26),
    "shake_even29_2x4x64d": Variant(EVEN_29, 34_529_700, 32, _29),
    "se_shake_shake26_2x96d": Variant(partial(SHAKE_26, attention=SE), 26_292_546, 32, _HU_10),
    "se_shake_even29_2x4x64d": Variant(partial(EVEN_29, attention=SE), 35_051_508, 32, _HU_100),
}
