"""ArcFace and CosFace: margins of the true class, for faces and fine-grained classes.

In training both change the cosines between features and class vectors (`se_flax.CosineClassifier`) before
`losses.cross_entropy`; evaluation uses the unchanged cosines.
"""

import math

import jax
import jax.numpy as jnp

from se_flax.arrays import check_array
from se_flax.errors import UserError

# 1 - cos^2 of a float32 cosine is 0 or at least 6e-8, so this bound only keeps the root's derivative finite at 0.
_LEAST_SINE_SQUARED = 1e-8


def arcface(logits: jax.Array, labels: jax.Array, margin: float = 0.5, scale: float = 64.0) -> jax.Array:
    """Adds a margin to the angle theta between an image and its class (Deng et al. 2019, equation 3).

    The logit of the true class becomes scale * cos(theta + margin). Beyond theta = pi - margin this would rise again
    with theta; there the logit is scale * (cos(theta) - margin * sin(margin)), as in the authors' code, which decreases
    further, with a step down at pi - margin. The authors' "easy margin" (the margin only if cos(theta) > 0, else the
    plain cosine) is not offered: it has no margin for images at more than a right angle from their class, which are
    half of them when a training in many dimensions starts. The authors do not use it by default either.

    Args:
      logits: float [n, classes], scale times the cosines.
      labels: integer [n].
      margin: radians, from 0 to below pi / 2 (0.5 in the paper).
      scale: of the logits.

    Returns:
      float32 [n, classes]; rows with a label that is not a class are unchanged. Gradients are finite everywhere.

    Raises:
      UserError: logits of another rank or dtype, or labels that are not one class index per row.
    """
    cosines, right = _cosines(logits, labels, scale, "arcface")
    sines = jnp.sqrt(jnp.maximum((1.0 - cosines) * (1.0 + cosines), _LEAST_SINE_SQUARED))
    turned = cosines * math.cos(margin) - sines * math.sin(margin)
    moved = jnp.where(cosines > -math.cos(margin), turned, cosines - margin * math.sin(margin))
    return scale * jnp.where(right, moved, cosines)


def cosface(logits: jax.Array, labels: jax.Array, margin: float = 0.4, scale: float = 64.0) -> jax.Array:
    """Subtracts a margin from the cosine between an image and its class (Wang et al. 2018, equation 4).

    Args:
      logits: float [n, classes], scale times the cosines.
      labels: integer [n].
      margin: from 0 to below 2; 0.35 in the paper, 0.4 in the code of ArcFace's authors.
      scale: of the logits.

    Returns:
      float32 [n, classes], as `arcface`.

    Raises:
      UserError: logits of another rank or dtype, or labels that are not one class index per row.
    """
    cosines, right = _cosines(logits, labels, scale, "cosface")
    return scale * jnp.where(right, cosines - margin, cosines)


def _cosines(logits: jax.Array, labels: jax.Array, scale: float, name: str) -> tuple[jax.Array, jax.Array]:
    """The cosines, and the mask of the true class."""
    logits = check_array(logits, f"the logits of {name}", "[n, classes]")
    if labels.shape != logits.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(
            f"got labels of shape {labels.shape} and dtype {labels.dtype} for {name}, whose margin needs a "
            "single true class; give one class index per image, and train without mixup and CutMix"
        )
    right = jnp.arange(logits.shape[-1], dtype=jnp.int32) == labels.astype(jnp.int32)[:, None]
    return logits.astype(jnp.float32) / scale, right
