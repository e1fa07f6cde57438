"""The TPU's form of a 1x1 convolution with its norm against the plain one: same numbers, without the map between."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from se_flax.attention import ECA, SqueezeExcite
from se_flax.lowering import deferred_conv
from se_flax.lowering.dispatch import force
from se_flax.nn.conv import Conv
from se_flax.nn.norm import BatchNorm
from se_flax.nn.norm_attention import norm_act_attend
from se_flax.nn.residual import Bottleneck, project

LEAN = partial(BatchNorm, defer_conv=True)


as_on_tpu = force("tpu")  # of a function: traces it in the TPU's form


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def drawn(shape, seed, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(got, wanted, tolerance):
    def check(path, a, b):
        assert a.shape == b.shape and a.dtype == b.dtype
        wide = [np.asarray(x, np.float64) for x in (a, b)]
        np.testing.assert_allclose(*wide, rtol=tolerance, atol=tolerance * np.abs(wide[1]).max(), err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, got, wanted)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_statistics_of_a_product_from_its_input(n, h, w, narrow, features):
    x, kernel = (np.asarray(drawn(s, i, np.float32)) for i, s in enumerate([(n, h, w, narrow), (narrow, features)]))
    y = x.astype(np.float64) @ kernel
    with force("tpu"):
        deferred = deferred_conv.defer_conv(x, kernel)
        (mean, square), means = deferred_conv.moments(deferred), deferred_conv.image_means(deferred)
    assert not np.any(deferred.output)
    np.testing.assert_allclose(mean, y.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(square, (y**2).mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(means, y.mean((1, 2), keepdims=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_image", [False, True])
def test_the_affine_map_has_the_gradients_of_its_formula(float64, per_image):
    x, kernel = drawn((3, 4, 5, 6), 0), drawn((6, 24), 1)
    factor, offset = (drawn((3, 1, 1, 24) if per_image else (24,), seed) for seed in (2, 3))
    weights = drawn((3, 4, 5, 24), 4)

    def value(f):
        return lambda *operands: jnp.sum(weights * jnp.sin(f(*operands)))

    def plain(x, kernel, factor, offset):
        return x @ kernel * factor + offset

    @as_on_tpu
    def through(x, kernel, factor, offset):
        return deferred_conv.affine(deferred_conv.defer_conv(x, kernel), factor, offset, jnp.float64)

    operands = (x, kernel, factor, offset)
    for derivative in (jax.value_and_grad, lambda f, *a: jax.grad(lambda *x: jnp.sum(jax.grad(f)(*x) ** 2), *a)):
        got, wanted = (derivative(value(f), (0, 1, 2, 3))(*operands) for f in (through, plain))
        assert_close(got, wanted, 1e-10)


def network(attention, average=False):
    """Three bottlenecks, the first with a projection that widens."""

    class Stage(nn.Module):
        @nn.compact
        def __call__(self, x):
            shortcut = partial(project, average=average)
            parts = {"conv": Conv, "norm": LEAN, "zero_init_last": False, "downsample": shortcut}
            for i in range(3):
                x = Bottleneck(8, attention=attention, **parts, name=f"block{i}")(x, train=True)
            return x

    return Stage()


def gradients(model, x, weights, dtype, variables):
    def loss(params, x):
        y, updated = model.apply({**variables, "params": params}, x.astype(dtype), mutable=["batch_stats"])
        return jnp.sum(weights * y.astype(weights.dtype)), (y, updated)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)


@pytest.mark.parametrize("attention", [None, SqueezeExcite, ECA, partial(SqueezeExcite, gate="hard_sigmoid")])
@pytest.mark.parametrize("average", [False, True])
def test_blocks_give_the_same_numbers_in_both_forms(float64, attention, average):
    x, model = drawn((3, 6, 5, 8), 0), network(attention, average)
    variables = model.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda v: v.astype(jnp.float64), variables)
    run = partial(gradients, model, x, drawn((3, 6, 5, 32), 1), jnp.float64)
    # SE's own arithmetic is float32.
    assert_close(as_on_tpu(run)(variables), run(variables), 1e-9 if attention is None else 1e-5)


@pytest.mark.parametrize("attention", [None, SqueezeExcite])
def test_in_bfloat16_the_form_errs_no_more_than_the_plain_one(attention):
    x, model, weights = drawn((8, 12, 12, 8), 0, np.float32), network(attention), drawn((8, 12, 12, 32), 1, np.float32)
    variables = model.init(jax.random.key(0), x)
    exact, plain = (jax.tree.leaves(gradients(model, x, weights, d, variables)[1][0]) for d in ("f4", jnp.bfloat16))
    ours = jax.tree.leaves(as_on_tpu(gradients)(model, x, weights, jnp.bfloat16, variables)[1][0])

    def error(leaves):
        return np.sqrt(sum(float(jnp.sum((a - b) ** 2) / jnp.sum(b**2)) for a, b in zip(leaves, exact, strict=True)))

    assert 0 < error(ours) < 1.2 * error(plain)


def test_replicas_share_their_statistics_in_both_forms(float64):
    x, kernel = drawn((2, 3, 4, 4, 6), 0), drawn((6, 12), 1)
    norm = BatchNorm(axis_name="replicas")
    variables = norm.init(jax.random.key(0), jnp.zeros((1, 2, 2, 12)))

    def run(x):
        return norm.apply(variables, deferred_conv.defer_conv(x, kernel), train=True, mutable=["batch_stats"])

    y = x @ kernel
    normalised, updated = as_on_tpu(jax.vmap(run, axis_name="replicas"))(x)
    wanted = (y - y.mean((0, 1, 2, 3))) / np.sqrt(y.var((0, 1, 2, 3)) + 1e-5)
    np.testing.assert_allclose(normalised, wanted, rtol=1e-6, atol=1e-6)
    count = y.size / y.shape[-1]
    variance = 0.9 + 0.1 * y.var((0, 1, 2, 3)) * count / (count - 1)
    np.testing.assert_allclose(updated["batch_stats"]["var"][0], variance, rtol=1e-6)


@pytest.mark.program
@pytest.mark.parametrize("attention", [None, SqueezeExcite])
def test_the_wide_map_is_not_kept(attention):
    """Of maps as wide as the block's input and output, these two alone are kept for the way back."""
    x = jnp.zeros((2, 6, 6, 32))
    block = Bottleneck(8, conv=Conv, norm=LEAN, attention=attention)
    variables = block.init(jax.random.key(0), x)

    def run(params):
        return block.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])[0]

    def wide_maps():
        kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(run, p)[1], variables["params"]))
        return sum(leaf.shape == x.shape and leaf.dtype == jnp.float32 for leaf in kept)

    assert as_on_tpu(wide_maps)() == 2 < wide_maps()


def test_an_activation_before_the_gate_gets_the_written_map():
    x, kernel = drawn((2, 4, 4, 3), 0, np.float32), drawn((3, 6), 1, np.float32)

    class NormActAttend(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm, attention = BatchNorm(name="bn"), SqueezeExcite(reduction=2, name="se")
            return norm_act_attend(norm, attention, x, train=True, act=jax.nn.silu)

    variables = NormActAttend().init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))
    run = partial(NormActAttend().apply, variables, mutable=["batch_stats"])
    got, _ = as_on_tpu(lambda: run(deferred_conv.defer_conv(x, kernel)))()
    np.testing.assert_allclose(got, run(x @ kernel)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "deferred"),
    [
        ({"features": 16}, True),
        ({"features": 15}, False),  # fewer than twice the channels: the input's passes cost as much as are saved
        ({"features": 16, "strides": 2}, False),
        ({"features": 16, "groups": 2}, False),
        ({"features": 16, "kernel_size": 3}, False),
        ({"features": 16, "use_bias": True}, False),
        ({"features": 16, "padding": ((1, 1), (1, 1))}, False),  # its border is not in the input
    ],
)
def test_which_convolutions_can_be_deferred(settings, deferred):
    conv = Conv(**{"kernel_size": 1, **settings})
    x = drawn((2, 4, 4, 8), 0, np.float32)
    variables = conv.init(jax.random.key(0), x)
    assert conv.widens(x) == deferred
    if deferred:
        got = conv.apply(variables, x, method="deferred")
        np.testing.assert_allclose(got.written(), conv.apply(variables, x), rtol=1e-6, atol=1e-6)
