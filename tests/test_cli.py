"""The command line of the training program: what it reads, and how it says no."""

import re
from pathlib import Path

import pytest

from se_flax.errors import UserError
from train.cli import main, parse, settings_help
from train.config import Config, flatten
from train.validate import check_settings_of_run

ROOT = Path(__file__).parents[1]
DIGITS = f"--config={ROOT}/configs/digits.py"
WORKDIR = "--workdir=unused"  # nothing here gets as far as making it


def test_overrides_replace_the_recipes_values_and_nothing_else():
    plain, _ = parse([DIGITS, WORKDIR])
    changed, workdir = parse(
        [
            DIGITS,
            "--workdir=some/where",
            "--config.optim.learning_rate=0.25",
            "--config.optim.boundaries=(1, 2.5)",
            "--config.augment.flip=true",
            "--config.model.attention.stages=(3,4)",
            "--config.steps=7",
        ]
    )
    assert workdir == "some/where"
    before, after = flatten(plain), flatten(changed)
    assert {k: v for k, v in after.items() if v != before[k]} == {
        "optim.learning_rate": 0.25,
        "optim.boundaries": [1, 2.5],
        "augment.flip": True,
        "model.attention.stages": [3, 4],
        "steps": 7,
    }


def test_flags_and_values_may_be_two_words():
    config, workdir = parse(["--config", f"{ROOT}/configs/digits.py", "--config.epochs", "3", "--workdir", "x"])
    assert (config.epochs, workdir) == (3.0, "x")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], r"--config=configs/<recipe>.py is missing; for example: python -m train"),
        ([DIGITS], r"--workdir=<directory> is missing"),
        (["--config=configs/digts.py", WORKDIR], r"no recipe 'configs/digts.py'; closest: configs/digits.py"),
        (
            [DIGITS, WORKDIR, "--config.optim.learning_rte=1"],
            r"unknown setting 'optim.learning_rte'; closest: optim.learn",
        ),
        ([DIGITS, WORKDIR, "--config.steps=many"], r"got --config.steps=many; a whole number is expected"),
        ([DIGITS, WORKDIR, "--config.optim.learning_rate=fast"], r"learning_rate=fast; a number is expected"),
        ([DIGITS, WORKDIR, "--config.profile=perhaps"], r"got --config.profile=perhaps; true or false is expected"),
        ([DIGITS, WORKDIR, "--config.data.crop_scale=wide"], r"crop_scale=wide; a tuple of numbers"),
        ([DIGITS, WORKDIR, "--worker=3"], r"unknown argument '--worker=3'; allowed: --config=, --workdir="),
        ([f"--config={ROOT}/configs/imagenet.py:modrn", WORKDIR], r"unknown recipe imagenet.py:modrn; closest: modern"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words, text, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(text, err), err
    assert err.startswith("error: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("model.name=seresnet21", r"unknown model 'seresnet21'; closest: .*seresnet20"),
        ("model.attention.kind=ecaa", r"unknown model.attention.kind 'ecaa'; closest: eca"),
        ("model.attention.placement=psot", r"unknown placement 'psot'; closest: post"),
        ("model.attention.stages=(1,)", r"1 is not a stage of blocks; allowed: 2, 3, 4"),
        ("data.source=folder:/nowhere/at/all", r"/nowhere/at/all"),
        ("data.source=digit", r"digit.*digits"),
        ("optim.name=sdg", r"sdg.*sgd"),
        ("optim.schedule=cosin", r"cosin.*cosine"),
        ("parallel.backend=pmaps", r"unknown parallel.backend 'pmaps'; closest: pmap"),
        ("parallel.batch_norm=all", r"unknown parallel.batch_norm 'all'; allowed: global, replica"),
        ("precision=float16", r"unknown precision 'float16'; closest: .*float32"),
        ("data.batch_size=0", r"data.batch_size=0; it must be at least 1"),
        ("epochs=-1", r"got epochs=-1.0; it must be positive"),
        ("model.num_classes=7", r"got model.num_classes=7, but digits has 10 classes; set it to 10, or to 0"),
        ("model.drop_rate=1.5", r"got model.drop_rate=1.5; a probability below 1 is allowed"),
        (
            "optim.accumulate=3",
            r"data.batch_size=64 does not divide into 24 equal parts \(8 devices x optim.accumulate=3",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_any_compile(setting, text, capsys, tmp_path, monkeypatch):
    import train.run.program

    monkeypatch.setattr(train.run.program, "init_state", lambda *a, **k: pytest.fail("went on to compile"))
    assert main([DIGITS, f"--workdir={tmp_path}", f"--config.{setting}", "--config.compilation_cache="]) == 2
    err = capsys.readouterr().err
    assert re.search(text, err), err
    assert err.startswith("error: ") and len(err.splitlines()) == 1


def test_attention_words_reach_the_network():
    config, _ = parse([DIGITS, WORKDIR, "--config.model.attention.kind=se", "--config.model.attention.gate=sigmod"])
    with pytest.raises(UserError, match="unknown gate 'sigmod'; closest: sigmoid"):
        check_settings_of_run(config)


def test_help_lists_every_setting_with_its_comment():
    text = settings_help()
    for name in flatten(Config()):
        assert f"--config.{name}=" in text
    line = next(x for x in text.splitlines() if "--config.optim.ema_decay=" in x)
    assert "moving average" in line


def test_help_is_printed_and_succeeds(capsys):
    assert main(["--help"]) == 0
    assert "python -m train --config=configs/digits.py" in capsys.readouterr().out


RECIPES = [
    p.stem for p in sorted((ROOT / "configs").glob("*.py")) if p.stem != "__init__" and not p.stem.startswith("ctr_")
]


@pytest.mark.parametrize("recipe", [*RECIPES, "imagenet:modern", "cifar10:seresnet110"])
def test_every_recipe_passes_validation(recipe):
    name, _, argument = recipe.partition(":")
    config, _ = parse([f"--config={ROOT}/configs/{name}.py" + (f":{argument}" if argument else ""), WORKDIR])
    check_settings_of_run(config)
    head = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    assert f"--config=configs/{name}.py" in head
