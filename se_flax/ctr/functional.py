"""Interactions of feature fields as pure functions of arrays.

Notation: N rows, F fields, K numbers in an embedding, P = F (F - 1) / 2 pairs of fields i < j in the order (0, 1),
(0, 2), ..., (1, 2), ...; M = hidden width of the excitation.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from se_flax import functional as F

Array = jax.Array

SQUEEZES: Mapping[str, F.Elementwise] = {
    "mean": lambda x: jnp.mean(x, axis=-1, dtype=jnp.float32),
    "max": lambda x: jnp.max(x, axis=-1).astype(jnp.float32),
}
"""Squeezes, from a field's embedding to one number (Huang et al. 2019, section 3.2, compares both and keeps the mean).
"""


def squeeze_excite_fields(
    x: Array,
    reduce_kernel: Array,
    reduce_bias: Array | None,
    expand_kernel: Array,
    expand_bias: Array | None,
    *,
    squeeze: str | F.Elementwise = "mean",
    activation: str | F.Elementwise = "relu",
    gate: str | F.Elementwise = "sigmoid",
) -> Array:
    """Each field's embedding times a gate computed from all fields (Huang et al. 2019, section 3.2).

    Args:
      x: embeddings [N, F, K], any float dtype.
      reduce_kernel: W1, [F, M].
      reduce_bias: b1, [M], or None.
      expand_kernel: W2, [M, F].
      expand_bias: b2, [F], or None.
      squeeze: `mean` or `max` over the embedding, or a function of x that gives [N, F].
      activation: non-linearity between the layers, by name or as a function.
      gate: non-linearity at the end, by name or as a function.

    Returns:
      [N, F, K] of x's dtype; the gates are computed in float32.

    Raises:
      UserError: the squeeze, activation or gate is unknown.
    """
    z = F.lookup(SQUEEZES, squeeze, "squeeze")(x)
    gates = F.excite(z, reduce_kernel, reduce_bias, expand_kernel, expand_bias, activation=activation, gate=gate)
    return F.scale(x, gates[..., None])


def _pairs(x: Array, left: Callable[[int], Array]) -> Array:
    """Products of all pairs of fields i < j: left(i) times the embedding of j.

    Slices are used instead of gathers by pair: the gradient of a gather is a scatter, which costs far more than the
    products.

    Args:
      x: [N, F, K].
      left: from i to the left factor of its pairs, [N, 1, K] (the same for all) or [N, F - 1 - i, K].

    Returns:
      [N, P, K].
    """
    return jnp.concatenate([left(i) * x[..., i + 1 :, :] for i in range(x.shape[-2] - 1)], axis=-2)


def hadamard(x: Array) -> Array:
    """Elementwise products v_i * v_j of all pairs: the bilinear interaction with the identity as W.

    Args:
      x: [N, F, K], at least two fields.

    Returns:
      [N, P, K] of x's dtype.
    """
    x = jnp.asarray(x)
    return _pairs(x, lambda i: x[..., i : i + 1, :])


def bilinear_all(x: Array, kernel: Array) -> Array:
    """Interactions (v_i W) * v_j with one W for all pairs (Huang et al. 2019, section 3.3, Field-All).

    Args:
      x: [N, F, K], at least two fields.
      kernel: W, [K, K].

    Returns:
      [N, P, K] of x's dtype.
    """
    x = jnp.asarray(x)
    left = jnp.matmul(x, jnp.asarray(kernel, x.dtype))
    return _pairs(x, lambda i: left[..., i : i + 1, :])


def bilinear_each(x: Array, kernel: Array) -> Array:
    """Interactions (v_i W_i) * v_j with one W per first field (Huang et al. 2019, section 3.3, Field-Each).

    Args:
      x: [N, F, K], at least two fields.
      kernel: W, [F, K, K]. The last field is first in no pair: its matrix has no effect, but the paper counts it.

    Returns:
      [N, P, K] of x's dtype.
    """
    x = jnp.asarray(x)
    kernel = jnp.asarray(kernel, x.dtype)
    return _pairs(x, lambda i: jnp.matmul(x[..., i : i + 1, :], kernel[i]))


def bilinear_interaction(x: Array, kernel: Array) -> Array:
    """Interactions (v_i W_ij) * v_j with one W per pair (Huang et al. 2019, section 3.3, Field-Interaction).

    Args:
      x: [N, F, K], at least two fields.
      kernel: W, [P, K, K].

    Returns:
      [N, P, K] of x's dtype.
    """
    x = jnp.asarray(x)
    fields, size = x.shape[-2:]
    kernel = jnp.asarray(kernel, x.dtype)

    def left(i: int) -> Array:
        start, count = i * (2 * fields - i - 1) // 2, fields - 1 - i
        # All matrices of a first field in one: one product of [N, K] with [K, count * K].
        matrix = kernel[start : start + count].swapaxes(0, 1).reshape(size, count * size)
        return jnp.matmul(x[..., i, :], matrix).reshape(*x.shape[:-2], count, size)

    return _pairs(x, left)


def factorisation(x: Array) -> Array:
    """Sum of the inner products of all pairs of embeddings (Rendle 2010, lemma 3.1), in time linear in F.

    Args:
      x: [N, F, K], any float dtype.

    Returns:
      float32 [N].
    """
    x = jnp.asarray(x, jnp.float32)
    square_of_sum = jnp.square(x.sum(axis=-2))
    sum_of_squares = jnp.square(x).sum(axis=-2)
    return 0.5 * (square_of_sum - sum_of_squares).sum(axis=-1)
