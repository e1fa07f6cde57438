"""VGG with batch norm and SE: published integers, timm's layout, a NumPy forward pass, a training step."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from costs import count, products, traced
from formulas import batch_norm, conv, random_variables, relu, squeeze_excite
from one_step import check_training_step, images_of
from parity import compare

import se_flax
from se_flax import CBAM, ECA, UserError
from se_flax.backbones import vgg

WIDTHS = (*2 * (64,), *2 * (128,), *3 * (256,), *6 * (512,))


def test_the_papers_costs_with_and_without_se():
    """Hu et al. 2020, table 2: 15.47 and 15.48 GFLOPs."""
    variables = traced("se_vgg16_bn")
    macs, se_macs = products("vgg16_bn"), products("se_vgg16_bn")
    assert round(macs / 1e9, 2) == 15.47
    # The second number counts the squeezes' additions besides convolutions and layers.
    sides = (224, 224, 112, 112, *3 * (56,), *3 * (28,), *3 * (14,))
    squeezes = sum(side * side * width for side, width in zip(sides, WIDTHS, strict=True))
    assert round((se_macs + squeezes) / 1e9, 2) == 15.48
    weights = 2 * sum(width * width for width in WIDTHS) // 16
    assert se_macs - macs == weights
    added = count(variables["params"]) - 138_365_992  # torchvision's
    assert added == weights + sum(width + width // 16 for width in WIDTHS)
    attending = {name: tree for name, tree in variables["params"].items() if name.startswith("se")}
    assert sorted(attending) == [f"se{g}_{i}" for g, n in enumerate((2, 2, 3, 3, 3), start=1) for i in range(n)]
    assert [tree["fc1"]["kernel"].shape[2] for _, tree in sorted(attending.items())] == list(WIDTHS)


TINY = {"depths": (1, 2), "widths": (8, 16), "hidden": 12}


@pytest.mark.parametrize("size", [(8, 20), (36, 28), (4, 5)])
def test_a_small_network_is_what_numpy_computes(size):
    model = se_flax.create_model("se_vgg16_bn", **TINY, num_classes=5)
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    variables = random_variables(model, images)
    params, stats = variables["params"], variables["batch_stats"]

    x, expected = images, []
    for group, layers in enumerate(((0,), (4, 7)), start=1):
        for i, index in enumerate(layers):
            layer = params[f"features_{index}"]
            x = conv(x, layer["kernel"]) + layer["bias"]
            norm = f"features_{index + 1}"
            x = squeeze_excite(relu(batch_norm(x, params[norm], stats[norm])), params[f"se{group}_{i}"])
        expected.append(x)
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = x[:, : 2 * height, : 2 * width].reshape(2, height, 2, width, 2, -1).max((2, 4))
    expected.append(x)
    for axis in (1, 2):
        if x.shape[axis] < 7:  # PyTorch's adaptive average-pooling, window by window
            pixels = np.arange(x.shape[axis])
            shares = [(pixels * 7 < (i + 1) * len(pixels)) & ((pixels + 1) * 7 > i * len(pixels)) for i in range(7)]
            x = np.stack([np.compress(share, x, axis).mean(axis) for share in shares], axis)
    for name, padding in (("fc1", ((0, 0), (0, 0))), ("fc2", None)):
        layer = params["pre_logits"][name]
        x = relu(conv(x, layer["kernel"], padding=padding) + layer["bias"])
    dense = params["head"]["fc"]

    logits, maps = compare.compiled(partial(model.apply, return_features=True), variables, images)
    for ours, theirs in zip(maps, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(logits, x.mean((1, 2)) @ dense["kernel"] + dense["bias"], rtol=1e-3, atol=1e-3)


def test_small_maps_are_stretched_as_pytorch_does():
    """Numbers of torch.nn.functional.adaptive_avg_pool1d in PyTorch 2.13."""
    x = jnp.asarray([1.0, 4.0, 8.0, 16.0, 64.0]).reshape(1, 5, 1, 1) * jnp.ones((1, 1, 9, 1))
    stretched = vgg.at_least(x, 7)
    assert stretched.shape == (1, 7, 9, 1)
    np.testing.assert_allclose(stretched[0, :, 0, 0], PYTORCH, rtol=1e-6)


PYTORCH = [1.0, 2.5, 6.0, 8.0, 12.0, 40.0, 64.0]


def test_a_training_step():
    attention = partial(se_flax.SqueezeExcite, reduction=4)
    widths = (16, 16, 32, 32, 32)
    model = se_flax.create_model("se_vgg16_bn", widths=widths, hidden=16, num_classes=4, attention=attention)
    check_training_step(model, images_of(4, 32, seed=1), seed=2)


def test_variables_go_to_torch_and_back():
    images = np.zeros((1, 32, 32, 3), np.float32)
    variables = random_variables(se_flax.create_model("se_vgg16_bn", **TINY), images)
    state_dict = se_flax.to_timm("se_vgg16_bn", variables)
    assert state_dict["features.0.weight"].shape == (8, 3, 3, 3) and state_dict["head.fc.weight"].shape == (1000, 12)
    back = se_flax.from_timm("se_vgg16_bn", state_dict, **TINY)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(variables)))


def test_fused_networks_compute_the_same():
    model = se_flax.create_model("se_vgg16_bn", **TINY, num_classes=3)
    images = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    variables = random_variables(model, images)
    fused, folded = se_flax.fuse(model, variables)
    assert "batch_stats" not in folded
    ours, theirs = compare.compiled(fused.apply, folded, images), compare.compiled(model.apply, variables, images)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", [ECA, CBAM])
def test_every_convolution_carries_the_attention_that_is_given(attention):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    model = se_flax.create_model("vgg11_bn", attention=attention, hidden=8)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    attending = sorted(name for name in variables["params"] if name.startswith("se"))
    assert attending == [f"se{g}_{i}" for g, n in enumerate((1, 1, 2, 2, 2), start=1) for i in range(n)]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "got images of 40 x 31 pixels, of which this network would leave no pixel for its classifier; resize"),
        ({"depths": (1, 1)}, "got depths=(1, 1) and widths=(64, 128, 256, 512, 512); give one of each per group"),
        ({"in_channels": 1}, "with 3 channels; this network takes [N, H, W, 1]"),
    ],
)
def test_what_cannot_be_is_refused(attributes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        se_flax.create_model("vgg16_bn", **attributes).init(jax.random.key(0), np.zeros((1, 40, 31, 3), np.float32))
