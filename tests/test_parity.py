"""Every network with reference numbers held against timm's.

Names, shapes, counts and the way back bit for bit; logits and features; and for networks under 30 M parameters loss,
gradients and batch statistics of one training step. `python -m benchmarks.parity` writes the same comparisons into
docs/parity.md.
"""

import collections

import pytest
from parity import compare

import se_flax

FIXTURES = sorted(path.name.removesuffix(".json.gz") for path in (compare.HERE / "fixtures").glob("*.json.gz"))
STEPS = [name for name in FIXTURES if "train" in compare.fixture(name)]
# Float64 takes minutes for all 44 networks that need it; these are one of each kind, the table has the others.
DOUBLE = {
    "ecaresnet26t",
    "ecaresnext26t_32x4d",
    "fbnetv3_b",
    "hardcorenas_a",
    "legacy_seresnet18",
    "legacy_seresnet50",
    "mobilenetv3_small_050",
    "resnest26d",
    "semnasnet_050",
    "seresnet50",
    "seresnext26d_32x4d",
    "skresnet18",
}


def test_there_are_fixtures_of_every_family():
    families = collections.Counter(compare.fixture(name)["family"] for name in FIXTURES)
    assert families == {"senet": 9, "resnet": 32, "efficientnet": 62, "mobilenetv3": 20}
    assert len(STEPS) == 85
    assert set(FIXTURES) <= set(se_flax.list_models())


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_and_features_are_timms(name):
    compare.check_evaluation(name, compare.check_names_and_count(name))


@pytest.mark.parametrize("name", [name for name in STEPS if name in DOUBLE or not compare.double_reference(name)])
def test_a_training_step_is_timms(name, monkeypatch):
    compare.check_training_step(name, monkeypatch)
