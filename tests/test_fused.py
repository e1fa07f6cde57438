"""Folding norms into convolutions: the same logits, fewer variables, and what must stay."""

from functools import partial

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest
from formulas import random_variables
from parity import compare

import se_flax
from se_flax import UserError


def made(name, side=64, **attributes):
    """A network, variables and images; the fixtures' weights where there are any, for they keep deep maps near one."""
    model = se_flax.create_model(name, **attributes)
    images = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    known = any((compare.HERE / kind / f"{name}.json.gz").exists() for kind in ("fixtures", "specs"))
    variables = se_flax.from_timm(name, compare.state_dict(name)) if known else random_variables(model, images)
    return model, variables, images


def norms(variables):
    return {path[:-1] for path in flax.traverse_util.flatten_dict(variables.get("batch_stats", {}))}


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("seresnet20", 32),
        ("seresnet50", 64),
        ("ecaresnet26t", 64),
        ("mobilenetv3_small_050", 64),
        ("tf_efficientnetv2_b0", 64),
    ],
)
def test_a_fused_network_gives_the_same_logits_and_maps_without_norms(name, side):
    model, variables, images = made(name, side)
    expected, features = compare.compiled(partial(model.apply, return_features=True), variables, images)
    fused, folded = se_flax.fuse(model, variables)
    logits, maps = compare.compiled(partial(fused.apply, return_features=True), folded, images)
    for given, wanted in zip([logits, *maps], [expected, *features], strict=True):
        np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert "batch_stats" not in folded
    assert all("bn" not in "/".join(path) for path in flax.traverse_util.flatten_dict(folded["params"]))


# By the blocks' definitions. Pre-activation: bn1 reads a sum in all blocks but the first, and so does the
# last norm; bn2 and bn3 read a convolution. With the shortcut of the first block reading the stem too (attention in
# front of the branch, here in later stages only), its bn1 stays. CondConv: in the last stages' 3 + 4 + 1 blocks no
# convolution is a `Conv`. SK: one norm of a descriptor in each of 8 blocks belongs to the attention.
@pytest.mark.parametrize(
    ("name", "side", "attributes", "left"),
    [
        ("preresnet164", 32, {"depth": 1}, 3),
        ("sepreresnet164", 32, {"depth": 1, "placement": "pre", "stages": (3, 4)}, 4),
        ("efficientnet_cc_b0_4e", 64, {}, 24),
        ("skresnet18", 64, {}, 8),
    ],
)
def test_norms_that_follow_no_single_convolution_stay(name, side, attributes, left):
    model, variables, images = made(name, side, **attributes)
    fused, folded = se_flax.fuse(model, variables)
    assert len(norms(folded)) == left
    expected = compare.compiled(model.apply, variables, images)
    given = compare.compiled(fused.apply, folded, images)
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_norms_without_statistics_stay_beside_folded_ones():
    model, variables, _ = made("seresnet20", 32, attention=se_flax.CBAM)
    _, folded = se_flax.fuse(model, variables)
    # CBAM's own norm belongs to the attention, which keeps its parameters.
    assert {path[-1] for path in norms(folded)} == {"spatial_bn"}
    assert len(norms(folded)) == 9


def test_what_cannot_be_fused_is_said():
    model, variables, images = made("seresnet20", 32)
    with pytest.raises(UserError, match=r"^Dense has no se_flax.Conv and se_flax.Bat"):
        se_flax.fuse(nn.Dense(3), {})
    with pytest.raises(UserError, match=r"^got variables without batch_stats; give both params and batch_stats"):
        se_flax.fuse(model, {"params": variables["params"]})
    fused, folded = se_flax.fuse(model, variables)
    with pytest.raises(UserError, match=r"^got variables without batch_stats;.* that is not fused$"):
        se_flax.fuse(fused, folded)
    with pytest.raises(UserError, match=r"^a fused network has no batch norms to train; train the network that"):
        fused.apply(folded, images, train=True)


def test_the_squeeze_of_a_fused_bottleneck_reads_the_narrow_map():
    model, variables, images = made("seresnet50", 64)
    fused, folded = se_flax.fuse(model, variables)
    program = jax.make_jaxpr(fused.apply)(folded, images)
    sums = [eqn for eqn in program.eqns if eqn.primitive.name == "reduce_sum"]
    widths = [eqn.invars[0].aval.shape[-1] for eqn in sums if eqn.params["axes"] == (1, 2)]
    # conv3's input has a quarter of its output's channels; the last mean is the classifier's.
    assert widths == [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3 + [2048]
