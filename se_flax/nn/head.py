"""The last layer of a network: dense, or comparing directions for losses with a margin (ArcFace, CosFace)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.arrays import check_array
from se_flax.lowering.sharding import gathered

Array = jax.Array

_classifier_init = nn.initializers.normal(0.01)


class Dense(nn.Dense):
    """Flax's dense layer, whose parameters are gathered on explicit axes."""

    def param(self, *args: Any, **kwargs: Any) -> Any:
        """As `flax.linen.Module.param`."""
        return gathered(super().param(*args, **kwargs))

    def __call__(self, inputs: Array) -> Array:
        """Args: inputs float [..., C]. Returns: [..., features]."""
        return super().__call__(gathered(check_array(inputs, "Dense", "[..., C]"), -1))


def own_dense(classifier: Any) -> Any:
    """`Dense` in place of Flax's dense layer; any other class or partial as it is."""
    return Dense if classifier is nn.Dense else classifier


def classify(
    x: Array,
    classifier: Callable[..., Any],
    num_classes: int,
    *,
    name: str,
    kernel_init: nn.initializers.Initializer = _classifier_init,
    drop_rate: float = 0.0,
    train: bool = False,
) -> Array:
    """Dropout and the last layer of a network; to be called where the network makes its submodules.

    Args:
      x: features [N, C].
      classifier: class or partial, called as `classifier(num_classes, kernel_init=..., name=...)`.
      num_classes: its width; 0 leaves it out.
      name: of the submodule.
      kernel_init: of its weights.
      drop_rate: of the dropout.
      train: the dropout is active.

    Returns:
      Logits [N, num_classes], or the features.
    """
    x = nn.Dropout(drop_rate, deterministic=not train)(x)
    return own_dense(classifier)(num_classes, kernel_init=kernel_init, name=name)(x) if num_classes else x


class CosineClassifier(nn.Module):
    """Scaled cosines between the features and one vector per class (Wang et al. 2018, section 3.1).

    logits_k = scale * <x / |x|, w_k / |w_k|>. It takes the place of a network's dense layer:
    `create_model("seresnet50", num_classes=500, classifier=se_flax.CosineClassifier)`.

    Parameters: `kernel` [features, classes]; its columns have any length. No bias.

    Attributes:
      features: number of classes.
      scale: what the cosines are multiplied by, the papers' s; a softmax of bare cosines cannot come close to 1.
      kernel_init: initialiser of the kernel; only the directions of its columns count.
      dtype: accepted for uniformity; the arithmetic is float32 in full precision.
    """

    features: int
    scale: float = 64.0
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.01)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x float [N, features]. Returns: float32 [N, classes], in [-scale, scale] up to rounding."""
        x = check_array(x, "CosineClassifier", "[N, features]")
        kernel = gathered(self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32))
        # Angles of a few degrees are what the margin is about: a TPU's default of bfloat16 would blur them.
        cosines = jnp.matmul(
            _unit(jnp.asarray(x, jnp.float32), -1), _unit(kernel, 0), precision=jax.lax.Precision.HIGHEST
        )
        return self.scale * cosines


def _unit(x: Array, axis: int) -> Array:
    # A vector of zeros stays one, with a finite gradient.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis, keepdims=True), 1e-12))
