"""Names and layouts of PyTorch's state dictionaries; `test_resnet.py` holds whole networks against timm."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest

import se_flax
from se_flax import ECA, UserError, zoo
from se_flax.checkpoints.convert import sizes_in, variable_shapes
from se_flax.checkpoints.torch import LAYOUT, torch_key, torch_shape

SMALLEST = [min(family.VARIANTS, key=lambda name, f=family: f.VARIANTS[name].num_params) for family in zoo.FAMILIES]


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("params/conv1/kernel", "conv1.weight"),
        ("params/bn1/scale", "bn1.weight"),
        ("params/bn1/bias", "bn1.bias"),
        ("batch_stats/bn1/mean", "bn1.running_mean"),
        ("batch_stats/layer4_2/bn3/var", "layer4.2.bn3.running_var"),
        ("params/layer1_0/conv1/kernel", "layer1.0.conv1.weight"),
        ("params/layer3_22/downsample_0/kernel", "layer3.22.downsample.0.weight"),
        ("params/layer1_0/se/fc1/bias", "layer1.0.se.fc1.bias"),
        ("params/blocks_3_11/conv_pw/kernel", "blocks.3.11.conv_pw.weight"),
        ("params/blocks_3_11/se/conv_reduce/kernel", "blocks.3.11.se.conv_reduce.weight"),
        ("params/conv_stem/kernel", "conv_stem.weight"),
        ("params/fc/bias", "fc.bias"),
        ("params/Mixed_5b/branch3x3dbl__3/bn/scale", "Mixed_5b.branch3x3dbl_3.bn.weight"),
        ("batch_stats/repeat__1_19/branch1_2/bn/var", "repeat_1.19.branch1.2.bn.running_var"),
    ],
)
def test_a_path_is_renamed_by_rule(path, key):
    assert torch_key(tuple(path.split("/"))) == key


@pytest.fixture(scope="module")
def state_dict():
    """A network in torch's own layout, made without our exporter."""
    shapes = {"conv1.weight": (16, 3, 3, 3), "linear.weight": (10, 64), "linear.bias": (10,)}
    shapes |= {f"bn1.{leaf}": (16,) for leaf in ("weight", "bias", "running_mean", "running_var")}
    channels = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for i in range(3):
            block = f"layer{stage}.{i}"
            shapes |= {f"{block}.conv1.weight": (width, channels, 3, 3), f"{block}.conv2.weight": (width, width, 3, 3)}
            for bn in ("bn1", "bn2"):
                shapes |= {
                    f"{block}.{bn}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")
                }
            channels = width
    rng = np.random.default_rng(0)
    values = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    counters = {key.replace("running_mean", "num_batches_tracked") for key in shapes if key.endswith("running_mean")}
    return values | {key: np.asarray(7, np.int64) for key in counters}


def test_layouts(state_dict):
    variables = se_flax.from_timm("resnet20", state_dict)
    params = variables["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    kernel = state_dict["layer2.0.conv1.weight"]
    assert params["layer2_0"]["conv1"]["kernel"].shape == (3, 3, 16, 32)
    for o, i, h, w in ((0, 0, 0, 0), (31, 2, 1, 0), (5, 15, 2, 1)):
        assert params["layer2_0"]["conv1"]["kernel"][h, w, i, o] == kernel[o, i, h, w]
    np.testing.assert_array_equal(params["linear"]["kernel"], state_dict["linear.weight"].T)
    np.testing.assert_array_equal(params["layer1_2"]["bn2"]["scale"], state_dict["layer1.2.bn2.weight"])
    stats = variables["batch_stats"]["layer1_2"]["bn2"]
    np.testing.assert_array_equal(stats["mean"], state_dict["layer1.2.bn2.running_mean"])
    np.testing.assert_array_equal(stats["var"], state_dict["layer1.2.bn2.running_var"])


def test_round_trip_is_exact_and_the_counters_start_anew(state_dict):
    back = se_flax.to_timm("resnet20", se_flax.from_timm("resnet20", state_dict))
    assert back.keys() == state_dict.keys()
    for key, value in state_dict.items():
        expected = np.zeros((), np.int64) if key.endswith("num_batches_tracked") else value
        assert back[key].dtype == expected.dtype
        np.testing.assert_array_equal(back[key], expected)
        assert back[key].flags.c_contiguous


def test_counters_may_be_absent(state_dict):
    few = {key: value for key, value in state_dict.items() if not key.endswith("num_batches_tracked")}
    se_flax.from_timm("resnet20", few)


def test_a_rank_3_kernel_is_a_1d_convolution():
    model = se_flax.create_model("resnet20", attention=ECA, depth=1)
    shapes = variable_shapes(model, 32)
    rng = np.random.default_rng(0)
    variables = {"params": {}, "batch_stats": {}}
    for path, leaf in shapes.items():
        at = variables
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = rng.standard_normal(leaf.shape).astype(np.float32)
    given = se_flax.to_timm("resnet20", variables)
    assert given["layer1.0.se.conv.weight"].shape == (1, 1, 3)
    back = se_flax.from_timm("resnet20", given, attention=ECA, depth=1)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_everything_that_is_wrong_is_in_one_message(state_dict):
    wrong = dict(state_dict)
    del wrong["layer1.0.conv1.weight"], wrong["bn1.running_var"]
    wrong["layer9.0.conv1.weight"] = np.zeros(3, np.float32)
    wrong["conv1.num_batches_tracked"] = np.zeros((), np.int64)  # of a convolution: nothing we know
    wrong["linear.weight"] = np.zeros((100, 64), np.float32)
    wrong["conv1.weight"] = wrong["conv1.weight"].transpose(2, 3, 1, 0)
    with pytest.raises(UserError) as error:
        se_flax.from_timm("resnet20", wrong)
    message = str(error.value)
    assert message.startswith("the state dict does not fit resnet20; missing: ")
    missing, unexpected, shapes = re.fullmatch(
        r".*missing: (.*); unexpected: (.*); of another shape: (.*)", message
    ).groups()
    assert set(missing.split(", ")) == {"layer1.0.conv1.weight", "bn1.running_var"}
    assert set(unexpected.split(", ")) == {"layer9.0.conv1.weight", "conv1.num_batches_tracked"}
    assert "linear.weight (100, 64) instead of (10, 64)" in shapes
    assert "conv1.weight (3, 3, 3, 16) instead of (16, 3, 3, 3)" in shapes


def test_a_long_list_of_differences_is_shortened(state_dict):
    with pytest.raises(UserError, match=r"missing: (\S+ ){8}\.\.\. \(\d+ in all\)"):
        se_flax.from_timm("seresnet56", state_dict)


def test_attributes_are_those_of_create_model(state_dict):
    few = dict(state_dict)
    few["linear.weight"], few["linear.bias"] = few["linear.weight"][:7], few["linear.bias"][:7]
    variables = se_flax.from_timm("resnet20", few, num_classes=7)
    assert variables["params"]["linear"]["kernel"].shape == (64, 7)
    with pytest.raises(UserError, match=r"linear\.bias \(7,\) instead of \(10,\)"):
        se_flax.from_timm("resnet20", few)


def test_an_unknown_network_names_the_closest():
    for call in (lambda: se_flax.from_timm("resnet21", {}), lambda: se_flax.to_timm("resnet21", {})):
        with pytest.raises(UserError, match="unknown model 'resnet21'; closest: "):
            call()


@pytest.fixture(scope="module")
def seresnet20():
    """Variables of a small network and the state dict that we make of them."""
    model = se_flax.create_model("seresnet20", num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(1), np.zeros((1, 32, 32, 3), np.float32))
    return variables, se_flax.to_timm("seresnet20", variables)


def test_another_number_of_classes_draws_the_classifier_anew(seresnet20):
    _, given = seresnet20
    variables = se_flax.from_timm("seresnet20", given, num_classes=5)  # asked for, so no warning: it would be an error
    back = se_flax.to_timm("seresnet20", variables)
    assert back["linear.weight"].shape == (5, 64) and np.std(back["linear.weight"]) > 0.01
    assert back["linear.bias"].shape == (5,)
    for key in given.keys() - {"linear.weight", "linear.bias"}:
        np.testing.assert_array_equal(back[key], given[key] if "batches" not in key else 0, err_msg=key)


def test_the_same_number_of_classes_keeps_the_classifier(seresnet20):
    _, given = seresnet20
    variables = se_flax.from_timm("seresnet20", given, num_classes=10)  # a warning would be an error here
    np.testing.assert_array_equal(variables["params"]["linear"]["kernel"], given["linear.weight"].T)


def test_no_classifier(seresnet20):
    _, given = seresnet20
    variables = se_flax.from_timm("seresnet20", given, num_classes=0)
    assert "linear" not in variables["params"]
    headless = {key: value for key, value in given.items() if not key.startswith("linear")}
    assert se_flax.from_timm("seresnet20", headless, num_classes=7)["params"]["linear"]["kernel"].shape == (64, 7)
    assert "linear" not in se_flax.from_timm("seresnet20", headless, num_classes=0)["params"]
    advice = r"it has no classifier: pass num_classes=0 for a network without one, or the classes of a new one$"
    with pytest.raises(UserError, match=r"missing: linear\.\w+, linear\.\w+; " + advice):
        se_flax.from_timm("seresnet20", headless)


def test_a_grey_stem_gives_what_the_colour_stem_gave(seresnet20):
    variables, given = seresnet20
    grey = se_flax.from_timm("seresnet20", given, in_channels=1)
    np.testing.assert_allclose(
        grey["params"]["conv1"]["kernel"][:, :, 0],
        given["conv1.weight"].sum(1).transpose(1, 2, 0),
        rtol=1e-6,
        atol=1e-7,
    )
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 1), np.float32)
    expected = se_flax.create_model("seresnet20").apply(variables, np.tile(images, 3))
    given_logits = se_flax.create_model("seresnet20", in_channels=1).apply(grey, images)
    np.testing.assert_allclose(given_logits, expected, rtol=1e-4, atol=1e-5)


def test_a_fourth_channel_repeats_the_first(seresnet20):
    _, given = seresnet20
    four = se_flax.from_timm("seresnet20", given, in_channels=4)
    stem = given["conv1.weight"][:, [0, 1, 2, 0]] * np.float32(0.75)
    np.testing.assert_array_equal(four["params"]["conv1"]["kernel"], stem.transpose(2, 3, 1, 0))


def test_what_was_not_asked_for_is_not_adapted(seresnet20):
    _, given = seresnet20
    other = given | {"linear.weight": np.zeros((5, 64), np.float32), "linear.bias": np.zeros(5, np.float32)}
    text = r"of another shape: .*linear\.bias \(5,\) instead of \(10,\).*; its classifier has 5 classes: pass \w+=5$"
    with pytest.raises(UserError, match=text):
        se_flax.from_timm("seresnet20", other)
    with pytest.raises(UserError, match=r"unexpected: conv9\.weight$"):
        se_flax.from_timm("seresnet20", given | {"conv9.weight": np.zeros(3)}, num_classes=5)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "backbone.", "model._orig_mod.", "net.module."])
def test_a_prefix_of_all_keys_is_taken_off_and_said(seresnet20, prefix):
    variables, given = seresnet20
    with pytest.warns(UserWarning, match=f"^the prefix '{prefix}' of all names in the checkpoint was removed"):
        found = se_flax.from_timm("seresnet20", {prefix + key: value for key, value in given.items()})
    jax.tree.map(np.testing.assert_array_equal, found, variables)


@pytest.mark.parametrize("outer", ["state_dict", "model", "model_state_dict", "net"])
def test_what_a_training_program_saved_around_the_state_dict(seresnet20, outer):
    variables, given = seresnet20
    found = se_flax.from_timm("seresnet20", {outer: given, "epoch": 3, "optimizer": {"lr": 0.1}})
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_a_prefix_that_not_all_keys_have_is_named(seresnet20):
    _, given = seresnet20
    lightning = {f"model.{key}": value for key, value in given.items()} | {"criterion.weight": np.ones(10)}
    text = r"; the missing keys are under 'model\.', beside 'criterion\.weight': save only them$"
    with pytest.raises(UserError, match=text):
        se_flax.from_timm("seresnet20", lightning)
    # A part that several keys share is none of all of them.
    some = {key.replace("layer1.", "layer1._orig_mod."): value for key, value in given.items()}
    with pytest.raises(UserError, match=r"missing: layer1\.\d\..*; unexpected: layer1\._orig_mod\.\d\."):
        se_flax.from_timm("seresnet20", some)


def test_without_its_prefix_a_misfit_says_which_was_taken_off(seresnet20):
    _, given = seresnet20
    wrong = {f"module.{key}": value for key, value in given.items() if key != "conv1.weight"}
    text = r"the state dict without the prefix 'module\.' does not fit seresnet20; missing: conv1\.weight$"
    with pytest.raises(UserError, match=text):
        se_flax.from_timm("seresnet20", wrong)


def test_a_stem_of_another_width_names_the_argument(seresnet20):
    _, given = seresnet20
    grey = given | {"conv1.weight": given["conv1.weight"].sum(1, keepdims=True)}
    text = r"conv1\.weight \(16, 1, 3, 3\) instead of \(16, 3, 3, 3\); its stem takes 1 channel: pass in_channels=1$"
    with pytest.raises(UserError, match=text):
        se_flax.from_timm("seresnet20", grey)
    with pytest.raises(UserError, match=r"its stem takes 1 channel: pass in_channels=1$"):
        se_flax.from_timm("seresnet20", grey, in_channels=4)
    kernel = se_flax.from_timm("seresnet20", grey, in_channels=1)["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, 0], grey["conv1.weight"][:, 0].transpose(1, 2, 0))
    headless = {key: value for key, value in grey.items() if not key.startswith("linear")}
    with pytest.raises(UserError, match=r"pass in_channels=1; it has no classifier: pass num_classes=0 for a network"):
        se_flax.from_timm("seresnet20", headless)


def test_another_network_gets_no_advice_about_its_ends(seresnet20):
    _, given = seresnet20
    headless = {key: value for key, value in given.items() if not key.startswith("linear")}
    with pytest.raises(UserError) as caught:
        se_flax.from_timm("seresnet32", headless)
    assert "classifier" not in str(caught.value)


@pytest.mark.parametrize("name", SMALLEST)
def test_classes_and_channels_show_in_the_arrays_of_every_family(name):
    model = se_flax.create_model(name, num_classes=7, in_channels=1)
    shapes = variable_shapes(model, se_flax.get_variant(name).input_size)
    arrays = {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in shapes.items()}
    assert sizes_in(name, arrays, LAYOUT, {}) == {"num_classes": 7, "in_channels": 1}
    bare = se_flax.create_model(name, num_classes=0)
    shapes = variable_shapes(bare, se_flax.get_variant(name).input_size)
    arrays = {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in shapes.items()}
    assert sizes_in(name, arrays, LAYOUT, {}) == {"in_channels": 3}


def test_bfloat16_that_numpy_saved_without_its_name(seresnet20, tmp_path):
    _, given = seresnet20
    np.savez(tmp_path / "half.npz", **{key: value.astype(ml_dtypes.bfloat16) for key, value in given.items()})
    with np.load(tmp_path / "half.npz") as archive:
        raw = dict(archive)
    assert raw["conv1.weight"].dtype == np.dtype("V2")
    found = se_flax.to_timm("seresnet20", se_flax.from_timm("seresnet20", raw))
    # bfloat16 is the upper half of a float32, rounded to even.
    expected = np.asarray(jax.lax.reduce_precision(given["conv1.weight"], exponent_bits=8, mantissa_bits=7))
    np.testing.assert_array_equal(found["conv1.weight"], expected)
    with pytest.raises(UserError, match=r"conv1\.weight has dtype \|V1; give an array of real numbers, such as fl"):
        se_flax.from_timm("seresnet20", given | {"conv1.weight": np.zeros((16, 3, 3, 3), "V1")})
