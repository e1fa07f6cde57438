"""Flax's lifted transformations over modules whose `train` is keyword-only: the recipe of docs/attention.md."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import se_flax
from tests.random_variables import random_variables

PAGE = Path(__file__).parents[1] / "docs" / "attention.md"
KEY = jax.random.key(0)
SMALL = {"depths": (1, 1), "strides": (1, 2), "width": 8, "num_classes": 4}


@pytest.fixture(scope="module")
def recipe():
    """The names that the page's section defines."""
    section = PAGE.read_text().partition("## Less memory: `nn.remat`")[2].partition("\n## ")[0]
    names = {"__name__": "page", "nn": nn, "se_flax": se_flax}
    for code in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
        exec(
            code.replace('"seresnet50", ', '"seresnet50", depths=(1, 1), strides=(1, 2), width=8, num_classes=4, '),
            names,
        )
    return names


def training(model, variables, images):
    """A training step's loss by the parameters, its statistics beside it."""

    def loss(params):
        rngs = {"dropout": KEY}
        logits, updated = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"], rngs=rngs
        )
        return jnp.sum(jnp.square(logits)), updated

    return loss


def kept(loss, params):
    """Bytes that the forward pass leaves for the gradient."""
    backward = jax.eval_shape(lambda p: jax.vjp(loss, p, has_aux=True)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))


def test_a_networks_blocks_are_computed_again_and_nothing_else_changes(recipe):
    model, plain = recipe["model"], se_flax.create_model("seresnet50", **SMALL)
    assert isinstance(model, type(plain)) and model.block is recipe["Recomputed"]
    images = jax.random.normal(KEY, (2, 32, 32, 3))
    variables = random_variables(plain, *images.shape)
    assert jax.eval_shape(model.init, KEY, images) == jax.eval_shape(plain.init, KEY, images)
    one, other = (training(m, variables, images) for m in (plain, model))
    (value, statistics), gradient = jax.jit(jax.value_and_grad(one, has_aux=True))(variables["params"])
    (again, statistics_again), gradient_again = jax.jit(jax.value_and_grad(other, has_aux=True))(variables["params"])
    np.testing.assert_allclose(again, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), statistics, statistics_again)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), gradient, gradient_again)
    assert kept(other, variables["params"]) < 0.5 * kept(one, variables["params"])


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_modules_of_ones_own_network(recipe, lift, monkeypatch):
    monkeypatch.setattr(nn, "remat", lift)
    images = jax.random.normal(KEY, (2, 6, 6, 32))
    model = recipe["Net"]()
    variables = jax.jit(model.init)(KEY, images)
    assert set(variables["params"]) == {"BatchNorm_0", "CBAM_0"}
    y, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    of_norm, of_attention = (
        {kind: variables[kind][name] for kind in ("params", "batch_stats")} for name in ("BatchNorm_0", "CBAM_0")
    )
    z, after_norm = se_flax.BatchNorm().apply(of_norm, images, train=True, mutable=["batch_stats"])
    expected, after = se_flax.CBAM().apply(of_attention, z, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        updated["batch_stats"],
        {"BatchNorm_0": after_norm["batch_stats"], "CBAM_0": after["batch_stats"]},
    )


def test_without_the_recipe_flax_says_what_the_page_says():
    images = jnp.zeros((1, 4, 4, 32))
    with pytest.raises(jax.errors.TracerBoolConversionError):
        nn.remat(se_flax.BatchNorm)().init(KEY, images, train=True)


def test_nnx_computes_again_in_training_mode():
    model = se_flax.create_model("seresnet20", depth=1)
    images = jax.random.normal(KEY, (2, 8, 8, 3))
    variables = random_variables(model, *images.shape)
    nets = [se_flax.to_nnx(model, variables, rngs=nnx.Rngs(0)) for _ in range(2)]
    for net in nets:
        net.train()
    plain, lifted = (lambda net: net(images).sum()), (lambda net: nnx.remat(lambda net, x: net(x))(net, images).sum())
    values = [nnx.jit(nnx.value_and_grad(f))(net)[0] for f, net in zip((plain, lifted), nets, strict=True)]
    np.testing.assert_allclose(*values, rtol=1e-6)
    one, other = (se_flax.from_nnx(net)["batch_stats"] for net in nets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one, other)
    assert not np.array_equal(one["bn1"]["mean"], variables["batch_stats"]["bn1"]["mean"])
