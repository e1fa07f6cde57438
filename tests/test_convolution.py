"""The convolution's lowerings against XLA's own, whatever the shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from se_flax import Conv
from se_flax.convolution import convolve, shifted_products


def reference(x, kernel, strides, padding, dilation):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


SIDES = st.integers(5, 9)
PAIRS = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(deadline=None, max_examples=12)
@given(
    sides=st.tuples(SIDES, SIDES),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(PAIRS, PAIRS)),
)
def test_shifted_products_are_a_depthwise_convolution(sides, size, strides, dilation, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *sides, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((*size, 1, 3)), jnp.float32)
    arguments = (strides, padding, dilation)
    expected, pullback = jax.vjp(lambda x, k: reference(x, k, *arguments), x, kernel)
    given_values, given_pullback = jax.vjp(lambda x, k: shifted_products(x, k, *arguments), x, kernel)
    assert given_values.shape == expected.shape
    np.testing.assert_allclose(given_values, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(given_pullback(expected), pullback(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("platform", "native"), [("cpu", False), ("tpu", True), ("cuda", True)])
def test_only_a_cpu_takes_the_sum(platform, native):
    x, kernel = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 1, 4), jnp.float32)
    function = jax.jit(lambda x, k: convolve(x, k, (1, 1), "SAME", (1, 1), 4))
    text = jax.export.export(function, platforms=[platform])(x, kernel).mlir_module()
    assert ("stablehlo.convolution" in text) == native


def test_other_convolutions_stay_xlas():
    for groups, features in ((1, 4), (2, 4), (4, 8)):
        conv = Conv(features, 3, groups=groups)
        text = str(
            jax.make_jaxpr(lambda x, c=conv: c.init_with_output(jax.random.key(0), x)[0])(jnp.zeros((1, 8, 8, 4)))
        )
        assert "conv_general_dilated" in text and "platform_index" not in text


def test_bfloat16_stays_bfloat16():
    x = jnp.ones((1, 8, 8, 4), jnp.bfloat16)
    model = Conv(4, 3, groups=4)
    assert model.apply(model.init(jax.random.key(0), x), x).dtype == jnp.bfloat16
