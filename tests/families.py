"""The smallest network of every family, for tests that walk all of them."""

import jax
import jax.numpy as jnp

import se_flax
from se_flax.zoo import FAMILIES

SMALLEST = sorted(
    min(family.VARIANTS, key=lambda name: (se_flax.get_variant(name).num_params, name)) for family in FAMILIES
)
CLASSES = 8


def small_side(name):
    """A side that the network takes, at which its last maps still have several pixels."""
    return 32 if se_flax.get_variant(name).input_size == 32 else 160


def model_and_shapes(name):
    """A network of 8 classes, and its variables' shapes."""
    model = se_flax.create_model(name, num_classes=CLASSES)
    side = small_side(name)
    return model, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
