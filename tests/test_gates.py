"""What gates are read and replaced, sums over a data set, and the command `se-flax gates`."""

import csv
import json
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import se_flax
from se_flax.analysis.gates import (
    EVERY_LAYER,
    UNCHANGED,
    GateStatistics,
    apply_with_gates,
    collect,
    gate_layers,
    usefulness,
)
from se_flax.attention import CBAM, ECA, EffectiveSE, GlobalContext, SqueezeExcite
from se_flax.cli import main
from se_flax.cli.gates import parse_groups
from se_flax.errors import UserError
from se_flax.images.labels import imagenet_labels
from se_flax.nn.norm_attention import norm_act_attend

SIDE = 16


def random_variables(model, seed=0, images=None):
    """Variables of which none is at its start: gates that differ, norms that do something."""
    images = jnp.zeros((1, SIDE, SIDE, 3)) if images is None else images
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        value = rng.normal(size=leaf.shape) * (0.5 if len(leaf.shape) < 2 else (2 / np.prod(leaf.shape[:-1])) ** 0.5)
        return jnp.asarray({"var": np.exp(value), "scale": 1 + value}.get(name, value), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def some_images(count=3):
    return jax.random.normal(jax.random.key(7), (count, SIDE, SIDE, 3))


def without_attention(params):
    return {k: without_attention(v) if isinstance(v, dict) else v for k, v in params.items() if k != "se"}


NETWORKS = {
    "fused with the norm": ("seresnet20", {"depth": 1}),
    "no squeeze": ("resnet20", {"depth": 1, "attention": partial(SqueezeExcite, squeeze="none"), "stages": (2,)}),
    "after the sum": ("resnet20", {"depth": 1, "attention": EffectiveSE, "placement": "post", "stages": (3,)}),
    "eca": ("resnet20", {"depth": 1, "attention": ECA, "stages": (4,)}),
    "mobile": ("test_efficientnet", {}),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_gates_of_one_leave_the_network_without_attention(case):
    name, attributes = NETWORKS[case]
    model = se_flax.create_model(name, num_classes=5, **attributes)
    variables = random_variables(model)
    bare = se_flax.create_model(name, num_classes=5, **{**attributes, "attention": None})
    layers = gate_layers(model, variables, SIDE)
    ones = {layer: jnp.ones(channels) for layer, channels in layers.items()}

    @jax.jit
    def apply(variables, images, replaced):
        return apply_with_gates(model, variables, images, ones, dict.fromkeys(ones, replaced))

    logits, gates = apply(variables, some_images(), True)
    plain = jax.jit(bare.apply)({**variables, "params": without_attention(variables["params"])}, some_images())
    scale = float(jnp.abs(plain).max())
    np.testing.assert_allclose(logits, plain, atol=1e-5 * scale)
    assert float(jnp.abs(apply(variables, some_images(), False)[0] - plain).max()) > 1e-2 * scale
    assert {layer: gate.shape for layer, gate in gates.items()} == {k: (3, c) for k, c in layers.items()}


class OneBlock(nn.Module):
    """A convolution and an attention: quick to compile."""

    attention: Any
    fused: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        x, attention = se_flax.Conv(8, name="conv")(x), self.attention(reduction=2.0, name="se")
        norm = se_flax.BatchNorm(name="bn")
        return norm_act_attend(norm, attention, x, train=train) if self.fused else attention(norm(x))


@pytest.mark.parametrize(
    "model", [OneBlock(SqueezeExcite), OneBlock(SqueezeExcite, fused=True), OneBlock(CBAM), OneBlock(GlobalContext)]
)
def test_an_images_own_gates_in_their_place_change_nothing(model):
    variables = random_variables(model)

    @jax.jit
    def apply(variables, images, factor):
        own, gates = apply_with_gates(model, variables, images)
        means = {layer: factor * gate[0] for layer, gate in gates.items()}
        return own, apply_with_gates(model, variables, images, means, dict.fromkeys(means, jnp.asarray(True)))[0]

    own, same = apply(variables, some_images(1), 1.0)
    scale = float(jnp.abs(own).max())
    np.testing.assert_allclose(same, own, atol=2e-5 * scale)
    assert float(jnp.abs(apply(variables, some_images(1), 0.5)[1] - own).max()) > 1e-2 * scale


def test_cbams_channel_gate_is_read():
    model = CBAM(reduction=4.0)
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 8))
    variables = random_variables(model, images=x)
    _, gates = jax.jit(partial(apply_with_gates, model))(variables, x)
    params, y = jax.tree.map(np.asarray, variables["params"]), np.asarray(x, np.float64)

    def mlp(z):
        hidden = np.maximum(z @ params["fc1"]["kernel"][0, 0] + params["fc1"]["bias"], 0)
        return hidden @ params["fc2"]["kernel"][0, 0] + params["fc2"]["bias"]

    logits = mlp(y.mean((1, 2))) + mlp(y.max((1, 2)))
    assert list(gates) == ["CBAM"]
    np.testing.assert_allclose(gates["CBAM"], 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_layers_come_in_the_order_of_the_calls():
    model = se_flax.create_model("seresnet20", depth=11)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    layers = gate_layers(model, shapes, 8)
    assert list(layers) == [f"layer{stage}_{i}/se" for stage in (1, 2, 3) for i in range(11)]
    assert list(layers.values()) == [16] * 11 + [32] * 11 + [64] * 11


def test_a_network_without_gates_is_refused():
    model = se_flax.create_model("resnet20", depth=1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(UserError, match="no channel gates to read; choose one with squeeze-and-excitation"):
        gate_layers(model, shapes, 8)


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 10**6), st.integers(1, 9), st.integers(3, 30))
def test_streamed_sums_are_the_statistics_of_the_whole_set(seed, batch, count):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, count)
    labels[:3] = 2, 4, 5  # no group is empty
    x = {"a": rng.random((count, 3)).astype(np.float32), "b": rng.beta(0.2, 0.2, (count, 5)).astype(np.float32)}
    statistics = GateStatistics({"a": 3, "b": 5}, labels, {"one": [2], "two": [4, 5]}, permutations=7)
    for start in range(0, count, batch):
        statistics.add({name: values[start : start + batch] for name, values in x.items()})
    for name, found in statistics.result().items():
        values = x[name].astype(np.float64)
        np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.std, values.std(0), atol=1e-7)
        assert (found.closed, found.open) == (np.mean(values < 0.1), np.mean(values > 0.9))
        assert found.dead == np.mean(np.all(values < 0.1, 0)) and found.saturated == np.mean(np.all(values > 0.9, 0))
        for i, number in enumerate(np.unique(labels)):
            np.testing.assert_allclose(found.class_means[i], values[labels == number].mean(0), rtol=1e-12)
        parts = [values[labels == 2], values[np.isin(labels, (4, 5))]]
        for i, part in enumerate(parts):
            np.testing.assert_allclose(found.group_means[i], part.mean(0), rtol=1e-12)
            np.testing.assert_allclose(found.group_std[i], part.std(0), atol=1e-7)
        whole = np.concatenate(parts)
        within = sum(np.square(part - part.mean(0)).sum() for part in parts)
        if len(whole) == 2:
            assert np.isnan(found.between)
            continue
        expected = 1 - within / np.square(whole - whole.mean(0)).sum()
        np.testing.assert_allclose(found.between, expected, atol=1e-9)
        assert found.permuted.shape == (7,) and np.all((found.permuted >= -1e-12) & (found.permuted <= 1 + 1e-12))
        assert found.chance == pytest.approx(1 / (len(whole) - 1))


def test_random_groups_are_at_chance_and_real_ones_above():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 10)
    x = rng.normal(size=(40, 200)) * 0.01 + 0.5
    x[:, :20] += 0.01 * labels[:, None]
    statistics = GateStatistics({"a": 200}, labels, {str(i): [i] for i in range(4)}, permutations=200)
    statistics.add({"a": x})
    found = statistics.result()["a"]
    # The mean over random groupings is (G - 1) / (N - 1) = 3 / 39.
    assert found.permuted.mean() == pytest.approx(3 / 39, rel=0.02)
    assert found.between > found.permuted.max()


def test_images_that_are_missing_are_noticed():
    statistics = GateStatistics({"a": 1}, [0, 1], {"x": [0]})
    statistics.add({"a": np.ones((1, 1))})
    with pytest.raises(ValueError, match="1 of 2 images were added"):
        statistics.result()


@pytest.fixture(scope="module")
def network():
    model = se_flax.create_model("seresnet20", depth=1, num_classes=4)
    return model, random_variables(model, 3)


def with_constant_gates(params, layer, gate):
    """The same network with an excitation whose last layer gives one gate for every image."""
    block, name = layer.split("/")
    attention = dict(params[block][name])
    fc2 = attention["fc2"]
    attention["fc2"] = {"kernel": jnp.zeros_like(fc2["kernel"]), "bias": jnp.log(gate) - jnp.log1p(-gate)}
    return {**params, block: {**params[block], name: attention}}


def test_usefulness_counts_what_constant_gates_change(network):
    model, variables = network
    images, labels = np.asarray(some_images(7)), [0, 1, 2, 3, 0, 1, 2]
    batches = [(images[:4], 4), (np.concatenate([images[4:], np.zeros_like(images[:1])]), 3)]
    statistics = GateStatistics(gate_layers(model, variables, SIDE), labels, {"x": [0], "y": [1]})
    means = {name: layer.mean for name, layer in collect(model, variables, batches, statistics).items()}
    gates = jax.jit(partial(apply_with_gates, model))(variables, images)[1]
    for name, mean in means.items():
        np.testing.assert_allclose(mean, np.asarray(gates[name], np.float64).mean(0), rtol=1e-5)
    passes = []
    answers = usefulness(model, variables, means, batches, labels, passes.append)
    assert list(answers) == [UNCHANGED, *means, EVERY_LAYER]
    assert passes == [4] * len(answers) + [3] * len(answers)
    apply = jax.jit(model.apply)
    own = np.asarray(apply(variables, images)).argmax(-1)
    every = variables["params"]
    cases = {UNCHANGED: variables["params"]}
    for name, mean in means.items():
        cases[name] = with_constant_gates(variables["params"], name, jnp.asarray(mean, jnp.float32))
        every = with_constant_gates(every, name, jnp.asarray(mean, jnp.float32))
    for case, params in {**cases, EVERY_LAYER: every}.items():
        logits = np.asarray(apply({**variables, "params": params}, images), np.float64)
        best, found = logits.argmax(-1), answers[case]
        right, before = best == labels, own == labels
        assert (found.count, found.top1, found.changed) == (7, right.sum(), (best != own).sum())
        assert (found.lost, found.gained) == ((before & ~right).sum(), (~before & right).sum())
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(7), labels]
        assert found.loss == pytest.approx(losses.mean(), rel=1e-4)


NAMES = ("blue", "green", "red", "white")


@pytest.fixture(scope="module")
def ref(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    prepare = se_flax.Preprocess(image_size=SIDE, crop=1.0)
    variables = network[1]
    arguments = {"num_classes": 4, "depth": 1}
    se_flax.save_pretrained(folder, "seresnet20", variables, arguments=arguments, preprocess=prepare, labels=NAMES)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(5)
    for name in NAMES:
        (root / name).mkdir()
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


def command(capsys, *words):
    status = main([str(word) for word in ("gates", *words)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_writes_tables_and_pictures(capsys, ref, photos, tmp_path):
    target = tmp_path / "gates"
    words = ("--output", target, "--batch-size", 5, "--classes", "cold=blue,1", "red")
    status, out, err = command(capsys, ref, photos, *words)
    assert status == 0 and "groups: cold (6), red (3)" in out, err
    loaded = se_flax.load_pretrained(ref)
    paths = sorted(photos.rglob("*.png"))
    labels = np.array([NAMES.index(path.parent.name) for path in paths])
    _, gates = jax.jit(partial(apply_with_gates, loaded.model))(loaded.variables, loaded.preprocess(paths))
    layers = rows_of(target / "layers.csv")
    assert [row["layer"] for row in layers] == [*gates, EVERY_LAYER, UNCHANGED]
    groups = {(row["layer"], row["group"], int(row["channel"])): row for row in rows_of(target / "groups.csv")}
    for row, (name, values) in zip(layers, gates.items(), strict=False):
        x = np.asarray(values, np.float64)
        assert float(row["mean"]) == pytest.approx(x.mean(), rel=1e-4) and int(row["channels"]) == x.shape[1]
        assert float(row["std_over_images"]) == pytest.approx(np.sqrt(x.var(0).mean()), rel=1e-4)
        assert row["count"] == "12" and int(row["lost"]) <= int(layers[-1]["top1"])
        for group, members in (("all", (0, 1, 2, 3)), ("cold", (0, 1)), ("red", (2,))):
            part = x[np.isin(labels, members)]
            cell = groups[name, group, 1]
            assert float(cell["mean"]) == pytest.approx(part[:, 1].mean(), rel=1e-4)
            assert float(cell["std"]) == pytest.approx(part[:, 1].std(), rel=1e-3)
        table = rows_of(target / "class_means" / f"{name.replace('/', '.')}.csv")
        assert len(table) == x.shape[1] and float(table[2]["1 green"]) == pytest.approx(
            x[labels == 1, 2].mean(), rel=1e-4
        )
    for picture in ("groups.png", "spread.png", "layers.png"):
        with Image.open(target / picture) as image:
            assert min(image.size) > 200 and len(image.convert("L").getcolors(1 << 20)) > 50
    again = command(capsys, ref, photos, "--output", target)
    assert again[0] == 1 and again[2].endswith(
        "exists already; choose another --output, or pass --overwrite to write into it\n"
    )


def test_the_bar_moves_with_every_pass_and_counts_all_of_them(capsys, monkeypatch, ref, photos, tmp_path):
    bars = []

    class Bar:
        def __init__(self, total, desc, **_):
            self.total, self.title, self.moves = total, desc, []
            self.update = self.moves.append
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("se_flax.cli.gates.tqdm", Bar)
    assert command(capsys, ref, photos, "--output", tmp_path / "x", "--batch-size", 8)[0] == 0
    (bar,) = bars  # three layers, the network as it is, and all layers at once
    assert (bar.title, bar.total) == ("gates replaced, 5 passes", 5 * 12)
    assert bar.moves == [8] * 5 + [4] * 5


def test_the_command_as_json_without_usefulness_or_groups_of_several(capsys, ref, photos, tmp_path):
    for i, name in enumerate(NAMES):
        (tmp_path / f"{i}_x.png").write_bytes((photos / name / "0.png").read_bytes())
    words = ("--json", "--no-usefulness", "--layers", "layer[12]*", "--output", tmp_path / "out")
    status, out, _ = command(capsys, ref, tmp_path, *words)
    result = json.loads(out)
    assert status == 0 and result["groups"] == dict.fromkeys(NAMES, 1) and result["count"] == 4
    assert [row["layer"] for row in result["layers"]] == ["layer1_0/se", "layer2_0/se", "layer3_0/se"]
    # With one picture a group there is nothing within to compare with.
    assert all(row["between_groups"] is None and row["top1"] is None for row in result["layers"])
    assert (tmp_path / "out" / "layers.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--classes", "gren"), "unknown class 'gren'; give a label or a class number, 0 to 3; closest: green"),
        (("--classes", "x=0-2", "blue"), "class 0 is in the groups 'x' and 'blue' of --classes; a class may be in one"),
        (("--classes", "x=0", "x=1"), "got two groups 'x' in --classes; give each a name of its own"),
        (("--classes", "0-4"), "got the classes 0-4; a range goes up and ends at 3 at most"),
        (("--layers", "conv*"), "no layer matches 'conv*'; allowed: layer1_0/se, layer2_0/se, layer3_0/se"),
        (("--closed", "0.95"), "got --closed=0.95 and --open=0.9; the first must be the lower one"),
    ],
)
def test_what_cannot_be_grouped_is_refused(capsys, ref, photos, tmp_path, words, message):
    status, _, err = command(capsys, ref, photos, "--output", tmp_path / "x", *words)
    assert status == 1 and message in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def groups_of(labels, specs, present=None):
    loaded = SimpleNamespace(labels=labels, model=SimpleNamespace(num_classes=len(labels)))
    return parse_groups(specs, loaded, set(range(len(labels))) if present is None else present)


def test_groups_take_labels_before_numbers():
    labels = ("1", "10", "2", "a=b", "c, d", "e", "1-2")
    assert groups_of(labels, ["10", "x=1,2", "a=b", "c, d", "e", "1-2"]) == {
        "10": (1,),
        "x": (0, 2),
        "a=b": (3,),
        "c": (4,),
        "e": (5,),
        "1-2": (6,),
    }
    assert groups_of(("1", "2", "3"), ["x=1-2"]) == {"x": (0, 1)}
    with pytest.raises(UserError, match=r"unknown class '0'; give a label \(class numbers do not count"):
        groups_of(("1", "2", "3"), ["0"])
    # Without --classes the numbers of the chosen classes are numbers, whatever the labels are.
    assert groups_of(("1", "2", "3"), None) == {"1": (0,), "2": (1,), "3": (2,)}


def test_groups_of_imagenets_classes():
    labels = tuple(label.name for label in imagenet_labels())
    assert groups_of(labels, None) == {"goldfish": (1,), "pug": (254,), "airliner": (404,), "cliff": (972,)}
    assert groups_of(labels, ["tench, Tinca tinca", "dogs=151-153", "birds=n01514668,hen"]) == {
        "tench": (0,),
        "dogs": (151, 152, 153),
        "birds": (7, 8),
    }
    assert groups_of(labels, ["134", "517"]) == {"crane (134)": (134,), "crane (517)": (517,)}
    with pytest.raises(UserError, match=r"the class 'crane' fits several classes: class 134 \('crane'\), class 517"):
        groups_of(labels, ["crane"])


def test_without_matplotlib_the_tables_are_written_and_one_sentence_says_so(capsys, monkeypatch, ref, photos, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "se_flax.cli.gate_plots", raising=False)
    status, _, err = command(capsys, ref, photos, "--output", tmp_path / "x", "--no-usefulness")
    assert status == 1 and "the pictures need matplotlib, which is not installed; install it with pip install" in err
    assert len(rows_of(tmp_path / "x" / "layers.csv")) == 3 and not (tmp_path / "x" / "groups.png").exists()
