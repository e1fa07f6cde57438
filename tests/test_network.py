"""What networks say of their parts, over all families: the classifier, the layer that reads the images, the blocks."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import se_flax
from se_flax import UserError, zoo
from se_flax.backbones import inception_resnet_v2
from se_flax.backbones.resnet import stem_7x7
from se_flax.checkpoints import torch
from se_flax.checkpoints.convert import import_variables, sizes_in
from se_flax.checkpoints.pretrained import NATIVE
from se_flax.nn.network import Network, lies_in, reads_images
from train.config import Optim
from train.optim.param_groups import frozen_parts, layer_depths
from train.run.init import trace

# The smallest of every family, and how many blocks its source counts in it: residual blocks, units, modules of branches
# (and with them the two convolutions before the first), for VGG all layers but the first and the last.
BLOCKS = {
    "airbench94_050": 3,  # Jordan 2024, section 3: groups of two convolutions
    "resnet20": 9,  # He et al. 2016, section 4.2: 6n + 2 layers
    "test_efficientnet": 5,
    "ghostnet_050": 16 + 1,  # Han et al. 2020, table 1
    "bn_inception": 1 + 10,  # Ioffe and Szegedy 2015, figure 5
    "inception_resnet_v2": 1 + 1 + 10 + 1 + 20 + 1 + 10,  # released model
    "ese_vovnet19b_slim_dw": 4,  # Lee and Park 2020, table 1: one aggregation a stage
    "inception_v3": 1 + 3 + 1 + 4 + 1 + 2,  # Szegedy et al. 2016, table 1
    "mnasnet_small": 1 + 1 + 2 + 4 + 3 + 3 + 1,
    "mobilenetv1_100": 13,  # Howard et al. 2017, table 1
    "mobilenetv2_100": 17,  # Sandler et al. 2018, table 2
    "mobilenetv3_small_050": 11 + 1,  # Howard et al. 2019, table 2, and its last convolution before the pooling
    "resnest14d": 4,
    "resnet18": 8,
    "legacy_seresnet18": 8,
    "shake_shake26_2x96d": 12,
    "shufflenet_g3_100": 16,  # Zhang et al. 2018, table 1
    "lcnetv2_small": 2 + 2 + 4 + 2,  # released model
    "repghostnet_050": 16 + 1,  # released model
    "repvit_m1": 2 + 2 + 14 + 2 + 3,  # released model, with three downsamplings
    "regnety_002": 13,  # Radosavovic et al. 2020, table 8: 1, 1, 4, 7
    "rexnet_100": 1 + 2 + 2 + 3 + 3 + 5 + 1,  # released model, with the convolution after its blocks
    "skresnet18": 8,
    "test_nfnet": 4,
    "tresnet_m": 3 + 4 + 11 + 3,  # Ridnik et al. 2021, table 1
    "vgg11_bn": 11 - 2,  # Simonyan and Zisserman 2015, table 1
    "wrn16_8": 6,
}


def test_there_is_one_of_every_family():
    smallest = {min(family.VARIANTS, key=lambda n, f=family: f.VARIANTS[n].num_params) for family in zoo.FAMILIES}
    assert smallest == BLOCKS.keys()


@functools.cache
def traced(name, **attributes):
    """The network, and its shapes by path in the order of the calls."""
    model = se_flax.create_model(name, **attributes)
    return model, trace(model, 96).shapes


def shapes_of(name, **attributes):
    return {path: leaf.shape for path, leaf in flatten_dict(traced(name, **attributes)[1]["params"]).items()}


def changed(name, **attributes):
    """Paths of the parameters that are not there, or have another shape, under other attributes."""
    before, after = shapes_of(name), shapes_of(name, **attributes)
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


# The dense layers of a head of more than one layer (Wang et al. 2024: labels and teacher, with a norm before each).
HEADS = {"repvit_m1": [("head", "head", "l"), ("head", "head_dist", "l")]}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_head_is_what_depends_on_the_classes(name):
    model, _ = traced(name)
    head = {path for path in shapes_of(name) if lies_in(path, model.head_path)}
    dense = {(*layer, part) for layer in HEADS.get(name, [model.head_path]) for part in ("kernel", "bias")}
    assert head == dense or (name in HEADS and head > dense)
    assert changed(name, num_classes=7) == dense
    assert changed(name, num_classes=0) == head


# Every kind of stem beside the families' first members.
STEMS = {name: {"depths": (1,) * 4} for name in ("seresnet50t", "legacy_senet154", "resnetrs50")}


@pytest.mark.parametrize("name", [*BLOCKS, *STEMS])
def test_the_stem_is_what_depends_on_the_channels(name):
    fewer = STEMS.get(name, {})
    before, after = shapes_of(name, **fewer), shapes_of(name, **fewer, in_channels=4)
    stem = traced(name, **fewer)[0].stem_path
    assert {path for path in before if before[path] != after[path]} == {(*stem, "kernel")}


@pytest.mark.parametrize(("name", "blocks"), BLOCKS.items())
def test_depths_follow_the_calls_and_tell_every_block_apart(name, blocks):
    model, shapes = traced(name)
    depths = layer_depths(model, shapes["params"])
    assert depths.keys() == shapes_of(name).keys()
    assert {path for path, depth in depths.items() if depth == 0} == {
        path for path in depths if lies_in(path, model.head_path)
    }
    order = list(depths.values())
    assert order == sorted(order, reverse=True)
    assert set(order) == set(range(blocks + 2))  # the stem is the deepest
    assert depths[(*model.stem_path, "kernel")] == blocks + 1
    for number, block in enumerate(model.block_paths):
        assert {depth for path, depth in depths.items() if lies_in(path, block)} == {blocks - number}


@pytest.mark.parametrize("name", BLOCKS)
def test_training_the_head_trains_the_classifier_and_nothing_else(name):
    model, shapes = traced(name)
    frozen = frozen_parts(Optim(train_only="head"), model, shapes).params
    assert shapes_of(name).keys() - frozen == {path for path in shapes_of(name) if lies_in(path, model.head_path)}


# timm's `group_matcher` of the same networks, from the classifier down; its VGG has a group for every norm and puts the
# hidden layers to the classifier, which is one layer here.
DEPTHS = {
    "vgg11_bn": [
        ["head"],
        ["pre_logits/fc2"],
        ["pre_logits/fc1"],
        *([f"features_{i}", f"features_{i + 1}"] for i in (25, 22, 18, 15, 11, 8, 4, 0)),
    ],
    "inception_resnet_v2": [
        ["classif"],
        ["conv2d_7b", "block8"],
        *([f"repeat__2_{i}"] for i in range(8, -1, -1)),
        ["mixed_7a"],
        *([f"repeat__1_{i}"] for i in range(19, -1, -1)),
        ["mixed_6a"],
        *([f"repeat_{i}"] for i in range(9, -1, -1)),
        ["mixed_5b"],
        ["conv2d_4a", "conv2d_3b"],
        ["conv2d_2b", "conv2d_2a", "conv2d_1a"],
    ],
    "inception_v3": [
        ["fc"],
        *([f"Mixed_{i}"] for i in ("7c", "7b", "7a", "6e", "6d", "6c", "6b", "6a", "5d", "5c", "5b")),
        ["Conv2d_4a_3x3", "Conv2d_3b_1x1"],
        ["Conv2d_2b_3x3", "Conv2d_2a_3x3", "Conv2d_1a_3x3"],
    ],
}


@pytest.mark.parametrize("name", DEPTHS)
def test_groups_that_are_no_numbered_blocks(name):
    model, shapes = traced(name)
    found = {"/".join(path): depth for path, depth in layer_depths(model, shapes["params"]).items()}
    for depth, group in enumerate(DEPTHS[name]):
        parts = {path for path, d in found.items() if d == depth}
        assert all(any(path.startswith(f"{part}/") for part in group) for path in parts)
        assert all(any(path.startswith(f"{part}/") for path in parts) for part in group)


def test_attention_goes_with_its_layer():
    model, shapes = traced("se_vgg16_bn")
    depths = layer_depths(model, shapes["params"])
    assert depths["se1_0", "fc1", "kernel"] == depths["features_0", "kernel"] == 15
    assert depths["se5_2", "fc2", "bias"] == depths["features_40", "kernel"] == 3


def test_a_stem_of_ones_own_says_what_reads_the_images():
    def bare(x, features, *, conv, norm, act, train):
        return act(norm(name="n")(conv(features, 3, strides=4, name="first")(x), train=train))

    model = se_flax.create_model("resnet18", stem=bare)
    text = r"^the stem bare does not say which of its layers the images go to; put se_flax\.nn\.network\.reads_images "
    with pytest.raises(UserError, match=text):
        _ = model.stem_path
    assert model.head_path == ("fc",) and len(model.block_paths) == 8
    assert se_flax.create_model("resnet18", stem=reads_images("first")(bare)).stem_path == ("first",)
    assert se_flax.create_model("resnet18", stem=partial(partial(stem_7x7), act=jax.nn.silu)).stem_path == ("conv1",)


# Small networks of the families whose classifier or stem is nested or has a name of its own.
NESTED = {
    "vgg11_bn": {"widths": (4,) * 5, "hidden": 8},
    "inception_resnet_v2": {"layout": inception_resnet_v2.layout()[:2]},
    "legacy_seresnet18": {"depths": (1,) * 4, "width": 8},
    "test_efficientnet": {},
}


@pytest.mark.parametrize("name", NESTED)
def test_weights_with_other_classes_and_channels_are_imported(name):
    """The classifier is new, the stem is summed over the colours, and all else is as it was."""
    model, shapes = traced(name, **NESTED[name])
    rng = np.random.default_rng(0)
    given = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    arrays = se_flax.to_timm(name, given)
    changes = {"num_classes": 5, "in_channels": 1}
    made, notes = import_variables(name, arrays, torch.LAYOUT, **changes, attributes=NESTED[name])
    assert notes == (
        f"{name}: the classifier was initialised anew for 5 classes (the checkpoint's: 1,000 classes)",
        f"{name}: the stem was adapted from 3 channels to 1 (summed over the colours)",
    )
    before, after = flatten_dict(given), flatten_dict(made)
    assert before.keys() == after.keys()
    stem = ("params", *model.stem_path, "kernel")
    for path, value in after.items():
        if lies_in(path[1:], model.head_path):
            assert value.shape == (*before[path].shape[:-1], 5)
        elif path == stem:
            np.testing.assert_allclose(value, before[path].sum(2, keepdims=True), rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(value, before[path])
    made, notes = import_variables(name, arrays, torch.LAYOUT, num_classes=0, attributes=NESTED[name])
    assert notes == (f"{name}: the classifier was left out (the checkpoint's: 1,000 classes)",)
    assert flatten_dict(made).keys() == {path for path in before if not lies_in(path[1:], model.head_path)}


@pytest.mark.parametrize("attributes", [{}, {"classifier": se_flax.CosineClassifier}], ids=["dense", "cosines"])
@pytest.mark.parametrize("layout", [NATIVE, torch.LAYOUT], ids=["native", "torch"])
def test_how_many_classes_a_file_has_shows_in_its_classifier(attributes, layout):
    """In the kernel as well: a classifier of cosines has no bias."""
    _, shapes = traced("resnet20", **attributes, num_classes=17)
    given = {layout.key(path): tuple(layout.shape(path, x.shape)) for path, x in flatten_dict(shapes).items()}
    assert sizes_in("resnet20", given, layout, attributes) == {"num_classes": 17, "in_channels": 3}
    headless = {key: shape for key, shape in given.items() if "linear" not in key}
    assert sizes_in("resnet20", headless, layout, attributes) == {"in_channels": 3}


class Silent(nn.Module):
    """A network that says nothing."""

    @nn.compact
    def __call__(self, images, *, train=False):
        return nn.Dense(3, name="fc")(images.mean((1, 2)))


class WithoutParameters(Network):
    """A network whose classifier has none."""

    head_path = ("fc",)

    @nn.compact
    def __call__(self, images, *, train=False):
        return jnp.mean(se_flax.BatchNorm(name="bn")(images, train=train), (1, 2))


def test_a_network_that_does_not_say_is_refused_where_it_is_asked():
    model, settings = Silent(), Optim(train_only="head")
    assert not frozen_parts(Optim(), model, trace(model, 8).shapes).params
    text = (
        r"^optim\.train_only needs to know the classifier and the blocks of Silent, which does not say; derive it from "
        r"se_flax\.nn\.network\.Network, or leave optim\.train_only as it is by default$"
    )
    with pytest.raises(UserError, match=text):
        frozen_parts(settings, model, trace(model, 8).shapes)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [(Optim(train_only="head"), "train_only='head'"), (Optim(freeze_batch_norm=True), "freeze_batch_norm=True")],
)
def test_a_run_that_would_train_nothing_is_refused(settings, setting):
    model = WithoutParameters()
    with pytest.raises(UserError) as error:
        frozen_parts(settings, model, trace(model, 8).shapes)
    assert str(error.value) == (
        f"optim.{setting} freezes all 2 parameters of WithoutParameters, so that nothing would be trained; leave the "
        "setting out, or give a network whose classifier has parameters"
    )
