"""Mobile blocks, their tables, and the norms and pooling that came with them, each against a plain formula."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_flax.attention import GlobalContext
from se_flax.checkpoints.torch import from_torch_layout, to_torch_layout
from se_flax.errors import UserError
from se_flax.nn.conv import Conv
from se_flax.nn.mobile import CondConv, DepthwiseSeparable, InvertedResidual, mixed_conv
from se_flax.nn.mobile_table import (
    change,
    fused,
    inverted,
    plain,
    scale_depth,
    scale_width,
    separable,
    start_with_space_to_depth,
)
from se_flax.nn.norm import BatchNorm, EvoNormS0, GroupNorm, LayerNorm
from se_flax.nn.pooling import blur_pool

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.standard_normal((2, 8, 6, 16)), jnp.float32)
PARTS = {"conv": Conv, "norm": BatchNorm}


def repeats(layout):
    return [[row.repeats for row in stage] for stage in layout]


def test_depth_is_scaled_per_stage_and_shared_from_the_last_row():
    layout = ((separable(16),), (inverted(24, 1), inverted(24, 3)), (inverted(40, 4),))
    assert repeats(scale_depth(layout, 1.2)) == [[2], [1, 4], [5]]
    assert repeats(scale_depth(layout, 1.2, round)) == [[1], [1, 4], [5]]
    assert repeats(scale_depth(layout, 0.1, round)) == [[1], [1, 1], [1]]
    assert repeats(scale_depth(layout, (1, 2, 1.5), math.ceil)) == [[1], [2, 6], [6]]


def test_width_is_rounded_to_the_divisor():
    layout = ((separable(16),), (inverted(24),), (plain(72, skip=True),))
    widths = [row.features for stage in scale_width(layout, 1.1) for row in stage]
    assert widths == [16, 24, 80]  # 17.6, 26.4 and 79.2
    assert [row.features for stage in scale_width(layout, 0.5) for row in stage] == [8, 16, 40]  # 12 must not become 8
    assert [row.features for stage in scale_width(layout, 1.2, 16) for row in stage] == [32, 32, 80]


def test_further_attributes_reach_every_block():
    layout = change(((separable(16),), (inverted(24, kernel=5),)), group_size=8)
    assert [row.block.keywords["group_size"] for stage in layout for row in stage] == [8, 8]
    assert layout[1][0].block.keywords["kernel"] == 5


def test_space_to_depth_moves_the_second_stages_stride_to_the_front():
    layout = start_with_space_to_depth(((separable(16, 2),), (fused(24, 3, strides=2, expand=6),), (inverted(40),)))
    first, second, third = layout
    assert [(row.features, row.repeats, row.downsamples) for row in first] == [(64, 1, True), (64, 1, False)]
    assert [(row.repeats, row.strides, row.block.keywords["expand"]) for row in second] == [(1, 1, 1.5), (2, 1, 6)]
    assert [row.features for row in third] == [40]


def test_mixed_kernels_share_the_channels_and_the_first_takes_the_rest():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return mixed_conv(Conv, 16, (3, 5, 7), x, groups=16, name="conv_dw")

    y, variables = Mixed().init_with_output(jax.random.key(0), X)
    kernels = {name: leaf["kernel"] for name, leaf in variables["params"].items()}
    assert {name: k.shape for name, k in kernels.items()} == {
        "conv_dw_0": (3, 3, 1, 6),
        "conv_dw_1": (5, 5, 1, 5),
        "conv_dw_2": (7, 7, 1, 5),
    }
    last = jax.lax.conv_general_dilated(
        X[..., 11:],
        kernels["conv_dw_2"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=5,
    )
    np.testing.assert_allclose(y[..., 11:], last, atol=1e-5)


@pytest.mark.parametrize("padding", ["symmetric", "SAME"])
@pytest.mark.parametrize(("kernel", "strides", "groups"), [(1, 1, 1), (3, 1, 16), (5, 2, 16), (3, 2, 4)])
def test_condconv_is_one_convolution_per_image(kernel, strides, groups, padding):
    layer = CondConv(32, kernel, 3, strides=strides, groups=groups, padding=padding)
    routing = jnp.asarray(RANDOM.uniform(size=(2, 3)), jnp.float32)
    variables = layer.init(jax.random.key(0), X, routing)
    y = layer.apply(variables, X, routing)
    experts = variables["params"]["experts"]
    for i in range(2):
        mixed = jnp.tensordot(routing[i], experts, 1)
        single = Conv(32, kernel, strides=strides, groups=groups, padding=padding)
        expected = single.apply({"params": {"kernel": mixed}}, X[i : i + 1])
        np.testing.assert_allclose(y[i : i + 1], expected, atol=1e-4)


def test_experts_are_flattened_kernels_in_torch():
    path = ("params", "conv_pw", "experts")
    ours = RANDOM.standard_normal((4, 3, 3, 2, 5)).astype(np.float32)
    theirs = to_torch_layout(path, ours)
    assert theirs.shape == (4, 90)
    np.testing.assert_array_equal(theirs[1].reshape(5, 2, 3, 3), ours[1].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(from_torch_layout(path, theirs, ours.shape), ours)


def test_blur_pool_is_a_strided_binomial_convolution():
    line = np.array([1, 2, 1]) / 4
    kernel = jnp.asarray(np.tile(np.outer(line, line)[:, :, None, None], (1, 1, 1, 16)), jnp.float32)
    for x in (X, X[:, :7, :5]):
        expected = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=16
        )
        np.testing.assert_allclose(blur_pool(x), expected, atol=1e-6)


def test_antialiasing_takes_the_stride_from_the_convolution():
    block = InvertedResidual(16, **PARTS, strides=2, expand=2, antialias=blur_pool)
    y, variables = block.init_with_output(jax.random.key(0), X)
    assert y.shape == (2, 4, 3, 16)
    plain_block = InvertedResidual(16, **PARTS, strides=2, expand=2)
    assert plain_block.apply(variables, X).shape == y.shape
    assert not np.allclose(plain_block.apply(variables, X), y)


def test_space_to_depth_halves_the_map_and_the_kernel():
    block = DepthwiseSeparable(64, **PARTS, space_to_depth=True)
    y, variables = block.init_with_output(jax.random.key(0), X)
    assert y.shape == (2, 4, 3, 64)
    assert variables["params"]["conv_s2d"]["kernel"].shape == (2, 2, 16, 64)
    assert variables["params"]["conv_dw"]["kernel"].shape == (2, 2, 1, 64)


def test_residual_sum_only_where_shape_and_settings_allow():
    def starts_as_input(**settings):
        block = InvertedResidual(**PARTS, **settings)
        y, variables = block.init_with_output(jax.random.key(0), X)
        params = jax.tree.map(jnp.zeros_like, variables["params"])
        return y.shape == X.shape and np.allclose(block.apply({**variables, "params": params}, X), X)

    assert starts_as_input(features=16)
    assert not starts_as_input(features=16, skip=False)
    assert not starts_as_input(features=16, strides=2)
    assert not starts_as_input(features=24)


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_group_norm_is_flaxs(group_size):
    ours, theirs = GroupNorm(group_size), nn.GroupNorm(None, group_size, epsilon=1e-5)
    np.testing.assert_allclose(
        ours.apply(ours.init(jax.random.key(0), X), X), theirs.apply(theirs.init(jax.random.key(0), X), X), atol=1e-5
    )
    with pytest.raises(UserError, match="got group_size=5 for 16 channels; it must divide them"):
        GroupNorm(5).init(jax.random.key(0), X)


def test_layer_norm_is_flaxs():
    ours, theirs = LayerNorm(), nn.LayerNorm(epsilon=1e-5)
    np.testing.assert_allclose(
        ours.apply(ours.init(jax.random.key(0), X), X), theirs.apply(theirs.init(jax.random.key(0), X), X), atol=1e-5
    )


def test_evonorm_is_its_formula():
    params = {
        "scale": jnp.asarray(RANDOM.uniform(0.5, 2, 16), jnp.float32),
        "bias": jnp.asarray(RANDOM.standard_normal(16), jnp.float32),
        "v": jnp.asarray(RANDOM.standard_normal(16), jnp.float32),
    }
    x = np.asarray(X, np.float64)
    deviation = np.sqrt(x.reshape(2, 8, 6, 4, 4).var(axis=(1, 2, 4), keepdims=True) + 1e-5)
    deviation = np.broadcast_to(deviation, (2, 8, 6, 4, 4)).reshape(x.shape)
    expected = x / (1 + np.exp(-x * np.asarray(params["v"]))) / deviation * params["scale"] + params["bias"]
    np.testing.assert_allclose(EvoNormS0(4).apply({"params": params}, X), expected, atol=1e-5)
    del params["v"]
    linear = EvoNormS0(4, nonlinear=False).apply({"params": params}, X)
    np.testing.assert_allclose(linear, X * params["scale"] + params["bias"], atol=1e-6)


@pytest.mark.parametrize("norm", [GroupNorm, LayerNorm, EvoNormS0])
def test_norms_keep_float32_parameters_and_give_the_wanted_dtype(norm):
    layer = norm(dtype=jnp.bfloat16)
    y, variables = layer.init_with_output(jax.random.key(0), X)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(layer.apply(variables, X, train=True), y)


def test_global_context_is_its_formula():
    layer = GlobalContext(fraction=0.25, activation="silu")
    variables = layer.init(jax.random.key(0), X)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.asarray(RANDOM.standard_normal(leaf.shape)), variables["params"]
    )
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    pixels = np.asarray(X, np.float64).reshape(2, 48, 16)
    weights = np.exp(pixels @ p["conv_attn"]["kernel"][0, 0])
    context = (pixels * weights / weights.sum(1, keepdims=True)).sum(1)
    hidden = context @ p["mlp_scale"]["fc1"]["kernel"][0, 0] + p["mlp_scale"]["fc1"]["bias"]
    hidden = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-6)
    hidden = hidden * p["mlp_scale"]["norm"]["scale"] + p["mlp_scale"]["norm"]["bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    logits = hidden @ p["mlp_scale"]["fc2"]["kernel"][0, 0] + p["mlp_scale"]["fc2"]["bias"]
    expected = np.asarray(X) / (1 + np.exp(-logits))[:, None, None]
    np.testing.assert_allclose(layer.apply({"params": params}, X), expected, atol=1e-5)
    wide = GlobalContext(fraction=0.25).init(jax.random.key(0), X, base_channels=64)["params"]
    assert wide["mlp_scale"]["fc1"]["kernel"].shape == (1, 1, 16, 16)


def test_experts_route_by_the_blocks_input():
    block = InvertedResidual(16, **{**PARTS, "conv": partial(Conv, padding="SAME")}, expand=2, experts=3)
    y, variables = block.init_with_output(jax.random.key(0), X)
    assert y.shape == X.shape
    assert variables["params"]["routing_fn"]["kernel"].shape == (16, 3)
    assert variables["params"]["conv_dw"]["experts"].shape == (3, 3, 3, 1, 32)
