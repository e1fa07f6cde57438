"""MobileNetV3, FBNetV3, HardCoRe-NAS and LCNet: every variant's layout, and the numbers of one of each kind."""

import jax
import jax.numpy as jnp
from parity import compare

import se_flax
from se_flax.attention import ECA
from se_flax.backbones import mobilenetv3
from se_flax.checkpoints.convert import variable_shapes
from se_flax.checkpoints.torch import torch_key

# The minimalistic two carry no attention; test_keras_weights.py holds them against Keras.
NAMES = sorted(name for name in mobilenetv3.VARIANTS if "minimal" not in name)


def shapes_of(model, size=64):
    return {torch_key(path): value.shape for path, value in variable_shapes(model, size).items()}


def test_every_published_checkpoint_is_known():
    for name in NAMES:
        published = {c["name"] for c in compare.fixture(name)["checkpoints"]}
        assert {f"{name}.{w.tag}" for w in se_flax.get_variant(name).weights} == published


def test_reduction_is_a_share_of_the_expanded_channels_rounded_to_eight():
    shapes = shapes_of(se_flax.create_model("mobilenetv3_large_100"))
    # 24 channels in, 72 expanded: a quarter is 18, the nearest multiple of eight 16, which is more than 10 % less.
    assert shapes["blocks.2.0.se.conv_reduce.weight"] == (1, 1, 72, 24)
    # FBNetV3 takes the share of the 24 channels that enter the block: 6, at least 8.
    assert shapes_of(se_flax.create_model("fbnetv3_b"))["blocks.2.0.se.conv_reduce.weight"] == (1, 1, 120, 8)


def test_small_stems_keep_their_width():
    assert shapes_of(se_flax.create_model("mobilenetv3_small_050"))["conv_stem.weight"][-1] == 16
    assert shapes_of(se_flax.create_model("mobilenetv3_small_075"))["conv_stem.weight"][-1] == 16
    assert shapes_of(se_flax.create_model("mobilenetv3_large_150d"))["conv_stem.weight"][-1] == 24


def test_without_classes_the_heads_activations_come_out():
    model = se_flax.create_model("mobilenetv3_small_050", num_classes=0)
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    pooled, maps = jax.eval_shape(lambda v, x: model.apply(v, x, return_features=True), variables, images)
    assert pooled.shape == (2, 1024)
    # The last map comes before the pooling and so before the head.
    assert [x.shape[1:] for x in maps] == [(16, 16, 16), (8, 8, 8), (4, 4, 16), (2, 2, 24), (1, 1, 288)]


def test_another_attention_goes_in():
    shapes = shapes_of(se_flax.create_model("mobilenetv3_small_050", attention=ECA))
    assert "blocks.0.0.se.conv.weight" in shapes
    assert not [key for key in shapes if "conv_reduce" in key]
