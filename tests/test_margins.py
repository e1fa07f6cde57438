"""ArcFace, CosFace and the classifier of cosines: the papers' formulas in NumPy, the ends of the range, and a run."""

import dataclasses
import math

import flax.linen as nn
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

import se_flax
import train.run.loop
from se_flax.errors import UserError
from train.build import build_model, loss_margin
from train.cli import parse
from train.config import Augment, Config, Data, Loss, Model, Optim, Parallel
from train.optim import finetune
from train.optim.losses import cross_entropy
from train.optim.margins import arcface, cosface
from train.run.init import trace
from train.run.loop import run
from train.run.report import read_metrics

EXAMPLES = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
COSINE = st.floats(-1, 1, width=32)


@st.composite
def batches(draw):
    n, classes = draw(st.sampled_from([(4, 3), (1, 2), (3, 6)]))  # few shapes, since each compiles anew
    cosines = draw(hnp.arrays(np.float32, (n, classes), elements=COSINE))
    return cosines, draw(hnp.arrays(np.int32, n, elements=st.integers(0, classes - 1)))


def reference(cosines, labels, moved):
    """Logits over scale: the right class's angle goes through `moved`, in float64."""
    out = cosines.astype(np.float64)
    rows = np.arange(len(labels))
    out[rows, labels] = moved(np.arccos(out[rows, labels]))
    return out


def loss_of(cosines, labels, scale):
    logits = scale * cosines
    shifted = logits - logits.max(-1, keepdims=True)
    return (np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(labels)), labels]).astype(np.float64)


@EXAMPLES
@hypothesis.given(batches(), st.sampled_from([0.0, 0.1, 0.5, 1.2]), st.sampled_from([64.0, 30.0]))
def test_arcface_adds_an_angle(batch, margin, scale):
    cosines, labels = batch
    theta = np.arccos(cosines.astype(np.float64)[np.arange(len(labels)), labels])
    hypothesis.assume(np.all(np.abs(theta + margin - np.pi) > 1e-3))  # the seam: either side is right
    expected = reference(
        cosines,
        labels,
        # Deng et al. 2019, equation 3; beyond pi the authors' code (insightface, losses.py).
        lambda t: np.where(t + margin < np.pi, np.cos(t + margin), np.cos(t) - margin * np.sin(np.pi - margin)),
    )
    got = arcface(jnp.asarray(scale * cosines), jnp.asarray(labels), margin, scale)
    assert got.dtype == jnp.float32
    # A float32 cosine near 1 has lost half the digits of its angle.
    np.testing.assert_allclose(got / scale, expected, atol=5e-4)
    np.testing.assert_allclose(cross_entropy(got, labels), loss_of(expected, labels, scale), atol=1e-3 * scale)


@EXAMPLES
@hypothesis.given(batches(), st.sampled_from([0.0, 0.35, 0.4]), st.sampled_from([64.0, 30.0]))
def test_cosface_takes_the_margin_from_the_cosine(batch, margin, scale):
    cosines, labels = batch
    expected = reference(cosines, labels, lambda t: np.cos(t) - margin)
    got = cosface(jnp.asarray(scale * cosines), jnp.asarray(labels), margin, scale)
    np.testing.assert_allclose(got / scale, expected, atol=1e-6)
    np.testing.assert_allclose(cross_entropy(got, labels), loss_of(expected, labels, scale), atol=1e-5 * scale)


@pytest.mark.parametrize("margin", [0.2, 0.5, 1.2])
def test_arcface_never_rewards_a_wider_angle(margin):
    theta = np.linspace(0, np.pi, 2001)
    logits = jnp.asarray(np.stack([np.cos(theta), np.zeros(2001)], 1), jnp.float32)
    own = np.asarray(arcface(logits, jnp.zeros(2001, jnp.int32), margin, 1.0))[:, 0]
    assert np.all(np.diff(own) < 1e-6)
    # cos(pi) before the seam, -cos(m) - m sin(m) behind it.
    assert own[-1] == pytest.approx(-1 - margin * math.sin(margin), abs=1e-6)


@pytest.mark.parametrize(("function", "margin"), [(arcface, 0.5), (cosface, 0.4)])
def test_gradients_are_finite_at_the_ends_and_exact_between(function, margin):
    def loss(cosines, labels):
        return cross_entropy(function(64.0 * cosines, labels, margin, 64.0), labels).sum()

    ends = jnp.asarray([[1, -1, 0], [-1, 1, 1], [1, 1, 1], [-1, -1, -1]], jnp.float32)
    ends = jnp.concatenate([ends, jnp.nextafter(ends, 0), jnp.nextafter(ends, 2 * ends)])
    for label in range(3):
        gradient = jax.grad(loss)(ends, jnp.full(len(ends), label))
        assert np.isfinite(gradient).all() and np.abs(gradient).max() < 64 * 6000
    theta = np.linspace(0.05, np.pi - margin - 0.05, 9)
    own = jax.vmap(jax.grad(lambda c: function(c[None, None], jnp.zeros(1, jnp.int32), margin, 1.0)[0, 0]))
    slope = np.sin(theta + margin) / np.sin(theta) if function is arcface else np.ones(9)
    np.testing.assert_allclose(own(jnp.asarray(np.cos(theta), jnp.float32)), slope, rtol=1e-3)


@pytest.mark.parametrize(("function", "name"), [(arcface, "arcface"), (cosface, "cosface")])
def test_mixed_labels_are_refused(function, name):
    logits = jnp.zeros((2, 3))
    with pytest.raises(UserError, match=rf"labels of shape \(2, 3\) and dtype float32 for {name}.*one class index per"):
        function(logits, jax.nn.one_hot(jnp.array([0, 1]), 3))
    with pytest.raises(UserError, match=r"dtype float32.*train without mixup and CutMix"):
        function(logits, jnp.array([0.0, 1.0]))


@EXAMPLES
@hypothesis.given(
    hnp.arrays(np.float32, (3, 5), elements=st.floats(-4, 4, width=16)),
    hnp.arrays(np.float32, (5, 4), elements=st.floats(-4, 4, width=16)),
)
def test_the_classifier_scales_the_cosines(x, kernel):
    hypothesis.assume(min(np.linalg.norm(x, axis=1).min(), np.linalg.norm(kernel, axis=0).min()) > 1e-3)
    layer = se_flax.CosineClassifier(4, scale=30.0)
    got = layer.apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x))
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    cosines = x @ kernel / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(got, 30 * cosines, atol=2e-5)


def test_the_classifier_has_a_kernel_alone_and_finite_gradients_everywhere():
    layer = se_flax.CosineClassifier(3)
    variables = layer.init(jax.random.key(0), jnp.ones((1, 4)))
    assert jax.tree.map(jnp.shape, variables) == {"params": {"kernel": (4, 3)}}
    kernel = variables["params"]["kernel"]
    # Nothing at all, exactly one class's direction, and its opposite.
    x = jnp.stack([jnp.zeros(4), 7 * kernel[:, 0], -3 * kernel[:, 0]])

    def loss(kernel, x):
        logits = layer.apply({"params": {"kernel": kernel}}, x)
        return cross_entropy(arcface(logits, jnp.zeros(3, jnp.int32)), jnp.zeros(3, jnp.int32)).sum()

    for gradient in jax.grad(loss, argnums=(0, 1))(kernel, x):
        assert np.isfinite(gradient).all()


def settings(**changes):
    config = Config(
        model=Model(name="seresnet20"),
        data=Data(source="digits", image_size=8, batch_size=48, eval_batch_size=90),
        optim=Optim(learning_rate=0.1, schedule="constant"),
        loss=Loss(name="arcface", margin=0.2, scale=16.0),
        parallel=Parallel(devices=1),
        steps=12,
        eval_every_epochs=100.0,
        log_every_steps=3,
        compilation_cache="",
    )
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": Loss(name="arc")}, "unknown loss.name 'arc'; closest: arcface"),
        ({"loss": Loss(name="arcface", margin=1.6)}, "got loss.margin=1.6 for arcface; give 0 to below 1.571"),
        (
            {"loss": Loss(name="cosface", margin=2.0)},
            "got loss.margin=2.0 for cosface; give 0 to below 2, or -1 for 0.4",
        ),
        ({"loss": Loss(name="cosface", scale=0.0)}, "got loss.scale=0.0; it must be positive and finite"),
        ({"augment": Augment(mixup=0.2)}, "augment.mixup=0.2 and augment.cutmix=0, but a mixed image has no one right"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError) as caught:
        build_model(settings(**changes), 10)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", se_flax.list_models())
def test_the_program_builds_every_network_with_a_dense_classifier_and_with_one_of_cosines(name):
    model = dataclasses.replace(settings().model, name=name)
    assert build_model(settings(model=model, loss=Loss(name="cross_entropy")), 10).classifier is nn.Dense
    assert build_model(settings(model=model), 10).classifier.func is se_flax.CosineClassifier


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("se_vgg16_bn", ("head", "fc")),
        ("se_bn_inception", ("fc",)),
        ("se_inception_resnet_v2", ("classif",)),
        ("shufflenet_g3_100", ("fc",)),
        ("wrn16_8", ("linear",)),
        ("shake_shake26_2x96d", ("linear",)),
        ("efficientnet_b0", ("classifier",)),
    ],
)
def test_the_classifier_of_cosines_is_the_last_layer(name, head):
    model = se_flax.create_model(name, num_classes=7, classifier=se_flax.CosineClassifier)
    leaves = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))["params"]
    for key in head:
        leaves = leaves[key]
    assert {key: leaf.shape[1:] for key, leaf in leaves.items()} == {"kernel": (7,)}


def test_a_rate_of_zero_leaves_the_networks_own_dropout():
    for name, own in (("se_vgg16_bn", 0.5), ("legacy_senet154", 0.2), ("seresnet50", 0.0)):
        model = dataclasses.replace(settings().model, name=name)
        assert build_model(settings(model=model), 10).drop_rate == own
        assert build_model(settings(model=dataclasses.replace(model, drop_rate=0.1)), 10).drop_rate == 0.1


def test_margins_left_open_are_the_usual_ones():
    for name, margin in (("arcface", 0.5), ("cosface", 0.4)):
        words = ["--config=configs/digits.py", "--workdir=x", f"--config.loss.name={name}"]
        config, _ = parse([*words, "--config.augment.mixup=0", "--config.augment.cutmix=0"])
        function = loss_margin(config)
        assert function.keywords == {"margin": margin, "scale": 64.0}
        config, _ = parse([*words, "--config.loss.margin=0.25", "--config.loss.scale=30", "--config.augment.mixup=0"])
        assert loss_margin(config).keywords == {"margin": 0.25, "scale": 30.0}
    assert loss_margin(Config()) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("arcface")
    return workdir, run(settings(), workdir)


def test_a_run_learns_and_saves_a_network_of_cosines(trained):
    workdir, outcome = trained
    losses = [row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row]
    assert outcome.completed and losses[-1] < losses[0]
    assert outcome.result.top1 > 0.25 * outcome.result.count  # chance is a tenth
    loaded = se_flax.load_pretrained(workdir / "model")
    assert loaded.variables["params"]["linear"].keys() == {"kernel"}
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    logits = loaded.model.apply(loaded.variables, images)
    bare = se_flax.create_model("seresnet20", num_classes=0)
    params = {name: part for name, part in loaded.variables["params"].items() if name != "linear"}
    x = np.asarray(bare.apply({**loaded.variables, "params": params}, images), np.float64)
    kernel = np.asarray(loaded.variables["params"]["linear"]["kernel"], np.float64)
    cosines = x @ kernel / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(logits, 16 * cosines, atol=1e-4)


def test_a_dense_classifier_is_taken_over_without_its_bias(tmp_path):
    plain = se_flax.create_model("seresnet20", num_classes=10)
    variables = jax.jit(plain.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    variables["params"]["linear"]["bias"] = jnp.ones(10)
    prepare = se_flax.Preprocess(image_size=8, crop=1.0)
    se_flax.save_pretrained(tmp_path / "plain", "seresnet20", variables, preprocess=prepare)
    config = settings(init_from=str(tmp_path / "plain"))
    loaded = finetune.load(config, 10)
    assert loaded.notes[-1] == "seresnet20: the classifier's bias was left out, as cosines have none"
    network = trace(build_model(config, 10), config.data.image_size)
    finetune.check_fit(config, network.model, network.shapes, loaded)
    np.testing.assert_array_equal(
        loaded.variables["params"]["linear"]["kernel"], variables["params"]["linear"]["kernel"]
    )


TINY_VGG = {"num_classes": 10, "widths": (4,) * 5, "hidden": 8}


def tiny_vgg(monkeypatch):
    """A VGG of a few parameters under the name of one of 133 million, whose classifier is one level down."""
    original = se_flax.create_model
    monkeypatch.setattr(se_flax, "create_model", lambda name, **given: original(name, **{**TINY_VGG, **given}))
    monkeypatch.setattr(train.run.loop, "save_model", lambda *arguments: None)


def test_margins_start_from_a_network_whose_classifier_is_nested(tmp_path, monkeypatch):
    """And train that classifier alone, where they are told so."""
    tiny_vgg(monkeypatch)
    model = se_flax.create_model("vgg11_bn")
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables["params"]["head"]["fc"]["bias"] = jnp.ones(10)
    prepare = se_flax.Preprocess(image_size=32)
    se_flax.save_pretrained(tmp_path / "plain", "vgg11_bn", variables, arguments=TINY_VGG, preprocess=prepare)
    config = settings(
        model=Model(),
        init_from=str(tmp_path / "plain"),
        data=Data(source="digits", image_size=32, batch_size=8, eval_batch_size=90),
        optim=Optim(schedule="constant", train_only="head"),
        loss=Loss(name="arcface", scale=16.0),
        steps=2,
        log_every_steps=1,
    )
    loaded = finetune.load(config, 10)
    assert loaded.notes[-1] == "vgg11_bn: the classifier's bias was left out, as cosines have none"
    outcome = run(config, tmp_path / "run")
    assert outcome.completed
    with ocp.StandardCheckpointer() as reader:
        after = flatten_dict(reader.restore(tmp_path / "run" / "checkpoints" / "2" / "state")["params"])
    before = flatten_dict(variables["params"])
    assert before.keys() - after.keys() == {("head", "fc", "bias")}
    assert {path for path, x in after.items() if not np.array_equal(x, before[path])} == {("head", "fc", "kernel")}


def test_the_cross_entropy_starts_from_cosines_with_a_new_classifier(trained):
    """Directions of classes are no dense layer: it is initialised anew, and a note says so."""
    workdir, _ = trained
    config = settings(init_from=str(workdir), loss=Loss())
    loaded = finetune.load(config, 10)
    assert loaded.notes == (
        "seresnet20: the classifier was initialised anew for 10 classes (the checkpoint's: 10 classes)",
    )
    network = trace(build_model(config, 10), config.data.image_size)
    finetune.check_fit(config, network.model, network.shapes, loaded)
    assert loaded.variables["params"]["linear"].keys() == {"kernel", "bias"}
    again = finetune.load(settings(init_from=str(workdir)), 10)
    assert again.notes == () and again.variables["params"]["linear"].keys() == {"kernel"}
