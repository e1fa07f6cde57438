"""Norms at their limits: one value, which they refuse; no variance; the largest values of 16 bits."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import random_variables
from test_gradients import NORMS, UNITS

import se_flax
from se_flax import CBAM, BatchNorm, UserError
from se_flax.attention import GlobalContext
from se_flax.lowering.dispatch import force
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


# --- No variance, and the largest values ------------------------------------------------------------------------------


def derived(module, train, platform, shape, dtype, without=()):
    """A compiled function of x, of the output and all gradients of a weighted sum of it, and the variables."""
    variables = random_variables(module, jax.ShapeDtypeStruct(shape, jnp.float32))
    params = {name: part for name, part in variables["params"].items() if name not in without}
    rest = {} if without or "batch_stats" not in variables else {"batch_stats": variables["batch_stats"]}
    weights = np.random.default_rng(1).standard_normal(shape[:-1])[..., None].astype(np.float32)

    def loss(params, x):
        y, new = module.apply({"params": params, **rest}, x, train=train, mutable=["batch_stats"])
        return jnp.sum(y.astype(jnp.float32) * weights), (y, new)

    with force(platform):
        example = params, jax.ShapeDtypeStruct(shape, dtype)
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(*example).compile()
    return lambda x: compiled(params, jnp.asarray(x, dtype)), params


FORMS = {name: (module, train, "cpu", shape, ()) for name, (module, shape, train) in NORMS.items()} | {
    name: (module, train, platform, (2, 4, 3, 6), ("norm",) if name.startswith("folded") else ())
    for name, (module, train, platform) in UNITS.items()
}


@pytest.mark.parametrize("name", FORMS)
def test_without_variance_everything_is_finite(name):
    """Every pixel and image the same, and within a pixel every channel."""
    module, train, platform, shape, without = FORMS[name]
    call, params = derived(module, train, platform, shape, jnp.bfloat16, without)
    for value in (0.0, 1e-30, 1.0, -3.140625, 1e4):
        (_, (y, new)), gradients = call(np.full(shape, value))
        for leaf in jax.tree.leaves((y, new, gradients)):
            assert np.isfinite(np.asarray(leaf, np.float32)).all(), value
        if train and name in ("batch", "batch of vectors", "group", "instance", "layer"):
            # A float32 mean is off by a rounding, which a variance of zero multiplies by 1 / sqrt(epsilon).
            error = 2**-23 * abs(value) * 1e5**0.5 * 4
            np.testing.assert_allclose(
                np.asarray(y, np.float32), np.broadcast_to(params["bias"], shape), rtol=0.01, atol=error
            )


@pytest.mark.parametrize(("dtype", "largest"), [(jnp.float16, 65504.0), (jnp.bfloat16, 1e18)])
@pytest.mark.parametrize("name", NORMS)
def test_the_largest_values_are_normalised(name, dtype, largest):
    """The largest of float16; of bfloat16 those whose squares are float32 numbers with room for a sum."""
    module, train, platform, shape, _ = FORMS[name]
    call, params = derived(module, train, platform, shape, dtype)
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(largest * rng.uniform(-1, 1, shape), dtype), np.float64)
    x[(0,) * x.ndim] = np.asarray(jnp.asarray(largest, dtype), np.float64)
    (_, (y, new)), gradients = call(x)
    for leaf in jax.tree.leaves((new, gradients)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    y = np.asarray(y, np.float64)
    if name in ("batch evaluated", "evo linear"):  # no statistics of x: the largest values may leave the range
        assert not np.isnan(y).any()
        return
    grouped = {"group": 4, "instance": 1, "evo": 4, "layer": 8}.get(name)
    if grouped is None:
        mean, var = (f(x, tuple(range(x.ndim - 1)), keepdims=True) for f in (np.mean, np.var))
    else:
        parts = x.reshape(*shape[:-1], -1, grouped)
        axes = (4,) if name == "layer" else (1, 2, 4)
        mean, var = (np.repeat(f(parts, axes, keepdims=True)[..., 0], grouped, -1) for f in (np.mean, np.var))
    params = {key: np.float64(value) for key, value in params.items()}
    if name == "evo":
        z = params["v"] * x
        expected = x / (1 + np.exp(-np.clip(z, -700, 700))) / np.sqrt(var + 1e-5)
    else:
        expected = (x - mean) / np.sqrt(var + 1e-5)
    expected = expected * params.get("scale", 1.0) + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=0.01, atol=0.01)
