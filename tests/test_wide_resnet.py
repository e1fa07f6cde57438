"""Wide residual networks: a closed formula for their counts, a NumPy forward pass, where the dropout sits."""

from functools import partial

import jax
import numpy as np
import pytest
from costs import count, products, traced
from formulas import batch_norm, conv, double, random_variables, relu, squeeze_excite
from one_step import check_training_step, images_of

import se_flax
from se_flax import BatchNorm, Conv
from se_flax.backbones.wide_resnet import VARIANTS, PreActBasicBlock
from se_flax.nn.residual import Placement, project_linear


def costs(layers, widen, se):
    """Parameters; multiply-adds at 32 pixels."""
    params, macs, channels, side = 27 * 16, 27 * 16 * 32**2, 16, 32
    for stage in range(3):
        out = 16 * widen * 2**stage
        for i in range((layers - 4) // 6):
            if i == 0 and stage:
                side //= 2
            weights = 9 * channels * out + 9 * out * out + (channels * out if i == 0 else 0)
            gates = se * 2 * out * (out // 16)
            params += weights + 2 * (channels + out) + gates + se * (out // 16 + out)
            macs += weights * side**2 + gates
            channels = out
    return params + 2 * channels + channels * 10 + 10, macs + channels * 10


@pytest.mark.parametrize(
    ("name", "layers", "widen", "millions"), [("wrn16_8", 16, 8, 11.0), ("wrn28_10", 28, 10, 36.5)]
)  # Zagoruyko & Komodakis 2016, tables 4 and 5
def test_counts(name, layers, widen, millions):
    for se, prefix in ((False, ""), (True, "se_")):
        found = count(traced(prefix + name, 32)["params"]), products(prefix + name, 32)
        assert found == costs(layers, widen, se)
    assert round(costs(layers, widen, False)[0] / 1e6, 1) == millions
    # Their depth counts the projections of the shortcuts.
    convs = [leaf for leaf in jax.tree.leaves(traced(name, 32)["params"]) if leaf.ndim == 4]
    assert len(convs) == layers
    assert VARIANTS.keys() == {"wrn16_8", "wrn28_10", "se_wrn16_8", "se_wrn28_10"}


def forward(variables, x):
    params, stats = variables["params"], variables["batch_stats"]
    (x,) = double(x)
    x = conv(x, params["conv1"]["kernel"])
    for stage in range(3):
        p, s = (tree[f"layer{stage + 1}_0"] for tree in (params, stats))
        strides = 2 if stage else 1
        y = relu(batch_norm(x, p["bn1"], s["bn1"]))
        shortcut = conv(y, p["downsample_0"]["kernel"], strides)
        y = relu(batch_norm(conv(y, p["conv1"]["kernel"], strides), p["bn2"], s["bn2"]))
        x = shortcut + squeeze_excite(conv(y, p["conv2"]["kernel"]), p["se"])
    x = relu(batch_norm(x, params["bn"], stats["bn"]))
    return x.mean((1, 2)) @ params["linear"]["kernel"] + params["linear"]["bias"]


def test_the_network_is_what_numpy_computes():
    images = images_of(2, 9)
    model = se_flax.create_model("se_wrn16_8", depth=1, width=32)
    variables = random_variables(model, images)
    logits, maps = model.apply(variables, images, return_features=True)
    np.testing.assert_allclose(logits, forward(variables, images), rtol=1e-3, atol=1e-3)
    assert [x.shape[1:] for x in maps] == [(9, 9, 32), (5, 5, 64), (3, 3, 128)]


class Shift(se_flax.ECA):
    """In the place of an attention: 2x - 0.3 commutes with neither a ReLU, nor a norm, nor a sum."""

    def __call__(self, x, **_):
        return 2 * x - 0.3


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("place", Placement)
def test_a_block_with_attention_at_every_place(place, strides):
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 4)).astype(np.float32)
    parts = {"conv": Conv, "norm": BatchNorm, "downsample": project_linear}
    block = PreActBasicBlock(4 * strides, **parts, strides=strides, attention=Shift, placement=place)
    variables = random_variables(block, x)
    p, s = variables["params"], variables["batch_stats"]
    at = lambda here, value: 2 * value - 0.3 if place == here else value  # noqa: E731
    (x64,) = double(x)
    first = relu(batch_norm(at("pre", x64), p["bn1"], s["bn1"]))
    y = at("3x3", conv(first, p["conv1"]["kernel"], strides))
    y = at("standard", conv(relu(batch_norm(y, p["bn2"], s["bn2"])), p["conv2"]["kernel"]))
    shortcut = x64 if strides == 1 else conv(x64 if place == "pre" else first, p["downsample_0"]["kernel"], strides)
    expected = at("post", at("identity", shortcut) + y)
    np.testing.assert_allclose(block.apply(variables, x), expected, rtol=1e-4, atol=1e-4)


def test_dropout_sits_between_the_convolutions_and_nowhere_else():
    images = images_of(4, 8)
    model = partial(se_flax.create_model, "wrn16_8", depth=1, width=16)
    variables = random_variables(model(), images)
    # With everything dropped, every second convolution sees zeros, whatever its kernel; the first ones do matter.
    run = partial(model(drop_rate=1.0).apply, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    logits, _ = run(variables, images)
    for name, same in (("conv2", True), ("downsample_0", False)):
        changed = jax.tree_util.tree_map_with_path(
            lambda path, leaf, name=name: -leaf if any(getattr(k, "key", "") == name for k in path) else leaf, variables
        )
        assert np.allclose(run(changed, images)[0], logits) == same
    assert np.ptp(logits, axis=0).max() > 0.01  # nothing was dropped before the classifier


def test_a_training_step():
    attention = partial(se_flax.SqueezeExcite, reduction=4.0)
    small = se_flax.create_model("wrn16_8", depth=1, width=16, attention=attention, drop_rate=0.1, drop_path_rate=0.1)
    check_training_step(small, images_of(4, 8))
