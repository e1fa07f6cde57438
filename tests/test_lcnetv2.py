"""PP-LCNetV2: where its stages have branches, attention, a split and a shortcut (the authors' documentation)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import se_flax
from se_flax import UserError
from se_flax.backbones.lcnetv2 import LCNetV2Block
from se_flax.nn.conv import Conv
from se_flax.nn.norm import BatchNorm

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 8)), jnp.float32)
PARTS = {"conv": Conv, "norm": BatchNorm}


def shapes(**attributes):
    model = se_flax.create_model("lcnetv2_base", num_classes=0, **attributes)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]


def count(**attributes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(**attributes)))


def kernels(block):
    """Sides of the depthwise kernels."""
    return [layer["conv"]["kernel"].shape[0] for name, layer in sorted(block.items()) if name.startswith("dw_conv")]


def test_later_stages_are_trained_with_branches():
    params = shapes()
    assert kernels(params["stages_1_1"]) == [3]
    assert kernels(params["stages_2_0"]) == kernels(params["stages_3_0"]) == [5, 3]  # a 1x1 does not go with a stride
    assert kernels(params["stages_2_1"]) == kernels(params["stages_3_1"]) == [5, 3, 1]
    assert {name for name in params if "pw_conv_0" in params[name]} == {f"stages_2_{i}" for i in range(6)}


def test_attention_is_in_the_stage_of_the_table():
    """A quarter of the block's input channels, 256 and then 512, with biases."""
    gates = [2 * c * (c // 4) + c + c // 4 for c in (256, 512, 512, 512, 512, 512)]
    plain = count(attention=None)
    assert count() - plain == sum(gates)
    assert count(stages=(3,)) - plain == sum(2 * c * (c // 4) + c + c // 4 for c in (128, 256))
    with pytest.raises(UserError, match=re.escape("6 is not a stage of blocks; allowed: 2, 3, 4, 5")):
        count(stages=(6,))


def test_only_blocks_that_keep_the_shape_have_a_shortcut():
    for block, shortcut in ((LCNetV2Block(8, **PARTS, skip=True), X), (LCNetV2Block(8, **PARTS), 0 * X)):
        variables = block.init(jax.random.key(0), X)
        variables["params"]["pw_conv"]["bn"]["scale"] *= 0
        np.testing.assert_array_equal(block.apply(variables, X), shortcut)
    wider = LCNetV2Block(16, **PARTS, skip=True, branches=True, kernel=5, strides=2)
    assert wider.init_with_output(jax.random.key(0), X)[0].shape == (2, 4, 4, 16)
