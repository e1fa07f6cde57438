"""Norms that have a single value to take their statistics of: its gradient would be zero, and they say so instead."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import se_flax
from se_flax import CBAM, BatchNorm, UserError
from se_flax.attention import GlobalContext
from se_flax.nn.norm import EvoNormS0, GroupNorm, LayerNorm

BATCH_REMEDY = (
    "train with more images per device and micro-batch, larger images, or statistics over all devices (axis_name; in "
    "the training program parallel.batch_norm=global)"
)
GROUP_REMEDY = "give larger images, or more channels per group"
CHANNEL_REMEDY = "give a map of more channels, or leave the norm out"


def refused(call, norm, values, remedy):
    with pytest.raises(UserError) as error:
        call()
    assert str(error.value) == (
        f"{norm} has {values} to normalise by, so that the difference from the mean, the variance and every gradient "
        f"through them are zero; {remedy}"
    )


@pytest.mark.parametrize(
    ("module", "shape", "values", "remedy"),
    [
        (BatchNorm(), (1, 1, 1, 4), "one value per channel (one image, one pixel)", BATCH_REMEDY),
        (BatchNorm(), (1, 4), "one value per channel (one image, one pixel)", BATCH_REMEDY),
        (GroupNorm(1), (3, 1, 1, 4), "one value per group", GROUP_REMEDY),  # instance norm
        (EvoNormS0(1), (3, 1, 1, 4), "one value per group", GROUP_REMEDY),
        (LayerNorm(), (3, 2, 2, 1), "one channel", CHANNEL_REMEDY),
    ],
    ids=["batch", "descriptors", "instance", "evo", "layer"],
)
def test_one_value_is_refused_and_two_are_not(module, shape, values, remedy):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    variables = module.init(jax.random.key(0), x, train=True)  # the images of `init` may be of any size

    def spread(x):
        y = module.apply(variables, x, train=True, mutable=["batch_stats"])[0]
        return jnp.sum(y * jnp.arange(y.size).reshape(y.shape))

    refused(lambda: spread(x), type(module).__name__, values, remedy)
    refused(lambda: jax.eval_shape(spread, x), type(module).__name__, values, remedy)  # without computing
    if isinstance(module, BatchNorm):
        module.apply(variables, x)  # evaluation has its running statistics
        more = jnp.concatenate([x, 2 * x])
    elif isinstance(module, LayerNorm):
        more = jnp.concatenate([x, 2 * x], -1)
        variables = module.init(jax.random.key(0), more)
    else:
        more = jnp.concatenate([x, 2 * x], 1)
    assert np.abs(jax.grad(spread)(more)).max() > 1e-6


def test_a_norm_without_statistics_takes_one_value():
    x = jnp.ones((1, 1, 1, 4))
    module = EvoNormS0(1, nonlinear=False)
    np.testing.assert_array_equal(module.apply(module.init(jax.random.key(0), x), x), x)


def test_statistics_over_two_devices_are_of_two_values():
    module = BatchNorm(axis_name="replica")
    x = jnp.asarray([[[[[1.0]]]], [[[[3.0]]]]])
    variables = module.init(jax.random.key(0), x[0])
    call = partial(module.apply, variables, train=True, mutable=["batch_stats"])
    y, new = jax.vmap(call, axis_name="replica")(x)
    np.testing.assert_allclose(np.ravel(y), [-1, 1], rtol=1e-4)
    np.testing.assert_allclose(new["batch_stats"]["var"][0], 0.9 + 0.1 * 2)  # unbiased, of 1 and 3
    with pytest.raises(UserError, match=r"^BatchNorm has one value per channel"):
        jax.vmap(call, axis_name="replica")(x[:1])


def traced(name, images, side, **attributes):
    """The shapes of a training step's forward pass."""
    model = se_flax.create_model(name, **attributes)
    x = jax.ShapeDtypeStruct((images, side, side, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.eval_shape(partial(model.apply, train=True, mutable=["batch_stats"]), variables, x)


@pytest.mark.parametrize(
    ("name", "side", "attributes", "where"),
    [
        ("seresnet20", 4, {"depth": 1}, "layer3_0/bn1"),
        ("skresnet18", 64, {"depths": (1, 0, 0, 0)}, "layer1_0/conv1/attn/bn"),  # behind the squeeze, at any side
        ("resnest14d", 64, {"depths": (1, 0, 0, 0)}, "layer1_0/conv2/bn1"),
        ("resnet20", 4, {"depth": 1, "attention": CBAM}, "layer3_0/bn1"),
    ],
)
def test_a_network_names_the_norm_that_has_one_value(name, side, attributes, where):
    with pytest.raises(UserError, match=f"^BatchNorm at {re.escape(where)} has one value per channel"):
        traced(name, 1, side, **attributes)
    traced(name, 2, side, **attributes)
    if name == "seresnet20":
        traced(name, 1, 8, **attributes)


def test_attention_that_is_one_channel_wide_inside_is_refused():
    module, x = GlobalContext(reduction=4), jnp.ones((2, 3, 3, 4))
    variables = module.init(jax.random.key(0), x)
    refused(lambda: module.apply(variables, x), "LayerNorm at mlp_scale/norm", "one channel", CHANNEL_REMEDY)
