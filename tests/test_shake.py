"""Shake-Shake: the noise by its statistics, the two mixtures by exact gradients, the networks by formulas."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from costs import count, traced
from formulas import batch_norm, conv, double, random_variables, relu, squeeze_excite
from hypothesis import given, settings
from hypothesis import strategies as st
from one_step import check_training_step, images_of

import se_flax
from se_flax import BatchNorm, Conv, UserError
from se_flax.backbones import shake
from se_flax.backbones.shake import ShakeBasicBlock, ShakeBottleneck, draw_weights, mix
from se_flax.nn.residual import Placement, project

KINDS = [(f, b, level) for f in shake.FORWARD for b in shake.BACKWARD for level in shake.LEVELS]
SMALL_26 = {"depth": 1, "width": 16, "stem": 8}
SMALL_29 = {
    "depth": 1,
    "width": 8,
    "stem": 8,
    "block": partial(ShakeBottleneck, groups=2, backward="even"),
}


# ---- the noise


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 1, width=32), st.floats(0, 1, width=32), st.integers(0, 99))
def test_branches_weigh_alpha_and_their_gradients_beta(alpha, beta, seed):
    first, second, grad = np.random.default_rng(seed).standard_normal((3, 2, 3, 2, 4)).astype(np.float32)
    per_image = lambda value: jnp.asarray([value, 1 - value], jnp.float32).reshape(2, 1, 1, 1)  # noqa: E731
    y, pull = jax.vjp(mix, first, second, per_image(alpha), per_image(beta))
    for image, (a, b) in enumerate(((alpha, beta), (1 - alpha, 1 - beta))):
        np.testing.assert_allclose(y[image], a * first[image] + (1 - a) * second[image], atol=1e-6)
        for given_, share in zip(pull(grad)[:2], (b, 1 - b), strict=True):
            np.testing.assert_allclose(given_[image], share * grad[image], atol=1e-6)
    assert not np.any(pull(grad)[2]) and not np.any(pull(grad)[3])


@pytest.mark.parametrize(("forward", "backward", "level"), KINDS)
def test_weights_are_uniform_even_or_kept(forward, backward, level):
    batch, draws = 8, 4000
    draw = partial(draw_weights, forward=forward, backward=backward, level=level, batch=batch)
    alpha, beta = (np.asarray(w) for w in jax.vmap(draw)(jax.random.split(jax.random.key(0), draws)))
    assert alpha.shape == beta.shape == (draws, batch if level == "image" else 1, 1, 1, 1)
    error = 4 / np.sqrt(alpha.size)  # four standard errors of a mean of numbers in [0, 1], and more
    for weights, kind in ((alpha, forward), (beta, forward if backward == "keep" else backward)):
        if kind == "even":
            assert np.all(weights == 0.5)
            continue
        # Mean, variance and tails of the uniform distribution on [0, 1].
        assert 0 <= weights.min() < 0.01 and 0.99 < weights.max() <= 1
        assert abs(weights.mean() - 1 / 2) < error and abs(weights.var() - 1 / 12) < error
        if level == "image":  # images do not share a draw
            assert abs(np.corrcoef(weights[:, 0].ravel(), weights[:, 1].ravel())[0, 1]) < 4 / np.sqrt(draws)
    if backward == "keep":
        np.testing.assert_array_equal(alpha, beta)
    elif (forward, backward) == ("shake", "shake"):
        assert abs(np.corrcoef(alpha.ravel(), beta.ravel())[0, 1]) < error


# ---- a block with known weights


def fix(monkeypatch, alpha, beta):
    def weights(key, forward, backward, level, batch):
        del key, forward, backward, level
        return tuple(jnp.full((batch, 1, 1, 1), value, jnp.float32) for value in (alpha, beta))

    monkeypatch.setattr(shake, "draw_weights", weights)


BLOCKS = [
    ShakeBasicBlock(8, conv=Conv, norm=BatchNorm),
    ShakeBottleneck(2, conv=Conv, norm=BatchNorm, groups=2, act=lambda x: x),
]


@pytest.mark.parametrize("block", BLOCKS, ids=["basic", "bottleneck"])
def test_a_block_trains_with_alpha_forward_and_beta_backward(block, monkeypatch):
    x = np.random.default_rng(0).standard_normal((3, 4, 4, 8)).astype(np.float32)
    variables = random_variables(block, x)
    weigh = np.random.default_rng(1).standard_normal(x.shape)  # of a linear loss: the incoming gradient is fixed

    def run(alpha, beta):
        fix(monkeypatch, alpha, beta)

        def loss(params):
            y, _ = block.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
            )
            return jnp.vdot(weigh, y), y

        (_, y), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return np.asarray(y), grads

    key = jax.random.key(0)
    first, full = run(1.0, 1.0)  # branch1 alone, both ways
    second, other = run(0.0, 0.0)
    y, grads = run(0.3, 0.8)
    np.testing.assert_allclose(y, 0.3 * first + 0.7 * second, atol=1e-4)
    assert np.abs(first - second).max() > 0.1
    for branch, share, whole in (("branch1", 0.8, full), ("branch2", 0.2, other)):
        jax.tree.map(
            lambda got, expected, share=share: np.testing.assert_allclose(got, share * expected, rtol=1e-3, atol=1e-3),
            grads[branch],
            whole[branch],
        )
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole[branch])) > 0.1


def test_images_share_a_draw_at_the_level_of_the_batch_alone():
    x = np.repeat(np.random.default_rng(0).standard_normal((1, 4, 4, 8)), 4, axis=0).astype(np.float32)
    for level, distinct in (("image", 4), ("batch", 1)):
        block = ShakeBasicBlock(8, conv=Conv, norm=BatchNorm, level=level)
        variables = random_variables(block, x)
        y, _ = block.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
        assert len({image.tobytes() for image in np.round(np.asarray(y), 3)}) == distinct


def test_every_block_draws_for_itself_and_only_in_training(monkeypatch):
    keys = []

    def spy(key, *settings):
        keys.append(jax.random.key_data(key))
        assert settings == ("shake", "even", "image", 2)
        return draw_weights(key, *settings)

    monkeypatch.setattr(shake, "draw_weights", spy)
    model = se_flax.create_model("shake_even29_2x4x64d", **{**SMALL_29, "depth": 2})
    images = images_of(2, 8)
    variables = random_variables(model, images)
    jax.eval_shape(model.apply, variables, images)
    assert not keys

    @jax.jit  # what the keys do not depend on is not compiled
    def drawn():
        model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
        return jnp.stack(keys)

    assert len(np.unique(drawn(), axis=0)) == 6


# ---- the networks


def basic_count(width, depth, classes, se):
    """Gastaldi 2017: 16 features in the stem, two branches of two 3x3 convolutions."""
    total, channels = 27 * 16 + 2 * 16, 16
    for out in (width, 2 * width, 4 * width):
        for i in range(depth):
            total += 2 * (9 * channels * out + 9 * out * out + 4 * out)
            total += channels * out + 2 * out if i == 0 else 0
            total += se * (2 * out * (out // 16) + out // 16 + out)
            channels = out
    return total + channels * classes + classes


def bottleneck_count(classes, se):
    """ResNeXt-29 4x64d with every branch twice."""
    total, channels = 27 * 64 + 2 * 64, 64
    for out in (256, 512, 1024):
        for i in range(3):
            total += 2 * (channels * out + 9 * out * out // 4 + out * out + 6 * out)
            total += channels * out + 2 * out if i == 0 else 0
            total += se * (2 * out * (out // 16) + out // 16 + out)
            channels = out
    return total + channels * classes + classes


def test_counts():
    found = {name: count(traced(name, 32)["params"]) for name in shake.VARIANTS}
    assert found == {
        "shake_shake26_2x96d": basic_count(96, 4, 10, se=False),
        "se_shake_shake26_2x96d": basic_count(96, 4, 10, se=True),
        "shake_even29_2x4x64d": bottleneck_count(100, se=False),
        "se_shake_even29_2x4x64d": bottleneck_count(100, se=True),
    }
    # Gastaldi 2017, table 3. The second is ResNeXt-29's with ten classes (Xie et al. 2017, table 7).
    assert round(basic_count(96, 4, 10, se=False) / 1e6, 1) == 26.2
    assert round(bottleneck_count(10, se=False) / 1e6, 1) == 34.4


def basic_forward(variables, x):
    params, stats = variables["params"], variables["batch_stats"]
    (x,) = double(x)
    x = batch_norm(conv(x, params["conv1"]["kernel"]), params["bn1"], stats["bn1"])
    for stage in range(3):
        p, s = (tree[f"layer{stage + 1}_0"] for tree in (params, stats))
        strides = 2 if stage else 1

        def branch(name, x=x, p=p, s=s, strides=strides):
            y = batch_norm(conv(relu(x), p[name]["conv1"]["kernel"], strides), p[name]["bn1"], s[name]["bn1"])
            return batch_norm(conv(relu(y), p[name]["conv2"]["kernel"]), p[name]["bn2"], s[name]["bn2"])

        y = squeeze_excite((branch("branch1") + branch("branch2")) / 2, p["se"])
        moved = np.zeros_like(x)
        moved[:, 1:, 1:] = relu(x)[:, :-1, :-1]
        paths = [conv(m, p[f"skip{i}"]["kernel"], strides) for i, m in ((1, relu(x)), (2, moved))]
        x = batch_norm(np.concatenate(paths, -1), p["skip_bn"], s["skip_bn"]) + y
    return relu(x).mean((1, 2)) @ params["linear"]["kernel"] + params["linear"]["bias"]


def bottleneck_forward(variables, x):
    params, stats = variables["params"], variables["batch_stats"]
    (x,) = double(x)
    x = relu(batch_norm(conv(x, params["conv1"]["kernel"]), params["bn1"], stats["bn1"]))
    for stage in range(3):
        p, s = (tree[f"layer{stage + 1}_0"] for tree in (params, stats))
        strides = 2 if stage else 1

        def branch(name, x=x, p=p, s=s, strides=strides):
            y = relu(batch_norm(conv(x, p[name]["conv1"]["kernel"]), p[name]["bn1"], s[name]["bn1"]))
            y = conv(y, p[name]["conv2"]["kernel"], strides, groups=2)
            y = relu(batch_norm(y, p[name]["bn2"], s[name]["bn2"]))
            return batch_norm(conv(y, p[name]["conv3"]["kernel"]), p[name]["bn3"], s[name]["bn3"])

        y = squeeze_excite((branch("branch1") + branch("branch2")) / 2, p["se"])
        shortcut = conv(x, p["downsample_0"]["kernel"], strides)
        x = relu(batch_norm(shortcut, p["downsample_1"], s["downsample_1"]) + y)
    return x.mean((1, 2)) @ params["linear"]["kernel"] + params["linear"]["bias"]


@pytest.mark.parametrize(
    ("name", "attributes", "forward", "widths"),
    [
        ("se_shake_shake26_2x96d", SMALL_26, basic_forward, (16, 32, 64)),
        ("se_shake_even29_2x4x64d", SMALL_29, bottleneck_forward, (32, 64, 128)),
    ],
)
def test_the_networks_are_what_numpy_computes(name, attributes, forward, widths):
    images = images_of(2, 9)
    model = se_flax.create_model(name, **attributes)
    variables = random_variables(model, images)
    logits, maps = model.apply(variables, images, return_features=True)
    np.testing.assert_allclose(logits, forward(variables, images), rtol=1e-3, atol=1e-3)
    assert [x.shape[1:] for x in maps] == [(side, side, width) for side, width in zip((9, 5, 3), widths, strict=True)]


@pytest.mark.parametrize("name", ["shake_shake26_2x96d", "shake_even29_2x4x64d"])
@pytest.mark.parametrize("place", Placement)
def test_attention_sits_where_the_placement_says(name, place):
    variables = traced(name, 32, depth=1, attention=se_flax.ECA, placement=place)
    block = variables["params"]["layer2_0"]
    branches = {branch for branch in ("branch1", "branch2") if "se" in block[branch]}
    assert ("se" in block, branches) == ((False, {"branch1", "branch2"}) if place == "3x3" else (True, set()))


@pytest.mark.parametrize(
    ("name", "attributes"),
    [("se_shake_shake26_2x96d", SMALL_26), ("se_shake_even29_2x4x64d", {**SMALL_29, "width": 32, "num_classes": 8})],
)
def test_a_training_step(name, attributes):
    attention = partial(se_flax.SqueezeExcite, reduction=4.0)
    model = se_flax.create_model(name, **attributes, attention=attention, drop_rate=0.1)
    check_training_step(model, images_of(4, 8), exact=False)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"forward": "shak"}, "unknown forward 'shak' of a Shake-Shake network; closest: shake"),
        ({"forward": "keep"}, "unknown forward 'keep' of a Shake-Shake network; allowed: even, shake"),
        ({"backward": "kept"}, "unknown backward 'kept' of a Shake-Shake network; closest: keep"),
        ({"level": "pixel"}, "unknown level 'pixel' of a Shake-Shake network; allowed: batch, image"),
    ],
)
def test_unknown_noise_is_refused(attributes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        traced("shake_shake26_2x96d", 32, block=partial(ShakeBasicBlock, **attributes))


def test_a_strided_bottleneck_projects_its_shortcut():
    block = ShakeBottleneck(2, conv=Conv, norm=BatchNorm, strides=2, downsample=project)
    x = np.zeros((1, 5, 5, 8), np.float32)
    variables = random_variables(block, x)
    assert variables["params"]["downsample_0"]["kernel"].shape == (1, 1, 8, 8)
    assert block.apply(variables, x).shape == (1, 3, 3, 8)
