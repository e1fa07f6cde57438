"""ReXNet: widths, the shortcut of a part of the channels, and squeeze-and-excitation with a batch norm."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import se_flax
from se_flax import UserError
from se_flax.backbones.rexnet import ReXNetBlock
from se_flax.nn.conv import Conv
from se_flax.nn.norm import BatchNorm
from train.build import build_model
from train.config import Config, Model, Parallel

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.standard_normal((3, 6, 6, 24)), jnp.float32)


def test_widths_are_those_of_the_released_network():
    widths = se_flax.create_model("rexnet_100").widths
    assert widths == ((16,), (27, 38), (50, 61), (72, 84, 95), (106, 117, 128), (140, 151, 162, 174, 185))
    rounded = [width for stage in se_flax.create_model("rexnetr_300").widths for width in stage]
    assert rounded[:3] == [48, 80, 112] and not any(width % 16 for width in rounded)


def test_the_new_channels_of_a_block_have_no_shortcut():
    block = ReXNetBlock(32, conv=Conv, norm=BatchNorm, hidden=48)
    variables = block.init(jax.random.key(0), X)
    variables["params"]["conv_pwl"]["bn"]["scale"] *= 0
    y = block.apply(variables, X)
    np.testing.assert_array_equal(y[..., :24], X)
    assert not y[..., 24:].any()
    for other in ({"strides": 2}, {"features": 16}):
        y = block.clone(**other)
        variables = y.init(jax.random.key(0), X)
        variables["params"]["conv_pwl"]["bn"]["scale"] *= 0
        assert not y.apply(variables, X).any()


def count(**attributes):
    model = se_flax.create_model("rexnet_100", num_classes=0, **attributes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def test_attention_is_in_the_stages_from_the_third_on():
    """A twelfth of the expanded channels between the layers, whose norm has two parameters each."""
    inputs = [38, 50, 61, 72, 84, 95, 106, 117, 128, 140, 151, 162, 174]
    hidden = [6 * c // 12 for c in inputs]
    gates = [2 * 6 * c * m + 6 * c + 3 * m for c, m in zip(inputs, hidden, strict=True)]
    assert count() - count(attention=None) == sum(gates)
    assert count(stages=(4,)) - count(attention=None) == sum(gates[:2])
    with pytest.raises(UserError, match=re.escape("8 is not a stage of blocks; allowed: 2, 3, 4, 5, 6, 7")):
        count(stages=(8,))


@pytest.mark.parametrize("train", [False, True])
def test_a_batch_norm_between_the_layers(train):
    """x * sigmoid(W2 relu(norm(W1 mean(x) + b1)) + b2), with the batch's moments or the running ones."""
    se = se_flax.SqueezeExcite(reduction=4, norm=BatchNorm)
    variables = se.init(jax.random.key(0), X)
    variables = jax.tree.map(lambda leaf: leaf + RANDOM.uniform(0.1, 1, leaf.shape).astype(np.float32), variables)
    found = se.apply(variables, X, train=train, mutable=["batch_stats"] if train else False)
    y, new = found if train else (found, variables)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    old = variables["batch_stats"]["bn"]
    h = np.asarray(X, np.float64).mean((1, 2)) @ p["fc1"]["kernel"][0, 0] + p["fc1"]["bias"]
    mean, var = (h.mean(0), h.var(0)) if train else (old["mean"], old["var"])
    h = (h - mean) / np.sqrt(var + 1e-5) * p["bn"]["scale"] + p["bn"]["bias"]
    logits = np.maximum(h, 0) @ p["fc2"]["kernel"][0, 0] + p["fc2"]["bias"]
    np.testing.assert_allclose(y, X / (1 + np.exp(-logits))[:, None, None], rtol=1e-4, atol=1e-6)
    if train:
        np.testing.assert_allclose(new["batch_stats"]["bn"]["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-4)


def test_a_run_tells_that_norm_over_which_replicas_its_statistics_go():
    config = Config(model=Model(name="rexnet_100"), parallel=Parallel(batch_norm="global"))
    model = build_model(config, 5)
    assert model.attention.keywords["norm"].keywords["axis_name"] == model.norm.keywords["axis_name"] is not None
