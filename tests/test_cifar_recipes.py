"""Recipes of the squeeze-and-excitation paper's CIFAR and Places365 networks: the settings that their papers give."""

from pathlib import Path

import pytest

import se_flax
from train.cli import parse
from train.validate import check_settings_of_run

ROOT = Path(__file__).parents[1]


def recipe(text):
    name, _, argument = text.partition(":")
    words = [f"--config={ROOT}/configs/{name}.py" + (f":{argument}" if argument else ""), "--workdir=unused"]
    config, _ = parse(words)
    check_settings_of_run(config)
    return config


def schedule(config):
    o = config.optim
    return o.schedule, o.learning_rate, o.boundaries, o.decay_factor, o.weight_decay, o.warmup_epochs


@pytest.mark.parametrize(
    ("text", "expected", "epochs", "batch", "cutout"),
    [
        ("cifar10:seresnet110", ("step", 0.1, (82, 123), 0.1, 1e-4, 0), 164, 128, 0),
        ("cifar100:seresnet110", ("step", 0.1, (82, 123), 0.1, 1e-4, 1), 164, 128, 0),
        # Zagoruyko & Komodakis 2016, section 3.
        ("cifar10:wrn16_8", ("step", 0.1, (60, 120, 160), 0.2, 5e-4, 0), 200, 128, 0),
        ("cifar100:se_wrn16_8", ("step", 0.1, (60, 120, 160), 0.2, 5e-4, 0), 200, 128, 0),
        # Gastaldi 2017, sections 2.1 and 2.3, and its code; DeVries & Taylor 2017, section 4.2 for Cutout.
        ("cifar10:se_shake_shake26_2x96d", ("cosine", 0.2, (), 0.1, 1e-4, 0), 1800, 128, 16),
        ("cifar100:se_shake_even29_2x4x64d", ("cosine", 0.025, (), 0.1, 5e-4, 0), 1800, 32, 8),
    ],
)
def test_a_cifar_network_brings_its_papers_schedule(text, expected, epochs, batch, cutout):
    config = recipe(text)
    assert schedule(config) == expected
    assert (config.epochs, config.data.batch_size, config.augment.cutout) == (epochs, batch, cutout)
    assert (config.optim.name, config.optim.momentum, config.optim.nesterov) == ("sgd", 0.9, True)
    assert (config.augment.flip, config.augment.pad, config.data.image_size) == (True, 4, 32)
    assert config.model.name == text.partition(":")[2]
    assert config.data.source == f"tfds:{text.partition(':')[0]}"


def test_places365_trains_the_papers_network():
    config = recipe("places365")
    assert config.data.source == "tfds:places365_small"
    model = se_flax.create_model(config.model.name)
    assert model.depths == (3, 8, 36, 3) and model.attention is se_flax.SqueezeExcite and model.stride_first
