"""Fine-tuning: where a run starts from, and the settings of it."""

import dataclasses
import json
import types
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import se_flax
import train.run.loop
from se_flax.errors import UserError
from se_flax.images.preprocess import Preprocess
from se_flax.nn.norm import GroupNorm
from train.build import build_model
from train.cli import load_recipe, parse
from train.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Attention,
    Checkpoint,
    Config,
    Data,
    Model,
    Optim,
    Parallel,
    check_same_run,
    flatten,
)
from train.optim import finetune, optimizers
from train.optim.param_groups import trace
from train.run.loop import run
from train.validate import check_settings_of_run, check_start

ROOT = Path(__file__).parents[1]

# --- Networks ---------------------------------------------------------------------------------------------------------


def test_a_network_keeps_its_own_norm_in_training():
    """A checkpoint from TensorFlow has another epsilon, and some networks have no batch norm at all."""
    config = Config(model=Model(name="tf_efficientnet_b0"), parallel=Parallel(batch_norm="global"))
    norm = build_model(config, 5).norm
    assert norm.func is se_flax.BatchNorm and norm.keywords == {"epsilon": 1e-3, "axis_name": "replica"}
    config.model.name = "efficientnet_b0_gn"
    norm = build_model(config, 5).norm
    assert norm.func is GroupNorm and "axis_name" not in norm.keywords


# --- Where a run starts from ------------------------------------------------------------------------------------------

OURS = Preprocess(image_size=8, crop=1.0, interpolation="bicubic", mean=(0.3, 0.4, 0.5), std=(0.3, 0.2, 0.1))


def a_checkpoint(name="seresnet20", preprocess=OURS, notes=(), variables=None, **attributes):
    """What `se_flax.load_pretrained` gives."""
    model = se_flax.create_model(name, num_classes=10, **attributes)
    return types.SimpleNamespace(
        name=name, model=model, variables=variables or drawn(model), preprocess=preprocess, notes=notes, labels=None
    )


def drawn(model, seed=2):
    """Weights under which logits differ from image to image, without compiling an initialiser."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        return np.float32(rng.normal(size=leaf.shape) / np.sqrt(max(np.prod(leaf.shape[:-1]), 1)))

    return jax.tree_util.tree_map_with_path(draw, trace(model, 8))


@pytest.fixture
def small(monkeypatch):
    """Three blocks in place of nine: a whole run compiles in a third of the time."""
    original = se_flax.create_model
    monkeypatch.setattr(se_flax, "create_model", lambda name, **attributes: original(name, depth=1, **attributes))
    # The folder at a run's end is checked against the network of that name, which has three times as many blocks.
    monkeypatch.setattr(train.run.loop, "save_model", lambda *arguments: None)


@pytest.fixture
def serve(monkeypatch):
    """Makes `load_pretrained` give one checkpoint, and notes what it was asked for."""
    asked = []

    def use(loaded):
        def load_pretrained(ref, **options):
            asked.append((ref, options))
            return loaded

        monkeypatch.setattr(se_flax, "load_pretrained", load_pretrained, raising=False)
        return asked

    return use


def make_config(**optim_settings):
    return Config(
        model=Model(name=""),
        data=Data(source="digits", image_size=8, batch_size=48, eval_batch_size=90),
        optim=Optim(schedule="constant", **optim_settings),
        parallel=Parallel(devices=1),
        checkpoint=Checkpoint(every_steps=2),
        init_from="mine",
        steps=4,
        eval_every_epochs=100.0,
        log_every_steps=2,
        compilation_cache="",
    )


def test_what_is_left_empty_comes_from_the_checkpoint():
    loaded = a_checkpoint(variables={})
    config = finetune.complete(make_config(), None, loaded)
    assert config.model.name == "seresnet20"
    assert (config.data.mean, config.data.std, config.data.interpolation) == (OURS.mean, OURS.std, "bicubic")
    assert config.data.image_size == 8 and make_config().data.mean == ()

    given = make_config()
    given.model.name, given.data.mean, given.data.interpolation = "seresnet20", (0.1, 0.2, 0.3), "bilinear"
    config = finetune.complete(given, None, loaded)
    assert (config.data.mean, config.data.std, config.data.interpolation) == ((0.1, 0.2, 0.3), OURS.std, "bilinear")


def test_without_a_checkpoint_it_is_imagenets_mean_and_std():
    config = finetune.complete(Config(), None, None)
    assert (config.model.name, config.data.mean, config.data.std) == ("seresnet18", IMAGENET_MEAN, IMAGENET_STD)
    assert config.data.interpolation == "bilinear"


def test_the_range_of_the_checkpoints_images_is_brought_to_ours():
    """(255 x - m) / s is (x - m / 255) / (s / 255)."""
    bytes_ = dataclasses.replace(OURS, mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 2.0), input_max=255.0)
    config = finetune.complete(make_config(), None, a_checkpoint(preprocess=bytes_, variables={}))
    image = np.array([12, 130, 255])
    np.testing.assert_allclose(
        (image / 255 - np.array(config.data.mean)) / np.array(config.data.std), bytes_.normalise(image), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("preprocess", "text"),
    [
        (dataclasses.replace(OURS, color_order="bgr"), "init_from=mine takes images with 3 channels in the order bgr"),
        (OURS.for_channels(1), "takes images with 1 channels .* RGB only; start from another checkpoint"),
    ],
)
def test_images_that_the_training_step_does_not_have_are_refused(preprocess, text):
    with pytest.raises(UserError, match=text):
        finetune.complete(make_config(), None, a_checkpoint(preprocess=preprocess, variables={}))


def test_the_checkpoint_is_asked_for_what_the_settings_say(serve):
    asked = serve(a_checkpoint(variables={}))
    config = make_config()
    config.model.name, config.model.attention = "seresnet20", Attention(kind="eca", stages=(3,), placement="pre")
    finetune.load(config, 7)
    ((ref, options),) = asked
    assert ref == "mine" and options["name"] == "seresnet20" and options["num_classes"] == 7
    assert options["attention"].func is se_flax.ECA and options["stages"] == (3,) and options["placement"] == "pre"


def test_another_network_than_the_named_one_is_refused(serve):
    serve(a_checkpoint(variables={}))
    config = make_config()
    config.model.name = "resnet20"
    text = r"init_from=mine holds seresnet20, but model.name is 'resnet20'; leave it empty \(--config.model.name=\)"
    with pytest.raises(UserError, match=text):
        finetune.load(config, 10)


def test_a_checkpoint_that_cannot_be_read_names_the_setting(monkeypatch):
    def load_pretrained(ref, **options):
        raise UserError("no such file")

    monkeypatch.setattr(se_flax, "load_pretrained", load_pretrained, raising=False)
    with pytest.raises(UserError, match=r"^init_from=mine: no such file$"):
        finetune.load(make_config(), 10)


def test_a_checkpoint_of_the_same_network_with_other_attributes_is_refused():
    config = make_config()
    config.model.name = "seresnet20"
    model = build_model(config, 10)
    finetune.check_fit(config, model, a_checkpoint())  # the norm's axis, dtype and dropout may differ
    with pytest.raises(UserError, match=r"mine has a network with placement=pre, this run standard; set model\.att"):
        finetune.check_fit(config, model, a_checkpoint(placement="pre", variables={}))
    with pytest.raises(UserError, match=r"with attention=SqueezeExcite\(gate=tanh\), this run SqueezeExcite\(\);"):
        attention = partial(se_flax.SqueezeExcite, gate="tanh")
        finetune.check_fit(config, model, a_checkpoint(attention=attention, variables={}))
    other = drawn(se_flax.create_model("seresnet20", attention=None))
    with pytest.raises(UserError, match=r"mine does not fit seresnet20: .* params/layer1_0/se/.*\(36 in all\); set"):
        finetune.check_fit(config, model, a_checkpoint(variables=other))


def digits_result(variables, preprocess):
    """Correct answers and loss on the held-out digits, without the training program's step."""
    from train.data.loader import BadImages, eval_batches
    from train.data.sources import open_data

    data = dataclasses.replace(make_config().data, interpolation=preprocess.interpolation)
    splits = open_data(data)
    batches = list(eval_batches(splits, data, batch_size=360, bad=BadImages(splits, data)))
    images = np.concatenate([b["image"][b["mask"]] for b in batches])
    labels = np.concatenate([b["label"][b["mask"]] for b in batches])
    model = se_flax.create_model("seresnet20", num_classes=10)
    logits = np.float64(jax.jit(model.apply)(variables, preprocess.normalise(images)))
    loss = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return int(np.sum(logits.argmax(1) == labels)), float(np.mean(loss - logits[np.arange(len(labels)), labels]))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_run_starts_from_the_loaded_weights(small, tmp_path, capsys, ema_decay):
    """At rate zero with a frozen backbone, the evaluation of the run is that of the checkpoint."""
    arguments = {"num_classes": 7, "depth": 1}
    variables = drawn(se_flax.create_model("seresnet20", num_classes=7))
    saved = tmp_path / "saved"
    se_flax.save_pretrained(saved, "seresnet20", variables, arguments=arguments, preprocess=OURS)
    loaded = se_flax.load_pretrained(saved, num_classes=10)
    assert "the classifier was initialised anew for 10 classes" in loaded.notes[0]
    config = make_config(train_only="head", learning_rate=0.0, ema_decay=ema_decay)
    config.steps, config.init_from = 1, str(saved)
    result = run(config, tmp_path / "run").result
    correct, loss = digits_result(loaded.variables, OURS)
    assert (result.top1, result.count) == (correct, 360)
    assert result.loss == pytest.approx(loss, rel=1e-4)
    said = capsys.readouterr().err
    for line in (
        f"starting from {saved} (seresnet20)",
        *loaded.notes,
        "images: mean (0.3, 0.4, 0.5), std (0.3, 0.2, 0.1), bicubic",
        f"training 650 of the {sum(x.size for x in jax.tree.leaves(loaded.variables['params'])):,} parameters",
    ):
        assert line in said.splitlines()
    assert loaded.notes and "in the checkpoint" not in said
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["model.name"], written["data.mean"]) == ("seresnet20", [0.3, 0.4, 0.5])


def test_what_differs_from_the_checkpoints_images_is_said():
    config = make_config()
    config.data.std, config.data.image_size = (0.3, 0.2, 0.15), 16
    loaded = a_checkpoint(variables={}, preprocess=dataclasses.replace(OURS, exif_orientation=False))
    assert list(finetune.describe(finetune.complete(config, None, loaded), loaded)) == [
        "starting from mine (seresnet20)",
        "images: mean (0.3, 0.4, 0.5), std (0.3, 0.2, 0.15), bicubic",
        "data.std is (0.3, 0.2, 0.15) here and (0.3, 0.2, 0.1) in the checkpoint",
        "data.image_size is 16 here and 8 in the checkpoint",
        "data.exif_orientation is True here and False in the checkpoint",
    ]


def test_a_classifier_of_as_many_other_classes_is_said():
    loaded = a_checkpoint(variables={})
    loaded.labels = ("cafe\N{COMBINING ACUTE ACCENT}", "dog")
    assert list(finetune.describe_classes(loaded, ["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "dog"])) == []
    (line,) = finetune.describe_classes(loaded, ["dog", "tea"])
    assert (
        "as it has 2 classes too, but others: class 0 is 'caf\N{LATIN SMALL LETTER E WITH ACUTE}' there and 'dog'"
        in line
    )
    loaded.labels = None
    assert list(finetune.describe_classes(loaded, ["dog", "tea"])) == []


def arrays_of(workdir, step):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(Path(workdir) / "checkpoints" / str(step) / "state")
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}


def test_a_resumed_run_does_not_load_again_and_ends_at_the_same_bits(small, serve, tmp_path, monkeypatch):
    serve(a_checkpoint())
    settings = {"name": "adamw", "learning_rate": 0.01, "ema_decay": 0.9, "train_only": "head"}
    run(make_config(**settings), tmp_path / "whole")
    config = make_config(**settings)
    config.steps = 2
    run(config, tmp_path / "resumed")
    monkeypatch.setattr(se_flax, "load_pretrained", lambda *a, **k: pytest.fail("read again"), raising=False)
    config.steps = 4
    run(config, tmp_path / "resumed")
    one, other = (arrays_of(tmp_path / name, 4) for name in ("whole", "resumed"))
    assert one.keys() == other.keys() and any("opt_state" in path for path in one)
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)

    config.init_from = "another"
    with pytest.raises(UserError, match=r"another run \(init_from='mine' there and 'another' here\)"):
        run(config, tmp_path / "resumed")


def test_a_checkpoint_from_before_a_setting_existed_is_still_the_same_run():
    saved = flatten(Config())
    del saved["init_from"], saved["optim.layer_decay"]
    check_same_run(saved, Config(), "somewhere")
    with pytest.raises(UserError, match=r"optim.layer_decay=1.0 there and 0.8 here"):
        check_same_run(saved, Config(optim=Optim(layer_decay=0.8)), "somewhere")


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"train_only": "haed"}, r"optim\.train_only is 'haed'; it must be 'head', or empty to train every parameter"),
        ({"layer_decay": 0.0}, r"optim\.layer_decay is 0\.0; it must be above 0 and at most 1 \(0\.8 is usual"),
        ({"layer_decay": 1.1}, r"optim\.layer_decay is 1\.1; it must be above 0 and at most 1"),
        ({"backbone_multiplier": 0.0}, r"optim\.backbone_multiplier is 0\.0; .* optim\.train_only='head' freezes the"),
        (
            {"train_only": "head", "layer_decay": 0.8},
            r"optim\.train_only is 'head' and optim\.layer_decay is 0\.8, which slows .*; leave one of the two out",
        ),
    ],
)
def test_settings_out_of_range_are_one_sentence(change, text):
    with pytest.raises(UserError, match=text) as error:
        optimizers.check(Optim(**change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (Config(optim=Optim(train_only="head")), r"got optim.train_only='head' without init_from, .* random weights"),
        (Config(optim=Optim(freeze_batch_norm=True)), r"got optim.freeze_batch_norm=True without init_from"),
        (Config(data=Data(mean=(0.5,))), r"got data.mean=\(0.5,\); three numbers"),
        (Config(data=Data(std=(0.5, 0.5, 0.0))), r"got data.std=.*std positive"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(changes, text):
    with pytest.raises(UserError, match=text):
        check_settings_of_run(changes)


def test_the_command_line_can_leave_to_the_checkpoint_what_a_recipe_names():
    cifar = f"--config={ROOT}/configs/cifar10.py"
    words = ["--config.init_from=mine", "--config.model.name=", "--config.data.mean=()", "--config.data.interpolation="]
    config, _ = parse([cifar, "--workdir=x", *words])
    loaded = a_checkpoint(variables={})
    config = finetune.complete(config, None, loaded)
    assert config.model.name == "seresnet20" and config.data.interpolation == "bicubic"
    assert config.data.mean == OURS.mean and config.data.std != OURS.std


def test_the_recipe_for_fine_tuning_wants_a_checkpoint(tmp_path, capsys):
    """Without one it would train another network from random weights, at a rate that is made for trained ones."""
    from train.cli import main

    words = [f"--config={ROOT}/configs/folder.py:finetune", f"--workdir={tmp_path / 'run'}"]
    assert main([*words, f"--config.data.source=folder:{tmp_path}", "--config.compilation_cache="]) == 2
    text = "error: this recipe goes on from a checkpoint, and none is named; give one, such as --config.init_from="
    assert capsys.readouterr().err.startswith(text)
    assert not (tmp_path / "run").exists()
    config, _ = parse([*words, "--config.init_from=mine"])
    check_start(config)
    check_start(load_recipe(f"{ROOT}/configs/folder.py"))


def test_a_checkpoint_that_does_not_say_its_network_names_the_setting(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    config = make_config()
    config.init_from = str(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"does not say which network it holds; pass --config\.model\.name=\.\.\. "):
        finetune.load(config, 10)


def test_the_folder_recipe_has_settings_for_fine_tuning():
    scratch, config = (load_recipe(f"{ROOT}/configs/folder.py{argument}") for argument in ("", ":finetune"))
    assert config.model.name == scratch.model.name == ""
    for left_open in (scratch, config):
        check_settings_of_run(left_open)
        assert finetune.complete(left_open, None, None).model.name == "seresnet18"
        left_open.init_from = "mine"
        check_settings_of_run(left_open)
        assert finetune.complete(left_open, None, a_checkpoint(variables={})).model.name == "seresnet20"
    assert config.optim.learning_rate < scratch.optim.learning_rate
