"""TResNet against the paper's table, its stem on squares of pixels, and the blur against NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import se_flax
from se_flax import UserError
from se_flax.backbones.tresnet import space_to_depth
from se_flax.checkpoints import torch
from se_flax.checkpoints.convert import import_variables, sizes_in
from se_flax.nn.pooling import blur_pool

TINY = {"depths": (1, 1, 1, 1), "width": 8}


def shapes_of(name, **attributes):
    model = se_flax.create_model(name, **attributes)
    return model, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, model.in_channels)))


def test_stages_and_attention_are_the_papers():
    # Ridnik et al. 2021, table 1: TResNet-M; section 2.4: basic blocks first, SE in three stages, hidden widths of 64
    # and more (a quarter of the output in basic blocks, an eighth in bottlenecks).
    _, shapes = shapes_of("tresnet_m")
    body = shapes["params"]["body"]
    for stage, (depth, hidden) in enumerate(((3, 64), (4, 64), (11, 128), (3, None)), 1):
        blocks = {name: block for name, block in body.items() if name.startswith(f"layer{stage}_")}
        assert len(blocks) == depth
        assert all(("conv3" in block) == (stage > 2) for block in blocks.values())
        widths = {block["se"]["fc1"]["kernel"].shape[-1] if "se" in block else None for block in blocks.values()}
        assert widths == {hidden}


def test_a_square_of_pixels_is_one_pixel():
    x = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    given = np.asarray(space_to_depth(jnp.asarray(x)))
    assert given.shape == (2, 2, 3, 48)
    for row, column, i, j, channel in ((0, 0, 0, 0, 0), (1, 2, 3, 1, 2), (0, 1, 2, 3, 1)):
        np.testing.assert_array_equal(
            given[:, row, column, (i * 4 + j) * 3 + channel], x[:, 4 * row + i, 4 * column + j, channel]
        )


def test_a_side_that_is_no_multiple_of_four_is_refused():
    text = "got images of 62 x 64 pixels; this network takes squares of 4 x 4 pixels as one: give a height and a width"
    with pytest.raises(UserError, match=re.escape(text)):
        jax.eval_shape(se_flax.create_model("tresnet_m", **TINY).init, jax.random.key(0), jnp.zeros((1, 62, 64, 3)))


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("side", [6, 7])
def test_the_blur_is_a_binomial_filter(mode, side):
    x = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    padded = np.pad(np.float64(x), [(0, 0), (1, 1), (1, 1), (0, 0)], mode)
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    starts = range(0, side, 2)
    expected = [[np.einsum("nhwc,hw->nc", padded[:, i : i + 3, j : j + 3], kernel) for j in starts] for i in starts]
    np.testing.assert_allclose(blur_pool(x, mode), np.array(expected).transpose(2, 0, 1, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_stem_of_squares_is_adapted_colour_by_colour(channels):
    _, shapes = shapes_of("tresnet_m", **TINY)
    rng = np.random.default_rng(0)
    given = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    arrays = se_flax.to_timm("tresnet_m", given)
    made, notes = import_variables("tresnet_m", arrays, torch.LAYOUT, in_channels=channels, attributes=TINY)
    assert notes[0].startswith(f"tresnet_m: the stem was adapted from 3 channels to {channels} (")
    before, after = (np.asarray(v["params"]["body"]["conv1"]["conv"]["kernel"]) for v in (given, made))
    pixels = before.reshape(3, 3, 16, 3, 8)
    colours = [pixels.sum(3)] if channels == 1 else [0.75 * pixels[..., c, :] for c in (0, 1, 2, 0)]
    np.testing.assert_allclose(after.reshape(3, 3, 16, channels, 8), np.stack(colours, 3), rtol=1e-5, atol=1e-5)
    sizes = {key: array.shape for key, array in se_flax.to_timm("tresnet_m", made).items()}
    assert sizes_in("tresnet_m", sizes, torch.LAYOUT, TINY) == {"num_classes": 1000, "in_channels": channels}
