"""Torchvision's weights: names, shapes, and logits from the same weights (`tools/torchvision_reference.py`)."""

import gzip
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from parity import synthetic
from parity.compare import compiled, nhwc

import se_flax
from se_flax import UserError
from se_flax.checkpoints import torchvision
from se_flax.checkpoints.convert import variable_shapes
from se_flax.checkpoints.files import write_arrays
from se_flax.checkpoints.names import network_of

FOLDER = Path(__file__).parent / "torchvision"
FIXTURES = {path.name.removesuffix(".json.gz"): path for path in FOLDER.glob("*.json.gz")}
READ = {name: json.loads(gzip.decompress(path.read_bytes())) for name, path in FIXTURES.items()}
COMPUTED = sorted(name for name, content in READ.items() if "logits" in content)
SMALL = "mobilenetv3_small_100"


def state_dict(name):
    return synthetic.state_dict(READ[name]["entries"], READ[name]["norm_scales"])


def test_there_is_a_fixture_of_every_network():
    assert READ.keys() == torchvision.NETWORKS.keys()
    assert {name: content["network"] for name, content in READ.items()} == {
        name: theirs.name for name, theirs in torchvision.NETWORKS.items()
    }


@pytest.mark.parametrize("name", sorted(READ))
def test_names_and_shapes_are_torchvisions(name):
    layout = torchvision.layout(name)
    shapes = variable_shapes(se_flax.create_model(name), 64)
    ours = {layout.key(path): tuple(layout.shape(path, leaf.shape)) for path, leaf in shapes.items()}
    entries = READ[name]["entries"]
    assert ours == {key: tuple(shape) for key, shape in entries if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("name", COMPUTED)
def test_logits_are_torchvisions(name):
    """Also where its batch norms have another epsilon: seven networks of all kinds of blocks."""
    variables = se_flax.from_torchvision(name, state_dict(name))
    logits = compiled(se_flax.create_model(name).apply, variables, nhwc(READ[name]["input_shape"]))[:, ::5]
    expected = np.asarray(READ[name]["logits"])
    assert np.linalg.norm(expected[0] - expected[1]) > 0.02 * np.linalg.norm(expected)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_epsilon_is_in_the_variance():
    given = state_dict(SMALL)
    variables = se_flax.from_torchvision(SMALL, given)
    theirs = given["features.0.1.running_var"]
    np.testing.assert_allclose(variables["batch_stats"]["bn1"]["var"], theirs + (1e-3 - 1e-5), rtol=1e-6)
    assert {theirs.epsilon for name, theirs in torchvision.NETWORKS.items() if "regnet" in name} == {1e-5}


@pytest.mark.parametrize(("file", "wrap"), [("mobilenet_v3_small-047dcff4", ""), ("mine", "module.")])
def test_a_file_is_known_by_its_arrays(tmp_path, file, wrap):
    given = state_dict(SMALL)
    path = tmp_path / f"{file}.safetensors"
    write_arrays(path, {wrap + key: value for key, value in given.items()})
    with pytest.warns(UserWarning, match="does not say how its images are prepared"):
        loaded = se_flax.load_pretrained(path, name=None if "v3" in file else SMALL)
    assert loaded.name == SMALL and len(loaded.notes) == 1 + bool(wrap)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, se_flax.from_torchvision(SMALL, given))


def test_another_number_of_classes_and_channels():
    given = state_dict(SMALL)
    variables = se_flax.from_torchvision(SMALL, given, num_classes=7, in_channels=1)
    assert variables["params"]["classifier"]["kernel"].shape == (1024, 7)
    stem = given["features.0.0.weight"].sum(1, keepdims=True).transpose(2, 3, 1, 0)
    np.testing.assert_allclose(variables["params"]["conv_stem"]["kernel"], stem, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("word", "network"),
    [
        ("mobilenet_v3_large", "mobilenetv3_large_100"),
        ("regnet_y_800mf", "regnety_008_tv"),
        ("regnet_y_1_6gf-b11a554e", "regnety_016"),
        ("efficientnet_v2_s-dd5fe13b", "efficientnetv2_s"),
    ],
)
def test_files_are_known_by_torchvisions_names(word, network):
    assert network_of(Path(f"{word}.pth"), None) == network


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: se_flax.from_torchvision("seresnet50", {}),
            "seresnet50 has no counterpart in torchvision; ",
        ),
        (
            lambda: se_flax.from_torchvision(SMALL, {"features.0.0.weight": np.zeros((16, 3, 3, 3), np.float32)}),
            "the torchvision state dict does not fit mobilenetv3_small_100; missing: features.1.b",
        ),
    ],
)
def test_what_is_not_torchvisions_is_one_sentence(call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call()
