"""`optim.fit_head`: the classifier that starts fitted to the features of the training images."""

import dataclasses
import json

import flax.traverse_util
import jax
import numpy as np
import pytest
from families import SMALLEST, small_side
from random_variables import random_variables
from test_finetune import arrays_of

import se_flax
from se_flax.errors import UserError
from se_flax.images.preprocess import Preprocess
from train.config import Checkpoint, Config, Data, Loss, Model, Optim, Parallel
from train.data.loader import eval_batches
from train.data.sources import open_data
from train.optim.linear_probe import fit
from train.run.fitted_head import IMAGES, _Part, classifier_input
from train.run.loop import run
from train.run.report import read_metrics
from train.validate import check_settings_of_run

CLASSES = 4


def clusters(count, spread, seed=0):
    """Points around a centre per class, far from the origin and of unequal scales."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLASSES, 6))
    labels = rng.integers(CLASSES, size=count)
    points = (centres[labels] + spread * rng.normal(size=(count, 6))) * [1, 10, 0.1, 1, 3, 1] + 5
    return points.astype(np.float32), labels


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_the_gradient_of_the_penalised_loss_is_zero():
    """In float64, in the standardised features, of which one is constant."""
    points, labels = clusters(300, spread=1.0)
    points = np.concatenate([points, np.full((300, 1), 7, np.float32)], axis=1)
    probe = fit(points, labels, CLASSES, penalties=(0.05,))
    std = np.where(np.arange(7) < 6, np.float64(points).std(0), 1)
    x = (np.float64(points) - np.float64(points).mean(0)) / std
    kernel = probe.kernel * std[:, None]
    bias = probe.bias + np.float64(points).mean(0) @ probe.kernel
    error = softmax(x @ kernel + bias) - np.eye(CLASSES)[labels]
    np.testing.assert_allclose(x.T @ error / 300 + 0.05 * kernel, 0, atol=3e-4)
    np.testing.assert_allclose(error.mean(0), 0, atol=3e-4)
    assert np.abs(probe.kernel).max() > 0.1 and probe.kernel.dtype == probe.bias.dtype == np.float32


@pytest.mark.parametrize(("spread", "penalty"), [(3.0, 10.0), (0.3, 0.001)])
def test_the_penalty_is_the_better_one_on_held_out_examples(spread, penalty):
    """Noise asks for a strong penalty; ten examples of clear classes in all but one for a weak one."""
    points, labels = clusters(40 if spread > 1 else 300, spread)
    if spread > 1:
        labels = np.random.default_rng(1).permutation(labels)
        labels[:30] = 2  # with a strong penalty, what is most frequent
    probe = fit(points, labels, CLASSES, penalties=(10.0, 0.001))
    assert probe.penalty == penalty
    assert probe.held_out == round(0.2 * len(points)) and 0 <= probe.right <= probe.held_out
    if spread < 1:
        assert np.mean(np.argmax(points @ probe.kernel + probe.bias, 1) == labels) == 1


@pytest.mark.parametrize("name", [name for name in SMALLEST if not name.startswith("repvit")])
def test_the_classifiers_input_gives_its_logits(name):
    model = se_flax.create_model(name, num_classes=CLASSES)
    images = np.random.default_rng(0).normal(size=(2, small_side(name), small_side(name), 3)).astype(np.float32)
    variables = random_variables(model, *images.shape)
    features = np.asarray(jax.jit(lambda v: classifier_input(model, v, images))(variables), np.float64)
    params = flax.traverse_util.flatten_dict(variables["params"])
    kernel, bias = (np.float64(params[(*model.head_path, part)]) for part in ("kernel", "bias"))
    wanted = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(features @ kernel + bias, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_a_part_of_a_source_is_spread_over_it():
    splits = open_data(Data(source="digits", image_size=8))
    part = _Part(splits.train, 5)
    whole = _Part(splits.train, IMAGES)
    assert len(part) == 5 and len(whole) == len(splits.train)
    assert [part.name(i) for i in range(5)] == [splits.train.name(i * len(splits.train) // 5) for i in range(5)]
    assert part[1]["label"] == splits.train[len(splits.train) // 5]["label"] and whole.name(7) == splits.train.name(7)


def make_config(checkpoint, **changes):
    return Config(
        model=Model(name=""),
        data=Data(source="digits", image_size=8, batch_size=48, eval_batch_size=100),
        optim=Optim(fit_head=True, schedule="constant", learning_rate=0.01, warmup_epochs=0),
        parallel=Parallel(devices=1),
        checkpoint=Checkpoint(every_steps=2),
        init_from=str(checkpoint),
        eval_every_epochs=100.0,
        compilation_cache="",
        **changes,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network with random weights whose features tell digits apart."""
    model = se_flax.create_model("seresnet20", num_classes=3)
    variables = random_variables(model, 1, 8, 8, 3)
    folder = tmp_path_factory.mktemp("checkpoint") / "saved"
    ours = Preprocess(image_size=8, crop=1.0, interpolation="bilinear", mean=(0.3, 0.4, 0.5), std=(0.3, 0.2, 0.1))
    se_flax.save_pretrained(folder, "seresnet20", variables, arguments={"num_classes": 3}, preprocess=ours)
    return folder


def test_a_run_of_no_epochs_is_the_fitted_classifier(checkpoint, tmp_path, capsys):
    config = make_config(checkpoint, epochs=0.0)
    config.optim.warmup_epochs, config.optim.train_only = 1.0, "head"
    outcome = run(config, tmp_path)
    assert outcome.completed and outcome.step == 0 and outcome.result.count == 360
    said = capsys.readouterr().err
    assert "computing the features of 1,437 training images ...\n" in said
    assert "classifier fitted to the features of 1,437 images (L2 penalty " in said

    # From the saved model, without the training program's step: the count, and a classifier that fits the features.
    saved = se_flax.load_pretrained(tmp_path / "model")
    splits = open_data(config.data)
    batches = list(eval_batches(splits, dataclasses.replace(config.data, interpolation="bilinear"), batch_size=360))
    images, labels = batches[0]["image"], batches[0]["label"]
    logits = jax.jit(saved.model.apply)(saved.variables, saved.preprocess.normalise(images))
    assert int(np.sum(np.argmax(logits, 1) == labels)) == outcome.result.top1
    assert outcome.result.top1 > 0.6 * 360

    again = run(config, tmp_path)
    assert again.result == outcome.result and again.checkpoint == outcome.checkpoint
    assert "computing" not in capsys.readouterr().err
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "eval_top1" in row]
    assert [(row["step"], row["eval_top1_count"]) for row in rows] == [(0, outcome.result.top1)]
    config.optim.weight_decay = 0.1
    with pytest.raises(UserError, match="another run"):
        run(config, tmp_path)


def test_a_resumed_run_goes_on_from_its_checkpoint_to_the_same_bits(checkpoint, tmp_path, capsys):
    config = make_config(checkpoint, steps=4)
    config.optim.ema_decay = 0.9
    run(config, tmp_path / "whole")
    run(dataclasses.replace(config, steps=2), tmp_path / "resumed")
    capsys.readouterr()
    run(config, tmp_path / "resumed")
    assert "computing the features" not in capsys.readouterr().err
    one, other = (arrays_of(tmp_path / name, 4) for name in ("whole", "resumed"))
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)
    kernel = np.asarray(one["['params']['linear']['kernel']"])
    start = np.asarray(arrays_of(tmp_path / "whole", 2)["['params']['linear']['kernel']"])
    assert np.abs(kernel - start).max() < 0.2 * np.abs(start).max()  # near where the fit left it
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["optim.fit_head"] is True


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            Config(optim=Optim(fit_head=True)),
            "got optim.fit_head=True without init_from, which would fit the classifier to features of random weights; "
            "name a checkpoint to start from, or leave it out",
        ),
        (
            Config(init_from="x", optim=Optim(fit_head=True), loss=Loss(name="arcface")),
            "got optim.fit_head=True with loss.name='arcface', whose classifier takes cosines; it fits classifiers for "
            "cross_entropy only: leave one of the two out",
        ),
        (
            Config(epochs=0.0),
            "got epochs=0.0; it must be positive, or 0 with optim.fit_head, whose classifier is then all that is "
            "trained",
        ),
        (Config(eval_every_epochs=0.0), "got eval_every_epochs=0.0; it must be positive"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(config, text):
    with pytest.raises(UserError) as error:
        check_settings_of_run(config)
    assert str(error.value) == text
