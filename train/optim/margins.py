"""ArcFace and CosFace: margins of the true class, for faces and fine-grained classes.

Both act on the cosines between features and class vectors (`se_flax.CosineClassifier`) while training; evaluation uses
the cosines as they are. What they return goes into `losses.cross_entropy`.
"""

import math

import jax
import jax.numpy as jnp

from se_flax.arrays import check_array
from se_flax.errors import UserError

# 1 - cos^2 of a float32 cosine is 0 or at least 6e-8: the root's derivative stays finite at the ends, and nothing else
# changes.
_LEAST_SINE_SQUARED = 1e-8


def arcface(logits: jax.Array, labels: jax.Array, margin: float = 0.5, scale: float = 64.0) -> jax.Array:
    """Adds an angle to that between an image and its class (Deng et al. 2019, equation 3).

    The logit of the right class becomes scale * cos(theta + margin). Beyond theta = pi - margin that would rise again
    as the angle grows, and the wrong side would pay: there it is scale * (cos(theta) - margin * sin(margin)), as in
    the authors' code, which falls on to the end with a step down at the seam. The authors' "easy margin", the margin
    only where cos(theta) > 0 and the bare cosine elsewhere, is not offered: it lets images go that are more than a
    right angle from their class, which at the start of a training in many dimensions is half of them; the authors
    leave it off too.

    Args:
      logits: float [n, classes], scale times the cosines.
      labels: integer [n].
      margin: radians, 0 to below pi / 2 (the paper's 0.5).
      scale: of the logits.

    Returns:
      float32 [n, classes]; rows of a label that is no class are unchanged. Gradients are finite everywhere.

    Raises:
      UserError: logits of another rank or dtype, or labels that are not one class index a row.
    """
    cosines, right = _cosines(logits, labels, scale, "arcface")
    sines = jnp.sqrt(jnp.maximum((1.0 - cosines) * (1.0 + cosines), _LEAST_SINE_SQUARED))
    turned = cosines * math.cos(margin) - sines * math.sin(margin)
    moved = jnp.where(cosines > -math.cos(margin), turned, cosines - margin * math.sin(margin))
    return scale * jnp.where(right, moved, cosines)


def cosface(logits: jax.Array, labels: jax.Array, margin: float = 0.4, scale: float = 64.0) -> jax.Array:
    """Takes a constant from the cosine between an image and its class (Wang et al. 2018, equation 4).

    Args:
      logits: float [n, classes], scale times the cosines.
      labels: integer [n].
      margin: from 0 to below 2; the paper has 0.35, the code of ArcFace's authors 0.4.
      scale: of the logits.

    Returns:
      float32 [n, classes], as `arcface`.

    Raises:
      UserError: logits of another rank or dtype, or labels that are not one class index a row.
    """
    cosines, right = _cosines(logits, labels, scale, "cosface")
    return scale * jnp.where(right, cosines - margin, cosines)


def _cosines(logits: jax.Array, labels: jax.Array, scale: float, name: str) -> tuple[jax.Array, jax.Array]:
    """The cosines, and where the right class is."""
    logits = check_array(logits, f"the logits of {name}", "[n, classes]")
    if labels.shape != logits.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(
            f"got labels of shape {labels.shape} and dtype {labels.dtype} for {name}, whose margin belongs to one "
            "right class; give one class index per image, and train without mixup and cutmix"
        )
    right = jnp.arange(logits.shape[-1], dtype=jnp.int32) == labels.astype(jnp.int32)[:, None]
    return logits.astype(jnp.float32) / scale, right
