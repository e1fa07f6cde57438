"""What fast training on small images adds: whitening, alternating flips, reflected borders, rates of biases, views."""

import contextlib
import dataclasses
import re
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import se_flax
from se_flax import UserError
from se_flax.nn.network import Network
from train.cli import parse
from train.config import Augment, Config, Data, Model, Optim, Parallel
from train.data import augment as aug
from train.data.alternate_flip import epochs, mirrored
from train.data.examples import sample_images
from train.data.sources import ArraySource
from train.optim.optimizers import Updates
from train.optim.param_groups import Frozen, frozen_parts, rate_factors, stem_kernel
from train.optim.whitening import EPSILON, whitening_kernel
from train.run.evaluate import Result
from train.run.init import init_state, trace
from train.run.parallel import make_replicas
from train.run.save_model import save_model
from train.run.setup import make_trainer, prepare
from train.run.step import make_eval_step, make_train_step
from train.run.tta import VIEWS
from train.validate import check_settings_of_run

ROOT = Path(__file__).parents[1]
flat = flax.traverse_util.flatten_dict

# ---- schedule


def test_the_triangle_is_two_lines():
    settings = Optim(
        schedule="triangular", learning_rate=0.5, first_learning_rate=0.1, peak=0.25, final_learning_rate=0.05
    )
    steps = np.array([0, 10, 20, 50, 80, 100])
    expected = [0.1, 0.3, 0.5, 0.5 - 0.45 * 30 / 60, 0.05, 0.05]
    rate = Updates(settings).schedule(10, 80)
    np.testing.assert_allclose([rate(int(step)) for step in steps], expected, rtol=1e-6)


# ---- rates of biases


def small(**attributes):
    return se_flax.create_model("se_airbench94", widths=(16, 16, 32), num_classes=4, **attributes)


def test_biases_of_batch_norms_have_a_rate_of_their_own():
    model = small()
    shapes = trace(model, 16).shapes
    assert rate_factors(Optim(), model, shapes) == {}
    faster = rate_factors(Optim(norm_bias_multiplier=64.0), model, shapes)
    assert faster.keys() == flat(shapes["params"]).keys()
    norms = {(f"layer{i}", f"norm{j}", "bias") for i in (1, 2, 3) for j in (1, 2)}
    assert {path: factor for path, factor in faster.items() if factor != 1} == dict.fromkeys(norms, 64.0)
    both = rate_factors(Optim(norm_bias_multiplier=64.0, layer_decay=0.5), model, shapes)
    assert both["layer3", "norm2", "bias"] == 32 and both["layer1", "conv1", "kernel"] == 0.5**3


def test_the_rate_of_a_bias_multiplies_its_update():
    model = small()
    shapes = trace(model, 16).shapes
    rng = np.random.default_rng(0)
    grads, params = (jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), shapes["params"]) for _ in range(2))
    made = []
    for multiplier in (1.0, 64.0):
        settings = Optim(norm_bias_multiplier=multiplier)
        optimizer = Updates(settings).optimizer(optax.constant_schedule(0.1), rate_factors(settings, model, shapes))
        made.append(flat(optimizer.update(grads, optimizer.init(params), params)[0]))
    for path, plain in made[0].items():
        np.testing.assert_allclose(made[1][path], plain * (64 if "norm" in path[1] else 1), rtol=1e-6)


# ---- whitening


def correlated(count=200, size=12):
    """Images whose neighbouring pixels and colours go together."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(count, size + 2, size + 2, 3))
    smooth = noise[:, :-2, :-2] + noise[:, 1:-1, 1:-1] + noise[:, 2:, 1:-1]
    return smooth @ np.array([[1, 0.5, 0.2], [0, 1, 0.5], [0.3, 0, 1]])


def responses(images, kernel):
    """What the filters say of every patch, [patches, features]."""
    kh, kw, _, features = kernel.shape
    height, width = images.shape[1] - kh + 1, images.shape[2] - kw + 1
    sums = sum(
        images[:, i : i + height, j : j + width] @ np.float64(kernel[i, j]) for i in range(kh) for j in range(kw)
    )
    return sums.reshape(-1, features)


def test_patches_are_white_behind_the_kernel():
    images = correlated()
    kernel = whitening_kernel(images, (2, 2, 3, 24))
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])
    found = responses(images, kernel[..., :12])
    np.testing.assert_allclose(found.T @ found / len(found), np.eye(12), atol=0.02)
    # The first filters are those of the largest variances: they have the smallest norm.
    norms = np.linalg.norm(kernel[..., :12].reshape(12, 12), axis=0)
    assert np.all(np.diff(norms) > 0)
    np.testing.assert_array_equal(whitening_kernel(images, (2, 2, 3, 8))[..., :4], kernel[..., :4])


def test_a_direction_without_variance_is_not_blown_up():
    grey = np.repeat(correlated()[..., :1], 3, axis=-1)
    kernel = whitening_kernel(grey, (1, 1, 3, 6)).reshape(3, 6)
    assert np.linalg.norm(kernel, axis=0).max() == pytest.approx(EPSILON**-0.5, rel=1e-3)


@pytest.mark.parametrize("features", [26, 7])
def test_a_stem_that_cannot_whiten_is_refused(features):
    text = "optim.whiten_stem needs an even number of at most 24 filters in a first convolution of 2 x 2 pixels, and "
    text += f"this network has {features};"
    model = small(stem=features)
    with pytest.raises(UserError, match=re.escape(text)):
        frozen_parts(Optim(whiten_stem=True), model, trace(model, 16).shapes)


def test_a_whitened_stem_needs_to_know_which_layer_it_is_and_replaces_no_trained_one():
    with pytest.raises(UserError, match=r"optim\.whiten_stem needs to know the classifier and the blocks of Dense"):
        stem_kernel(nn.Dense(3))
    config = Config(init_from="somewhere", optim=Optim(whiten_stem=True))
    with pytest.raises(UserError, match=r"got optim\.whiten_stem=True with init_from='somewhere', whose first conv"):
        check_settings_of_run(config)


def test_the_sample_is_from_all_over_the_source():
    images = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    source = ArraySource(images, np.arange(100), "train")
    assert sample_images(source, Data(image_size=4), 5)[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80]
    assert len(sample_images(source, Data(image_size=4), 1000)) == 100


def test_given_parameters_stand_in_for_drawn_ones():
    model = small()
    network, path = trace(model, 16), stem_kernel(model)
    assert path == ("whiten", "kernel")
    given = {path: np.full((2, 2, 3, 24), 0.5, np.float32)}
    optimizer = optax.sgd(0.1)
    plain, made = (init_state(network, optimizer, 0, ema=True, given=values) for values in (None, given))
    before, after = flat(plain.params), flat(made.params)
    assert before.keys() == after.keys() == flat(made.ema["params"]).keys()
    for key, value in after.items():
        np.testing.assert_array_equal(value, given.get(key, before[key]))
    np.testing.assert_array_equal(made.ema["params"]["whiten"]["kernel"], given[path])


def test_a_run_whitens_its_stem(tmp_path):
    config = Config(
        model=Model(name="resnet20"),
        data=Data(image_size=8, batch_size=64, mean=(0.3,) * 3, std=(0.4,) * 3),
        optim=Optim(whiten_stem=True),
        parallel=Parallel(devices=1),
    )
    with contextlib.ExitStack() as held:
        setup = prepare(config, tmp_path, held)
        assert setup.program.frozen == Frozen(frozenset({("conv1", "kernel")}))
        trainer, _ = make_trainer(setup)
        trainer.report.close()
    kernel = np.asarray(trainer.state.params["conv1"]["kernel"])
    assert kernel.shape == (3, 3, 3, 16)
    images = (setup.splits.train.images / 255 - 0.3) / 0.4
    found = responses(images, kernel[..., :8])
    np.testing.assert_allclose(found.T @ found / len(found), np.eye(8), atol=0.01)


def test_a_saved_model_says_how_it_was_evaluated(tmp_path):
    variables = trace(se_flax.create_model("resnet20", num_classes=10), 8).zeros()
    for views in ("none", "flip"):
        config = Config(
            model=Model(name="resnet20"), data=Data(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
        )
        config.eval_tta = views
        save_model(tmp_path, config, variables, tuple("0123456789"), Result(20, 3, 12, 2.0), 7)
        evaluation = se_flax.load_pretrained(tmp_path).provenance["evaluation"]
        assert evaluation == {"count": 20, "top1_count": 3, "top5_count": 12} | (
            {"tta": views} if views == "flip" else {}
        )


# ---- flips and borders


def test_an_image_is_mirrored_in_every_other_epoch_from_a_start_of_its_own():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (200, 4, 4, 3)), jnp.uint8)
    key = jax.random.key(3)
    first, second, third = (np.asarray(mirrored(images, key, jnp.full(200, epoch))) for epoch in range(3))
    np.testing.assert_array_equal(first, ~second)
    np.testing.assert_array_equal(first, third)
    assert 70 < first.sum() < 130  # two of three draws of 200 lie within 7
    np.testing.assert_array_equal(mirrored(images[50:60], key, jnp.zeros(10, jnp.int32)), first[50:60])
    assert np.any(first != np.asarray(mirrored(images, jax.random.key(4), jnp.zeros(200, jnp.int32))))


def test_epochs_are_those_of_the_stream():
    stream = np.arange(60) // 14  # the loader's: 14 examples, reshuffled each epoch, in batches of 4
    found = [epochs(jnp.int32(step), jnp.arange(4), 4, 14) for step in range(15)]
    np.testing.assert_array_equal(np.concatenate(found), stream)


class Echo(Network):
    """Its logits show how its images lay: the mean of each column; in training it keeps them as statistics."""

    head_path = ("none",)

    @nn.compact
    def __call__(self, images, *, train=False):
        scale = self.param("scale", nn.initializers.ones_init(), ())
        seen = self.variable("batch_stats", "seen", jnp.zeros, images.shape[:1] + images.shape[2:3], jnp.float32)
        if train:
            seen.value = jnp.mean(images, axis=(1, 3))
        return jnp.mean(images, axis=(1, 3))[:, :4] * scale


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_mirrors_by_the_epoch(accumulate):
    """Two batches an epoch; the same images in two epochs in a row are seen in both directions."""
    settings = Augment(flip=True, alternate_flip=True)
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3)).astype(np.uint8)
    optimizer, replicas = optax.sgd(0.0), make_replicas("shard_map", 1)
    model = Echo(num_classes=4)
    step = replicas.spread(
        make_train_step(
            model,
            optimizer,
            optax.constant_schedule(0.0),
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
            settings=settings,
            num_classes=4,
            accumulate=accumulate,
            examples=16,
        )
    )
    variables = {"params": {"scale": np.float32(1)}, "batch_stats": {"seen": np.zeros((8 // accumulate, 4), "f")}}
    network = trace(model, 4)
    state = replicas.replicate(init_state(network, optimizer, 0, ema=False, variables=variables))
    batch = replicas.shard({"image": images, "label": np.zeros(8, np.int32)})
    seen = []
    for _ in range(5):
        state, _ = step(state, batch)
        seen.append(np.asarray(state.batch_stats["seen"]))
    columns = images.mean(axis=(1, 3))[-8 // accumulate :] / 255
    for i, found in enumerate(seen):
        np.testing.assert_allclose(found, seen[0] if i // 2 % 2 == 0 else seen[0][:, ::-1], rtol=1e-6)
    as_is = np.isclose(seen[0], columns).all(1)
    np.testing.assert_array_equal(np.isclose(seen[0], columns[:, ::-1]).all(1), ~as_is)


def test_reflected_borders_are_numpys():
    image = jnp.asarray(np.random.default_rng(0).random((5, 5, 3)), jnp.float32)
    canvas = np.pad(image, [(2, 2), (2, 2), (0, 0)], mode="reflect")
    crops = [canvas[i : i + 5, j : j + 5] for i in range(5) for j in range(5)]
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(300))
    found = np.asarray(jax.vmap(lambda key: aug.pad_and_crop(image, key, 2, mode="reflect"))(keys))
    which = [[i for i, crop in enumerate(crops) if np.array_equal(crop, x)] for x in found]
    assert {i for (i,) in which} == set(range(25))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pad_mode": "reflekt"}, "unknown augment.pad_mode 'reflekt'; closest: reflect"),
        ({"alternate_flip": True}, "augment.alternate_flip=True needs augment.flip=True: it says when an image is mir"),
    ],
)
def test_check_refuses(changes, text):
    with pytest.raises(UserError, match=re.escape(text)):
        aug.check(Augment(**changes), 32)


# ---- views


def test_views_are_numpys_and_their_weights_sum_to_one():
    images = np.random.default_rng(0).random((2, 5, 6, 3)).astype(np.float32)
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    plain = [images, padded[:, :5, :6], padded[:, 2:, 2:]]
    expected = {
        "none": [(1.0, images)],
        "flip": [(0.5, images), (0.5, images[:, :, ::-1])],
        "flip_shift": [
            (weight, view) for weight, x in zip((0.25, 0.125, 0.125), plain, strict=True) for view in (x, x[:, :, ::-1])
        ],
    }
    assert VIEWS.keys() == expected.keys()
    for name, views in VIEWS.items():
        found = views(jnp.asarray(images))
        assert sum(weight for weight, _ in found) == 1
        for (weight, view), (wanted, image) in zip(found, expected[name], strict=True):
            assert weight == wanted
            np.testing.assert_array_equal(view, image)


def test_evaluation_takes_the_mean_of_the_logits():
    model, replicas = Echo(num_classes=4), make_replicas("shard_map", 1)
    images = np.random.default_rng(1).integers(0, 256, (32, 4, 4, 3)).astype(np.uint8)
    variables = {"params": {"scale": np.float32(9)}, "batch_stats": {"seen": np.zeros((32, 4), "f")}}
    batch = {"image": images, "label": np.arange(32, dtype=np.int32) % 4, "mask": np.ones(32, bool)}
    step = replicas.spread(make_eval_step(model, mean=(0.0,) * 3, std=(1.0,) * 3, views=VIEWS["flip"]))
    sums = step(replicas.replicate(variables), replicas.shard(batch))
    columns = images.mean(axis=(1, 3)) / 255
    logits = 9 * (columns + columns[:, ::-1]) / 2
    chosen = logits[np.arange(32), batch["label"]]
    assert float(sums["loss"]) == pytest.approx(np.sum(np.log(np.exp(logits).sum(1)) - chosen), rel=1e-5)


def test_unknown_views_are_refused():
    with pytest.raises(UserError, match=r"unknown eval_tta 'flips'; closest: flip"):
        check_settings_of_run(dataclasses.replace(Config(), eval_tta="flips"))


# ---- the recipe


def test_the_recipe_has_the_papers_settings():
    config, _ = parse([f"--config={ROOT}/configs/cifar10.py:fast", "--workdir=unused"])
    checked = check_settings_of_run(config)
    assert config.model.name == "se_airbench94" and checked.network.model.attention is se_flax.SqueezeExcite
    optim, batch = config.optim, config.data.batch_size
    # Jordan 2024, listing: rates are per 1,024 summed losses, over the sum of the momentum's weights.
    kilostep = 1024 * (1 + 1 / (1 - 0.85))
    assert optim.learning_rate == pytest.approx(11.5 / kilostep * batch, rel=0.01)
    assert optim.weight_decay == pytest.approx(0.0153 / 11.5, rel=0.01)
    assert optim.first_learning_rate / optim.learning_rate == pytest.approx(0.2)
    assert optim.final_learning_rate / optim.learning_rate == pytest.approx(0.07)
    assert (optim.momentum, optim.nesterov, optim.peak, optim.label_smoothing) == (0.85, True, 0.23, 0.2)
    frozen = frozen_parts(optim, checked.network.model, checked.network.shapes)
    assert frozen == Frozen(frozenset({("whiten", "kernel")}))


def test_the_small_recipe_is_the_fast_one_on_half_the_widths():
    fast, small = (
        parse([f"--config={ROOT}/configs/cifar10.py:{name}", "--workdir=x"])[0] for name in ("fast", "small")
    )
    assert (small.model.name, small.epochs) == ("se_airbench94_050", 8)
    small.model.name, small.epochs = fast.model.name, fast.epochs
    assert small == fast
