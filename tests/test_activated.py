"""Norm, activation and gate in few passes, against the plain composition and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_flax import functional as F
from se_flax.attention import ECA, SqueezeExcite
from se_flax.lowering.gated_norm import _gate, _plain_gate, _plain_squeeze, _squeeze
from se_flax.nn.conv import Conv
from se_flax.nn.mobile import InvertedResidual
from se_flax.nn.norm import BatchNorm

ACTS = [jax.nn.silu, jax.nn.relu, F.ACTIVATIONS["hard_swish"]]


def operands(seed=0):
    rng = np.random.default_rng(seed)
    u = jnp.asarray(rng.normal(size=(3, 4, 5, 6)), jnp.float32)
    factor, offset = (jnp.asarray(rng.normal(size=6), jnp.float32) for _ in range(2))
    gates = jnp.asarray(rng.uniform(size=(3, 1, 1, 6)), jnp.float32)
    return u, factor, offset, gates


@pytest.mark.parametrize("act", ACTS)
def test_the_squeeze_has_the_gradients_of_its_formula(act):
    u, factor, offset, _ = operands()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 1, 1, 6)), jnp.float32)

    def value(form):
        return lambda *x: jnp.sum(weights * form(act, *x))

    for got, wanted in zip(
        jax.grad(value(_squeeze), (0, 1, 2))(u, factor, offset),
        jax.grad(value(_plain_squeeze), (0, 1, 2))(u, factor, offset),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forward", [True, False])
def test_hessian_vector_products_in_either_order(forward):
    u, factor, offset, gates = operands()
    spread = [jnp.broadcast_to(x, gates.shape) for x in (factor, offset)]
    v = jnp.asarray(np.random.default_rng(2).normal(size=u.shape), jnp.float32)

    def product(squeeze, gate):
        def loss(u):
            means = squeeze(jax.nn.silu, u, factor, offset)
            return jnp.sum(gate(jax.nn.silu, jnp.float32, u, *spread, jax.nn.sigmoid(means)) ** 2)

        if forward:
            return jax.jvp(jax.grad(loss), (u,), (v,))[1]
        return jax.grad(lambda u: jnp.vdot(jax.grad(loss)(u), v))(u)

    np.testing.assert_allclose(product(_squeeze, _gate), product(_plain_squeeze, _plain_gate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gating_has_the_gradients_of_its_formula(act, dtype):
    u, factor, offset, gates = operands()
    u = u.astype(dtype)
    spread = [jnp.broadcast_to(x, gates.shape) for x in (factor, offset)]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=u.shape), jnp.float32)

    def value(form):
        return lambda *x: jnp.sum(weights * form(act, dtype, *x).astype(jnp.float32))

    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for got, wanted in zip(
        jax.grad(value(_gate), (0, 1, 2, 3))(u, *spread, gates),
        jax.grad(value(_plain_gate), (0, 1, 2, 3))(u, *spread, gates),
        strict=True,
    ):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("attention", [SqueezeExcite, ECA])
@pytest.mark.parametrize("form", ["here", "accelerators"])
def test_a_block_is_norm_then_activation_then_attention(attention, form, monkeypatch):
    if form == "accelerators":  # the form that is compiled there, run here
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, default, **_: default(*x))
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

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), results(attention), results(Apart)
    )
