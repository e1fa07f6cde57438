"""Every network with reference numbers held against timm's.

Names, shapes, counts and the way back bit for bit; logits and features; and for networks under 30 M parameters loss,
gradients and batch statistics of one training step (SE_FLAX_ALL_STEPS=1 runs all 85 of these). The same comparisons are
written into docs/parity.md by `python -m benchmarks.parity`.
"""

import collections
import os

import pytest
from parity import compare

import se_flax

FIXTURES = sorted(path.name.removesuffix(".json.gz") for path in (compare.HERE / "fixtures").glob("*.json.gz"))
STEPS = [name for name in FIXTURES if "train" in compare.fixture(name)]
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
    assert families == {"senet": 9, "resnet": 32, "efficientnet": 62, "mobilenetv3": 20}
    assert len(STEPS) == 85
    assert set(FIXTURES) <= set(se_flax.list_models())


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_and_features_are_timms(name):
    compare.check_evaluation(name, compare.check_names_and_count(name))


@pytest.mark.parametrize("name", [name for name in STEPS if name in CHOSEN or "SE_FLAX_ALL_STEPS" in os.environ])
def test_a_training_step_is_timms(name, monkeypatch):
    compare.check_training_step(name, monkeypatch)
