"""A linear classifier fitted to a network's features: the start of linear probing, then fine-tuning.

Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution": a random
classifier spoils the features while it learns. Kornblith et al. 2019, "Do Better ImageNet Models Transfer Better?",
section 3, choose the weight of the L2 penalty on held-out examples, as here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Of the mean loss over standardised features; from strong to weak, each fit starting from the one before.
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
HELD_OUT = 0.2
_MOST_STEPS = 200
_TOLERANCE = 1e-4  # of the gradient's norm

Array = jax.Array


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on features.

    Attributes:
      kernel: float32 [C, K].
      bias: float32 [K].
      penalty: the chosen weight of the L2 penalty.
      right: right answers on the examples that were held out for the choice.
      held_out: number of these.
    """

    kernel: np.ndarray
    bias: np.ndarray
    penalty: float
    right: int
    held_out: int


def fit(
    features: np.ndarray, labels: np.ndarray, num_classes: int, penalties: Sequence[float] = PENALTIES
) -> LinearProbe:
    """Multinomial logistic regression with an L2 penalty on the kernel, by L-BFGS.

    The features are standardised for the fit; kernel and bias are for features as they are. The penalty is the one with
    the most right answers on every fifth example (of equals the stronger), after which all examples are fitted.

    Args:
      features: float [N, C].
      labels: int [N], in [0, num_classes).
      num_classes: K.
      penalties: to choose from, in falling order.

    Returns:
      The classifier.
    """
    mean, std = features.mean(0), features.std(0)
    std = np.where(std > 1e-6, std, 1).astype(np.float32)
    x, y = jnp.asarray((features - mean) / std), jnp.asarray(labels, jnp.int32)
    order = np.random.default_rng(0).permutation(len(features))
    held, kept = np.split(order, [max(1, round(HELD_OUT * len(order)))])

    weights = _zeros(x.shape[1], num_classes)
    best = (-1, penalties[0])
    for penalty in penalties if len(kept) else penalties[:1]:
        weights = _minimise(weights, x[kept], y[kept], penalty)
        right = int(jnp.sum(jnp.argmax(_logits(weights, x[held]), -1) == y[held]))
        best = max(best, (right, penalty))
    right, penalty = best
    weights = _minimise(_zeros(x.shape[1], num_classes), x, y, penalty)
    kernel = np.asarray(weights["kernel"]) / std[:, None]
    bias = np.asarray(weights["bias"]) - mean @ kernel
    return LinearProbe(kernel.astype(np.float32), bias.astype(np.float32), penalty, right, len(held))


def _zeros(channels: int, num_classes: int) -> dict[str, Array]:
    return {"kernel": jnp.zeros((channels, num_classes)), "bias": jnp.zeros(num_classes)}


def _logits(weights: dict[str, Array], x: Array) -> Array:
    return x @ weights["kernel"] + weights["bias"]


@jax.jit
def _minimise(weights: dict[str, Array], x: Array, y: Array, penalty: float) -> dict[str, Array]:
    """The weights at which the penalised loss is least."""

    def loss(weights: dict[str, Array]) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(_logits(weights, x), y)
        return jnp.mean(losses) + penalty / 2 * jnp.sum(weights["kernel"] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        weights, state, _ = carry
        value, gradient = value_and_grad(weights, state=state)
        updates, state = solver.update(gradient, state, weights, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(weights, updates), state, optax.tree.norm(gradient)

    def unfinished(carry: Any) -> Array:
        _, state, norm = carry
        return (optax.tree.get(state, "count") < _MOST_STEPS) & (norm > _TOLERANCE)

    return jax.lax.while_loop(unfinished, step, (weights, solver.init(weights), jnp.inf))[0]
