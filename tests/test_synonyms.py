"""Words of other libraries and programs: advice by what they mean, where letters would mislead."""

import dataclasses
import re
from pathlib import Path

import pytest

import se_flax
import train.synonyms
from se_flax import UserError, load_pretrained, synonyms, zoo
from se_flax.checkpoints import hub
from se_flax.errors import closest
from train.cli import main, parse
from train.config import Config, flatten
from train.ctr.config import Config as TableConfig
from train.synonyms import known

ROOT = Path(__file__).parents[1]
DIGITS, WORKDIR = f"--config={ROOT}/configs/digits.py", "--workdir=unused"
SETTINGS, TABLE_SETTINGS = flatten(Config()), flatten(dataclasses.asdict(TableConfig()))
SMALLEST = [min(family.VARIANTS, key=lambda name, f=family: f.VARIANTS[name].num_params) for family in zoo.FAMILIES]


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ("optim.lr", "optim.learning_rate"),  # by letters: optim.b2
        ("lr", "optim.learning_rate"),
        ("wd", "optim.weight_decay"),
        ("bs", "data.batch_size"),
        ("batch_size", "data.batch_size"),
        ("batch-size", "data.batch_size"),
        ("optim.epochs", "epochs"),
        ("train.num_epochs", "epochs"),
        ("num_classes", "model.num_classes"),
        ("pretrained", "init_from"),
        ("model.pretrained", "init_from"),
        ("model", "model.name"),
        ("drop_path", "model.drop_path_rate"),
        ("amp", "precision"),
        ("data.num_workers", "data.workers"),
    ],
)
def test_a_setting_by_another_programs_word(given, setting, capsys):
    assert main([DIGITS, WORKDIR, f"--config.{given}=1"]) == 2
    text = f"error: unknown setting '{given}'; here it is {setting} (python -m train --help lists all)\n"
    assert capsys.readouterr().err == text


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("--lr=0.1", "unknown argument '--lr=0.1'; here it is --config.optim.learning_rate"),
        ("--batch-size=64", "unknown argument '--batch-size=64'; here it is --config.data.batch_size"),
        ("--seed=1", "unknown argument '--seed=1'; here it is --config.seed"),
        ("--output_dir=x", "unknown argument '--output_dir=x'; --workdir=DIR is where a run leaves everything"),
        ("--config.in_chans=1", "unknown setting 'in_chans'; the training program reads colour images"),
        (
            "--config.resume=true",
            "unknown setting 'resume'; --workdir=DIR is where a run leaves everything, and",
        ),
        ("--config.optim.learning_rte=1", "unknown setting 'optim.learning_rte'; closest: optim.learning_rate"),
        ("--config.name=x", "unknown setting 'name'; here it is model.name or optim.name or loss.name"),
    ],
)
def test_flags_sentences_and_letters(word, text):
    with pytest.raises(UserError, match=f"^{re.escape(text)}"):
        parse([DIGITS, WORKDIR, word])


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("--config.wd=1", "unknown setting 'wd'; here it is optim.l2 (python -m train.ctr --help lists all)"),
        ("--config.dropout=0.1", "unknown setting 'dropout'; here it is model.dropout"),
        ("--config.early_stopping=3", "unknown setting 'early_stopping'; here it is optim.patience"),
        ("--dataset=x", "unknown argument '--dataset=x'; here it is --config.data.train"),
        ("--config.in_chan=1", "unknown setting 'in_chan'; allowed: "),
    ],
)
def test_recipes_for_tables_have_settings_of_their_own(word, text):
    with pytest.raises(UserError, match=f"^{re.escape(text)}"):
        parse([f"--config={ROOT}/configs/ctr_frappe.py", WORKDIR, word])


def test_every_word_leads_to_settings_that_there_are():
    for word, meaning in train.synonyms._MEANINGS.items():
        assert isinstance(meaning, str) or set(meaning) <= SETTINGS.keys() | TABLE_SETTINGS.keys(), word
        assert known(word, SETTINGS) or known(word, TABLE_SETTINGS), word


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"in_chans": 1}, "resnet20 has no attribute 'in_chans'; here it is in_channels"),
        ({"classes": 3}, "resnet20 has no attribute 'classes'; here it is num_classes"),
        ({"drop": 0.1}, "resnet20 has no attribute 'drop'; here it is drop_rate"),
        ({"norm_layer": None}, "resnet20 has no attribute 'norm_layer'; here it is norm"),
        ({"pretrained": True}, "'pretrained'; trained weights come from se_flax.load_pretrained(NAME), without this"),
        (
            {"features_only": True},
            "'features_only'; num_classes=0 gives the pooled features, model.apply(..., return",
        ),
        ({"img_size": 64}, "'img_size'; a network takes images of any size, so leave it out"),
        ({"rd_ratio": 0.25}, "'rd_ratio'; give attention=functools.partial(se_flax.SqueezeExcite, reduction=16)"),
        ({"num_clases": 3}, "resnet20 has no attribute 'num_clases'; closest: num_classes"),
    ],
)
def test_an_argument_by_another_librarys_word(given, text):
    with pytest.raises(UserError, match=re.escape(text)):
        se_flax.create_model("resnet20", **given)
    with pytest.raises(UserError, match=re.escape(text)):
        se_flax.from_timm("resnet20", {}, **given)


def test_load_pretrained_says_it_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda *a, **k: pytest.fail("went to the hub"))
    text = "^load_pretrained has no argument 'pretrained'; trained weights come from .*, without this word$"
    with pytest.raises(UserError, match=text):
        load_pretrained("seresnet50.ra2_in1k", pretrained=True)
    with pytest.raises(UserError, match=r"^load_pretrained has no argument 'in_chans'; here it is in_channels$"):
        load_pretrained("seresnet50.ra2_in1k", in_chans=1)


def test_no_word_is_an_attribute_and_every_answer_is_one():
    attributes = {f.name for name in SMALLEST for f in dataclasses.fields(se_flax.create_model(name))}
    assert not attributes & synonyms.NETWORK.keys()
    assert {meaning for meaning in synonyms.NETWORK.values() if " " not in meaning} <= attributes


def test_letters_alone_would_mislead():
    by_letters = closest("optim.lr", SETTINGS)
    assert by_letters.startswith("closest: ") and "learning_rate" not in by_letters
