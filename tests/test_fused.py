"""Folding norms into convolutions: the same logits, fewer variables, and what must stay."""

import re
from functools import partial
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest
from formulas import random_variables
from parity import compare

import se_flax
from se_flax import UserError
from se_flax.nn.conv import Conv
from se_flax.nn.norm import BatchNorm
from se_flax.nn.parallel import Branch, ParallelBlock
from se_flax.nn.residual import ConvNorm


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
        ("ghostnet_050", 64, {}, 1),  # the stem's convolution is a feature map
    ],
)
def test_norms_that_follow_no_single_convolution_stay(name, side, attributes, left):
    model, variables, images = made(name, side, **attributes)
    fused, folded = se_flax.fuse(model, variables)
    assert len(norms(folded)) == left
    (expected, features), (given, maps) = (
        compare.compiled(partial(network.apply, return_features=True), its, images)
        for network, its in ((model, variables), (fused, folded))
    )
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(maps[0], features[0], rtol=0, atol=1e-5 * np.abs(features[0]).max())


class Sum(ParallelBlock):
    """A sum of all kinds of branches, and a norm after it."""

    strides: int = 1
    kernels: tuple = (5, 3, 1)
    skip: bool = True
    conv: Any = Conv
    norm: Any = BatchNorm

    @nn.compact
    def __call__(self, x, *, train=False):
        channels = x.shape[-1]
        conv = partial(self.conv, 8, strides=self.strides, groups=2)
        branches = [Branch(conv(kernel_size=k, name=f"c{k}"), self.norm(name=f"n{k}")) for k in self.kernels]
        nested = ConvNorm(8, self.conv, self.norm, 3, self.strides, groups=2, name="nested")
        plain = Branch(self.conv(8, 1, strides=self.strides, groups=2, use_bias=True, name="plain"))
        skips = [Branch(norm=self.norm(name="skip")), Branch()] if self.skip else []
        assert channels == 8
        return self.norm(name="last")(self.add_branches(x, *branches, nested, plain, *skips, train=train), train=train)


def sum_made(**attributes):
    model = Sum(**attributes)
    x = np.random.default_rng(0).normal(size=(2, 11, 9, 8)).astype(np.float32)
    return model, random_variables(model, x), x


@pytest.mark.parametrize("attributes", [{}, {"strides": 2, "skip": False}], ids=["skips", "strides"])
def test_a_sum_of_convolutions_becomes_one(attributes, monkeypatch):
    """Kernels of all sizes around one centre, a norm alone and the identity, and the norm after the sum."""
    monkeypatch.setattr(Sum, "in_channels", 8, raising=False)
    model, variables, x = sum_made(**attributes)
    fused, folded = se_flax.fuse(model, variables)
    assert {"/".join(path) for path in flax.traverse_util.flatten_dict(folded)} == {
        "params/c5/kernel",
        "params/c5/bias",
    }
    expected = model.apply(variables, x)
    np.testing.assert_allclose(fused.apply(folded, x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_sum_whose_first_kernel_is_not_the_largest_stays(monkeypatch):
    monkeypatch.setattr(Sum, "in_channels", 8, raising=False)
    model, variables, x = sum_made(kernels=(1, 3))
    fused, folded = se_flax.fuse(model, variables)
    # Of its norms only those after a convolution are gone: the skip's and the sum's stay.
    assert norms(folded) == {("skip",), ("last",)}
    expected = model.apply(variables, x)
    np.testing.assert_allclose(fused.apply(folded, x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_network_trained_with_branches_has_one_convolution_for_each_sum():
    model, variables, images = made("ghostnetv3_050", 64)
    fused, folded = se_flax.fuse(model, variables)
    assert norms(folded) == {("bn1",)}
    kinds = {re.sub(r"\d+_\d+", "", path[0]) for path in flax.traverse_util.flatten_dict(folded["params"])}
    assert kinds == {"conv_stem", "bn1", "blocks_", "conv_head", "classifier"}
    kept = {path[-3] for path in flax.traverse_util.flatten_dict(folded["params"]) if "rpr" in "/".join(path)}
    assert kept == {"primary_rpr_conv_0", "cheap_rpr_conv_0", "dw_rpr_conv_0"}
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
