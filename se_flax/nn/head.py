"""The classifier of a network: a dense layer, or cosines for losses with a margin (ArcFace, CosFace)."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_flax.arrays import check_array
from se_flax.lowering.sharding import gathered

Array = jax.Array

classifier_init = nn.initializers.normal(0.01)


class Dense(nn.Dense):
    """Flax's dense layer, with its parameters gathered on explicit mesh axes."""

    def param(self, *args: Any, **kwargs: Any) -> Any:
        """As `flax.linen.Module.param`."""
        return gathered(super().param(*args, **kwargs))

    def __call__(self, inputs: Array) -> Array:
        """Args: inputs float [..., C]. Returns: [..., features]."""
        return super().__call__(gathered(check_array(inputs, "Dense", "[..., C]"), -1))


def own_dense(classifier: Any) -> Any:
    """`Dense` if the classifier is Flax's dense layer, else the classifier itself."""
    return Dense if classifier is nn.Dense else classifier


def classify(
    x: Array,
    classifier: Callable[..., Any],
    num_classes: int,
    *,
    path: tuple[str, ...],
    kernel_init: nn.initializers.Initializer = classifier_init,
    drop_rate: float = 0.0,
    train: bool = False,
) -> Array:
    """Dropout and classifier, as submodules of the calling module; to be called in a compact method.

    Args:
      x: pooled features [N, C].
      classifier: class or partial, called as `classifier(num_classes, kernel_init=..., name=...)`.
      num_classes: number of classes; 0 for no classifier.
      path: names from the network down to the classifier: one, or two where the checkpoints nest it (`head.fc`).
      kernel_init: initialiser of the classifier's kernel.
      drop_rate: of the dropout.
      train: the dropout is active.

    Returns:
      Logits [N, num_classes], or the features.
    """
    x = nn.Dropout(drop_rate, deterministic=not train)(x)
    if not num_classes:
        return x
    classifier = own_dense(classifier)
    for inner in path[:0:-1]:
        classifier = functools.partial(NestedClassifier, classifier=classifier, inner=inner)
    return classifier(num_classes, kernel_init=kernel_init, name=path[0])(x)


class NestedClassifier(nn.Module):
    """A classifier one level down, where the checkpoints of some families have it.

    Attributes:
      features: number of classes.
      classifier: class or partial of the layer.
      inner: its submodule name.
      kernel_init: of its weights.
    """

    features: int
    classifier: Callable[..., Any]
    inner: str
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x [N, C]. Returns: [N, features]."""
        return self.classifier(self.features, kernel_init=self.kernel_init, name=self.inner)(x)


class CosineClassifier(nn.Module):
    """Scaled cosines between the features and one vector per class (Wang et al. 2018, section 3.1).

    logits_k = scale * <x / |x|, w_k / |w_k|>. It replaces a network's dense layer:
    `create_model("seresnet50", num_classes=500, classifier=se_flax.CosineClassifier)`.

    Parameters: `kernel` [features, classes], with columns of any length. No bias.

    Attributes:
      features: number of classes.
      scale: factor of the cosines, the papers' s; without it the softmax cannot come close to 1.
      kernel_init: initialiser of the kernel; only the directions of its columns matter.
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
        # A margin is a few degrees; a TPU's default of bfloat16 would be too coarse.
        cosines = jnp.matmul(
            _unit(jnp.asarray(x, jnp.float32), -1), _unit(kernel, 0), precision=jax.lax.Precision.HIGHEST
        )
        return self.scale * cosines


def _unit(x: Array, axis: int) -> Array:
    # The maximum keeps the gradient of a zero vector finite.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis, keepdims=True), 1e-12))
