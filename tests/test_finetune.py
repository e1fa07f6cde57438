"""Fine-tuning: where a run starts from, what it freezes and how fast each layer moves."""

import dataclasses
import functools
import json
import types
from functools import partial
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import se_flax
import train.loop
from se_flax.errors import UserError
from se_flax.norms import GroupNorm
from se_flax.preprocess import Preprocess
from train import finetune, optim
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
from train.layers import NOTHING, frozen_parts, layer_depths, merge, split, trace
from train.loop import run
from train.parallel import make_replicas
from train.step import init_state, make_train_step
from train.validate import check_settings_of_run

ROOT = Path(__file__).parents[1]

# --- Depths -----------------------------------------------------------------------------------------------------------


def blocks(*counts, name="layer{}_{}", first=1):
    """Names of the blocks of stages with so many of them, from the images up."""
    return [name.format(stage, i) for stage, count in enumerate(counts, first) for i in range(count)]


mobile = partial(blocks, name="blocks_{}_{}", first=0)

# The groups from the stem up, as timm's `group_matcher` has them for the same networks (CIFAR's: by analogy).
GROUPS = {
    "seresnet20": [["conv1", "bn1"], *blocks(3, 3, 3), ["linear"]],
    "sepreresnet164": [["conv1"], *blocks(18, 18, 17), ["layer3_17", "bn"], ["linear"]],
    "seresnet50": [["conv1", "bn1"], *blocks(3, 4, 6, 3), ["fc"]],
    "legacy_seresnet50": [["layer0"], *blocks(3, 4, 6, 3), ["last_linear"]],
    "resnetrs50": [
        ["conv1_0", "conv1_1", "conv1_3", "conv1_4", "conv1_6", "bn1", "maxpool_0", "maxpool_1"],
        *blocks(3, 4, 6, 3),
        ["fc"],
    ],
    "efficientnet_b0": [
        ["conv_stem", "bn1"],
        *mobile(1, 2, 2, 3, 3, 4),
        ["blocks_6_0", "conv_head", "bn2"],
        ["classifier"],
    ],
    "mobilenetv3_small_100": [
        ["conv_stem", "bn1"],
        *mobile(1, 2, 3, 2, 3),
        ["blocks_5_0", "conv_head"],
        ["classifier"],
    ],
}


@pytest.mark.parametrize("name", GROUPS)
def test_layer_depths_count_blocks_from_the_classifier(name):
    groups = [[group] if isinstance(group, str) else group for group in GROUPS[name]]
    expected = {part: len(groups) - 1 - i for i, group in enumerate(groups) for part in group}
    assert layer_depths(trace(se_flax.create_model(name), 32)["params"]) == expected


def test_the_order_is_that_of_the_calls_and_not_of_the_alphabet():
    shapes = trace(se_flax.create_model("efficientnet_b0"), 32)
    assert next(iter(shapes["params"])) == "conv_stem"
    assert min(shapes["params"]) == "blocks_0_0"
    depths = layer_depths(trace(se_flax.create_model("resnet110"), 32)["params"])
    assert depths["layer1_2"] == depths["layer1_10"] + 8  # "layer1_10" comes before "layer1_2" in the alphabet


# --- Rates ------------------------------------------------------------------------------------------------------------

DEPTHS = {"conv1": 3, "layer1_0": 2, "layer2_0": 1, "fc": 0}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        name: {"kernel": jnp.float32(rng.normal(size=(3, 3, 2, 4))), "bias": jnp.float32(rng.normal(size=4))}
        for name in DEPTHS
    }


def updates_of(settings, steps=3):
    optimizer = optim.make_optimizer(settings, lambda step: 0.1 / (1.0 + step), DEPTHS)
    params, state, seen = tree(0), None, []
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(tree(1 + step), state, params)
        seen.append(updates)
    return seen


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_layer_rates_multiply_every_update_exactly(name):
    """The factor is a power in float64, rounded once; the parameters stay, so that the gradients are the same."""
    settings = Optim(name=name, weight_decay=0.05, clip_norm=1.0)
    plain = updates_of(settings)
    slowed = updates_of(dataclasses.replace(settings, layer_decay=0.7, backbone_multiplier=0.5))
    factors = {"conv1": 0.5 * 0.7**3, "layer1_0": 0.5 * 0.7**2, "layer2_0": 0.5 * 0.7, "fc": 1.0}
    for before, after in zip(plain, slowed, strict=True):
        for part, factor in factors.items():
            for leaf in ("kernel", "bias"):
                np.testing.assert_array_equal(after[part][leaf], np.float32(factor) * np.asarray(before[part][leaf]))


def test_layer_rates_are_rates_in_the_formula_of_sgd():
    """theta - rate * factor * (g + decay * theta), in NumPy."""
    settings = Optim(name="sgd", momentum=0.0, nesterov=False, weight_decay=0.05, layer_decay=0.5)
    (updates,) = updates_of(settings, steps=1)
    params, gradients = tree(0), tree(1)
    for part, depth in DEPTHS.items():
        rate = 0.1 * 0.5**depth
        expected = -rate * (np.float64(gradients[part]["kernel"]) + 0.05 * np.float64(params[part]["kernel"]))
        np.testing.assert_allclose(updates[part]["kernel"], expected, rtol=1e-6)
        np.testing.assert_allclose(updates[part]["bias"], -rate * np.float64(gradients[part]["bias"]), rtol=1e-6)


def test_equal_rates_leave_the_optimizers_state_as_it_was():
    settings, rate = Optim(), optax.constant_schedule(0.1)
    with_depths, without = (optim.make_optimizer(settings, rate, depths) for depths in (DEPTHS, None))
    assert jax.tree.structure(with_depths.init(tree(0))) == jax.tree.structure(without.init(tree(0)))


# --- Frozen parts in a step -------------------------------------------------------------------------------------------

MEAN, STD, CLASSES = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 4


def a_model(**attributes):
    return se_flax.create_model("seresnet20", depth=1, num_classes=CLASSES, **attributes)


@functools.cache
def random_variables():
    """Weights and statistics that no initialiser would give."""
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape) / np.sqrt(max(np.prod(leaf.shape[:-1]), 1))
        return np.float32(0.5 + np.abs(value) if path[-1].key in ("var", "scale") else value)

    return jax.tree_util.tree_map_with_path(draw, trace(a_model(), 8))


def a_batch(size=12, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, size).astype(np.int32)
    return {"image": rng.integers(0, 256, (size, 8, 8, 3)).astype(np.uint8), "label": label}


def normalised(batch):
    return jnp.asarray((batch["image"] / 255 - np.array(MEAN)) / np.array(STD), jnp.float32)


def take_steps(settings, *, steps=2, devices=1, backend="shard_map", seed=0, **attributes):
    """A few steps from `random_variables`; returns the states before and after and the last metrics."""
    model, rate = a_model(**attributes), optax.constant_schedule(0.1)
    shapes = trace(model, 8)
    frozen = frozen_parts(settings, shapes)
    optimizer = optim.make_optimizer(settings, rate, layer_depths(shapes["params"]))
    replicas = make_replicas(backend, devices)
    state = init_state(
        model, optimizer, 8, seed, ema=settings.ema_decay > 0, frozen=frozen.params, variables=random_variables()
    )
    before = jax.device_get(state)
    step = replicas.spread(
        make_train_step(
            model,
            optimizer,
            rate,
            mean=MEAN,
            std=STD,
            settings=train.config.Augment(),
            num_classes=CLASSES,
            ema_decay=settings.ema_decay,
            accumulate=settings.accumulate,
            frozen=frozen,
        ),
        donate=True,
    )
    state = replicas.replicate(state)
    for _ in range(steps):
        state, metrics = step(state, replicas.shard(a_batch()))
    return before, jax.device_get(state), jax.device_get(metrics)


def flat(nested):
    return {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(nested).items()}


def moved(before, after):
    """Paths of the leaves that differ in any bit."""
    a, b = flat(before), flat(after)
    assert a.keys() == b.keys()
    return {path for path in a if not np.array_equal(a[path], b[path])}


HEAD = {("linear", "kernel"), ("linear", "bias")}


@pytest.mark.parametrize(
    ("settings", "devices", "backend"),
    [
        (Optim(name="sgd", train_only="head", ema_decay=0.9), 3, "shard_map"),
        (Optim(name="adamw", train_only="head", accumulate=2), 2, "pmap"),
        (Optim(name="muon", train_only="head", decay_norm_and_bias=True), 1, "shard_map"),
    ],
    ids=lambda x: x.name if isinstance(x, Optim) else str(x),
)
def test_training_the_head_leaves_everything_else_to_the_bit(settings, devices, backend):
    before, after, _ = take_steps(settings, devices=devices, backend=backend)
    assert moved(before.params, after.params) == HEAD
    assert moved(before.batch_stats, after.batch_stats) == set()
    if after.ema is not None:
        assert moved(before.ema["params"], after.ema["params"]) == HEAD
        assert moved(before.ema["batch_stats"], after.ema["batch_stats"]) == set()
    remembered = {x.shape for x in jax.tree.leaves(after.opt_state)}
    assert remembered <= {(), (3,), (64, CLASSES), (CLASSES,)}  # (3,): Muon's polynomial; nothing of frozen parameters


def test_the_heads_step_is_that_of_softmax_regression_on_the_backbones_features():
    """In NumPy on the features of evaluation: batch norms and stochastic depth are those of a network in use."""
    settings = Optim(name="sgd", momentum=0.0, nesterov=False, weight_decay=0.0, train_only="head", clip_norm=0.05)
    before, after, metrics = take_steps(settings, steps=1, drop_path_rate=0.5)
    batch = a_batch()
    variables = random_variables()
    backbone = {name: part for name, part in variables["params"].items() if name != "linear"}
    features = np.float64(
        jax.jit(partial(a_model().clone(num_classes=0).apply, train=False))(
            {**variables, "params": backbone}, normalised(batch)
        )
    )
    head = variables["params"]["linear"]
    logits = features @ head["kernel"] + head["bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    error = p / p.sum(1, keepdims=True) - np.eye(CLASSES)[batch["label"]]
    gradient = {"kernel": features.T @ error / len(error), "bias": error.mean(0)}
    norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    assert norm > 0.05
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    for leaf, g in gradient.items():
        step = after.params["linear"][leaf] - before.params["linear"][leaf]
        np.testing.assert_allclose(step, -0.1 * g * 0.05 / norm, rtol=1e-3, atol=1e-6)


def test_dropout_before_the_classifier_stays_on_while_the_backbone_is_frozen():
    settings = Optim(train_only="head")
    losses = {take_steps(settings, steps=1, seed=seed, drop_rate=0.5)[2]["loss"].item() for seed in (0, 1)}
    assert len(losses) == 2


def test_frozen_batch_norms_keep_statistics_scale_and_bias():
    settings = Optim(freeze_batch_norm=True, layer_decay=0.5, ema_decay=0.9)
    before, after, metrics = take_steps(settings, steps=1, devices=3)
    norms = {path[:-1] for path in flat(random_variables()["batch_stats"])}
    changed = moved(before.params, after.params)
    assert not {path for path in changed if path[:-1] in norms}
    assert {path for path in flat(before.params) if path[-1] == "kernel"} <= changed
    assert moved(before.batch_stats, after.batch_stats) == set()
    assert moved(before.ema["batch_stats"], after.ema["batch_stats"]) == set()
    batch = a_batch()
    logits = jax.jit(a_model().apply)(random_variables(), normalised(batch))
    expected = -np.mean(np.asarray(jax.nn.log_softmax(logits))[np.arange(len(logits)), batch["label"]])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)


def test_split_and_merge_are_inverse_and_nothing_is_frozen_by_default():
    params = random_variables()["params"]
    assert frozen_parts(Optim(), trace(a_model(), 8)) == NOTHING
    frozen = frozen_parts(Optim(train_only="head"), trace(a_model(), 8)).params
    trained, kept = split(params, frozen)
    assert set(flat(trained)) == HEAD and set(flat(kept)) == frozen
    jax.tree.map(np.testing.assert_array_equal, merge(trained, kept), params)
    assert split(params, frozenset()) == (params, {})


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
        name=name, model=model, variables=variables or drawn(model), preprocess=preprocess, notes=notes
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
    monkeypatch.setattr(train.loop, "save_model", lambda *arguments: None)


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
    from train.data import BadImages, eval_batches
    from train.sources import open_data

    data = dataclasses.replace(make_config().data, interpolation=preprocess.interpolation)
    splits = open_data(data)
    batches = list(eval_batches(splits, data, batch_size=360, bad=BadImages(splits)))
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
    with pytest.warns(UserWarning, match="the classifier was drawn anew for 10 classes"):
        loaded = se_flax.load_pretrained(saved, num_classes=10)
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
    loaded = a_checkpoint(variables={})
    assert list(finetune.describe(finetune.complete(config, None, loaded), loaded)) == [
        "starting from mine (seresnet20)",
        "images: mean (0.3, 0.4, 0.5), std (0.3, 0.2, 0.15), bicubic",
        "data.std is (0.3, 0.2, 0.15) here and (0.3, 0.2, 0.1) in the checkpoint",
        "data.image_size is 16 here and 8 in the checkpoint",
    ]


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
        ({"backbone_multiplier": 0.0}, r"optim\.backbone_multiplier is 0\.0; .* optim\.train_only='head' stops the"),
        (
            {"train_only": "head", "layer_decay": 0.8},
            r"optim\.train_only is 'head' and optim\.layer_decay is 0\.8, which slows .*; leave one of the two out",
        ),
    ],
)
def test_settings_out_of_range_are_one_sentence(change, text):
    with pytest.raises(UserError, match=text) as error:
        optim.check(Optim(**change))
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
