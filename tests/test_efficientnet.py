"""EfficientNet, MnasNet, MixNet, TinyNet: every variant's layout, and the numbers of one of each kind."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import compare

import se_flax
from se_flax.attention import CBAM, ECA, SqueezeExcite
from se_flax.backbones import efficientnet, mnasnet
from se_flax.backbones.efficientnet import EfficientNet
from se_flax.checkpoints.convert import variable_shapes
from se_flax.checkpoints.torch import torch_key
from se_flax.errors import UserError
from se_flax.nn.mobile import fan_out_init
from se_flax.nn.mobile_table import fused, inverted, plain, separable

NAMES = sorted({**efficientnet.VARIANTS, **mnasnet.VARIANTS})
TINY = partial(
    EfficientNet,
    layout=(
        (plain(8, skip=True),),
        (fused(16, strides=2),),
        (inverted(16, strides=2, expand=2, attends=True), inverted(16, expand=2)),
    ),
    stem=8,
    head=24,
    num_classes=5,
    attention=efficientnet.SE,
)
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)


def start(model):
    """Variables drawn with NumPy: compiling the random numbers of every kernel takes longer than all else here."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("kernel", "v"):
            return jnp.asarray(rng.normal(0, math.prod(leaf.shape[:-1]) ** -0.5, leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, 1.0 if path[-1].key in ("scale", "var") else 0.0, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), IMAGES))


def run(model, variables, **settings):
    return jax.jit(partial(model.apply, **settings))(variables, IMAGES)


def shapes_of(model, size=32):
    return {torch_key(path): value.shape for path, value in variable_shapes(model, size).items()}


def test_every_published_checkpoint_is_known():
    assert [w.tag for w in se_flax.get_variant("efficientnet_b0").weights] == ["ra4_e3600_r224_in1k", "ra_in1k"]
    for name in NAMES:
        published = {c["name"]: c for c in compare.fixture(name)["checkpoints"]}
        weights = se_flax.get_variant(name).weights
        assert {f"{name}.{w.tag}" for w in weights} == published.keys()
        for w in weights:
            source = published[f"{name}.{w.tag}"]
            assert (w.hub_id, w.num_classes, w.licence) == (
                source["hf_hub_id"],
                source["num_classes"],
                source["license"],
            )
            assert (w.image_size, w.crop, w.crop_mode) == (
                source["input_size"][1],
                source["crop_pct"],
                source["crop_mode"],
            )
            assert (w.mean, w.std) == (tuple(source["mean"]), tuple(source["std"]))


def test_features_are_one_map_per_resolution_finest_first():
    model = se_flax.create_model("efficientnet_b0")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    logits, maps = jax.eval_shape(partial(model.apply, return_features=True), variables, images)
    assert logits.shape == (1, 1000) and logits.dtype == jnp.float32
    expected = [(1, 112, 112, 16), (1, 56, 56, 24), (1, 28, 28, 40), (1, 14, 14, 112), (1, 7, 7, 320)]
    assert [x.shape for x in maps] == expected


def test_without_classes_the_pooled_features_come_out():
    model = TINY(num_classes=0)
    variables = start(model)
    assert run(model, variables).shape == (2, 24)
    assert "classifier" not in variables["params"]


def test_half_precision_keeps_parameters_statistics_and_logits_in_float32():
    model = TINY(dtype=jnp.bfloat16)
    variables = start(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    logits, maps = run(model, variables, return_features=True)
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in maps} == {jnp.dtype(jnp.bfloat16)}


def test_reduction_is_a_share_of_the_blocks_input():
    shapes = shapes_of(se_flax.create_model("efficientnet_b0"), 64)
    # The second stage's first block takes 16 channels and expands them to 96.
    assert shapes["blocks.1.0.se.conv_reduce.weight"] == (1, 1, 96, 4)


def test_any_attention_goes_in_and_none_takes_it_out():
    with_eca = shapes_of(se_flax.create_model("efficientnet_b0", attention=ECA), 64)
    assert with_eca["blocks.1.0.se.conv.weight"] == (3, 1, 1)
    assert not [key for key in with_eca if "conv_reduce" in key]
    assert not [key for key in shapes_of(se_flax.create_model("efficientnet_b0", attention=None), 64) if ".se." in key]
    model = TINY(attention=partial(CBAM, reduction=4))
    variables = start(model)
    _, updates = run(model, variables, train=True, mutable=["batch_stats"])
    assert "spatial_bn" in updates["batch_stats"]["blocks_2_0"]["se"]


def test_stages_choose_where_attention_sits():
    def attending(**attributes):
        return sorted({key.split(".se.")[0] for key in shapes_of(TINY(**attributes)) if ".se." in key})

    assert attending() == ["blocks.2.0"]
    assert attending(stages=(4,)) == ["blocks.2.0", "blocks.2.1"]
    assert attending(stages=(3, 4)) == ["blocks.1.0", "blocks.2.0", "blocks.2.1"]
    assert attending(stages=()) == []
    assert attending(stages=(2,)) == []  # a single convolution carries none
    with pytest.raises(UserError, match=r"got attention stages \(4, 5\), but 5 is not .* allowed: 2, 3, 4 \(2 is"):
        attending(stages=(4, 5))


def test_attention_may_differ_by_stage():
    shapes = shapes_of(TINY(attention=(None, ECA, SqueezeExcite), stages=(2, 3, 4)))
    assert "blocks.1.0.se.conv.weight" in shapes
    assert "blocks.2.1.se.fc1.weight" in shapes
    with pytest.raises(UserError, match="got 2 attentions for 3 stages; give one for all, or one for each"):
        shapes_of(TINY(attention=(None, ECA)))
    model = se_flax.create_model("test_efficientnet", attention=[None, None, None, ECA, None])
    assert [key for key in shapes_of(model) if ".se." in key] == ["blocks.3.0.se.conv.weight"]
    with pytest.raises(UserError, match=r"got attention='eca'; attention is given as a class: attention=se_flax\.ECA"):
        se_flax.create_model("test_efficientnet", attention=[None, None, None, "eca", None])
    with pytest.raises(UserError, match="pass a class or a partial"):
        se_flax.create_model("resnet18", attention=(ECA, None, None, None))


def test_dropout_and_stochastic_depth_need_randomness_only_while_training():
    model = TINY(drop_rate=0.5, drop_path_rate=0.5)
    variables = start(model)
    assert run(model, variables).shape == (2, 5)

    @jax.jit
    def step(key):
        return model.apply(variables, IMAGES, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0]

    first, again, other = (np.asarray(step(jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_kernels_start_as_tensorflows():
    depthwise = fan_out_init(1152)(jax.random.key(0), (5, 5, 1, 1152))
    assert np.std(depthwise) == pytest.approx(np.sqrt(2 / 25), rel=0.02)
    project = fan_out_init()(jax.random.key(0), (1, 1, 1152, 192))
    assert np.std(project) == pytest.approx(np.sqrt(2 / 192), rel=0.02)


def test_images_are_checked():
    model = TINY()
    with pytest.raises(UserError, match="the channels come last"):
        model.init(jax.random.key(0), jnp.zeros((1, 3, 32, 32)))


def test_rows_of_a_table_name_their_block():
    assert separable(8, kernel=5).block.keywords == {"kernel": 5}
    assert not separable(8).downsamples
    assert inverted(8, strides=2).downsamples
