"""Norm, activation and gate in few passes: in both platforms' forms the formula and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import double, gate_after_act, gradients, squeeze_after_act

from se_flax import functional as F
from se_flax.attention import ECA, SqueezeExcite
from se_flax.lowering import gated_norm
from se_flax.lowering.dispatch import force
from se_flax.nn.conv import Conv
from se_flax.nn.mobile import InvertedResidual
from se_flax.nn.norm import BatchNorm

FORMS = pytest.mark.parametrize("platform", ["cpu", "tpu"])
ACTS = pytest.mark.parametrize("act", ["silu", "relu", "hard_swish"])


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def operands():
    gates = np.random.default_rng(3).uniform(size=(3, 1, 1, 6)).astype(np.float32)
    return normal((3, 4, 5, 6), 0), normal((6,), 1), normal((6,), 2), gates


@FORMS
@ACTS
def test_squeeze_after_act_and_its_gradients(platform, act):
    *given, _ = operands()
    weights = normal((3, 1, 1, 6), 4)
    with force(platform):
        got = gated_norm.squeeze_after_act(*given, F.ACTIVATIONS[act])
        slopes = jax.grad(
            lambda *x: jnp.sum(weights * gated_norm.squeeze_after_act(*x, F.ACTIVATIONS[act])), (0, 1, 2)
        )(*given)
    np.testing.assert_allclose(got, squeeze_after_act(*double(*given), act), rtol=1e-5, atol=1e-6)
    expected = gradients(lambda *x: np.sum(weights * squeeze_after_act(*x, act)), *given)
    for ours, wanted in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


@FORMS
@ACTS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_gate_after_act_and_its_gradients(platform, act, dtype):
    u, *rest = operands()
    given = jnp.asarray(u, dtype), *rest
    weights = normal(u.shape, 4)

    def form(*x):
        return gated_norm.gate_after_act(*x, F.ACTIVATIONS[act], dtype)

    with force(platform):
        got = form(*given)
        slopes = jax.grad(lambda *x: jnp.sum(weights * form(*x).astype(jnp.float32)), (0, 1, 2, 3))(*given)
    expected = gradients(lambda *x: np.sum(weights * gate_after_act(*x, act)), *given)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert got.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(got, np.float64), gate_after_act(*double(*given), act), rtol=tolerance, atol=tolerance
    )
    for ours, x, wanted in zip(slopes, given, expected, strict=True):
        assert ours.dtype == x.dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), wanted, rtol=tolerance, atol=tolerance)


@FORMS
@pytest.mark.parametrize("forward", [True, False])
def test_hessian_vector_products_in_either_order(platform, forward):
    u, factor, offset, _ = operands()
    v = normal(u.shape, 5)

    def loss(u):
        means = gated_norm.squeeze_after_act(u, factor, offset, jax.nn.silu)
        gated = gated_norm.gate_after_act(u, factor, offset, jax.nn.sigmoid(means), jax.nn.silu, jnp.float32)
        return jnp.sum(gated**2)

    with force(platform):
        if forward:
            got = jax.jvp(jax.grad(loss), (u,), (v,))[1]
        else:
            got = jax.grad(lambda u: jnp.vdot(jax.grad(loss)(u), v))(u)

    def formula(u):
        gates = 1 / (1 + np.exp(-squeeze_after_act(u, factor, offset, "silu")))
        return np.sum(gate_after_act(u, factor, offset, gates, "silu") ** 2)

    step = 1e-4
    (wanted,) = gradients(lambda u: (formula(u + step * v) - formula(u - step * v)) / (2 * step), u, step=step)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("attention", [SqueezeExcite, ECA])
@FORMS
def test_a_block_is_norm_then_activation_then_attention(platform, attention):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 8)), jnp.float32)

    class Apart(attention):
        """An attention that no norm goes together with."""

        squeezes_mean = False

    def results(attention):
        block = InvertedResidual(8, conv=Conv, norm=BatchNorm, act=jax.nn.silu, attention=attention)
        variables = block.init(jax.random.key(0), x)

        def loss(params, x):
            y, new = block.apply(
                {"params": params, "batch_stats": variables["batch_stats"]}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(y)), new

        (value, new), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)
        return value, new, grads, block.apply(variables, x)

    with force(platform):
        together, apart = results(attention), results(Apart)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), together, apart)
