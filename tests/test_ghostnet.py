"""GhostNet: its modules against their definitions, and what differs between the three versions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import se_flax
from se_flax import UserError
from se_flax.backbones.ghostnet import GhostModule, identity
from se_flax.nn.conv import Conv
from se_flax.nn.norm import BatchNorm
from se_flax.nn.pooling import unpool_nearest

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.standard_normal((2, 7, 6, 12)), jnp.float32)


def shapes(name, side=64, **attributes):
    model = se_flax.create_model(name, **attributes)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]


def count(*args, **attributes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(*args, **attributes)))


def test_half_of_a_ghost_module_is_the_other_half_convolved():
    module = GhostModule(16, conv=Conv, norm=BatchNorm)
    variables = module.init(jax.random.key(0), X)
    kernel = np.zeros((3, 3, 1, 8), np.float32)
    kernel[0, 1] = 2.0
    variables["params"]["cheap_operation_0"]["kernel"] = kernel
    y = np.asarray(module.apply(variables, X))
    primary = np.asarray(X) @ np.asarray(variables["params"]["primary_conv_0"]["kernel"][0, 0])
    np.testing.assert_allclose(y[..., :8], np.maximum(primary, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y[:, 1:, :, 8:], 2 * y[:, :-1, :, :8], rtol=1e-4)  # each pixel from the one above
    assert not y[:, 0, :, 8:].any()


def test_long_range_attention_is_a_gate_per_pixel_of_half_the_resolution():
    """With kernels of zero in its columns, the gate is the sigmoid of the last norm's bias."""
    module = GhostModule(16, conv=Conv, norm=BatchNorm, act=identity, long_range=True)
    variables = module.init(jax.random.key(0), X)
    layers = variables["params"]
    assert layers["short_conv_2"]["kernel"].shape == (1, 5, 1, 16)
    assert layers["short_conv_4"]["kernel"].shape == (5, 1, 1, 16)
    plain = module.clone(long_range=False).apply(variables, X)
    gates = np.asarray(module.apply(variables, X) / plain)
    assert gates.min() > 0 and gates.max() < 1
    for rows, columns in (((0, 1, 2), (0, 1)), ((3, 4), (2, 3)), ((5, 6), (4, 5))):  # 7 rows from 3, 6 columns from 3
        block = gates[:, rows][:, :, columns].reshape(2, -1, 16)
        np.testing.assert_allclose(block, np.broadcast_to(block[:, :1], block.shape), rtol=1e-4)
    layers["short_conv_4"]["kernel"] *= 0
    layers["short_conv_5"]["bias"] += 1.5
    np.testing.assert_allclose(module.apply(variables, X), plain / (1 + np.exp(-1.5)), rtol=1e-5)


@pytest.mark.parametrize("sides", [(6, 8), (7, 5), (2, 3)])
def test_unpooling_takes_the_nearest_pixel(sides):
    height, width = sides
    x = jnp.asarray(RANDOM.standard_normal((1, height // 2, width // 2, 3)), jnp.float32)
    rows, columns = (np.arange(side) * (side // 2) // side for side in sides)
    np.testing.assert_array_equal(unpool_nearest(x, height, width), x[:, rows][:, :, columns])


def test_attention_is_where_the_papers_table_has_it():
    """Han et al. 2020, table 1: seven of sixteen blocks, a quarter of the expanded channels as a multiple of four."""
    hidden = {72: 20, 120: 32, 480: 120, 672: 168, 960: 240}
    widths = [72, 120, 480, 672, 672, 960, 960]
    gates = sum(2 * w * hidden[w] + w + hidden[w] for w in widths)
    assert count("ghostnet_100") - count("ghostnet_100", attention=None) == gates
    one = count("ghostnet_100", stages=(6,)) - count("ghostnet_100", attention=None)
    assert one == 2 * 120 * 32 + 120 + 32
    with pytest.raises(UserError, match=re.escape("11 is not a stage of blocks; allowed: 2, 3, 4, 5, 6, 7, 8, 9, 10")):
        count("ghostnet_100", stages=(11,))


def test_versions_differ_in_their_first_modules():
    """Tang et al. 2022: long-range attention in all blocks but the first two."""
    v1, v2, v3 = (shapes(f"ghostnet{version}_100") for version in ("", "v2", "v3"))
    long_range = {name for name in v2 if "short_conv_0" in v2[name].get("ghost1", {})}
    assert long_range == {name for name in v1 if name.startswith("blocks") and name[-3:] != "9_0"} - {
        "blocks_0_0",
        "blocks_1_0",
    }
    assert all("short_conv_0" not in v2[name].get("ghost2", {}) for name in v2)
    trained = {"primary_rpr_conv_2", "cheap_rpr_conv_2", "cheap_rpr_scale", "cheap_rpr_skip"}
    assert trained <= v3["blocks_0_0"]["ghost1"].keys()


def test_images_too_small_for_half_of_the_last_map_are_refused():
    with pytest.raises(UserError, match=re.escape("got images of 32 x 32 pixels")):
        shapes("ghostnetv2_100", 32)
    assert count("ghostnet_050", 32)
