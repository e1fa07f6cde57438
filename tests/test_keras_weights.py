"""Keras's names, layouts, files and logits, against what Keras itself wrote (`keras_reference.py`)."""

import dataclasses
import re
from functools import partial

import h5py
import jax
import keras_reference as reference
import numpy as np
import pytest
import real_data
from hypothesis import given, settings
from hypothesis import strategies as st

import se_flax
from se_flax import UserError
from se_flax.attention import ECA
from se_flax.backbones import mobilenetv3
from se_flax.checkpoints import keras
from se_flax.checkpoints.convert import variable_shapes
from se_flax.checkpoints.keras import from_keras, to_keras

NAMES = sorted({path.name.partition(".")[0] for path in reference.FOLDER.glob("*.json.gz")})
NUMBERS = [name for name in NAMES if "logits" in reference.fixture(name)]
KERAS2 = [name for name in NAMES if (reference.FOLDER / f"{name}.keras2.json.gz").exists()]
SMALL = "tf_mobilenetv3_small_100"


def network(name):
    """Name and attributes of the network; a minimalistic MobileNetV3 can be had from its full one."""
    if name in se_flax.list_models():
        return name, {}
    full = name.replace("_minimal", "")
    layout = tuple(
        tuple(
            dataclasses.replace(row, block=partial(row.block, kernel=min(3, row.block.keywords["kernel"]))) for row in s
        )
        for s in (mobilenetv3.SMALL if "small" in name else mobilenetv3.LARGE)
    )
    return full, {"layout": layout, "attention": None, "act": jax.nn.relu}


def entries(name):
    """Key, shape and place in a `.weights.h5` file of every variable that is the network's own."""
    return [entry for entry in reference.fixture(name)["entries"] if not entry[0].startswith("normalization/")]


@pytest.fixture(scope="module")
def arrays():
    """Keras's weights of a small network."""
    return reference.weights(entries(SMALL), {})


@pytest.fixture(scope="module")
def variables(arrays):
    return from_keras(SMALL, arrays)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_every_network_of_keras_is_covered():
    assert {name: reference.fixture(name)["application"] for name in NAMES} == keras.APPLICATIONS
    assert len(NAMES) == 21


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_kerass(name):
    ours, attributes = network(name)
    layout = keras.layout(ours, **attributes)
    shapes = variable_shapes(se_flax.create_model(ours, **attributes), 64)
    found = {layout.key(path): layout.shape(path, leaf.shape) for path, leaf in shapes.items()}
    assert found == {key: tuple(shape) for key, shape, _ in entries(name)}
    assert len(found) == len(shapes)


@pytest.mark.parametrize("name", NAMES)
def test_counted_layers_of_a_file_are_found(name):
    ours, attributes = network(name)
    everything = reference.fixture(name)["entries"]
    found = keras.by_layer(ours, {path: key for key, _, path in everything}, **attributes)
    assert found == {key: key for key, _, _ in everything}
    assert any(path.endswith("conv2d_9/vars/0") for _, _, path in everything)


@pytest.mark.parametrize("name", KERAS2)
def test_names_of_both_kerases_are_found_in_every_form(name):
    ours, attributes = network(name)
    now, before = reference.fixture(name), reference.fixture(f"{name}.keras2")
    assert now["keras"].startswith("3.") and before["keras"].startswith("2.")
    assert now["legacy"][0].startswith("model_weights/") and before["legacy"][0].endswith(":0")
    keys = [key for key, _, _ in now["entries"]]
    forms = [now["legacy"], before["legacy"], *([e[i] for e in f["entries"]] for f in (now, before) for i in (0, 2))]
    for form in forms:
        found = keras.by_layer(ours, dict(zip(form, keys, strict=True)), **attributes)
        assert found == {key: key for key in keys}


@pytest.mark.parametrize("name", NUMBERS)
def test_logits_are_kerass(name):
    ours, attributes = network(name)
    source = reference.fixture(name)
    variables = from_keras(ours, reference.weights(source["entries"], source["norm_scales"]), **attributes)
    model = se_flax.create_model(ours, **attributes)
    logits = jax.jit(model.apply)(variables, reference.images())[:, :: reference.STEP]
    expected = np.asarray(source["logits"])
    assert np.linalg.norm(expected[0] - expected[1]) > 0.1 * np.linalg.norm(expected)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_real_weights_give_the_logits_of_another_implementation():
    files = ["efficientnetv2_b0_imagenet_keras.npz", "efficientnetv2_b0_imagenet_keras-reference-logits-300.npz"]
    files.append("imagenet-sample-20-224-bicubic.npz")
    folder = real_data.folder(*files)
    if folder is None:
        pytest.skip(real_data.REASON)
    given, expected, images = (dict(np.load(folder / file)) for file in files)
    variables = from_keras("tf_efficientnetv2_b0", given)
    np.testing.assert_array_equal(images["index"], expected["index"][:20])
    x = (images["images"] / np.float32(255) - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    logits = jax.jit(se_flax.create_model("tf_efficientnetv2_b0").apply)(variables, x)
    expected = expected["resize256_bicubic_crop224"][:20]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    back = to_keras("tf_efficientnetv2_b0", variables)
    assert back.keys() == given.keys()
    for key, value in given.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_layouts(arrays, variables):
    params, stats = variables["params"], variables["batch_stats"]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    depthwise = arrays["expanded_conv_3_depthwise/kernel"]
    assert depthwise.shape == (5, 5, 96, 1)
    ours = params["blocks_2_0"]["conv_dw"]["kernel"]
    assert ours.shape == (5, 5, 1, 96)
    for h, w, c in ((0, 0, 0), (4, 1, 95), (2, 3, 7)):
        assert ours[h, w, 0, c] == depthwise[h, w, c, 0]
    np.testing.assert_array_equal(params["classifier"]["kernel"], arrays["logits/kernel"][0, 0])
    np.testing.assert_array_equal(params["conv_head"]["bias"], arrays["conv_2/bias"])
    np.testing.assert_array_equal(params["blocks_5_0"]["conv"]["kernel"], arrays["conv_1/kernel"])
    np.testing.assert_array_equal(params["blocks_0_0"]["bn2"]["scale"], arrays["expanded_conv_project_bn/gamma"])
    np.testing.assert_array_equal(stats["bn1"]["var"], arrays["conv_bn/moving_variance"])


def test_export_is_the_inverse_in_both_spellings(arrays, variables):
    back = to_keras(SMALL, variables)
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
        assert back[key].flags.c_contiguous and back[key].dtype == np.float32
    older = to_keras(SMALL, variables, keras=2)
    assert {key: list(x.shape) for key, x in older.items()} == {k: s for k, s, _ in entries(f"{SMALL}.keras2")}
    assert "expanded_conv/squeeze_excite/Conv_1/bias" in older and "expanded_conv/depthwise/depthwise_kernel" in older
    same(from_keras(SMALL, older), variables)


def datasets(file):
    found = {}
    file.visititems(lambda path, item: found.update({path: item}) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.mark.parametrize("form", ["weights.h5", "weights of Keras 2", "model of Keras 3"])
def test_files_hold_the_same_variables(form, arrays, variables, tmp_path):
    source = reference.fixture(SMALL)
    places = {
        "weights.h5": [path for _, _, path in source["entries"]],
        "weights of Keras 2": reference.fixture(f"{SMALL}.keras2")["legacy"],
        "model of Keras 3": source["legacy"],
    }[form]
    with h5py.File(tmp_path / "file.h5", "w") as file:
        for path, value in zip(places, arrays.values(), strict=True):
            file[path] = value
        # What training leaves behind: `optimizer` in a .weights.h5 file, `optimizer_weights` in a whole model's.
        file["optimizer/vars/0"] = file["optimizer_weights/adam/iteration"] = np.int64(7)
    with h5py.File(tmp_path / "file.h5") as file:
        same(from_keras(SMALL, datasets(file)), variables)


def test_the_preprocessing_of_the_network_is_ignored():
    name = "tf_efficientnet_b0"
    assert {key for key, _, _ in reference.fixture(name)["entries"]} - {key for key, _, _ in entries(name)} == {
        f"normalization/{weight}" for weight in ("mean", "variance", "count")
    }
    given = reference.weights(entries(name), {})
    without = from_keras(name, given)
    for layer in ("normalization", "normalization_3", "model_weights/normalization/normalization"):
        extra = {f"{layer}/mean": np.zeros(3), f"{layer}/variance": np.ones(3), f"{layer}/count": np.zeros(())}
        same(from_keras(name, given | extra), without)
    with pytest.raises(UserError, match=r"unexpected: normalization/gamma$"):
        from_keras(name, given | {"normalization/gamma": np.ones(3)})


@settings(deadline=None, max_examples=30)
@given(
    middle=st.lists(st.text("abcxyz_0123", min_size=1, max_size=6), max_size=3),
    whole_model=st.booleans(),
    tensor_number=st.booleans(),
    case=st.sampled_from(
        [
            ("Conv/BatchNorm", "gamma", "conv_bn/gamma"),
            ("Conv", "kernel", "conv/kernel"),
            ("expanded_conv/depthwise", "depthwise_kernel", "expanded_conv_depthwise/kernel"),
            ("expanded_conv_10/expand/BatchNorm", "moving_mean", "expanded_conv_10_expand_bn/moving_mean"),
            ("expanded_conv_1_expand", "kernel", "expanded_conv_1_expand/kernel"),
        ]
    ),
)
def test_what_stands_between_layer_and_weight_does_not_matter(middle, whole_model, tensor_number, case):
    # A model that was built twice in a session numbers them: `stem_conv/stem_conv_1/kernel:0`.
    layer, weight, key = case
    path = "/".join([*(["model_weights"] if whole_model else []), layer, *middle, weight]) + ":0" * tensor_number
    assert keras.by_layer(SMALL, {path: 1}) == {key: 1}


def test_another_number_of_classes_draws_the_classifier_anew(arrays, variables):
    new = from_keras(SMALL, arrays, num_classes=7)  # asked for, so no warning: it would be an error here
    assert new["params"]["classifier"]["kernel"].shape == (1024, 7)
    same(new["params"]["conv_head"], variables["params"]["conv_head"])
    seven = {key: value[..., :7] if key.startswith("logits") else value for key, value in arrays.items()}
    same(from_keras(SMALL, seven, num_classes=7)["params"]["conv_stem"], variables["params"]["conv_stem"])


def test_a_network_without_classifier_fits_one_without():
    name = "tf_efficientnet_b0"
    given = reference.weights(entries(name), {})
    few = {key: value for key, value in given.items() if not key.startswith("predictions")}
    assert "classifier" not in from_keras(name, few, num_classes=0)["params"]
    names = "predictions/(kernel, predictions/bias|bias, predictions/kernel)"
    with pytest.raises(UserError, match=rf"missing: {names}; it has no classifier: pass num_classes=0 for a network"):
        from_keras(name, few)


@pytest.mark.parametrize("prefix", ["model/", "layers/functional/", "efficientnet/top_model/"])
def test_a_prefix_of_all_names_is_taken_off_and_said(prefix, arrays, variables):
    text = f"^the prefix '{prefix}' of all names in the checkpoint was removed$"
    counted = {path: arrays[key] for key, _, path in entries(SMALL)}
    for names in (arrays, to_keras(SMALL, variables, keras=2), counted):
        # What an optimizer left has a place of its own.
        prefixed = {prefix + path: value for path, value in names.items()} | {"optimizer/vars/0": np.int64(7)}
        with pytest.warns(UserWarning, match=text):
            same(from_keras(SMALL, prefixed), variables)


class Unread:
    """An array that must not be read."""

    def __init__(self, shape):
        self.shape = shape

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("read before all names and shapes were compared")


def test_everything_that_is_wrong_is_in_one_message_before_anything_is_read(arrays):
    wrong = {key: Unread(value.shape) for key, value in arrays.items()}
    del wrong["conv/kernel"], wrong["expanded_conv_2_project_bn/beta"]
    wrong["conv/bias"] = wrong["block1a_dwconv/kernel"] = Unread((16,))
    wrong["Conv_2/bias"] = Unread((1024,))  # there already by its new name
    wrong["expanded_conv_depthwise/kernel"] = Unread((3, 3, 1, 16))
    wrong["logits/kernel"] = Unread((1024, 1000))
    with pytest.raises(UserError) as error:
        from_keras(SMALL, wrong)
    message = str(error.value)
    assert message.startswith(f"the set of Keras weights does not fit {SMALL}; missing: ")
    missing, unexpected, shapes = re.fullmatch(
        r".*missing: (.*); unexpected: (.*); of another shape: (.*)", message
    ).groups()
    assert set(missing.split(", ")) == {"conv/kernel", "expanded_conv_2_project_bn/beta"}
    assert set(unexpected.split(", ")) == {"conv/bias", "block1a_dwconv/kernel", "Conv_2/bias"}
    assert "expanded_conv_depthwise/kernel (3, 3, 1, 16) instead of (3, 3, 16, 1)" in shapes
    assert "logits/kernel (1024, 1000) instead of (1, 1, 1024, 1000)" in shapes


def test_a_file_of_another_network_does_not_pass():
    counted = {path: Unread(tuple(shape)) for _, shape, path in entries("tf_mobilenetv3_small_075")}
    with pytest.raises(UserError, match=rf"not fit {SMALL}; of another shape: .* instead of .* \(\d+ in all\)$"):
        from_keras(SMALL, counted)


def test_a_network_that_keras_does_not_have():
    for call in (from_keras, to_keras, keras.by_layer):
        with pytest.raises(
            UserError,
            match=r"efficientnet_b0 has no counterpart in keras.applications; closest: tf_efficientnet_b0, .*all",
        ):
            call("efficientnet_b0", {})
        with pytest.raises(UserError, match=r"resnet18 has no counterpart .*; allowed: tf_efficientnet_b0, .*in all"):
            call("resnet18", {})
        with pytest.raises(UserError, match=r"unknown model 'EfficientNetB0'"):
            call("EfficientNetB0", {})


def test_modules_that_keras_does_not_have(variables):
    shapes = variable_shapes(se_flax.create_model(SMALL, attention=ECA), 64)
    assert keras.layout(SMALL, attention=ECA).key(next(p for p in shapes if p[-2:] == ("conv", "kernel") and "se" in p))
    with pytest.raises(
        UserError, match=r"missing: blocks_0_0/se/conv/kernel, .*; unexpected: expanded_conv_squeeze_exc"
    ):
        from_keras(SMALL, {k: Unread(tuple(s)) for k, s, _ in entries(SMALL)}, attention=ECA)
    strange = {"params": {"blocks_0_0": {"se": {"conv": {"kernel": np.zeros((3, 1, 1))}}}}}
    with pytest.raises(UserError, match=r"blocks_0_0/se/conv/kernel has no place in Keras's MobileNetV3Small; export"):
        to_keras(SMALL, strange)
    with pytest.raises(UserError, match=r"got keras=1; give 2 or 3"):
        to_keras(SMALL, variables, keras=1)
