"""Channel attention as pure functions of arrays: the formulas, with their shapes, in one place.

Maps are NHWC. A gate is pooled and computed in float32 whatever the dtype of the map, because a mean over thousands of
bfloat16 values and a sigmoid near saturation both lose what the gate is there to express; the product with the map has
the map's dtype.

Notation: N images, H x W pixels, C channels, M = hidden width of the excitation.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from se_flax.errors import UserError, closest

Array = jax.Array
Elementwise = Callable[[Array], Array]
# Gates are a few thousand multiply-adds per image: full float32 precision costs nothing, also on a TPU.
_PRECISION = jax.lax.Precision.HIGHEST


def hard_sigmoid(x: Array) -> Array:
    """ReLU6(x + 3) / 6, the piecewise linear sigmoid of MobileNetV3 (Howard et al. 2019, section 5.2).

    Args:
      x: float array of any shape.

    Returns:
      Array of the same shape and dtype, in [0, 1].
    """
    return jnp.clip(x + 3.0, 0.0, 6.0) / 6.0


def hard_swish(x: Array) -> Array:
    """X * ReLU6(x + 3) / 6 (Howard et al. 2019, section 5.2); shape and dtype of `x`."""
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


def _squeeze_mean(x: Array) -> Array:
    return jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)


def _squeeze_max(x: Array) -> Array:
    return jnp.max(x, axis=(1, 2), keepdims=True).astype(jnp.float32)


def _squeeze_none(x: Array) -> Array:
    return x.astype(jnp.float32)


SQUEEZES: Mapping[str, Elementwise] = {"mean": _squeeze_mean, "max": _squeeze_max, "none": _squeeze_none}
"""How a map becomes a descriptor (Hu et al. 2020, tables 11 and 16); `none` keeps the full resolution."""


def lookup(table: Mapping[str, Elementwise], choice: "str | Elementwise", what: str) -> Elementwise:
    """Turns a name into its function; a function passes through.

    Args:
      table: the named choices.
      choice: one of their names, or a function of an array.
      what: what is being chosen, for the message.

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
    """Nearest multiple of `divisor`, at least `divisor`, and never less than `limit` of the value.

    The rule of the MobileNet family (`_make_divisible` in TensorFlow's slim): rounding down by more than 10 % is undone
    by one more step up.

    Args:
      value: the wished number of channels.
      divisor: what the result is a multiple of.
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
      channels: C, what the width is a share of.
      reduction: M = C / reduction (Hu et al. 2020, section 3.2: r). Exactly one of this and `fraction` is given.
      fraction: M = C * fraction (the `se0.25` of MnasNet and EfficientNet).
      rounding: `floor` (Caffe's SENet), `ceil` (usual over the fields of a table), `nearest`, `multiple_of_8` (with
        the 90 % rule), `multiple_of_8_any` (without it), or a function of the unrounded width.

    Returns:
      The width, at least 1.

    Raises:
      UserError: both or none of `reduction` and `fraction`, one that is not positive, or an unknown rounding.
    """
    if (reduction is None) == (fraction is None):
        raise UserError(
            f"got reduction={reduction} and fraction={fraction}; give exactly one of them (or the width outright)"
        )
    share = fraction if reduction is None else reduction
    assert share is not None
    if not share > 0:
        raise UserError(f"got {'fraction' if reduction is None else 'reduction'}={share}; it must be positive")
    if not callable(rounding) and rounding not in _ROUNDINGS:
        raise UserError(f"unknown rounding {rounding!r}; {closest(str(rounding), _ROUNDINGS)}")
    round_ = rounding if callable(rounding) else _ROUNDINGS[rounding]
    # A product with 1/16 is exact, one with 1/3 is not: divide where the caller spoke of a ratio.
    value = channels / share if reduction is not None else channels * share
    return max(1, round_(value))


def squeeze(x: Array, kind: str | Elementwise = "mean") -> Array:
    """The squeeze F_sq (Hu et al. 2020, equation 2).

    Args:
      x: map [N, H, W, C], any float dtype.
      kind: `mean`, `max`, `none` or a function of the map.

    Returns:
      float32 descriptor [N, 1, 1, C]; [N, H, W, C] for `none`.
    """
    return lookup(SQUEEZES, kind, "squeeze")(jnp.asarray(x))


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
    """
    z, reduce_kernel, expand_kernel = (jnp.asarray(a, jnp.float32) for a in (z, reduce_kernel, expand_kernel))
    hidden = jnp.matmul(z, reduce_kernel, precision=_PRECISION)
    if reduce_bias is not None:
        hidden = hidden + reduce_bias
    hidden = lookup(ACTIVATIONS, activation, "activation")(hidden)
    logits = jnp.matmul(hidden, expand_kernel, precision=_PRECISION)
    if expand_bias is not None:
        logits = logits + expand_bias
    return lookup(GATES, gate, "gate")(logits)


def scale(x: Array, gate: Array) -> Array:
    """The scaling F_scale (Hu et al. 2020, equation 4): the map times its gate, in the map's dtype.

    Args:
      x: map [N, H, W, C].
      gate: broadcastable to the map's shape.

    Returns:
      [N, H, W, C] of the map's dtype.
    """
    x = jnp.asarray(x)
    return x * jnp.asarray(gate, x.dtype)


def eca_kernel_size(channels: int, gamma: float = 2.0, b: float = 1.0) -> int:
    """Odd kernel size of ECA from the channel count: |log2(C) / gamma + b / gamma|_odd (Wang et al. 2020, equation 12).

    The authors' code truncates, then goes up to the next odd number; this does the same.

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
    """
    size = kernel.shape[0]
    z, kernel = jnp.asarray(z, jnp.float32), jnp.asarray(kernel)
    padded = jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(size // 2, size // 2)])
    # k is 3 to 9: a sum of shifted slices beats a one-channel convolution on every backend.
    out = jnp.zeros_like(z) if bias is None else jnp.broadcast_to(bias, z.shape).astype(jnp.float32)
    for i in range(size):
        out = out + kernel[i] * jax.lax.slice_in_dim(padded, i, i + z.shape[-1], axis=-1)
    return out


def channel_gate_mean_max(
    x: Array,
    reduce_kernel: Array,
    reduce_bias: Array | None,
    expand_kernel: Array,
    expand_bias: Array | None,
    *,
    gate: str | Elementwise = "sigmoid",
) -> Array:
    """CBAM's channel gate: sigmoid(MLP(mean(x)) + MLP(max(x))) with one shared MLP (Woo et al. 2018, equation 2).

    Args:
      x: map [N, H, W, C].
      reduce_kernel: [C, M].
      reduce_bias: [M] or None.
      expand_kernel: [M, C].
      expand_bias: [C] or None; it enters twice, once per path, as in the authors' code.
      gate: non-linearity at the end.

    Returns:
      float32 gate [N, 1, 1, C].
    """
    x = jnp.asarray(x)
    both = jnp.stack([squeeze(x, "mean"), squeeze(x, "max")])
    paths = excite(both, reduce_kernel, reduce_bias, expand_kernel, expand_bias, gate=lambda logits: logits)
    return lookup(GATES, gate, "gate")(jnp.sum(paths, axis=0))


def spatial_descriptor(x: Array) -> Array:
    """CBAM's spatial descriptor: maximum and mean over the channels (Woo et al. 2018, equation 3).

    Args:
      x: map [N, H, W, C].

    Returns:
      float32 [N, H, W, 2]; the maximum comes first, as in the authors' code.
    """
    x = jnp.asarray(x)
    maximum = jnp.max(x, axis=-1, keepdims=True).astype(jnp.float32)
    return jnp.concatenate([maximum, jnp.mean(x, axis=-1, keepdims=True, dtype=jnp.float32)], axis=-1)
