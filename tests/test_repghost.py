"""RepGhostNet: its module against its definition, for training and for inference."""

import jax
import jax.numpy as jnp
import numpy as np
from formulas import random_variables
from parity import compare

import se_flax
from se_flax.backbones.repghost import RepGhostModule
from se_flax.nn.conv import Conv
from se_flax.nn.norm import BatchNorm

X = np.random.default_rng(0).standard_normal((2, 7, 6, 12)).astype(np.float32)


def test_a_module_adds_the_norm_of_its_map_to_its_convolution():
    module = RepGhostModule(16, conv=Conv, norm=BatchNorm)
    variables = module.init(jax.random.key(0), X)
    layers = variables["params"]
    layers["cheap_operation_0"]["kernel"] = np.zeros((3, 3, 1, 16), np.float32)
    layers["cheap_operation_0"]["kernel"][2, 1] = 3.0
    layers["fusion_bn_0"] |= {"scale": np.full(16, 2.0, np.float32), "bias": np.full(16, -0.5, np.float32)}
    half = np.maximum(X @ np.asarray(layers["primary_conv_0"]["kernel"][0, 0]), 0)
    below = np.pad(half, [(0, 0), (0, 1), (0, 0), (0, 0)])[:, 1:]
    np.testing.assert_allclose(
        module.apply(variables, X), np.maximum(3 * below + 2 * half - 0.5, 0), rtol=1e-4, atol=1e-4
    )


def count(name, **attributes):
    model = se_flax.create_model(name, num_classes=0, **attributes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def test_attention_has_half_the_channels_of_ghostnets():
    """Released network at width 1; a quarter as a multiple of four, at least 90 % of it."""
    hidden = {36: 12, 60: 16, 240: 60, 336: 84, 480: 120}
    widths = [36, 60, 240, 336, 336, 480, 480]
    gates = sum(2 * w * hidden[w] + w + hidden[w] for w in widths)
    assert count("repghostnet_100") - count("repghostnet_100", attention=None) == gates


def test_inference_has_one_depthwise_convolution_per_module():
    """The released network for inference has neither the norms nor the layers `fusion_bn`."""
    model = se_flax.create_model("repghostnet_050", layout=se_flax.create_model("repghostnet_050").layout[:4])
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    variables = random_variables(model, images)
    fused, folded = se_flax.fuse(model, variables)
    module = folded["params"]["blocks_3_0"]["ghost1"]
    assert {name: set(layer) for name, layer in module.items()} == {
        "primary_conv_0": {"kernel", "bias"},
        "cheap_operation_0": {"kernel", "bias"},
    }
    expected = compare.compiled(model.apply, variables, images)
    given = compare.compiled(fused.apply, folded, images)
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
