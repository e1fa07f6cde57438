"""Every network with reference numbers held against timm's.

Counts for all (and names and shapes, in test_zoo.py); the way back bit for bit, logits and features for one network of
each kind, the smallest; and for some of these loss, gradients and batch statistics of one training step. What is left
out differs from them in widths and depths alone, and is compared as well with SE_FLAX_ALL=1, as in `make parity`, which
also writes docs/parity.md.
"""

import collections
import os

import pytest
from parity import compare

import se_flax
from se_flax import backbones

FIXTURES, SPECS = compare.FIXTURES, compare.SPECS
ALL = "SE_FLAX_ALL" in os.environ
STEPS = [name for name in FIXTURES if "train" in compare.fixture(name)]
KINDS = {
    "dm_nfnet_f0",
    "nf_regnet_b0",
    "nf_seresnet26",
    "test_nfnet",
    "ecaresnet26t",
    "ecaresnet50d_pruned",
    "ecaresnext26t_32x4d",
    "efficientnet_b0",
    "efficientnet_b0_g8_gn",
    "efficientnet_b2_pruned",
    "efficientnet_blur_b0",
    "efficientnet_cc_b0_4e",
    "efficientnet_x_b3",
    "efficientnetv2_rw_t",
    "ese_vovnet19b_slim",
    "ese_vovnet19b_slim_dw",
    "ese_vovnet39b_evos",
    "fbnetv3_b",
    "gc_efficientnetv2_rw_t",
    "ghostnet_050",
    "ghostnetv2_100",
    "ghostnetv3_050",
    "hardcorenas_a",
    "inception_resnet_v2",
    "inception_v3",
    "lcnet_035",
    "lcnetv2_small",
    "legacy_senet154",
    "legacy_seresnet18",
    "legacy_seresnext26_32x4d",
    "mixnet_s",
    "mobilenetv3_large_100",
    "mobilenetv3_large_150d",
    "mobilenetv3_rw",
    "mobilenetv3_small_050",
    "regnetv_040",
    "regnety_002",
    "regnety_008_tv",
    "regnetz_040_h",
    "repghostnet_080",
    "repvit_m1",
    "repvit_m1_1",
    "resnest26d",
    "rexnet_100",
    "semnasnet_050",
    "seresnet34",
    "seresnet50",
    "seresnext26d_32x4d",
    "skresnet18",
    "test_efficientnet",
    "test_efficientnet_evos",
    "test_efficientnet_gn",
    "tf_efficientnet_b0",
    "tf_efficientnetv2_b0",
    "tf_mixnet_s",
    "tf_mobilenetv3_small_075",
    "tinynet_e",
    "tresnet_m",
}
COMPUTED = [name for name in FIXTURES if ALL or name in KINDS]
# A training step takes up to ten times as long as an evaluation.
CHOSEN = {
    "test_nfnet",
    "ecaresnet26t",
    "ese_vovnet19b_slim_dw",
    "ghostnet_050",
    "hardcorenas_a",
    "lcnet_035",
    "lcnetv2_small",
    "legacy_seresnet18",
    "mobilenetv3_large_100",
    "mobilenetv3_small_050",
    "regnety_002",
    "repvit_m1",
    "rexnet_100",
    "seresnet50",
    "skresnet18",
    "test_efficientnet",
    "test_efficientnet_evos",
    "test_efficientnet_gn",
    "tf_efficientnetv2_b0",
    "tinynet_e",
}


def test_there_are_fixtures_of_every_family():
    families = collections.Counter(compare.fixture(name)["family"] for name in FIXTURES)
    with_attention = {"senet": 9, "resnet": 32, "efficientnet": 62, "mobilenetv3": 20, "regnet": 14}
    residual = {"vovnet": 7, "tresnet": 4, "nfnet": 21}
    mobile = {"rexnet": 8, "ghostnet": 7, "repghost": 6, "repvit": 4, "lcnetv2": 3}
    assert families == with_attention | residual | mobile | {"inception_v3": 1, "inception_resnet_v2": 1}
    assert len(STEPS) == 132
    assert set(FIXTURES) >= KINDS >= CHOSEN <= set(STEPS)
    assert set(FIXTURES) <= set(se_flax.list_models())


def test_every_network_of_timms_families_has_a_reference():
    families = "efficientnet ghostnet lcnetv2 mnasnet mobilenetv3 regnet repghost repvit resnest rexnet senet sknet"
    families += " nfnet tresnet vovnet"
    tables = (getattr(backbones, family).VARIANTS for family in families.split())
    networks = {name for table in tables for name in table if "minimal" not in name}  # Keras's alone
    assert networks <= {*FIXTURES, *SPECS}


@pytest.mark.parametrize("name", sorted({*FIXTURES, *SPECS}))
def test_the_number_of_parameters_is_timms(name):
    """The number that the zoo gives, which test_zoo.py counts."""
    assert compare.fixture(name)["num_params"] == se_flax.get_variant(name).num_params


@pytest.mark.parametrize("name", COMPUTED)
def test_logits_and_features_are_timms(name):
    compare.check_evaluation(name, compare.check_names(name))


@pytest.mark.parametrize("name", [name for name in STEPS if ALL or name in CHOSEN])
def test_a_training_step_is_timms(name, monkeypatch):
    compare.check_training_step(name, monkeypatch)
