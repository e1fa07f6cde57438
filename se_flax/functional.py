"""Channel attention as pure functions of arrays.

Feature maps have their channels last and one, two or three spatial axes: [N, L, C] (signals), [N, H, W, C] (images) or
[N, D, H, W, C] (volumes); a squeeze is over all spatial axes. Squeeze and gate are computed in float32 whatever the
map's dtype, because bfloat16 is too coarse for a mean over thousands of values and for a sigmoid near saturation; the
product with the map has the map's dtype.

Notation: N images, H x W pixels, C channels, M = hidden width of the excitation; [N, ..., C] is a map of any such rank.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from se_flax.arrays import check_array
from se_flax.errors import UserError, closest
from se_flax.lowering.sharding import gathered

Array = jax.Array
Elementwise = Callable[[Array], Array]
# A gate takes a few thousand multiply-adds per image: full float32 precision costs nothing, also on a TPU.
_PRECISION = jax.lax.Precision.HIGHEST
_MAPS = ("[N, L, C]", "[N, H, W, C]", "[N, D, H, W, C]")


def hard_sigmoid(x: Array) -> Array:
    """ReLU6(x + 3) / 6, the piecewise linear sigmoid of MobileNetV3 (Howard et al. 2019, section 5.2).

    Args:
      x: float array of any shape.

    Returns:
      Array of the same shape and dtype, in [0, 1].

    Raises:
      UserError: another dtype.
    """
    x = check_array(x, "hard_sigmoid", "[...]")
    return jnp.clip(x + 3.0, 0.0, 6.0) / 6.0


def hard_swish(x: Array) -> Array:
    """X * ReLU6(x + 3) / 6 (Howard et al. 2019, section 5.2); shape and dtype of `x`, which is float."""
    x = check_array(x, "hard_swish", "[...]")
    return x * hard_sigmoid(x)


GATES: Mapping[str, Elementwise] = {
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "hard_sigmoid": hard_sigmoid,
}
"""Non-linearities at the end of the excitation (Hu et al. 2020, table 12, and MobileNetV3's)."""

ACTIVATIONS: Mapping[str, Elementwise] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "hard_swish": hard_swish,
    "gelu": jax.nn.gelu,
    "identity": lambda x: x,
}
"""Non-linearities between the two layers of the excitation."""


def check_map(x: Array, what: str) -> Array:
    """Refuses anything but a float map with one to three spatial axes.

    Args:
      x: the array.
      what: name of the function, for the message.

    Returns:
      The map as a JAX array.

    Raises:
      UserError: another rank or dtype.
    """
    add_axes = {1: "x[None, None]", 2: "x[:, None] (and a signal without images by x[None])"}.get(np.ndim(x))
    hint = f", which a descriptor of channels becomes by {add_axes}" if add_axes else ""
    return check_array(x, what, *_MAPS, hint=hint)


def spatial_axes(x: Array) -> tuple[int, ...]:
    """The spatial axes: (1, 2) of a map [N, H, W, C]."""
    return tuple(range(1, check_array(x, "spatial_axes", *_MAPS, kind="real").ndim - 1))


def _squeeze_mean(x: Array) -> Array:
    return jnp.mean(x, axis=spatial_axes(x), keepdims=True, dtype=jnp.float32)


def _squeeze_max(x: Array) -> Array:
    return jnp.max(x, axis=spatial_axes(x), keepdims=True).astype(jnp.float32)


def _squeeze_none(x: Array) -> Array:
    return x.astype(jnp.float32)


SQUEEZES: Mapping[str, Elementwise] = {"mean": _squeeze_mean, "max": _squeeze_max, "none": _squeeze_none}
"""Squeezes, from a map to a descriptor (Hu et al. 2020, tables 11 and 16); `none` keeps the full resolution."""


def lookup(table: Mapping[str, Elementwise], choice: "str | Elementwise", what: str) -> Elementwise:
    """Turns a name into its function; a function passes through.

    Args:
      table: functions by name.
      choice: one of the names, or a function of an array.
      what: kind of function, for the message.

    Returns:
      The function.

    Raises:
      UserError: the name is not in the table.
    """
    if callable(choice):
        return choice
    if choice not in table:
        raise UserError(f"unknown {what} {choice!r}; {closest(str(choice), table)}, or a function of an array")
    return table[choice]


def round_to_multiple(value: float, divisor: int = 8, limit: float = 0.9) -> int:
    """Nearest multiple of `divisor`, at least `divisor`, and never less than `limit * value`.

    The rule of the MobileNet family (`_make_divisible` in TensorFlow's slim): a result more than 10 % below the value
    goes up to the next multiple.

    Args:
      value: number of channels before rounding.
      divisor: the result is a multiple of it.
      limit: smallest allowed share of `value`; 0 accepts any rounding down (timm's SE-ResNets).

    Returns:
      Number of channels.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < limit * value else rounded


_ROUNDINGS: Mapping[str, Callable[[float], int]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "nearest": lambda value: math.floor(value + 0.5),
    "multiple_of_8": round_to_multiple,
    "multiple_of_8_any": lambda value: round_to_multiple(value, limit=0.0),
}


def reduced_width(
    channels: int,
    *,
    reduction: float | None = None,
    fraction: float | None = None,
    rounding: str | Callable[[float], int] = "floor",
) -> int:
    """Hidden width M of an excitation.

    Args:
      channels: C.
      reduction: M = C / reduction (Hu et al. 2020, section 3.2: r). Give exactly one of `reduction` and `fraction`.
      fraction: M = C * fraction (the `se0.25` of MnasNet and EfficientNet).
      rounding: `floor` (Caffe's SENet), `ceil` (usual for fields of tables), `nearest`, `multiple_of_8` (with the 90 %
        rule of `round_to_multiple`), `multiple_of_8_any` (without it), or a function of the unrounded width.

    Returns:
      The width, at least 1.

    Raises:
      UserError: both or neither of `reduction` and `fraction` given, one not positive, or an unknown rounding.
    """
    if (reduction is None) == (fraction is None):
        raise UserError(f"got reduction={reduction} and fraction={fraction}; give exactly one of them (or width)")
    share = fraction if reduction is None else reduction
    assert share is not None
    if not share > 0:
        raise UserError(f"got {'fraction' if reduction is None else 'reduction'}={share}; it must be positive")
    if not callable(rounding) and rounding not in _ROUNDINGS:
        raise UserError(f"unknown rounding {rounding!r}; {closest(str(rounding), _ROUNDINGS)}")
    round_ = rounding if callable(rounding) else _ROUNDINGS[rounding]
    # Multiplying by 1 / reduction is inexact for reductions that are not powers of two, so divide.
    value = channels / share if reduction is not None else channels * share
    return max(1, round_(value))


def mask_of(x: Array, mask: Array) -> Array:
    """A mask of pixels in a form that can be multiplied with a map.

    Args:
      x: map [N, ..., C].
      mask: [N, ...], True or 1 where x holds data.

    Returns:
      float32 [N, ..., 1].

    Raises:
      UserError: the mask has another shape or dtype.
    """
    x, mask = check_array(x, "mask_of", "[N, ..., C]"), check_array(mask, "the mask of a map", "[N, ...]", kind="real")
    if mask.shape != x.shape[:-1]:
        raise UserError(
            f"got a mask of shape {tuple(mask.shape)} for a map of shape {tuple(x.shape)}; give one entry per pixel, "
            f"{tuple(x.shape[:-1])}"
        )
    return mask.astype(jnp.float32)[..., None]


def squeeze(x: Array, kind: str | Elementwise = "mean", mask: Array | None = None) -> Array:
    """The squeeze F_sq (Hu et al. 2020, equation 2).

    Args:
      x: map [N, ..., C], any float dtype.
      kind: `mean`, `max`, `none` or a function of the map.
      mask: [N, ...], True or 1 where x holds data, 0 where it holds padding, which is left out; None for no padding. An
        image without data has the descriptor zero.

    Returns:
      float32 descriptor of x's rank, [N, 1, 1, C] of a map [N, H, W, C]; the map's shape for `none`.

    Raises:
      UserError: x is no map, the kind is unknown, or the mask has another shape or is given with a function.
    """
    x = check_map(x, "a squeeze")
    function = lookup(SQUEEZES, kind, "squeeze")
    if mask is None or kind == "none":
        return function(x)
    if kind not in ("mean", "max"):
        raise UserError("got a mask with a squeeze that is a function; mask in the function, or give mean or max")
    axes, inside = spatial_axes(x), mask_of(x, mask)
    count = jnp.sum(inside, axes, keepdims=True)
    if kind == "mean":
        return jnp.sum(x.astype(jnp.float32) * inside, axes, keepdims=True) / jnp.maximum(count, 1.0)
    largest = jnp.max(jnp.where(inside > 0, x.astype(jnp.float32), -jnp.inf), axes, keepdims=True)
    return jnp.where(count > 0, largest, 0.0)


def excite(
    z: Array,
    reduce_kernel: Array,
    reduce_bias: Array | None,
    expand_kernel: Array,
    expand_bias: Array | None,
    *,
    activation: str | Elementwise = "relu",
    gate: str | Elementwise = "sigmoid",
) -> Array:
    """The excitation F_ex(z, W) = gate(W2 activation(W1 z + b1) + b2) (Hu et al. 2020, equation 3).

    Args:
      z: descriptor [..., C].
      reduce_kernel: W1, [C, M].
      reduce_bias: b1, [M], or None.
      expand_kernel: W2, [M, C].
      expand_bias: b2, [C], or None.
      activation: non-linearity between the layers, by name or as a function.
      gate: non-linearity at the end, by name or as a function.

    Returns:
      float32 gate [..., C].

    Raises:
      UserError: an array of another shape or dtype, or an unknown activation or gate.
    """
    hidden = pointwise(gathered(check_array(z, "excite", "[..., C]"), -1), reduce_kernel, reduce_bias)
    hidden = lookup(ACTIVATIONS, activation, "activation")(hidden)
    return lookup(GATES, gate, "gate")(pointwise(hidden, expand_kernel, expand_bias))


def pointwise(z: Array, kernel: Array, bias: Array | None = None) -> Array:
    """A dense layer over the channels (a 1x1 convolution), in full float32 precision.

    Args:
      z: float [..., C].
      kernel: [C, M].
      bias: [M], or None.

    Returns:
      float32 [..., M].

    Raises:
      UserError: another dtype; the kernel is not a matrix [C, M] with z's C, or the bias not [M].
    """
    z = check_array(z, "pointwise", "[..., C]").astype(jnp.float32)
    kernel = check_array(kernel, "the kernel of pointwise", "[...]").astype(jnp.float32)
    if kernel.ndim != 2 or kernel.shape[0] != z.shape[-1]:
        raise UserError(
            f"got a kernel of shape {tuple(kernel.shape)} for {z.shape[-1]} channels; give [{z.shape[-1]}, M] (of a "
            "1x1 convolution's kernel [1, 1, C, M]: kernel[0, 0])"
        )
    y = jnp.matmul(z, gathered(kernel), precision=_PRECISION)
    if bias is None:
        return y
    bias = check_array(bias, "the bias of pointwise", f"[{kernel.shape[1]}]")
    return y + jax.lax.broadcast_to_rank(gathered(bias), y.ndim)


def scale(x: Array, gate: Array) -> Array:
    """The scaling F_scale (Hu et al. 2020, equation 4): map times gate, in the map's dtype.

    Args:
      x: map [N, ..., C].
      gate: of the map's rank, broadcastable to its shape.

    Returns:
      The map's shape and dtype.

    Raises:
      UserError: another dtype; the gate has another rank, and would be broadcast along the wrong axes.
    """
    x, gate = check_array(x, "scale", "[N, ..., C]"), check_array(gate, "the gate of scale", "[...]")
    if gate.ndim != x.ndim:
        raise UserError(
            f"got a gate of shape {tuple(gate.shape)} for a map of shape {tuple(x.shape)}; give it the map's rank, "
            f"such as {(x.shape[0], *(1 for _ in x.shape[1:-1]), x.shape[-1])}"
        )
    return x * gate.astype(x.dtype)


def eca_kernel_size(channels: int, gamma: float = 2.0, b: float = 1.0) -> int:
    """Odd kernel size of ECA from the channel count: |log2(C) / gamma + b / gamma|_odd (Wang et al. 2020, equation 12).

    As in the authors' code, the value is truncated and an even result goes up to the next odd number.

    Args:
      channels: C.
      gamma: slope of the mapping.
      b: offset of the mapping.

    Returns:
      k, odd, at least 1 (64 channels: 3, 256: 5, 2048: 7).
    """
    size = int(abs((math.log2(channels) + b) / gamma))
    return size if size % 2 else size + 1


def channel_conv(z: Array, kernel: Array, bias: Array | None = None) -> Array:
    """Correlation of a descriptor with a short kernel along the channels, zero-padded to the same length.

    Args:
      z: descriptor [..., C].
      kernel: [k], k odd.
      bias: scalar, or None.

    Returns:
      float32 [..., C].

    Raises:
      UserError: another dtype; the kernel has another rank, or an even length; the bias is no scalar.
    """
    z = check_array(z, "channel_conv", "[..., C]").astype(jnp.float32)
    kernel = check_array(kernel, "the kernel of channel_conv", "[...]")
    bias = None if bias is None else check_array(bias, "the bias of channel_conv", "[]")
    if kernel.ndim != 1 or kernel.shape[0] % 2 == 0:
        raise UserError(
            f"got a kernel of shape {tuple(kernel.shape)} over the channels; give one axis of odd length, [k] (of a "
            "convolution's kernel [k, 1, 1]: kernel[:, 0, 0])"
        )
    size, kernel = kernel.shape[0], gathered(kernel)
    z = gathered(z, -1)
    padded = jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(size // 2, size // 2)])
    # k is 3 to 9: a sum of shifted slices beats a one-channel convolution on every backend.
    out = jnp.zeros_like(z) if bias is None else jnp.broadcast_to(bias, z.shape).astype(jnp.float32)
    for i in range(size):
        out = out + kernel[i] * jax.lax.slice_in_dim(padded, i, i + z.shape[-1], axis=-1)
    return out


def squeeze_mean_max(x: Array, mask: Array | None = None) -> Array:
    """CBAM's two channel descriptors, mean and maximum (Woo et al. 2018, section 3.1).

    Args:
      x: map [N, ..., C].
      mask: as for `squeeze`.

    Returns:
      float32 [2, N, 1, 1, C] of a map [N, H, W, C].

    Raises:
      UserError: as `squeeze`.
    """
    return jnp.stack([squeeze(x, "mean", mask), squeeze(x, "max", mask)])


def excite_mean_max(
    z: Array,
    reduce_kernel: Array,
    reduce_bias: Array | None,
    expand_kernel: Array,
    expand_bias: Array | None,
    *,
    gate: str | Elementwise = "sigmoid",
) -> Array:
    """CBAM's channel gate: sigmoid(MLP(mean(x)) + MLP(max(x))) with one shared MLP (Woo et al. 2018, equation 2).

    Args:
      z: float32 [2, ..., C], mean and maximum.
      reduce_kernel: [C, M].
      reduce_bias: [M] or None.
      expand_kernel: [M, C].
      expand_bias: [C] or None; it is added twice, once per path, as in the authors' code.
      gate: non-linearity at the end.

    Returns:
      float32 gate [..., C].

    Raises:
      UserError: as `excite`.
    """
    z = check_array(z, "excite_mean_max", "[2, ..., C]")
    paths = excite(z, reduce_kernel, reduce_bias, expand_kernel, expand_bias, gate=lambda logits: logits)
    return lookup(GATES, gate, "gate")(jnp.sum(paths, axis=0))


def channel_gate_mean_max(x: Array, *layers: Array | None, gate: str | Elementwise = "sigmoid") -> Array:
    """CBAM's channel gate of a map; see `squeeze_mean_max` and `excite_mean_max`.

    Args:
      x: map [N, ..., C].
      *layers: kernels and biases, as `excite_mean_max` takes them.
      gate: non-linearity at the end.

    Returns:
      float32 gate of x's rank, [N, 1, 1, C] of a map [N, H, W, C].
    """
    return excite_mean_max(squeeze_mean_max(x), *layers, gate=gate)  # type: ignore[arg-type]


def spatial_descriptor(x: Array) -> Array:
    """CBAM's spatial descriptor: maximum and mean over the channels (Woo et al. 2018, equation 3).

    Args:
      x: map [N, ..., C].

    Returns:
      float32 [N, ..., 2]; the maximum comes first, as in the authors' code.

    Raises:
      UserError: x is no map.
    """
    x = check_map(x, "spatial_descriptor")
    maximum = jnp.max(x, axis=-1, keepdims=True).astype(jnp.float32)
    return jnp.concatenate([maximum, jnp.mean(x, axis=-1, keepdims=True, dtype=jnp.float32)], axis=-1)
