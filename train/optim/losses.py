"""Cross-entropy and exact top-k counts, one number per example, without reduction.

A mean over a padded last batch would weight its examples wrongly. These functions return one value per example, in
float32 whatever the logits' dtype, so that a step or an evaluation can sum them and divide by the true count.
"""

import jax
import jax.numpy as jnp

from se_flax.arrays import check_array
from se_flax.errors import UserError


def _checked(name: str, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = check_array(logits, f"the logits of {name}", "[n, classes]")
    n, classes = logits.shape
    soft = jnp.ndim(labels) == 2
    shape = f"[{n}, {classes}]" if soft else f"[{n}]"
    return logits, check_array(labels, f"the labels of {name}", shape, kind="float" if soft else "integer")


def _smoothed(targets: jax.Array, label_smoothing: float) -> jax.Array:
    return (1.0 - label_smoothing) * targets + label_smoothing / targets.shape[-1]


def one_hot_smoothed(labels: jax.Array, num_classes: int, label_smoothing: float = 0.0) -> jax.Array:
    """Class indices as distributions: `(1 - s) * one_hot + s / num_classes`.

    Szegedy et al., "Rethinking the Inception Architecture", section 7, with the uniform prior. The true class also gets
    its share of `s`, as in PyTorch and Keras.

    Args:
      labels: integer [n].
      num_classes: number of classes.
      label_smoothing: `s`, in [0, 1).

    Returns:
      float32 [n, num_classes]. The row of a label outside 0 ... num_classes - 1 is NaN: with a row of zeros, a data set
      with more classes than the network would just have a small loss.

    Raises:
      UserError: labels of another rank or dtype.
    """
    labels = check_array(labels, "one_hot_smoothed", "[n]", kind="integer")
    labels = labels.astype(jnp.int32)  # uint8 could not be compared with 1000 classes
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    valid = (labels >= 0) & (labels < num_classes)
    return jnp.where(valid[:, None], _smoothed(one_hot, label_smoothing), jnp.nan)


def cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0, mask: jax.Array | None = None
) -> jax.Array:
    """Cross-entropy of each example between its label and the softmax of its logits.

    Args:
      logits: float [n, classes], any precision; computed in float32.
      labels: integer [n], or float [n, classes]: distributions, from mixup and CutMix.
      label_smoothing: in [0, 1); applied to either kind of label (see `one_hot_smoothed`).
      mask: bool [n], False for padding; None: every example counts.

    Returns:
      float32 [n]. Padding has loss 0 and gradient 0, even where its logits are NaN or its label is not a class.

    Raises:
      UserError: other dtypes, or shapes that do not fit each other.
    """
    logits, labels = _checked("cross_entropy", logits, labels)
    if mask is not None:
        mask = check_array(mask, "the mask of cross_entropy", f"[{logits.shape[0]}]", kind="real")
    logits = logits.astype(jnp.float32)
    if labels.ndim == 1:
        targets = one_hot_smoothed(labels, logits.shape[-1], label_smoothing)
    else:
        targets = _smoothed(labels.astype(jnp.float32), label_smoothing)
    if mask is not None:
        # Masks the logits, not the loss: the gradient of a masked NaN would be 0 * NaN = NaN.
        keep = mask.astype(bool)[:, None]
        logits, targets = jnp.where(keep, logits, 0.0), jnp.where(keep, targets, 0.0)
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def topk_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k classes with the highest logits.

    The label's rank is the number of classes with a greater logit plus the number of lower-numbered classes with an
    equal one. So exactly k classes are in the top k: `k=1` is `argmax(logits) == label`, and a network with constant
    logits is right for one class, not for all. If k is at least the number of classes, every example with valid logits
    counts. Logits with a NaN are wrong, whatever the label.

    Args:
      logits: float [n, classes].
      labels: integer [n]; a label outside 0 ... classes - 1 is wrong.
      k: at least 1.

    Returns:
      bool [n]; its integer sum over a split is an exact count.

    Raises:
      UserError: k below 1, other dtypes, or shapes that do not fit each other.
    """
    if k < 1:
        raise UserError(f"got k={k} for topk_correct; give 1 or more")
    logits = check_array(logits, "the logits of topk_correct", "[n, classes]")
    labels = check_array(labels, "the labels of topk_correct", f"[{logits.shape[0]}]", kind="integer")
    labels = labels.astype(jnp.int32)
    classes = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    is_label = classes == labels[:, None]
    score = jnp.sum(jnp.where(is_label, logits, 0), axis=-1, keepdims=True)  # a sum of one term: exact
    ahead = (logits > score) | ((logits == score) & (classes < labels[:, None]))
    valid = jnp.any(is_label, axis=-1) & ~jnp.any(jnp.isnan(logits), axis=-1)
    return valid & (jnp.sum(ahead, axis=-1) < k)
