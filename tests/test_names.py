"""Which network a word means, as a file's name and as `name=`: both are read alike."""

import json

import numpy as np
import pytest

import se_flax
from se_flax import UserError, load_pretrained
from se_flax.checkpoints import names, resolve
from se_flax.checkpoints.convert import variable_shapes


@pytest.mark.parametrize(
    ("word", "network"),
    [
        ("seresnet50", "seresnet50"),
        ("SE-ResNet-50", "seresnet50"),
        ("seresnet50.ra2_in1k", "seresnet50"),
        ("efficientnet-b0", "efficientnet_b0"),
        ("efficientnetv2_b0", "tf_efficientnetv2_b0"),
        ("EfficientNetV2B0", "tf_efficientnetv2_b0"),
        ("tf_efficientnetv2_b0", "tf_efficientnetv2_b0"),
        ("EfficientNetV2-S", "efficientnetv2_s"),  # timm has this one too, under its own name
    ],
)
def test_a_word_is_read_alike_as_a_files_name_and_as_name(word, network, tmp_path):
    path = tmp_path / f"{word}.safetensors"
    assert names.meanings(word)[0] == network
    assert names.network_of(path, None) == network
    assert names.network_of(tmp_path / "x.safetensors", word) == network


@pytest.mark.parametrize("name", se_flax.list_models())
def test_every_network_is_read_by_its_own_name(name):
    assert names.our_name(name, whole=True) == names.our_name(f"{name}-8efdb4bb", whole=False) == name


def test_the_longest_name_counts_and_a_whole_one_has_nothing_behind_it():
    assert names.our_name("seresnext50_32x4d_ra-c3c1", whole=False) == "seresnext50_32x4d"
    assert names.our_name("resnet50_of_mine", whole=False) == "resnet50"
    assert names.our_name("resnet50_of_mine", whole=True) is None
    assert names.our_name("myresnet50", whole=False) is None
    for call in (names.meanings, lambda name: load_pretrained(__file__, name=name)):
        with pytest.raises(UserError, match=r"^unknown model 'resnet51'; closest: resnet"):
            call("resnet51")
    with pytest.raises(UserError, match=r"^unknown checkpoint 'seresnet50.nope'; seresnet50 has a1_in1k, .*ra2_in1k"):
        names.meanings("seresnet50.nope")


@pytest.fixture(scope="module")
def efficientnet():
    """The same variables under timm's names and Keras's: both have a network of this spelling."""
    rng = np.random.default_rng(0)
    shapes = variable_shapes(se_flax.create_model("efficientnet_b0"), 64)
    flat = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    variables = {collection: {} for collection in ("params", "batch_stats")}
    for path, value in flat.items():
        at = variables
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = value
    return {
        "efficientnet_b0": se_flax.to_timm("efficientnet_b0", variables),
        "tf_efficientnet_b0": se_flax.to_keras("tf_efficientnet_b0", variables),
    }


@pytest.mark.parametrize("network", ["efficientnet_b0", "tf_efficientnet_b0"])
def test_the_arrays_tell_two_networks_of_one_spelling_apart(network, efficientnet, tmp_path):
    """Padding and epsilon differ, names and shapes do not: taking one for the other would change every logit."""
    for file in ("efficientnet_b0.npz", "efficientnetb0.npz", "x.npz"):
        np.savez(tmp_path / file, **efficientnet[network])
    for file, name in (
        ("efficientnet_b0.npz", None),
        ("efficientnetb0.npz", None),
        ("x.npz", "efficientnet_b0"),
        ("x.npz", "EfficientNetB0"),
        ("x.npz", network),
    ):
        found = load_pretrained(tmp_path / file, name=name, preprocess=se_flax.Preprocess())
        assert found.name == network, (file, name)


def test_a_name_beside_a_description_must_be_the_same_network(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "seresnet20"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"config.json is seresnet20, not the given name=resnet20; leave that out"):
        load_pretrained(tmp_path, name="resnet20")
    with pytest.raises(UserError, match=r"is empty, no \.safetensors file"):  # the name was right
        load_pretrained(tmp_path, name="SE-ResNet-20")
    # A published checkpoint says its network as well; this is seen before anything is fetched.
    with pytest.raises(UserError, match=r"^seresnet50\.ra2_in1k is seresnet50, not the given name=resnet50; leave th"):
        load_pretrained("seresnet50.ra2_in1k", name="resnet50")


def test_a_published_checkpoint_by_any_spelling():
    assert resolve.published("SE-ResNet50.ra2_in1k") == resolve.published("seresnet50.ra2_in1k")


def test_a_revision_belongs_to_a_repository(tmp_path):
    np.savez(tmp_path / "seresnet20.npz", x=np.zeros(3))
    for path in (tmp_path, tmp_path / "seresnet20.npz"):
        with pytest.raises(UserError, match=r"got revision='v2' with .*, which is no repository; leave it out"):
            load_pretrained(path, revision="v2")
