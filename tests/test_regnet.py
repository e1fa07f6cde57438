"""RegNet-Y's widths against the paper's table, attention at the places that the paper does not use, and V and Z."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import se_flax
from se_flax import UserError
from se_flax.backbones.regnet import InvertedRegNetBlock, PreActRegNetBlock, project_bare
from se_flax.nn.conv import Conv
from se_flax.nn.norm import BatchNorm

# Radosavovic et al. 2020, figure 16 (RegNetY): widths, blocks and channels per group of the four stages.
PAPER = {
    "regnety_002": ((24, 56, 152, 368), (1, 1, 4, 7), 8),
    "regnety_004": ((48, 104, 208, 440), (1, 3, 6, 6), 8),
    "regnety_008": ((64, 128, 320, 768), (1, 3, 8, 2), 16),
    "regnety_016": ((48, 120, 336, 888), (2, 6, 17, 2), 24),
    "regnety_032": ((72, 216, 576, 1512), (2, 5, 13, 1), 24),
    "regnety_080": ((168, 448, 896, 2016), (2, 4, 10, 1), 56),
}


@pytest.mark.parametrize("name", PAPER)
def test_stages_are_the_papers(name):
    widths, depths, group = PAPER[name]
    assert se_flax.create_model(name).layout == tuple((w, n, group) for w, n in zip(widths, depths, strict=True))


def test_torchvision_keeps_nine_tenths_of_a_width():
    # Its model files: 136 becomes 144 in groups of 16, 192 becomes 224 in groups of 56 (168 would be less than 90 %).
    assert [width for width, _, _ in se_flax.create_model("regnety_008_tv").layout] == [64, 144, 320, 784]
    assert [width for width, _, _ in se_flax.create_model("regnety_080_tv").layout] == [224, 448, 896, 2016]


def count(name="regnety_002", **attributes):
    model = se_flax.create_model(name, num_classes=0, **attributes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def gates(width, inputs):
    """Parameters of squeeze-and-excitation of a map of `width` channels with a quarter of `inputs` in the middle."""
    hidden = round(inputs / 4)
    return 2 * width * hidden + width + hidden


def test_attention_sits_where_placement_says():
    widths, depths, _ = PAPER["regnety_002"]
    outputs = [width for width, depth in zip(widths, depths, strict=True) for _ in range(depth)]
    inputs = [32, *outputs[:-1]]
    plain = count(attention=None)
    after_3x3 = sum(gates(w, i) for w, i in zip(outputs, inputs, strict=True))
    assert count() - plain == count(placement="3x3") - plain == after_3x3
    at_output = sum(gates(w, w) for w in outputs)
    for placement in ("standard", "post", "identity"):
        assert count(placement=placement) - plain == at_output
    assert count(placement="pre") - plain == sum(gates(i, i) for i in inputs)
    assert count(stages=(5,)) - plain == sum(gates(w, i) for w, i in list(zip(outputs, inputs, strict=True))[-7:])


def test_a_stage_that_is_not_there_is_refused():
    with pytest.raises(
        UserError, match=r"got attention stages \(6,\), but 6 is not a stage of blocks; allowed: 2, 3, 4"
    ):
        count(stages=(6,))


def test_attention_of_regnet_z_is_four_times_wider_than_its_block():
    small = {"layout": ((16, 3, 4), (32, 1, 4), (64, 2, 4))}
    outputs = [16, 16, 16, 32, 64, 64]
    inputs = [32, *outputs[:-1]]
    plain = count("regnetz_005", **small, attention=None)
    assert count("regnetz_005", **small) - plain == sum(gates(4 * w, i) for w, i in zip(outputs, inputs, strict=True))
    same = [w for w, i in zip(outputs, inputs, strict=True) if w == i]  # elsewhere there is no shortcut to gate
    assert count("regnetz_005", **small, placement="identity") - plain == sum(gates(w, w) for w in same)


def test_regnet_v_is_regnet_y_with_its_norms_moved():
    """Attention, blocks and convolutions are equal; the norms of the shortcuts are gone, those of the inputs new."""
    y, v = (se_flax.create_model(name) for name in ("regnety_040", "regnetv_040"))
    assert y.layout == v.layout and y.block_paths == v.block_paths
    small = {"layout": ((16, 2, 8), (24, 2, 8))}
    plain = [count(name, **small, attention=None) for name in ("regnety_040", "regnetv_040")]
    assert plain[0] - plain[1] == 2 * (32 + 3 * (16 + 24) - (32 + 16 + 16 + 24))
    for placement in ("pre", "3x3", "standard", "identity", "post"):
        found = [count(name, **small, placement=placement) for name in ("regnety_040", "regnetv_040")]
        assert found[0] - plain[0] == found[1] - plain[1] > 0


def apply(block, x):
    variables = block.init(jax.random.key(0), x)
    return block.apply(variables, x)


X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 6, 8)), jnp.float32)
PARTS = {"conv": Conv, "norm": BatchNorm}


def test_an_inverted_block_starts_as_the_identity_where_it_has_a_shortcut():
    np.testing.assert_array_equal(apply(InvertedRegNetBlock(8, **PARTS), X), X)  # no activation after the sum
    for block in (InvertedRegNetBlock(8, **PARTS, strides=2), InvertedRegNetBlock(4, **PARTS)):
        assert np.abs(apply(block, X)).max() > 0.1  # else nothing would reach the next block


def test_the_shortcut_of_a_pre_activation_block_starts_after_its_first_norm():
    """Without a branch (its last kernel zero), the block is norm and activation, projected where the shape changes."""
    block = PreActRegNetBlock(8, **PARTS)
    variables = block.init(jax.random.key(0), X)
    variables["params"]["conv3"]["kernel"] *= 0
    np.testing.assert_allclose(block.apply(variables, X), np.maximum(X / np.sqrt(1 + 1e-5), 0), rtol=1e-6)
    block = PreActRegNetBlock(16, **PARTS, strides=2, downsample=project_bare)
    assert block.init(jax.random.key(0), X)["params"]["downsample"]["kernel"].shape == (1, 1, 8, 16)
