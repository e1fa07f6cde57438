"""RepViT: mixers against their definitions, the two classifiers, and what they mean for fine-tuning."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import random_variables
from parity import compare

import se_flax
from se_flax import UserError
from se_flax.backbones.repvit import ChannelMixer, TokenMixer, TwoHeads
from se_flax.nn.conv import Conv
from se_flax.nn.head import Dense
from se_flax.nn.norm import BatchNorm
from train.config import Data
from train.run.fitted_head import fitted_head

X = np.random.default_rng(0).standard_normal((2, 7, 6, 8)).astype(np.float32)
SMALL = {"widths": (8, 16, 24, 32), "depths": (2, 1, 1, 1)}


def normed(variables, *path):
    """Factor and offset of a norm."""
    p, s = (variables[kind] for kind in ("params", "batch_stats"))
    for part in path:
        p, s = p[part], s[part]
    factor = p["scale"] / np.sqrt(s["var"] + 1e-5)
    return factor, p["bias"] - s["mean"] * factor


def test_a_token_mixer_is_a_sum_of_three():
    """norm(norm(conv3x3(x)) + conv1x1(x) + x); the 3x3 kernel takes the pixel to the left."""
    mixer = TokenMixer(Conv, BatchNorm)
    variables = random_variables(mixer, X)
    params = variables["params"]
    kernel = np.zeros((3, 3, 1, 8), np.float32)
    kernel[1, 0] = 2.0
    params["conv"]["c"]["kernel"] = kernel
    a, b = normed(variables, "conv", "bn")
    c, d = normed(variables, "bn")
    left = np.pad(X, [(0, 0), (0, 0), (1, 0), (0, 0)])[:, :, :-1]
    one = X * np.asarray(params["conv1"]["kernel"]).reshape(8) + params["conv1"]["bias"]
    np.testing.assert_allclose(mixer.apply(variables, X), c * (a * 2 * left + b + one + X) + d, rtol=1e-3, atol=1e-4)
    first = TokenMixer(Conv, BatchNorm, norm_each=True)
    assert first.init(jax.random.key(0), X)["params"].keys() == {"conv", "conv1"}


def test_a_channel_mixer_starts_as_the_identity():
    mixer = ChannelMixer(2, Conv, BatchNorm)
    np.testing.assert_array_equal(mixer.apply(mixer.init(jax.random.key(0), X), X), X)


def test_the_logits_are_the_mean_of_two_classifiers():
    x = X.mean((1, 2))
    heads = TwoHeads(5, BatchNorm, Dense, jax.nn.initializers.normal(), train=False)
    variables = random_variables(heads, x)
    logits = []
    for part in ("head", "head_dist"):
        a, b = normed(variables, part, "bn")
        layer = variables["params"][part]["l"]
        logits.append((a * x + b) @ layer["kernel"] + layer["bias"])
    np.testing.assert_allclose(heads.apply(variables, x), (logits[0] + logits[1]) / 2, rtol=1e-4, atol=1e-5)


def count(**attributes):
    model = se_flax.create_model("repvit_m1", **{"num_classes": 0, **SMALL, **attributes})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def test_attention_is_in_every_second_block_from_the_first_on():
    """Wang et al. 2024, section 3.4; a quarter of the channels, as a multiple of eight."""
    plain = count(attention=None)
    hidden = dict.fromkeys(SMALL["widths"], 8)
    assert count() - plain == sum(2 * c * m + c + m for c, m in hidden.items())
    assert count(stages=(2,)) - plain == 2 * 8 * 8 + 8 + 8
    assert count(depths=(3, 1, 1, 1), stages=(2,)) - count(depths=(3, 1, 1, 1), attention=None) == 2 * (2 * 64 + 16)


@pytest.mark.parametrize("name", ["repvit_m0_9", "repvit_m1"])
def test_inference_has_one_convolution_per_token_mixer(name):
    model = se_flax.create_model(name, **SMALL, num_classes=5)
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    variables = random_variables(model, images)
    fused, folded = se_flax.fuse(model, variables)
    mixer = folded["params"]["stages_1"]["downsample"]["pre_block"]["token_mixer"]
    assert jax.tree.map(np.shape, mixer) == {"conv": {"c": {"kernel": (3, 3, 1, 8), "bias": (8,)}}}
    assert folded["batch_stats"].keys() == {"head"}  # before a dense layer, not after a convolution
    expected = compare.compiled(model.apply, variables, images)
    given = compare.compiled(fused.apply, folded, images)
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_head_of_two_is_not_fitted_in_closed_form():
    model = se_flax.create_model("repvit_m1", **SMALL, num_classes=5)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    text = (
        "optim.fit_head fits one dense classifier, but the head of RepViT has several layers; leave optim.fit_head out"
    )
    with pytest.raises(UserError, match=re.escape(text)):
        fitted_head(model, variables, None, Data(), print)
