"""A convolution's value and derivatives against XLA's own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from se_flax.lowering.convolution import convolve


def reference(x, kernel, strides, padding, dilation, groups):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def check(x, kernel, *arguments, convolution=convolve):
    """Value on its own (which may take another form), value, gradients and forward derivative."""
    tangents = tuple(arrays(x.shape, kernel.shape))

    @partial(jax.jit, static_argnums=0)
    def all_of(convolution, x, kernel):
        def function(x, k):
            return convolution(x, k, *arguments)

        value, pullback = jax.vjp(function, x, kernel)
        return function(x, kernel), value, pullback(jnp.cos(value)), jax.jvp(function, (x, kernel), tangents)[1]

    for ours, theirs in zip(
        jax.tree.leaves(all_of(convolution, x, kernel)), jax.tree.leaves(all_of(reference, x, kernel)), strict=True
    ):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
