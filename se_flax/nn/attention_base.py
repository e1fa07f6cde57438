"""Base classes of channel attention, which `nn.norm_attention` fuses with the norm and activation before it."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax import functional as F
from se_flax.arrays import check_array
from se_flax.lowering.dispatch import Function
from se_flax.lowering.gated_norm import squeeze_after_act
from se_flax.lowering.sharding import gathered

Array = jax.Array
Initializer = nn.initializers.Initializer

he_normal = nn.initializers.he_normal()


class PointwiseParams(nn.Module):
    """Parameters of a 1x1 convolution: kernel [1, 1, C_in, C_out] as in checkpoints, returned as [C_in, C_out]."""

    use_bias: bool = True
    kernel_init: Initializer = he_normal
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, channels: int, features: int) -> tuple[Array, Array | None]:
        """Args: C_in; C_out. Returns: float32 kernel [C_in, C_out], and bias [C_out] or None."""
        kernel = self.param("kernel", self.kernel_init, (1, 1, channels, features), jnp.float32)
        bias = self.param("bias", self.bias_init, (features,), jnp.float32) if self.use_bias else None
        return gathered(kernel)[0, 0], None if bias is None else gathered(bias)


class Attention(nn.Module):
    """Base class of attention modules: costs and descriptions count them as attention.

    A module with other parts than attention lists their submodules in `not_attention`.
    """

    not_attention: ClassVar[tuple[str, ...]] = ()


class ChannelAttention(Attention):
    """Base class of channel attention: x * gates(descriptor(x)).

    Subclasses define `gates`, `descriptor` if it is not the mean over the spatial axes, and `attend` if there is more
    to do. `se_flax.analysis.gates` intercepts `gates` to read or replace gates.

    Attributes:
      squeezes_mean: whether the gates depend only on the channels' means, so that norm, activation and gate can be one
        step (`se_flax.nn.norm_attention`).
      norms_gates: whether there is a norm among the layers of `gates`, which then takes `train`.
    """

    squeezes_mean: ClassVar[Any] = True
    norms_gates: ClassVar[Any] = False

    def pool(
        self, x: Array, factor: Array | None = None, offset: Array | None = None, act: Function | None = None
    ) -> Array:
        """Mean over the spatial axes of x, or of act(factor * x + offset).

        Args:
          x: map [N, ..., C].
          factor: float32 [C], of a norm; None for x itself.
          offset: likewise.
          act: activation after the norm, as a `lowering.dispatch.Function`.

        Returns:
          float32 of x's rank, [N, 1, 1, C] of a map [N, H, W, C].
        """
        if factor is None or offset is None or act is None:
            return F.squeeze(x)
        return squeeze_after_act(x, factor, offset, act.function)

    def descriptor(self, x: Array, mask: Array | None = None) -> Array:
        """The squeeze, input of `gates`. Args: as `__call__`. Returns: float32, such as [N, 1, 1, C]."""
        return F.squeeze(x, mask=mask)

    def gates(self, z: Array, *, base_channels: int | None = None) -> Array:
        """The gates of a descriptor. Returns: float32, broadcastable to the map."""
        raise NotImplementedError(f"{type(self).__name__} defines no gates")

    @nn.nowrap
    def gates_of(self, z: Array, *, train: bool, base_channels: int | None = None) -> Array:
        """`gates`, told of `train` if a norm needs it. Returns: float32, broadcastable to the map."""
        told = {"train": train} if self.norms_gates else {}
        return self.gates(z, base_channels=base_channels, **told)

    def __call__(
        self,
        x: Array,
        *,
        train: bool = False,
        base_channels: int | None = None,
        mask: Array | None = None,
        batch_axis: bool = True,
    ) -> Array:
        """Gates a map.

        Args:
          x: [N, ..., C]; [L, C], [H, W, C] or [D, H, W, C] with `batch_axis=False`.
          train: the batch norm of a `CBAM`, or between the layers of a `SqueezeExcite`, uses the batch's statistics.
          base_channels: channel count that a reduction refers to; None for C.
          mask: [N, ...] without the channels, True or 1 where x holds data, 0 where it holds padding; [N, L] for a
            batch of sequences of several lengths. The squeeze leaves padding out; the gates multiply all of x.
          batch_axis: False for the map, and the mask, of one image, without the batch axis.

        Returns:
          The shape and dtype of x.

        Raises:
          UserError: x is no map.
        """
        if batch_axis:
            return self.attend(x, train=train, base_channels=base_channels, mask=mask)
        what = f"{type(self).__name__} with batch_axis=False, the map of one image"
        hint = ", map the call over images with jax.vmap, or leave batch_axis out"
        x = check_array(x, what, "[L, C]", "[H, W, C]", "[D, H, W, C]", hint=hint)
        mask = None if mask is None else jnp.asarray(mask)[None]
        return self.attend(x[None], train=train, base_channels=base_channels, mask=mask)[0]

    def attend(
        self, x: Array, *, train: bool = False, base_channels: int | None = None, mask: Array | None = None
    ) -> Array:
        """As `__call__`, of a map with the axis of images."""
        return F.scale(x, self.gates_of(self.descriptor(x, mask), train=train, base_channels=base_channels))
