"""CIFAR networks: closed formulas for their counts, a NumPy forward pass, trained weights where they are at hand."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from costs import count, traced
from formulas import batch_norm, conv, random_variables, relu, squeeze_excite

import se_flax
from se_flax import ECA, UserError
from se_flax.backbones.cifar_resnet import VARIANTS

DATA = Path(__file__).parents[2] / "shared" / "data"
WIDTHS = (16, 32, 64)


def basic_count(n, se):
    """6n + 2 layers with shortcuts that have no parameters: 3x3 convolutions, norms, classifier."""
    total, channels = 27 * 16 + 2 * 16, 16
    for width in WIDTHS:
        for _ in range(n):
            total += 9 * channels * width + 9 * width * width + 4 * width
            total += se * (2 * width * (width // 16) + width // 16 + width)
            channels = width
    return total + 64 * 10 + 10


def bottleneck_count(n, se):
    """9n + 2 layers, norms before convolutions, a projection where the channels change, one norm at the end."""
    total, channels = 27 * 16, 16
    for width in WIDTHS:
        for i in range(n):
            out = 4 * width
            total += channels * width + 9 * width * width + width * out + 2 * (channels + width + width)
            total += channels * out if i == 0 else 0
            total += se * (2 * out * (out // 16) + out // 16 + out)
            channels = out
    return total + 2 * channels + channels * 10 + 10


@pytest.mark.parametrize(
    ("layers", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)  # He et al. 2016, table 6
def test_counts_of_resnets(layers, millions):
    n = (layers - 2) // 6
    variables = traced(f"resnet{layers}", 32)
    assert count(variables["params"]) == basic_count(n, se=False)
    assert round(count(variables["params"]) / 1e6, len(str(millions)) - 2) == millions
    convs = [leaf for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 4]
    assert len(convs) + 1 == layers
    assert count(traced(f"seresnet{layers}", 32)["params"]) == basic_count(n, se=True)


def test_counts_of_pre_activation_networks():
    for name, se in (("preresnet164", False), ("sepreresnet164", True)):
        variables = traced(name, 32)
        assert count(variables["params"]) == bottleneck_count(18, se)
        assert round(bottleneck_count(18, False) / 1e6, 1) == 1.7  # He et al. 2016b
        layers = {k: v for k, v in variables["params"].items() if k.startswith("layer")}
        shortcuts = sum("downsample_0" in block for block in layers.values())
        assert 3 * len(layers) + 2 == 164 and shortcuts == 3


def test_every_variant_has_a_formula_here():
    covered = {f"{se}resnet{layers}" for se in ("", "se") for layers in (20, 32, 44, 56, 110)}
    assert VARIANTS.keys() == covered | {"preresnet164", "sepreresnet164"}


def double_tree(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def forward(variables, x, depth):
    """Logits and stage maps of a network of basic blocks, from its variables."""
    params, stats = double_tree(variables["params"]), double_tree(variables["batch_stats"])
    x = relu(batch_norm(conv(x, params["conv1"]["kernel"]), params["bn1"], stats["bn1"]))
    maps = []
    for stage in range(3):
        for i in range(depth):
            p, s = (tree[f"layer{stage + 1}_{i}"] for tree in (params, stats))
            strides = 2 if stage > 0 and i == 0 else 1
            y = relu(batch_norm(conv(x, p["conv1"]["kernel"], strides), p["bn1"], s["bn1"]))
            y = batch_norm(conv(y, p["conv2"]["kernel"]), p["bn2"], s["bn2"])
            if "se" in p:
                y = squeeze_excite(y, p["se"])
            if strides == 2:  # every other pixel; the old channels in the middle of the new
                wide = np.zeros(y.shape)
                quarter = y.shape[-1] // 4
                wide[..., quarter : 3 * quarter] = x[:, ::2, ::2]
                x = wide
            x = relu(x + y)
        maps.append(x)
    return x.mean((1, 2)) @ params["linear"]["kernel"] + params["linear"]["bias"], maps


def pre_activation_forward(variables, x, depth):
    params, stats = double_tree(variables["params"]), double_tree(variables["batch_stats"])
    x = conv(x, params["conv1"]["kernel"])
    for stage in range(3):
        for i in range(depth):
            p, s = (tree[f"layer{stage + 1}_{i}"] for tree in (params, stats))
            strides = 2 if stage > 0 and i == 0 else 1
            y = relu(batch_norm(x, p["bn1"], s["bn1"]))
            if i == 0:
                x = conv(y, p["downsample_0"]["kernel"], strides)
            y = relu(batch_norm(conv(y, p["conv1"]["kernel"], strides), p["bn2"], s["bn2"]))
            y = relu(batch_norm(conv(y, p["conv2"]["kernel"]), p["bn3"], s["bn3"]))
            x = x + squeeze_excite(conv(y, p["conv3"]["kernel"]), p["se"])
    x = relu(batch_norm(x, params["bn"], stats["bn"]))
    return x.mean((1, 2)) @ params["linear"]["kernel"] + params["linear"]["bias"]


IMAGES = np.random.default_rng(0).standard_normal((2, 16, 12, 3)).astype(np.float32)


@pytest.mark.parametrize("name", ["resnet20", "seresnet20"])
def test_basic_networks_are_what_numpy_computes(name):
    model = se_flax.create_model(name, depth=2)
    variables = random_variables(model, IMAGES)
    logits, maps = model.apply(variables, IMAGES, return_features=True)
    expected, expected_maps = forward(variables, IMAGES, 2)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert [x.shape for x in maps] == [(2, 16, 12, 16), (2, 8, 6, 32), (2, 4, 3, 64)]
    for ours, theirs in zip(maps, expected_maps, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_pre_activation_networks_are_what_numpy_computes():
    model = se_flax.create_model("sepreresnet164", depth=2)
    variables = random_variables(model, IMAGES)
    expected = pre_activation_forward(variables, IMAGES, 2)
    np.testing.assert_allclose(model.apply(variables, IMAGES), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("stages", [(2,), (3, 4), ()])
def test_stages_are_2_to_4(stages):
    variables = traced("resnet20", 32, attention=partial(ECA), stages=stages)
    attending = {block for block, tree in variables["params"].items() if "se" in tree}
    assert attending == {f"layer{stage - 1}_{i}" for stage in stages for i in range(3)}
    with pytest.raises(UserError, match="5 is not a stage of blocks; allowed: 2, 3, 4 "):
        traced("resnet20", 32, stages=(4, 5))


@pytest.mark.skipif(not DATA.is_dir(), reason="no trained weights beside the checkout (../shared/data)")
@pytest.mark.parametrize(
    ("file", "accuracy"),
    [
        ("resnet20-12fca82f", 94.0),
        ("resnet32-d509ac18", 95.4),
        ("resnet44-014dd654", 96.6),
        ("resnet56-4bfd9763", 97.4),
    ],
)
def test_trained_weights_score_as_their_authors_network_does(file, accuracy):
    name = file.split("-")[0]
    with np.load(DATA / f"cifar10_{file}.npz") as archive:
        variables = se_flax.from_timm(name, dict(archive))
    with np.load(DATA / "cifar10_lossless_subset.npz") as archive:
        images, labels = archive["test_images"], archive["test_labels"]
    images = (images / np.float32(255) - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    logits = se_flax.create_model(name).apply(variables, images)
    assert 100 * np.mean(np.argmax(logits, -1) == labels) == pytest.approx(accuracy)
    # And not by its labels alone: the same numbers as in NumPy, for a few.
    expected, _ = forward(variables, images[:4], se_flax.create_model(name).depth)
    np.testing.assert_allclose(logits[:4], expected, rtol=1e-3, atol=1e-3)
