"""Multiply-adds of a traced program: nothing is computed, so full-size networks take a second."""

import functools
import math

import jax
import jax.numpy as jnp

import se_flax


def multiply_adds(jaxpr):
    """Multiply-adds of the convolutions and matrix products of a jaxpr, those of called jaxprs included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = eqn.params["dimension_numbers"].rhs_spec[0]
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[features]
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
        elif eqn.primitive.name == "cond":  # what chooses an implementation by platform; the last is the plain one
            total += multiply_adds(eqn.params["branches"][-1].jaxpr)
        else:
            total += sum(multiply_adds(inner) for inner in map(_jaxpr, eqn.params.values()) if inner is not None)
    return total


def _jaxpr(value):
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


@functools.cache
def traced(name, size=224, **attributes):
    """Shapes of a network's variables, and its multiply-adds for one image.

    Args:
      name: of the zoo.
      size: side of the image.
      **attributes: of `create_model`; hashable.

    Returns:
      Variables as `ShapeDtypeStruct`s, multiply-adds.
    """
    model = se_flax.create_model(name, **attributes)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    # Initialisation draws random numbers: no product and no convolution, so one trace serves both questions.
    jaxpr, (_, variables) = jax.make_jaxpr(model.init_with_output, return_shape=True)(jax.random.key(0), images)
    return variables, multiply_adds(jaxpr.jaxpr)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
