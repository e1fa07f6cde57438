"""Every network with reference numbers held against timm's.

Names, shapes, counts and the way back bit for bit; logits and features; and for networks under 30 M parameters loss,
gradients and batch statistics of one training step. The deepest networks take minutes to compile and differ from others
in their depth alone: of these the names, shapes and counts, and of the training steps one of each kind, unless
SE_FLAX_ALL=1 asks for everything. `python -m benchmarks.parity` writes the same comparisons of all of them into
docs/parity.md.
"""

import collections
import os

import pytest
from parity import compare

import se_flax
from se_flax.backbones import efficientnet, mnasnet, mobilenetv3, resnest, senet, sknet

FIXTURES, SPECS = (
    sorted(path.name.removesuffix(".json.gz") for path in (compare.HERE / folder).glob("*.json.gz"))
    for folder in ("fixtures", "specs")
)
ALL = "SE_FLAX_ALL" in os.environ
STEPS = [name for name in FIXTURES if "train" in compare.fixture(name)]
LARGE = 30_000_000
# Large, and of a kind of which there is no smaller one.
ONE_OF_A_KIND = {"inception_resnet_v2", "legacy_senet154", "tf_efficientnet_cc_b1_8e"}
COMPUTED = [name for name in FIXTURES if ALL or name in ONE_OF_A_KIND or compare.fixture(name)["num_params"] <= LARGE]
# A training step takes ten times as long as an evaluation: one of each kind of network here, all of them on request
# (and in docs/parity.md).
CHOSEN = {
    "ecaresnet26t",
    "efficientnet_b0_g8_gn",
    "hardcorenas_a",
    "lcnet_035",
    "legacy_seresnet18",
    "mobilenetv3_large_100",
    "mobilenetv3_small_050",
    "regnety_002",
    "seresnet50",
    "skresnet18",
    "test_efficientnet",
    "test_efficientnet_evos",
    "test_efficientnet_gn",
    "tf_efficientnetv2_b0",
    "tf_mixnet_s",
    "tinynet_e",
}


def test_there_are_fixtures_of_every_family():
    families = collections.Counter(compare.fixture(name)["family"] for name in FIXTURES)
    with_attention = {"senet": 9, "resnet": 32, "efficientnet": 62, "mobilenetv3": 20, "regnet": 11}
    assert families == with_attention | {"inception_v3": 1, "inception_resnet_v2": 1}
    assert len(STEPS) == 92
    assert set(FIXTURES) <= set(se_flax.list_models())


def test_every_network_of_timms_families_has_a_reference():
    families = efficientnet, mnasnet, mobilenetv3, resnest, senet, sknet
    networks = {name for family in families for name in family.VARIANTS if "minimal" not in name}  # Keras's alone
    assert networks <= {*FIXTURES, *SPECS}


@pytest.mark.parametrize("name", sorted({*FIXTURES, *SPECS}))
def test_the_number_of_parameters_is_timms(name):
    """The number that the zoo gives, which test_zoo.py counts."""
    assert compare.fixture(name)["num_params"] == se_flax.get_variant(name).num_params


@pytest.mark.parametrize("name", sorted({*FIXTURES, *SPECS} - set(COMPUTED)))
def test_names_and_shapes_are_timms(name):
    compare.check_layout(name)


@pytest.mark.parametrize("name", COMPUTED)
def test_logits_and_features_are_timms(name):
    compare.check_evaluation(name, compare.check_names(name))


@pytest.mark.parametrize("name", [name for name in STEPS if ALL or name in CHOSEN])
def test_a_training_step_is_timms(name, monkeypatch):
    compare.check_training_step(name, monkeypatch)
