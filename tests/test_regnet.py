"""RegNet-Y's widths against the paper's table, and attention at the places that the paper does not use."""

import jax
import jax.numpy as jnp
import pytest

import se_flax
from se_flax import UserError

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


def count(**attributes):
    model = se_flax.create_model("regnety_002", num_classes=0, **attributes)
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
