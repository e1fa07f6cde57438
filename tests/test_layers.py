"""Convolution, batch norm and pooling against float64 NumPy; refusal of images that no network takes."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import batch_norm, conv, random_variables
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from se_flax import BatchNorm, Conv, UserError
from se_flax.nn.conv import normal_fan_out
from se_flax.nn.network import check_images
from se_flax.nn.pooling import avg_pool, max_pool
from se_flax.nn.residual import drop_path

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("kwargs", "size", "padding"),
    [
        ({"kernel_size": 3}, (7, 6), ((1, 1), (1, 1))),
        ({"kernel_size": 1, "strides": 2}, (7, 6), ((0, 0), (0, 0))),
        ({"kernel_size": 7, "strides": 2}, (11, 8), ((3, 3), (3, 3))),
        ({"kernel_size": (1, 5)}, (7, 6), ((0, 0), (2, 2))),
        ({"kernel_size": 3, "dilation": 2}, (7, 6), ((2, 2), (2, 2))),
        ({"kernel_size": 3, "groups": 2}, (7, 6), ((1, 1), (1, 1))),
        ({"kernel_size": 5, "groups": 8, "strides": 2}, (7, 6), ((2, 2), (2, 2))),
        # TensorFlow pads an even side by one pixel less in front than PyTorch does, an odd side alike.
        ({"kernel_size": 3, "strides": 2, "padding": "SAME"}, (8, 7), ((0, 1), (1, 1))),
        ({"kernel_size": 5, "strides": 2, "padding": "SAME"}, (8, 7), ((1, 2), (2, 2))),
        ({"kernel_size": 3, "padding": ((0, 2), (1, 0))}, (7, 6), ((0, 2), (1, 0))),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_conv(kwargs, size, padding):
    x = normal(2, *size, 8)
    module = Conv(16, use_bias=True, **kwargs)
    variables = random_variables(module, x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    options = {key: kwargs[key] for key in ("strides", "dilation", "groups") if key in kwargs}
    expected = conv(x, kernel, padding=padding, **options) + np.asarray(bias)
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-4)


def test_conv_computes_in_its_dtype_with_float32_parameters():
    x = normal(1, 4, 4, 3)
    for dtype, given, out in (
        (None, jnp.float32, jnp.float32),
        (None, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
    ):
        module = Conv(4, dtype=dtype, use_bias=True)
        y, variables = jax.eval_shape(
            partial(module.init_with_output, jax.random.key(0)), jax.ShapeDtypeStruct(x.shape, given)
        )
        assert y.dtype == out
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert Conv(4).init(jax.random.key(0), x)["params"].keys() == {"kernel"}


def test_conv_starts_with_the_variance_of_he_et_al_fan_out():
    kernel = Conv(256, 3).init(jax.random.key(0), normal(1, 4, 4, 64))["params"]["kernel"]
    assert float(kernel.std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert abs(float(kernel.mean())) < 1e-3


@pytest.mark.parametrize("shape", [(3, 3, 16, 32), [1, 1, 8, 4], (5, 5, 1, 64)])
def test_kernels_start_with_the_numbers_of_flax(shape):
    key = jax.random.key(3)
    theirs = nn.initializers.variance_scaling(3.0, "fan_out", "normal")(key, tuple(shape), jnp.float32)
    np.testing.assert_allclose(normal_fan_out(3.0)(key, shape), theirs, rtol=1e-6)
    assert normal_fan_out(3.0)(key, shape, jnp.bfloat16).dtype == jnp.bfloat16


def test_the_output_that_comes_with_the_first_parameters_is_the_convolutions():
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 8))
    conv = Conv(8, 3, strides=2, groups=8)
    y, variables = conv.init_with_output(jax.random.key(1), x)
    np.testing.assert_allclose(y, conv.apply(variables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.9, 0.6])
def test_batch_norm_uses_the_batch_while_training_and_records_the_unbiased_variance(momentum):
    x = normal(3, 4, 2, 5) * 2 + 1
    module = BatchNorm(momentum=momentum, epsilon=1e-3)
    variables = random_variables(module, x)
    params, stats = variables["params"], variables["batch_stats"]
    assert params.keys() == {"scale", "bias"} and stats.keys() == {"mean", "var"}
    np.testing.assert_allclose(module.apply(variables, x), batch_norm(x, params, stats, 1e-3), rtol=1e-4, atol=1e-5)
    y, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
    exact = x.astype(np.float64)
    batch = {"mean": exact.mean((0, 1, 2)), "var": exact.var((0, 1, 2))}
    np.testing.assert_allclose(y, batch_norm(x, params, batch, 1e-3), rtol=1e-4, atol=1e-5)
    # PyTorch's running_var: its momentum is 1 - ours, its estimate divides by n - 1 = 23.
    torch_momentum = 1 - momentum
    for key, value in (("mean", batch["mean"]), ("var", exact.var((0, 1, 2), ddof=1))):
        expected = (1 - torch_momentum) * np.asarray(stats[key]) + torch_momentum * value
        np.testing.assert_allclose(new["batch_stats"][key], expected, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-3, 3.1415927, 1e4, -12345.678])
def test_batch_norm_of_a_constant_channel_is_its_bias_without_nan(value):
    # E[x^2] - E[x]^2 of a constant rounds to below zero for some of these; its root would be NaN.
    module = BatchNorm(epsilon=1e-12 if value == 0 else 1e-5)
    x = np.full((4, 7, 7, 2), value, np.float32)
    variables = module.init(jax.random.key(0), x)

    def loss(x):
        y, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y**2), new["batch_stats"]

    (_, stats), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(x))
    assert np.isfinite(grad).all()
    assert np.isfinite(stats["var"]).all() and (np.asarray(stats["var"]) >= 0).all()


def test_batch_norm_counts_in_float32_and_answers_in_the_dtype_of_the_map():
    # The mean of 0.1 over 4,096 pixels is lost in bfloat16 long before the end of the sum.
    x = jnp.asarray(normal(16, 16, 16, 3) + 0.1, jnp.bfloat16)
    module = BatchNorm()
    variables = module.init(jax.random.key(0), x)
    y, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * exact.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * exact.var((0, 1, 2), ddof=1), rtol=1e-4)
    assert BatchNorm(dtype=jnp.float32).apply(variables, x).dtype == jnp.float32


@pytest.mark.parametrize("devices", [2, 4])
def test_batch_norm_across_devices_is_that_of_the_whole_batch(devices):
    x = normal(8, 3, 3, 4) * np.arange(1, 9, dtype=np.float32)[:, None, None, None]  # shards differ much
    variables = random_variables(BatchNorm(), x)
    mesh = Mesh(jax.devices()[:devices], ("batch",))

    def step(x, axis_name):
        y, new = BatchNorm(axis_name=axis_name).apply(variables, x, train=True, mutable=["batch_stats"])
        return y, new["batch_stats"]

    def on_devices(axis_name, stats):
        return jax.jit(
            jax.shard_map(
                partial(step, axis_name=axis_name), mesh=mesh, in_specs=P("batch"), out_specs=(P("batch"), stats)
            )
        )(x)

    y, stats = step(jnp.asarray(x), None)
    shared_y, shared = on_devices("batch", P())
    np.testing.assert_allclose(shared_y, y, rtol=1e-4, atol=1e-5)
    for key in ("mean", "var"):
        np.testing.assert_allclose(shared[key], stats[key], rtol=1e-5)
    # Without the axis every device keeps to its own images.
    own_y, _ = on_devices(None, P("batch"))
    part = 8 // devices
    np.testing.assert_allclose(own_y[:part], step(jnp.asarray(x[:part]), None)[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(own_y, y, atol=1e-2)


def test_batch_norm_across_devices_has_the_gradient_of_the_whole_batch():
    x, weight = normal(4, 3, 3, 4), normal(4, 3, 3, 4)
    variables = random_variables(BatchNorm(), x)
    mesh = Mesh(jax.devices()[:2], ("batch",))

    def loss(x, weight, axis_name):
        y, _ = BatchNorm(axis_name=axis_name).apply(variables, x, train=True, mutable=["batch_stats"])
        total = jnp.sum(y * weight)
        return total if axis_name is None else jax.lax.psum(total, axis_name)

    sharded = jax.shard_map(partial(loss, axis_name="batch"), mesh=mesh, in_specs=P("batch"), out_specs=P())
    np.testing.assert_allclose(
        jax.jit(jax.grad(sharded))(x, weight), jax.grad(partial(loss, axis_name=None))(x, weight), rtol=1e-3, atol=1e-5
    )


def test_max_pool_pads_with_minus_infinity():
    x = -np.abs(normal(1, 5, 4, 2)) - 1
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    expected = [[padded[0, i : i + 3, j : j + 3].max((0, 1)) for j in (0, 2)] for i in (0, 2, 4)]
    np.testing.assert_array_equal(max_pool(x)[0], expected)


@pytest.mark.parametrize(("size", "strides"), [(2, 2), (3, 2), (3, 3)])
def test_avg_pool_averages_what_a_hanging_window_holds(size, strides):
    x = normal(2, 5, 6, 3)
    steps = [range(0, dim - size + strides if (dim - size) % strides else dim - size + 1, strides) for dim in (5, 6)]
    expected = np.stack(
        [np.stack([x[:, i : i + size, j : j + size].mean((1, 2)) for j in steps[1]], 1) for i in steps[0]], 1
    )
    np.testing.assert_allclose(avg_pool(x, size, strides), expected, rtol=1e-5, atol=1e-6)


def test_drop_path_drops_whole_images_and_keeps_the_expectation():
    x = np.ones((4000, 2, 3), np.float32)
    y = np.asarray(drop_path(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert (y.reshape(4000, -1).std(1) == 0).all()
    assert y.mean() == pytest.approx(1, abs=0.03)  # 3 standard deviations: 3 * sqrt(0.25 / 0.75 / 4000)
    np.testing.assert_array_equal(y, drop_path(x, 0.25, jax.random.key(0)))
    assert not np.array_equal(y, drop_path(x, 0.25, jax.random.key(1)))
    np.testing.assert_array_equal(x, drop_path(x, 0.0, jax.random.key(0)))
    assert drop_path(jnp.asarray(x, jnp.bfloat16), 0.5, jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (32, 32, 3),
            "float32",
            "got images of shape (32, 32, 3); a network takes [N, H, W, 3] (add the batch axis",
        ),
        ((1, 1, 32, 32, 3), "float32", "got images of shape (1, 1, 32, 32, 3); a network takes [N, H, W, 3]"),
        ((2, 3, 32, 32), "float32", "the channels come last, transpose from NCHW with images.transpose(0, 2, 3, 1)"),
        ((2, 32, 32, 1), "float32", "pass 3 channels, or create the model with in_channels=1"),
        ((2, 32, 32, 3), "uint8", "got images of dtype uint8; a network takes normalised floats: divide by 255"),
        ((2, 32, 32, 3), "int32", "got images of dtype int32"),
    ],
)
def test_images_that_no_network_takes(shape, dtype, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_images(np.zeros(shape, dtype), 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_images_that_a_network_takes(dtype):
    images = check_images(np.zeros((1, 5, 7, 4), jnp.dtype(dtype)), 4)
    assert isinstance(images, jax.Array) and images.shape == (1, 5, 7, 4) and images.dtype == dtype
