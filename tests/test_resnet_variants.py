"""Stems, shortcuts, anti-aliasing, pruning and strides of the ResNets."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import compare

import se_flax
from se_flax.attention import CBAM, ECA, EffectiveSE, SqueezeExcite
from se_flax.backbones import resnest, resnet, senet, sknet
from se_flax.backbones.resnet import ResNet, conv_pooling, deep_stem, mean_pooling, stem_7x7
from se_flax.checkpoints.convert import variable_shapes
from se_flax.checkpoints.torch import torch_key
from se_flax.errors import UserError
from se_flax.nn.pooling import avg_pool
from se_flax.nn.residual import BasicBlock, Bottleneck, average_by_2, project

IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 64, 3)), jnp.float32)
TINY = partial(ResNet, depths=(1, 1, 1, 1), block=Bottleneck, width=16, num_classes=5)


SHORT = {"depths": (1, 1, 1, 1)}


def shapes_of(model, size=64):
    return {torch_key(path): value.shape for path, value in variable_shapes(model, size).items()}


@pytest.mark.parametrize(
    ("stem", "kernels"),
    [
        (stem_7x7, {"conv1.weight": (7, 7, 3, 16)}),
        (
            resnet.DEEP,
            {"conv1.0.weight": (3, 3, 3, 8), "conv1.3.weight": (3, 3, 8, 8), "conv1.6.weight": (3, 3, 8, 16)},
        ),
        (
            resnet.TIERED,
            {"conv1.0.weight": (3, 3, 3, 6), "conv1.3.weight": (3, 3, 6, 8), "conv1.6.weight": (3, 3, 8, 16)},
        ),
        (
            resnet.WIDE_DEEP,
            {"conv1.0.weight": (3, 3, 3, 16), "conv1.3.weight": (3, 3, 16, 16), "conv1.6.weight": (3, 3, 16, 32)},
        ),
    ],
)
def test_stems_scale_with_the_width_and_count_their_layers_as_torch_does(stem, kernels):
    shapes = shapes_of(TINY(stem=stem))
    found = {key: shape for key, shape in shapes.items() if key.startswith("conv1.") and len(shape) == 4}
    assert found == kernels
    norms = {key for key in shapes if key.startswith("conv1.") and key.endswith("running_mean")}
    assert norms == ({f"conv1.{i}.running_mean" for i in (1, 4)} if len(kernels) == 3 else set())


def test_a_deep_stem_takes_any_number_of_convolutions():
    shapes = shapes_of(TINY(stem=partial(deep_stem, widths=(16, 24, 32, 64))))
    assert [k for k in shapes if k.startswith("conv1.") and len(shapes[k]) == 4] == [
        f"conv1.{i}.weight" for i in (0, 3, 6, 9)
    ]


@pytest.mark.parametrize(
    "name", ["resnet50", "seresnet50t", "ecaresnet50d", "resnetrs50", "seresnetaa50d", "senet154", "resnest50d"]
)
def test_five_resolutions_finest_first(name):
    model = se_flax.create_model(name, **SHORT)
    images = jax.ShapeDtypeStruct((1, 96, 96, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    logits, features = jax.eval_shape(partial(model.apply, return_features=True), variables, images)
    assert logits.shape == (1, 1000) and logits.dtype == jnp.float32
    assert [f.shape[1] for f in features] == [48, 24, 12, 6, 3]


def test_stages_at_one_resolution_give_one_map():
    model = TINY(strides=(1, 2, 2, 1), pool=None)
    init = partial(model.init_with_output, return_features=True)
    (logits, features), _ = jax.eval_shape(init, jax.random.key(0), IMAGES)
    # Without pooling the first stage keeps the stem's resolution, and the last keeps the third's.
    assert [f.shape for f in features] == [(2, 32, 32, 64), (2, 16, 16, 128), (2, 8, 8, 512)]
    assert logits.shape == (2, 5)
    assert shapes_of(TINY()) == shapes_of(model), "strides and pooling have no parameters"


def test_wrong_strides_and_widths_are_refused():
    with pytest.raises(UserError, match=r"got strides=\(1, 2\) for 4 stages; give one stride per stage"):
        TINY(strides=(1, 2)).init(jax.random.key(0), IMAGES)
    model = se_flax.create_model("ecaresnet50d_pruned", depths=[1, 1, 1, 1])
    with pytest.raises(UserError, match=r"depths=\(1, 1, 1, 1\), but widths for \(3, 4, 6, 3\) blocks"):
        model.init(jax.random.key(0), IMAGES)


def test_the_averaged_shortcut_is_a_mean_and_then_a_1x1():
    """ResNet-D's shortcut equals a 2x2 convolution at stride 2 whose four taps are a quarter of the 1x1."""
    block = Bottleneck(
        8,
        conv=se_flax.Conv,
        norm=se_flax.BatchNorm,
        strides=2,
        downsample=partial(project, average=True),
        act=lambda x: x,
        zero_init_last=True,
    )
    x = IMAGES[:, :8, :8]
    out, variables = block.init_with_output(jax.random.key(1), x)
    kernel = variables["params"]["downsample_1"]["kernel"][0, 0]
    assert "downsample_0" not in variables["params"] and "downsample_2" in variables["params"]
    mean = x.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
    # The branch is zero at the start (zero_init_last), and the norms have mean 0 and variance 1.
    np.testing.assert_allclose(out, mean @ kernel / np.sqrt(1 + 1e-5), atol=1e-5)


def test_a_3x3_projection_only_where_it_strides():
    shapes = shapes_of(se_flax.create_model("senet154", **SHORT))
    assert shapes["layer1.0.downsample.0.weight"] == (1, 1, 128, 256)
    assert shapes["layer2.0.downsample.0.weight"] == (3, 3, 256, 512)
    assert shapes["layer1.0.conv1.weight"][-1] * 2 == shapes["layer1.0.conv2.weight"][-1]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_antialiasing_moves_the_stride_behind_the_activation(block):
    """With a pooling that picks every second pixel, it is the strided convolution again."""
    parts = {"conv": se_flax.Conv, "norm": se_flax.BatchNorm, "downsample": project, "zero_init_last": False}
    strided = block(8, strides=2, **parts)
    picking = block(8, strides=2, antialias=lambda x: x[:, ::2, ::2], **parts)
    x = IMAGES[:, :16, :16]
    variables = strided.init(jax.random.key(2), x)
    np.testing.assert_allclose(picking.apply(variables, x), strided.apply(variables, x), atol=1e-5)
    smooth = block(8, strides=2, antialias=average_by_2, **parts)
    assert smooth.apply(variables, x).shape == strided.apply(variables, x).shape
    assert not np.allclose(smooth.apply(variables, x), strided.apply(variables, x), atol=1e-2)
    once = block(8, strides=1, antialias=average_by_2, **parts)
    assert once.apply(variables, x).shape[1] == 16, "a block without a stride keeps its resolution"


def test_poolings():
    x = jnp.arange(2 * 7 * 8 * 3, dtype=jnp.float32).reshape(2, 7, 8, 3)
    assert mean_pooling(x, conv=None).shape == (2, 3, 4, 3)
    np.testing.assert_allclose(mean_pooling(x)[0, 0, 0], x[0, :2, :2].mean((0, 1)))
    # Inside a block the last odd row is kept, so that branch and shortcut fit for images of any size.
    assert average_by_2(x).shape == avg_pool(x, 2, 2).shape == (2, 4, 4, 3)
    shapes = shapes_of(TINY(pool=conv_pooling))
    assert shapes["maxpool.0.weight"] == (3, 3, 16, 16)
    assert shapes["maxpool.1.running_var"] == (16,)


def test_a_pruned_network_keeps_the_attention_of_its_old_widths():
    shapes = shapes_of(se_flax.create_model("ecaresnet50d_pruned"))
    assert shapes["layer1.0.conv3.weight"] == (1, 1, 18, 19)
    assert shapes["layer1.0.se.conv.weight"] == (5, 1, 1), "the kernel of 256 channels; 19 would have 3"
    assert shapes["layer4.0.se.conv.weight"] == (7, 1, 1), "the kernel of 2048 channels; 2022 would have 5"


@pytest.mark.parametrize("attention", [None, ECA, CBAM, EffectiveSE])
@pytest.mark.parametrize("name", ["skresnet18", "resnest14d", "legacy_seresnet18"])
def test_any_attention_goes_into_any_residual_network(name, attention):
    model = se_flax.create_model(name, **SHORT, width=32, num_classes=0, attention=attention, stages=(4, 5))
    shapes = shapes_of(model)
    carriers = {key.split(".")[0] for key in shapes if f".{model.attention_name}." in key}
    assert carriers == (set() if attention is None else {"layer3", "layer4"})
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.bfloat16)
    pooled, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert pooled.dtype == jnp.float32 and pooled.ndim == 2


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
@pytest.mark.parametrize("name", ["skresnet18", "skresnet50", "resnest14d", "legacy_seresnet18"])
def test_any_placement_in_any_residual_block(name, placement):
    model = se_flax.create_model(name, **SHORT, attention=SqueezeExcite, placement=placement)
    shapes = shapes_of(model)
    carried = [key for key in shapes if f".{model.attention_name}." in key]
    assert len(carried) == 4 * 4, "two layers with biases in every block"


def test_half_precision_keeps_parameters_and_logits_in_single():
    for name in ("skresnet18", "resnest14d", "resnetrs50", "seresnetaa50d"):
        model = se_flax.create_model(name, **SHORT, dtype=jnp.bfloat16)
        init = partial(model.init_with_output, return_features=True)
        (logits, features), variables = jax.eval_shape(init, jax.random.key(0), IMAGES)
        assert logits.dtype == jnp.float32
        assert {f.dtype for f in features} == {jnp.dtype(jnp.bfloat16)}
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


OURS_ALONE = re.compile(r"(msra_)?(se)?resnet\d+|resnext\d+_32x4d|ecaresnet50")
HAVE_FIXTURES = [
    name
    for name in resnet.VARIANTS
    if not OURS_ALONE.fullmatch(name)
    or name in ("seresnet18", "seresnet34", "seresnet50", "seresnet101", "seresnet152")
]


def test_input_size_is_that_of_the_first_published_checkpoint():
    for family in (resnet, senet, sknet, resnest):
        for name in family.VARIANTS.keys() - (resnet.VARIANTS.keys() - set(HAVE_FIXTURES)):
            sizes = [checkpoint["input_size"][1] for checkpoint in compare.fixture(name)["checkpoints"]]
            assert se_flax.get_variant(name).input_size == (sizes[0] if sizes else 224), name
