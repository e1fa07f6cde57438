"""Inception networks: the papers' and the released models' integers, a NumPy forward pass, a training step of each.

`test_parity.py` holds Inception-v3 and Inception-ResNet-v2 against timm.
"""

import os
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
from se_flax import CBAM, ECA, SqueezeExcite, UserError
from se_flax.backbones import inception, inception_resnet_v2, inception_v3
from se_flax.checkpoints.convert import variable_shapes
from se_flax.checkpoints.torch import torch_key
from se_flax.nn.conv import Conv
from se_flax.nn.inception import Mixed, MixedModule, Unit, average_3x3
from se_flax.nn.norm import BatchNorm
from se_flax.nn.pooling import max_pool

# Output channels of every module: Ioffe and Szegedy 2015, figure 5; Szegedy et al. 2016, table 1; Szegedy et al. 2017.
WIDTHS = {
    "bn_inception": (256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024),
    "inception_v3": (256, 288, 288, *5 * (768,), 1280, 2048, 2048),
    "inception_resnet_v2": (*11 * (320,), *21 * (1088,), *11 * (2080,)),
}


def attention_leaves(variables):
    """Shapes of the attention's kernels and biases, by module."""
    modules = {name: tree["se"] for name, tree in variables["params"].items() if "se" in tree}
    leaves = [leaf.shape for leaf in jax.tree.leaves(modules)]
    return modules.keys(), [s for s in leaves if len(s) == 4], [s for s in leaves if len(s) == 1]


def test_se_bn_inception_has_the_released_models_parameters():
    """Released Caffe model of SE-BN-Inception: 11,931,622 learnable parameters, 646,398 of them in 10 SE modules."""
    variables = traced("se_bn_inception")
    macs, se_macs = products("bn_inception"), products("se_bn_inception")
    modules, kernels, biases = attention_leaves(variables)
    assert len(modules) == 10
    assert sum(i * o for _, _, i, o in kernels) == 639_360 and sum(n for (n,) in biases) == 7_038
    # Hu et al. 2020, table 2: 2.03 and 2.04 GFLOPs. Convolutions and layers alone round to 2.03 both times; the second
    # number takes the squeezes' additions and the gates' products too.
    pixels = [28**2] * 2 + [14**2] * 5 + [7**2] * 3
    gated = sum(n * width for n, width in zip(pixels, WIDTHS["bn_inception"], strict=True))
    assert round(macs / 1e9, 2) == 2.03 and round((se_macs + 2 * gated) / 1e9, 2) == 2.04
    assert se_macs - macs == 639_360


@pytest.mark.parametrize(("name", "gigas"), [("inception_v3", 5.713), ("inception_resnet_v2", 13.156)])
def test_se_adds_what_its_formula_says(name, gigas):
    """Parameters (2 / r) sum C^2 (Hu et al. 2020, equation 5) and biases.

    torchvision documents 5.713 GFLOPs for its Inception-v3. Table 2 of Hu et al. has 11.75 for an Inception-ResNet-v2
    that was never released, and that no number of modules we know of explains: timm's and Google's takes 13.16 (our sum
    over its layers). The printed difference, 0.01, is its own.
    """
    plain, variables = traced(name, 299), traced(f"se_{name}", 299)
    macs, se_macs = products(name, 299), products(f"se_{name}", 299)
    modules, kernels, _ = attention_leaves(variables)
    widths = WIDTHS[name]
    assert [s[3] for s in sorted(kernels) if s[3] > s[2]] == sorted(widths)
    assert len(modules) == len(widths)
    weights = 2 * sum(c * c for c in widths) // 16
    assert count(variables["params"]) - count(plain["params"]) == weights + sum(c + c // 16 for c in widths)
    assert round(macs / 1e9, 3) == gigas and se_macs - macs == weights
    if name == "inception_resnet_v2":
        assert round((se_macs - macs) / 1e9, 2) == 0.01


def max_windows(x, size, strides, pad, sides):
    """Maximum over windows of x [N, H, W, C] from -pad on, `sides` of them; what is not there does not count."""
    out = np.full((x.shape[0], *sides, x.shape[-1]), -np.inf)
    for i in range(sides[0]):
        for j in range(sides[1]):
            top, left = i * strides - pad, j * strides - pad
            window = x[:, max(top, 0) : top + size, max(left, 0) : left + size]
            out[:, i, j] = window.max((1, 2))
    return out


def mean_of_nine(x):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return sum(x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9


def unit(variables, *path, x, strides=1):
    """A unit under its path, by `formulas` alone."""
    params, stats = variables["params"], variables["batch_stats"]
    for name in path:
        params, stats = params[name], stats[name]
    return relu(batch_norm(conv(x, params["conv"]["kernel"], strides), params["bn"], stats["bn"]))


def paper_module(variables, name, x, pool, strides=1):
    """A module of BN-Inception in NumPy."""
    at = partial(unit, variables, name)
    branches = [at("conv_1x1", x=x)] if "conv_1x1" in variables["params"][name] else []
    branches.append(at("conv_3x3", x=at("conv_3x3_reduce", x=x), strides=strides))
    double = at("double_3x3_a", x=at("double_3x3_reduce", x=x))
    branches.append(at("double_3x3_b", x=double, strides=strides))
    pooled = pool(x)
    branches.append(at("pool_proj", x=pooled) if strides == 1 else pooled)
    return squeeze_excite(np.concatenate(branches, -1), variables["params"][name]["se"])


SMALL = (
    (Unit("conv1", 6, 7, 2),),
    (inception.caffe_max_pooling, Unit("conv2", 16, 3)),
    (inception.module("a", 8, (4, 8), (4, 12), average_3x3, 4),),
    (
        inception.module("b", 0, (4, 8), (4, 8), inception.max_pooling_to_half, 0, strides=2),
        inception.module("c", 8, (4, 8), (4, 8), partial(max_pool, strides=1), 8),
    ),
)


@pytest.mark.parametrize("size", [(32, 24), (29, 23)])
def test_a_small_bn_inception_is_what_numpy_computes(size):
    model = se_flax.create_model("se_bn_inception", layout=SMALL, num_classes=5)
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    variables = random_variables(model, images)
    logits, maps = compare.compiled(partial(model.apply, return_features=True), variables, images)

    first = unit(variables, "conv1", x=images, strides=2)
    half = [-(-(dim - 3) // 2) + 1 for dim in first.shape[1:3]]  # Caffe rounds up, but a window must start inside
    second = unit(variables, "conv2", x=max_windows(first, 3, 2, 0, half))
    third = paper_module(variables, "a", second, mean_of_nine)
    half = [-(-dim // 2) for dim in third.shape[1:3]]
    x = paper_module(variables, "b", third, lambda x: max_windows(x, 3, 2, 0, half), strides=2)
    x = paper_module(variables, "c", x, lambda x: max_windows(x, 3, 1, 1, x.shape[1:3]))
    for ours, theirs in zip(maps, (first, second, third, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    dense = variables["params"]["fc"]
    np.testing.assert_allclose(logits, x.mean((1, 2)) @ dense["kernel"] + dense["bias"], rtol=1e-4, atol=1e-4)


BLOCK = Mixed("block", ((Unit("branch0", 6),), (Unit("branch1_0", 4), Unit("branch1_1", 10, (1, 3)))), scale=0.3)
PARTS = {"conv": Conv, "norm": BatchNorm, "attention": partial(SqueezeExcite, reduction=2)}


@pytest.mark.parametrize("activated", [True, False])
def test_a_residual_module_is_gated_before_it_is_scaled_and_added(activated):
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 8)).astype(np.float32)
    layer = MixedModule(BLOCK.branches, **PARTS, scale=BLOCK.scale, activated=activated)
    variables = random_variables(layer, x)
    one_by_three = ((0, 0), (1, 1))
    tree, stats = (variables[kind]["branch1_1"] for kind in ("params", "batch_stats"))
    y = conv(unit(variables, "branch1_0", x=x), tree["conv"]["kernel"], padding=one_by_three)
    y = np.concatenate([unit(variables, "branch0", x=x), relu(batch_norm(y, tree["bn"], stats["bn"]))], -1)
    last = variables["params"]["conv2d"]
    y = squeeze_excite(conv(y, last["kernel"]) + last["bias"], variables["params"]["se"])
    expected = x + 0.3 * y
    np.testing.assert_allclose(
        layer.apply(variables, x), relu(expected) if activated else expected, rtol=1e-4, atol=1e-4
    )


def test_stochastic_depth_leaves_out_residual_modules():
    x = np.random.default_rng(0).standard_normal((32, 3, 3, 8)).astype(np.float32)
    layer = MixedModule(BLOCK.branches, **PARTS, scale=BLOCK.scale, activated=False, drop_path_rate=0.5)
    variables = random_variables(layer, x)
    apply = partial(layer.apply, variables, x, train=True, mutable=["batch_stats"])
    y, _ = apply(rngs={"dropout": jax.random.key(0)})
    full, _ = layer.clone(drop_path_rate=0.0).apply(variables, x, train=True, mutable=["batch_stats"])
    kept = np.abs(y - x).max((1, 2, 3)) > 0
    assert 4 < kept.sum() < 28
    np.testing.assert_allclose(y[kept], (x + 2 * (full - x))[kept], rtol=1e-4, atol=1e-4)


def trimmed(layout):
    """The first module of every group, and those that halve the map; what is no module stays."""
    return tuple(
        tuple(e for e in group if not isinstance(e, Mixed) or e in [m for m in group if isinstance(m, Mixed)][:2])
        for group in layout
    )


TRIMMED = {
    "se_bn_inception": ({"layout": trimmed(inception.BN_INCEPTION)}, 32),
    "se_inception_v3": ({"layout": trimmed(inception_v3.INCEPTION_V3)}, 75),
    "se_inception_resnet_v2": ({"layout": inception_resnet_v2.layout(1, 1, 1)}, 75),
}
# Compiling takes a third of a second for every convolution of a step.
SHORT = {
    "se_bn_inception": (SMALL[0], SMALL[1], inception.BN_INCEPTION[3][:1]),
    "se_inception_v3": (
        inception_v3.INCEPTION_V3[0][:1],
        (inception_v3.REDUCTION_A, inception_v3.expanded("Mixed_7b")),
    ),
    "se_inception_resnet_v2": (
        inception_resnet_v2.layout()[0][:1],
        (inception_resnet_v2.block_17("repeat__1_0"), inception_resnet_v2.block_8("block8", 1.0, activated=False)),
    ),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_training_step(name):
    """Of a few modules; SE_FLAX_ALL=1 takes all of them."""
    attributes, side = {"layout": SHORT[name], "smallest": 1}, 16
    if "SE_FLAX_ALL" in os.environ:
        attributes, side = {}, 128
    model = se_flax.create_model(name, **attributes, num_classes=4, drop_rate=0.1)
    check_training_step(model, images_of(4, side, seed=1), seed=2)


@pytest.mark.parametrize("name", SHORT)
def test_variables_go_to_torch_and_back(name):
    attributes = {"layout": SHORT[name], "smallest": 1, "num_classes": 7}
    variables = random_variables(se_flax.create_model(name, **attributes), np.zeros((1, 16, 16, 3), np.float32))
    state_dict = se_flax.to_timm(name, variables)
    back = se_flax.from_timm(name, state_dict, **attributes)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(variables)))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("se_bn_inception", {"conv1.conv.weight", "inception_3a.double_3x3_b.bn.weight", "inception_3c.se.fc1.bias"}),
        ("se_inception_v3", {"Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch5x5_1.bn.running_mean", "fc.bias"}),
        ("se_inception_resnet_v2", {"repeat_1.0.branch1.2.conv.weight", "block8.conv2d.bias", "classif.weight"}),
    ],
)
def test_every_variable_has_a_name_of_its_own_in_torch(name, keys):
    attributes, side = TRIMMED[name]
    shapes = variable_shapes(se_flax.create_model(name, **attributes), side)
    given = {torch_key(path) for path in shapes}
    assert len(given) == len(shapes) and keys <= given


@pytest.mark.parametrize("attention", [ECA, partial(ECA, kernel_size=5), CBAM, partial(SqueezeExcite, reduction=8)])
def test_every_module_carries_the_attention_that_is_given(attention):
    variables = jax.eval_shape(
        se_flax.create_model("bn_inception", layout=SMALL, attention=attention).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    assert attention_leaves(variables)[0] == {"a", "b", "c"}


def test_fused_networks_compute_the_same():
    model = se_flax.create_model("se_bn_inception", layout=SMALL, num_classes=3)
    images = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    variables = random_variables(model, images)
    fused, folded = se_flax.fuse(model, variables)
    assert "batch_stats" not in folded
    ours, theirs = compare.compiled(fused.apply, folded, images), compare.compiled(model.apply, variables, images)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_networks_without_padding_can_be_fused():
    """The size at which `fuse` follows the program is one that they take."""
    model = se_flax.create_model("se_inception_resnet_v2", layout=SHORT["se_inception_resnet_v2"])
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 75, 75, 3), np.float32))
    _, folded = se_flax.fuse(model, jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes))
    assert "batch_stats" not in folded


def test_maps_have_the_strides_of_their_groups():
    for name, side, expected in (
        ("bn_inception", (64, 37), [(32, 19), (16, 9), (8, 4), (4, 2), (2, 1)]),
        ("bn_inception", (1, 1), [(1, 1)] * 5),
        ("inception_v3", (75, 139), [(35, 67), (15, 31), (7, 15), (3, 7), (1, 3)]),
    ):
        model = se_flax.create_model(name)
        call = partial(model.init_with_output, return_features=True)
        (_, maps), _ = jax.eval_shape(call, jax.random.key(0), jax.ShapeDtypeStruct((1, *side, 3), jnp.float32))
        assert [x.shape[1:3] for x in maps] == expected


@pytest.mark.parametrize("name", ["inception_v3", "inception_resnet_v2"])
def test_images_that_are_too_small(name):
    message = (
        "got images of 224 x 74 pixels, of which this network would leave no pixel for its classifier; "
        "resize them to at least 75 x 75"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        se_flax.create_model(name).init(jax.random.key(0), np.zeros((1, 224, 74, 3), np.float32))
    with pytest.raises(UserError, match="with 1 channels; this network takes"):
        se_flax.create_model(name).init(jax.random.key(0), np.zeros((1, 99, 99, 1), np.float32))
