"""Layer-wise rates and frozen parts of a network in training."""

import dataclasses
import functools
from functools import partial
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import se_flax
import train.run.loop
from se_flax.errors import UserError
from train.config import (
    Optim,
)
from train.optim.optimizers import OPTIMIZERS, Updates
from train.optim.param_groups import (
    NOTHING,
    evaluation_mode,
    frozen_parts,
    layer_depths,
    layer_factors,
    merge,
    rate_factors,
    split,
)
from train.run.init import init_state, trace
from train.run.parallel import make_replicas
from train.run.step import make_train_step

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


def depths_of(name, side=32):
    model = se_flax.create_model(name)
    return layer_depths(model, trace(model, side).shapes["params"])


def by_part(depths):
    """The depths that a network's part has, by the first name of the path."""
    parts = {}
    for path, depth in depths.items():
        parts.setdefault(path[0], set()).add(depth)
    return parts


@pytest.mark.parametrize("name", GROUPS)
def test_layer_depths_count_blocks_from_the_classifier(name):
    groups = [[group] if isinstance(group, str) else group for group in GROUPS[name]]
    expected = {part: len(groups) - 1 - i for i, group in enumerate(groups) for part in group}
    assert by_part(depths_of(name)) == {part: {depth} for part, depth in expected.items()}


def test_the_order_is_that_of_the_calls_and_not_of_the_alphabet():
    shapes = trace(se_flax.create_model("efficientnet_b0"), 32).shapes
    assert next(iter(shapes["params"])) == "conv_stem"
    assert min(shapes["params"]) == "blocks_0_0"
    depths = depths_of("resnet110")
    second, tenth = (depths[f"layer1_{i}", "conv1", "kernel"] for i in (2, 10))
    assert second == tenth + 8  # "layer1_10" comes before "layer1_2" in the alphabet


# --- Rates ------------------------------------------------------------------------------------------------------------

PARTS = {("conv1",): 3, ("s1", "b1"): 2, ("s1", "b2"): 1, ("head", "fc"): 0}
DEPTHS = {(*part, leaf): depth for part, depth in PARTS.items() for leaf in ("kernel", "bias")}


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 3, 2, 4), "bias": 4}
    leaves = {path: jnp.float32(rng.normal(size=shapes[path[-1]])) for path in DEPTHS}
    return flax.traverse_util.unflatten_dict(leaves)


def updates_of(settings, steps=3):
    optimizer = Updates(settings).optimizer(lambda step: 0.1 / (1.0 + step), layer_factors(settings, DEPTHS))
    params, state, seen = tree(0), None, []
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(tree(1 + step), state, params)
        seen.append(updates)
    return seen


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_layer_rates_multiply_every_update_exactly(name):
    """The factor is a power in float64, rounded once; the parameters stay, so that the gradients are the same."""
    settings = Optim(name=name, weight_decay=0.05, clip_norm=1.0)
    plain = updates_of(settings)
    slowed = updates_of(dataclasses.replace(settings, layer_decay=0.7, backbone_multiplier=0.5))
    factors = {("conv1",): 0.5 * 0.7**3, ("s1", "b1"): 0.5 * 0.7**2, ("s1", "b2"): 0.5 * 0.7, ("head", "fc"): 1.0}
    for before, after in zip(map(flat, plain), map(flat, slowed), strict=True):
        assert before.keys() == after.keys() == DEPTHS.keys()
        for path, update in after.items():
            np.testing.assert_array_equal(update, np.float32(factors[path[:-1]]) * before[path])


def test_layer_rates_are_rates_in_the_formula_of_sgd():
    """theta - rate * factor * (g + decay * theta), in NumPy."""
    settings = Optim(name="sgd", momentum=0.0, nesterov=False, weight_decay=0.05, layer_decay=0.5)
    (updates,) = updates_of(settings, steps=1)
    params, gradients, updates = flat(tree(0)), flat(tree(1)), flat(updates)
    for path, depth in DEPTHS.items():
        decay = 0.05 * np.float64(params[path]) if path[-1] == "kernel" else 0.0
        np.testing.assert_allclose(updates[path], -0.1 * 0.5**depth * (gradients[path] + decay), rtol=1e-6)


def test_equal_rates_leave_the_optimizers_state_as_it_was():
    settings, rate, model = Optim(), optax.constant_schedule(0.1), a_model()
    factors = rate_factors(settings, model, trace(model, 8).shapes)
    with_factors, without = (Updates(settings).optimizer(rate, given) for given in (factors, None))
    assert jax.tree.structure(with_factors.init(tree(0))) == jax.tree.structure(without.init(tree(0)))


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

    return jax.tree_util.tree_map_with_path(draw, trace(a_model(), 8).shapes)


def a_batch(size=12, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, size).astype(np.int32)
    return {"image": rng.integers(0, 256, (size, 8, 8, 3)).astype(np.uint8), "label": label}


def normalised(batch):
    return jnp.asarray((batch["image"] / 255 - np.array(MEAN)) / np.array(STD), jnp.float32)


def take_steps(settings, *, steps=2, devices=1, backend="shard_map", seed=0, **attributes):
    """A few steps from `random_variables`; returns the states before and after and the last metrics."""
    model, rate = a_model(**attributes), optax.constant_schedule(0.1)
    network = trace(model, 8)
    shapes = network.shapes
    frozen = frozen_parts(settings, model, shapes)
    optimizer = Updates(settings).optimizer(rate, rate_factors(settings, model, shapes))
    replicas = make_replicas(backend, devices)
    state = init_state(
        network, optimizer, seed, ema=settings.ema_decay > 0, frozen=frozen.params, variables=random_variables()
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
    assert frozen_parts(Optim(), a_model(), trace(a_model(), 8).shapes) == NOTHING
    frozen = frozen_parts(Optim(train_only="head"), a_model(), trace(a_model(), 8).shapes).params
    trained, kept = split(params, frozen)
    assert set(flat(trained)) == HEAD and set(flat(kept)) == frozen
    jax.tree.map(np.testing.assert_array_equal, merge(trained, kept), params)
    assert split(params, frozenset()) == (params, {})


# --- Evaluation mode --------------------------------------------------------------------------------------------------


class ByPosition(nn.Module):
    @nn.compact
    def __call__(self, x, train, scale=1.0):
        return x * scale + 10.0 * train


class TrainsByDefault(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=True):
        return x + 10.0 * train


class AnyKeyword(nn.Module):
    @nn.compact
    def __call__(self, x, *rest, **settings):
        return x + 10.0 * settings["train"] + sum(rest)


class ByMethod(nn.Module):
    def add(self, x, train):
        return x + 10.0 * train

    @nn.compact
    def __call__(self, x):
        return self.add(x, True)


class Calls(nn.Module):
    """A network with one part, and a dropout of its own."""

    call: object

    @nn.compact
    def __call__(self, x, *, train):
        return self.call(x) + 100.0 * train


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: ByPosition()(x, True), 0.0),
        (lambda x: ByPosition()(x, True, 2.0), 0.0),
        (lambda x: ByPosition()(x, train=True), 0.0),
        (lambda x: TrainsByDefault()(x), 0.0),
        (lambda x: AnyKeyword()(x, 1.0, train=True), 1.0),
        (lambda x: ByMethod()(x), 0.0),
    ],
    ids=["position", "position before others", "keyword", "default", "any keyword", "method"],
)
def test_training_is_switched_off_however_a_module_is_told(call, expected):
    """What a frozen part adds while training, 10, is not added; what the network itself adds, 100, is."""
    x = jnp.zeros(())
    network = Calls(call)
    assert float(network.apply({}, x, train=True)) > 105
    with evaluation_mode((nn.Module,)):
        assert float(network.apply({}, x, train=True)) == 100 + expected
    with evaluation_mode((nn.BatchNorm,)):  # none of these
        assert float(network.apply({}, x, train=True)) > 105


@pytest.mark.parametrize("given", [(False,), ()], ids=["given", "left out"])
def test_the_batch_norm_of_flax_uses_its_running_statistics(given):
    network = Calls(lambda x: nn.BatchNorm(name="bn")(x, *given))
    x = jnp.linspace(1.0, 3.0, 8)[:, None]
    variables = {"params": {"bn": {"scale": jnp.ones(1), "bias": jnp.zeros(1)}}}
    variables["batch_stats"] = {"bn": {"mean": jnp.full(1, 2.0), "var": jnp.full(1, 4.0)}}
    with evaluation_mode((nn.BatchNorm,)):
        y, updated = network.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, 100 + (np.asarray(x) - 2.0) / np.sqrt(4.0 + 1e-5), rtol=1e-6)
    assert moved(variables["batch_stats"], updated["batch_stats"]) == set()


class TrainsByAttribute(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        return x + 10.0 * self.train


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [(TrainsByAttribute, "train", True), (nn.BatchNorm, "use_running_average", False)],
    ids=["own", "batch norm"],
)
def test_a_mode_that_no_call_can_change_is_refused(part, name, value):
    network = Calls(lambda x: part(**{name: value}, name="p")(x))
    text = f"^{part.__name__} at p has the attribute {name}={value}, which freezing cannot change; let it take {name}"
    with evaluation_mode((nn.Module,)), pytest.raises(UserError, match=text):
        network.init(jax.random.key(0), jnp.zeros((2, 1)), train=True)


def test_attention_that_takes_train_by_position_stays_frozen_in_a_step():
    """The loss is that of the network without what the module adds while training."""

    class Shift(nn.Module):
        @nn.compact
        def __call__(self, x, train=False, base_channels=None):
            return x + 10.0 * train

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False, base_channels=None):
            return Shift()(x, True)

    settings = Optim(name="sgd", momentum=0.0, nesterov=False, weight_decay=0.0, train_only="head")
    plain = take_steps(settings, steps=1, attention=None)[2]["loss"]
    assert float(take_steps(settings, steps=1, attention=Attention)[2]["loss"]) == pytest.approx(float(plain), rel=1e-6)
