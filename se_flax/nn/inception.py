"""Inception modules (parallel branches), described as plain data (Szegedy et al. 2015, 2016 and 2017)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.nn.residual import ConvNorm, ModuleDef, drop_path

Array = jax.Array
Pool = Callable[[Array], Array]


@dataclass(frozen=True)
class Unit:
    """A convolution with norm and activation.

    Attributes:
      name: of the submodule, after torch's module path.
      features: output channels.
      kernel_size: side of the kernel, or (height, width).
      strides: of both axes.
      padding: `"symmetric"` keeps the size at stride 1; `"VALID"` does not pad.
    """

    name: str
    features: int
    kernel_size: int | tuple[int, int] = 1
    strides: int = 1
    padding: str = "symmetric"


Step = Unit | Pool | tuple[Unit, ...]
"""Step of a branch: a unit, a pooling, or several units over the same map, with their outputs concatenated."""


@dataclass(frozen=True)
class Mixed:
    """Parallel branches over the same map: their outputs are concatenated, or projected and added to the map.

    Attributes:
      name: of the submodule, after torch's module path.
      branches: one chain of steps each; an empty chain is the identity.
      scale: factor of the residual branch, the concatenation after a 1x1 convolution to the map's channels (Szegedy et
        al. 2017, section 3.3); None for a module without residual.
      activated: applies the activation to the sum of a residual module.
    """

    name: str
    branches: tuple[tuple[Step, ...], ...]
    scale: float | None = None
    activated: bool = True


def average_3x3(x: Array, count_padding: bool = True) -> Array:
    """Mean over 3x3 windows at stride 1.

    Args:
      x: [N, H, W, C].
      count_padding: divides by nine at the edges too, the default of Caffe and PyTorch; False divides by the number of
        pixels inside the map.

    Returns:
      The shape of x.
    """
    return nn.avg_pool(x, (3, 3), (1, 1), [(1, 1), (1, 1)], count_include_pad=count_padding)


def apply_unit(unit: Unit, x: Array, *, conv: ModuleDef, norm: ModuleDef, act: Pool, train: bool) -> Array:
    """Applies a unit as submodules of the calling module; x [N, H, W, C] to [N, h, w, unit.features]."""
    if unit.padding != "symmetric":
        conv = partial(conv, padding=unit.padding)
    layer = ConvNorm(
        unit.features,
        conv=conv,
        norm=norm,
        kernel_size=unit.kernel_size,
        strides=unit.strides,
        act=act,
        name=unit.name,
    )
    return layer(x, train=train)


class MixedModule(nn.Module):
    """`Mixed` as a submodule, with attention (Hu et al. 2020, section 3.3).

    Attention acts on the concatenation of the branches; in a residual module on the residual branch, before scale and
    sum.

    Attributes:
      branches: as in `Mixed`.
      conv: convolution, called as `conv(features, kernel_size, strides=..., name=...)`.
      norm: batch norm, called as `norm(name=...)(x, train=...)`.
      act: activation.
      attention: attention class or partial, or None.
      scale: as in `Mixed`.
      activated: as in `Mixed`.
      drop_path_rate: probability of dropping the residual branch (stochastic depth).
    """

    branches: tuple[tuple[Step, ...], ...]
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array] = jax.nn.relu
    attention: ModuleDef | None = None
    scale: float | None = None
    activated: bool = True
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x [N, H, W, C]. Returns: [N, h, w, features of all branches]; the shape of x if residual."""
        parts: dict[str, Any] = {"conv": self.conv, "norm": self.norm, "act": self.act, "train": train}
        y = jnp.concatenate([self._follow(branch, x, parts) for branch in self.branches], axis=-1)
        if self.scale is not None:
            y = self.conv(x.shape[-1], 1, use_bias=True, name="conv2d")(y)
        if self.attention is not None:
            y = self.attention(name="se")(y, train=train)
        if self.scale is None:
            return y
        if train and self.drop_path_rate > 0:
            y = drop_path(y, self.drop_path_rate, self.make_rng("dropout"))
        y = x + y * self.scale
        return self.act(y) if self.activated else y

    @nn.nowrap
    def _follow(self, branch: tuple[Step, ...], x: Array, parts: dict[str, Any]) -> Array:
        for step in branch:
            if isinstance(step, Unit):
                x = apply_unit(step, x, **parts)
            elif isinstance(step, tuple):
                x = jnp.concatenate([apply_unit(unit, x, **parts) for unit in step], axis=-1)
            else:
                x = step(x)
        return x
