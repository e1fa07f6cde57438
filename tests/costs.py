"""Sizes of networks, for comparison with the numbers of papers and released models. Nothing is computed."""

import functools
import math

import jax
import jax.numpy as jnp

import se_flax


@functools.cache
def traced(name, size=224, **attributes):
    """Shapes of a network's variables.

    Args:
      name: of the zoo.
      size: side of the image.
      **attributes: of `create_model`; hashable.

    Returns:
      Variables as `ShapeDtypeStruct`s.
    """
    model = se_flax.create_model(name, **attributes)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


@functools.cache
def products(name, size=224, **attributes):
    """Multiply-adds of a network's convolutions and dense layers for one image, as `se_flax.costs` counts them."""
    return sum(layer.products for layer in se_flax.costs(se_flax.create_model(name, **attributes), size).by_layer)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
