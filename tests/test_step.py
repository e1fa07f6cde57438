"""The per-replica step: the same numbers under shard_map, pmap and on one device, and what it computes."""

import functools
import logging
import re
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import se_flax
from se_flax import BatchNorm, Conv
from se_flax.nn.conv import normal_fan_out
from train.config import Augment, Optim
from train.optim.optimizers import Updates
from train.run.init import init_state, trace
from train.run.parallel import Replicas, make_replicas
from train.run.step import AXIS, make_eval_step, make_train_step

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CLASSES = 4


def a_model(scope=None, **attributes):
    norm = partial(se_flax.BatchNorm, axis_name=scope)
    return se_flax.create_model("seresnet20", depth=1, num_classes=CLASSES, norm=norm, **attributes)


@functools.cache
def initial_state(ema):
    """The same for every test: parameters do not depend on devices, and drawing them compiles for seconds."""
    optimizer = Updates(Optim(weight_decay=1e-3)).optimizer(optax.constant_schedule(0.05))
    return jax.device_get(init_state(trace(a_model(), 8), optimizer, seed=3, ema=ema))


def batches(count, size=16, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        label = rng.integers(0, CLASSES, size).astype(np.int32)
        image = rng.integers(0, 256, (size, 8, 8, 3)).astype(np.uint8) // 2 + 30 * label[:, None, None, None]
        yield {"image": image.astype(np.uint8), "label": label}


def train(backend, devices, steps=4, scope=AXIS, accumulate=1, settings=None, optimizer=None, ema=0.0, size=16):
    replicas = make_replicas(backend, devices)
    schedule = optax.constant_schedule(0.05)
    optimizer = optimizer or Updates(Optim(weight_decay=1e-3)).optimizer(schedule)
    model = a_model(scope)
    state = initial_state(ema > 0)
    state = replicas.replicate(state.replace(opt_state=optimizer.init(state.params)))
    step = replicas.spread(
        make_train_step(
            model,
            optimizer,
            schedule,
            mean=MEAN,
            std=STD,
            settings=settings or Augment(),
            num_classes=CLASSES,
            label_smoothing=0.1,
            ema_decay=ema,
            accumulate=accumulate,
        )
    )
    losses = []
    for batch in batches(steps, size):
        state, metrics = step(state, replicas.shard(batch))
        losses.append(float(metrics["loss"]))
    return jax.device_get(state), np.array(losses)


def assert_trees_close(a, b, rtol, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


AUGMENTED = Augment(flip=True, pad=1, mixup=0.2)


@pytest.fixture(scope="module")
def on_one_device():
    return train("shard_map", 1, settings=AUGMENTED, ema=0.9)


@pytest.mark.parametrize("backend", ["shard_map", "pmap"])
def test_eight_devices_give_the_loss_curve_of_one(on_one_device, backend):
    state, losses = train(backend, 8, settings=AUGMENTED, ema=0.9)
    np.testing.assert_allclose(losses, on_one_device[1], rtol=2e-5)
    assert_trees_close(state.params, on_one_device[0].params, rtol=0, atol=2e-4)
    assert_trees_close(state.ema, on_one_device[0].ema, rtol=0, atol=2e-4)


def test_shard_map_and_pmap_agree_with_batch_norm_per_replica(on_one_device):
    a_state, a_losses = train("shard_map", 4, scope=None, settings=AUGMENTED, ema=0.9)
    b_state, b_losses = train("pmap", 4, scope=None, settings=AUGMENTED, ema=0.9)
    assert np.abs(a_losses - on_one_device[1]).max() > 1e-3, "statistics per replica are those of the whole batch"
    np.testing.assert_allclose(a_losses, b_losses, rtol=1e-6)
    assert_trees_close(a_state.params, b_state.params, rtol=0, atol=1e-6)
    assert_trees_close(a_state.batch_stats, b_state.batch_stats, rtol=0, atol=1e-6)


def test_accumulation_is_the_mean_of_the_parts_gradients():
    """Two micro-batches on one device see what two replicas with batch norms of their own see."""
    sgd = optax.sgd(0.1)
    accumulated, losses = train("shard_map", 1, steps=1, scope=None, accumulate=2, optimizer=sgd)
    spread, spread_losses = train("shard_map", 2, steps=1, scope=None, optimizer=sgd)
    np.testing.assert_allclose(losses, spread_losses, rtol=1e-6)
    assert_trees_close(accumulated.params, spread.params, rtol=0, atol=1e-6)


def test_a_step_is_the_formula_without_the_machinery():
    """One SGD step, written out: normalise, apply, smoothed cross-entropy, gradient, subtract."""
    model = a_model()
    optimizer = optax.sgd(0.1)
    replicas = Replicas(tuple(jax.devices()[:1]))
    state = initial_state(False)
    state = replicas.replicate(state.replace(opt_state=optimizer.init(state.params)))
    (batch,) = batches(1)
    step = replicas.spread(
        make_train_step(
            model,
            optimizer,
            optax.constant_schedule(0.1),
            mean=MEAN,
            std=STD,
            settings=Augment(),
            num_classes=CLASSES,
            label_smoothing=0.1,
        )
    )
    new, metrics = step(state, replicas.shard(batch))

    def loss(params):
        images = (batch["image"] / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
        variables = {"params": params, "batch_stats": initial_state(False).batch_stats}
        logits, _ = model.apply(variables, jnp.asarray(images, jnp.float32), train=True, mutable=["batch_stats"])
        targets = 0.9 * np.eye(CLASSES)[batch["label"]] + 0.1 / CLASSES
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(initial_state(False).params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["accuracy"]) == np.mean(np.argmax(logits, -1) == batch["label"])
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, initial_state(False).params, grads)
    assert_trees_close(new.params, expected, rtol=0, atol=1e-5)
    assert int(new.step) == 1


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_counts_masked_examples_out(devices):
    model = a_model()
    variables = initial_state(False).variables()
    (batch,) = batches(1, size=32)
    batch["mask"] = np.arange(32) < 21
    images = (batch["image"][:21] / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    logits = np.asarray(jax.jit(model.apply)(variables, jnp.asarray(images, jnp.float32)))
    expected = int(np.sum(np.argmax(logits, -1) == batch["label"][:21]))

    replicas = make_replicas("shard_map", devices)
    sums = replicas.spread(make_eval_step(model, mean=MEAN, std=STD))(
        replicas.replicate(variables), replicas.shard(batch)
    )
    assert int(sums["count"]) == 21
    assert int(sums["top1"]) == expected
    assert int(sums["top5"]) == 21  # four classes: the right one is always among the first five


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(se_flax.UserError, match=r"parallel.devices=99, but JAX sees 8 cpu device\(s\); give 1 to 8"):
        make_replicas("shard_map", 99)


def test_an_unknown_backend_names_the_closest():
    with pytest.raises(se_flax.UserError, match=r"unknown parallel.backend 'shardmap'; closest: shard_map"):
        make_replicas("shardmap", 0)


class ThreeConvolutions(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        for _ in range(3):
            x = Conv(3, 3, kernel_init=normal_fan_out(1.75))(x)  # which nothing else has compiled
        return BatchNorm()(x, train=train)


def test_parameters_are_drawn_without_the_network_and_a_kind_of_kernel_is_compiled_once(caplog):
    model, key = ThreeConvolutions(), jax.random.key(5)
    with caplog.at_level(logging.WARNING, "jax"), jax.log_compiles():
        drawn = trace(model, 13).draw(key)
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    assert compiled.count("draw") == 1 and "conv_general_dilated" not in compiled
    expected = model.init(key, jnp.zeros((1, 13, 13, 3)))
    chex.assert_trees_all_equal_structs(drawn, expected)
    chex.assert_trees_all_close(drawn, expected, rtol=1e-6)
