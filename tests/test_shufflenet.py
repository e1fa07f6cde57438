"""ShuffleNet v1: closed formulas, the paper's costs for every number of groups, a NumPy forward pass."""

import math
import re
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from costs import count, products, traced
from formulas import batch_norm, conv, double, random_variables, relu, squeeze_excite
from hypothesis import given, settings
from hypothesis import strategies as st
from one_step import check_training_step, images_of
from parity import compare

import se_flax
from se_flax import UserError
from se_flax.backbones.shufflenet import channel_shuffle

# Zhang et al. 2018, table 1: groups, channels of the first stage, MFLOPs of 1x.
TABLE_1 = [(1, 144, 143), (2, 200, 140), (3, 240, 137), (4, 272, 133), (8, 384, 137)]


def units(width):
    """(input, bottleneck, made by the branch, output, strided, side of the output) of every unit at 224 pixels."""
    before = 24
    for stage, depth in enumerate((4, 8, 4)):
        out = width * 2**stage
        for i in range(depth):
            yield before, out // 4, out - before if i == 0 else out, out, i == 0, 28 // 2**stage
            before = out


def parameters(groups, width, se=False):
    total = 27 * 24 + 2 * 24 + 4 * width * 1000 + 1000
    for i, (before, hidden, made, _, _, _) in enumerate(units(width)):
        total += before * hidden // (groups if i else 1) + 9 * hidden + hidden * made // groups
        total += 4 * hidden + 2 * made + se * (2 * made * (made // 16) + made // 16 + made)
    return total


@pytest.mark.parametrize(("groups", "width", "mflops"), TABLE_1)
def test_costs_of_every_number_of_groups(groups, width, mflops):
    attributes = {"groups": groups, "widths": (width, 2 * width, 4 * width)}
    assert count(traced("shufflenet_g3_100", **attributes)["params"]) == parameters(groups, width)
    macs = products("shufflenet_g3_100", **attributes)
    assert round((macs - 4 * width * 1000) / 1e6) == mflops  # convolutions alone


def test_the_table_of_the_squeeze_and_excitation_paper():
    """Hu et al. 2020, table 3; digits of the parameters cut off, as the text of the module says."""
    names = "shufflenet_g3_100", "se_shufflenet_g3_100"
    (plain, se), (macs, se_macs) = (count(traced(name)["params"]) for name in names), map(products, names)
    assert (plain, se) == (parameters(3, 240), parameters(3, 240, se=True))
    assert [math.floor(n / 1e5) / 10 for n in (plain, se)] == [1.8, 2.4]
    assert [round(n / 2**20, 1) for n in (plain, se)] == [1.8, 2.4]
    after = count(traced("se_shufflenet_g3_100", placement="post")["params"])
    assert round(after / 1e6, 1) == 2.6

    shortcuts = sum(
        9 * before * side**2 if strided else out * side**2 for before, _, _, out, strided, side in units(240)
    )
    squeezed = sum(made * side**2 for _, _, made, _, _, side in units(240))
    assert round((macs + shortcuts) / 1e6) == 140
    assert round((se_macs + shortcuts + squeezed) / 1e6) == 142


@settings(deadline=None, max_examples=25)
@given(groups=st.integers(1, 6), per_group=st.integers(1, 6))
def test_the_shuffle_deals_the_channels_of_each_group_to_all(groups, per_group):
    channels = groups * per_group
    x = np.arange(2 * channels).reshape(2, 1, 1, channels)
    y = np.asarray(channel_shuffle(jnp.asarray(x), groups))
    for i in range(groups):
        np.testing.assert_array_equal(y[..., i::groups], x[..., i * per_group : (i + 1) * per_group])
    np.testing.assert_array_equal(channel_shuffle(jnp.asarray(y), per_group), x)


def mean_3x3(x):
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    height, width = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
    taps = [padded[:, i::2, j::2][:, :height, :width] for i in range(3) for j in range(3)]
    return sum(taps) / 9


def forward(variables, x, depths, groups):
    params, stats = variables["params"], variables["batch_stats"]
    (x,) = double(x)
    x = relu(batch_norm(conv(x, params["conv1"]["kernel"], 2), params["bn1"], stats["bn1"]))
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])  # nothing is below zero
    side = (x.shape[1] + 1) // 2
    x = np.max([padded[:, i::2, j::2][:, :side, :side] for i in range(3) for j in range(3)], axis=0)
    for stage, depth in enumerate(depths):
        for i in range(depth):
            p, s = (tree[f"layer{stage + 1}_{i}"] for tree in (params, stats))
            first = 1 if stage == i == 0 else groups
            y = relu(batch_norm(conv(x, p["conv1"]["kernel"], groups=first), p["bn1"], s["bn1"]))
            n, h, w, hidden = y.shape
            y = y.reshape(n, h, w, groups, -1).transpose(0, 1, 2, 4, 3).reshape(n, h, w, hidden)
            y = conv(y, p["conv2"]["kernel"], 1 if i else 2, groups=hidden)
            y = conv(batch_norm(y, p["bn2"], s["bn2"]), p["conv3"]["kernel"], groups=groups)
            y = squeeze_excite(batch_norm(y, p["bn3"], s["bn3"]), p["se"])
            x = relu(x + y) if i else relu(np.concatenate([mean_3x3(x), y], -1))
    return x.mean((1, 2)) @ params["fc"]["kernel"] + params["fc"]["bias"]


SMALL = {"depths": (2, 1, 2), "groups": 2, "widths": (56, 112, 224), "num_classes": 8}


def test_the_network_is_what_numpy_computes():
    images = images_of(2, 33)
    model = se_flax.create_model("se_shufflenet_g3_100", **SMALL)
    variables = random_variables(model, images)
    logits, maps = compare.compiled(partial(model.apply, return_features=True), variables, images)
    np.testing.assert_allclose(logits, forward(variables, images, (2, 1, 2), 2), rtol=1e-3, atol=1e-3)
    assert [x.shape[1:] for x in maps] == [(17, 17, 24), (9, 9, 24), (5, 5, 56), (3, 3, 112), (2, 2, 224)]


def test_a_training_step():
    attention = partial(se_flax.SqueezeExcite, reduction=4.0)
    small = se_flax.create_model("shufflenet_g3_100", **SMALL, attention=attention, drop_path_rate=0.1)
    check_training_step(small, images_of(4, 64))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"groups": 5}, "got groups=5 for units of 240 channels, which make 60 and 216; groups must divide both: give"),
        (
            {"widths": (24, 48, 96)},
            "got groups=3 for units of 24 channels, which make 6 and 0; groups must divide both",
        ),
        ({"widths": (240, 480)}, "got widths=(240, 480) for 3 stages; give one width per stage"),
        ({"stages": (5,)}, "5 is not a stage of blocks; allowed: 2, 3, 4 "),
    ],
)
def test_what_does_not_fit_is_refused(attributes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        traced("shufflenet_g3_100", 32, **attributes)
