"""Data that lives on the device: the run of the host's data, its crops, its checkpoints; and what cannot live there."""

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from PIL import Image
from test_run import arrays_of, assert_same_bits, figures_of, make_config
from test_step import CLASSES, MEAN, STD, batches

import train.run.feed
from se_flax import BatchNorm
from se_flax.errors import UserError
from train.config import Augment, Data
from train.data.loader import BadImages, DataSplits, TrainLoader, open_data, train_examples, train_loader
from train.data.sources import ArraySource, check_settings
from train.run.feed import Feed, lives_on_devices
from train.run.init import init_state, trace
from train.run.loop import run
from train.run.parallel import make_replicas
from train.run.step import make_steps, make_train_step

STEPS = 12


def config_of(place, **parallel):
    config = make_config()
    config.data.place = place
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return config


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("host")
    return workdir, run(config_of("host"), workdir)


@pytest.fixture
def several_steps_a_call(monkeypatch):
    """Calls as on an accelerator, of up to three steps."""
    monkeypatch.setattr(train.run.feed, "CPU_MOST_STEPS", 3)


def stop_after_batch(number, monkeypatch):
    """Sends SIGTERM when the batch of the given step is fetched."""
    original, batches = TrainLoader.__next__, itertools.count(1)

    def batch(self):
        if next(batches) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(TrainLoader, "__next__", batch)


# --- Order and images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [1, 3])
def test_indices_name_the_images_of_the_batches_over_several_epochs(hosts):
    data = Data(source="digits", image_size=9, batch_size=300)
    splits = open_data(data)
    whole = train_examples(splits, data)
    assert whole["image"].shape == (1437, 9, 9, 3) and whole["label"].dtype == np.int32
    for host in range(hosts):
        settings = {"seed": 5, "start": 600, "process_index": host, "process_count": hosts}
        images = train_loader(splits, data, **settings)
        indices = train_loader(splits, data, indices=True, **settings)
        for _ in range(8):  # 2,400 images
            batch, named = next(images), next(indices)
            assert named.keys() == {"index"} and named["index"].dtype == np.int32
            for key, rows in whole.items():
                np.testing.assert_array_equal(rows[named["index"]], batch[key], strict=True)
        assert images.get_state() == indices.get_state()
        images.close(), indices.close()


def test_files_are_decoded_once_and_bad_ones_are_replaced_as_on_the_host(tmp_path):
    rng = np.random.default_rng(0)
    for path in (tmp_path / name / f"{i}.png" for name in "ab" for i in range(12)):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (int(rng.integers(5, 30)), 20, 3), np.uint8)).save(path)
    (tmp_path / "a" / "3.png").write_bytes(b"not an image")
    data = Data(source=f"folder:{tmp_path}", image_size=8, batch_size=6, train_crop="center", bad_images="skip")
    splits = open_data(data)
    bad = {name: BadImages(splits, data) for name in ("host", "device")}
    whole = train_examples(splits, data, bad["device"])
    images = train_loader(splits, data, seed=0, bad=bad["host"])
    indices = train_loader(splits, data, seed=0, indices=True)
    for _ in range(8):
        batch, named = next(images), next(indices)["index"]
        for key, rows in whole.items():
            np.testing.assert_array_equal(rows[named], batch[key], strict=True)
    assert bad["host"].train == bad["device"].train and len(bad["device"].train) == 1
    with pytest.raises(UserError, match=r"3\.png could not be read"):
        train_examples(splits, dataclasses.replace(data, bad_images="error"))


# --- Calls of several steps -------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Compiles quickly, has statistics and draws random numbers."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(BatchNorm()(nn.Conv(8, (3, 3))(x), train=train))
        return nn.Dense(CLASSES)(nn.Dropout(0.2, deterministic=not train)(x.mean(axis=(1, 2))))


def assert_trees(compare, a, b, **tolerance):
    for one, other in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True):
        compare(one, other, **tolerance)


@pytest.mark.parametrize(("backend", "devices"), [("shard_map", 1), ("shard_map", 8), ("pmap", 2)])
def test_a_call_of_several_steps_is_these_steps_however_they_are_divided(backend, devices):
    replicas, optimizer = make_replicas(backend, devices), optax.sgd(0.05, momentum=0.9)
    step = make_train_step(
        Small(),
        optimizer,
        optax.linear_schedule(0.05, 0.01, 4),
        mean=MEAN,
        std=STD,
        settings=Augment(flip=True, pad=1, mixup=0.2),
        num_classes=CLASSES,
        ema_decay=0.9,
    )
    start = jax.device_get(init_state(trace(Small(), 8), optimizer, seed=3, ema=True))
    four = list(batches(4))
    order = np.random.default_rng(1).permutation(64).astype(np.int32)  # where in the table each example lies
    joined = {key: np.concatenate([batch[key] for batch in four]) for key in four[0]}
    table = {key: np.empty_like(rows) for key, rows in joined.items()}
    for key, rows in table.items():
        rows[order] = joined[key]
    data = replicas.copy({"image": table["image"].reshape(64, -1), "label": table["label"]})
    single, steps = replicas.spread(step), replicas.spread(make_steps(step, 8), shared=1)

    def feed():
        return Feed(({"index": column} for column in order.reshape(4, 16)), shared=(data,), most_steps=4)

    def called(lengths):
        calls, state, rows = feed(), replicas.replicate(start), []
        for length in lengths:
            state, metrics = steps(state, replicas.shard(calls.fetch(length)), data)
            metrics = jax.device_get(metrics)
            assert all(values.shape == (4,) and not values[length:].any() for values in metrics.values())
            rows.extend({name: values[i] for name, values in metrics.items()} for i in range(length))
        return state, rows

    whole, divided = called([4]), called([1, 3])
    assert int(whole[0].step) == 4
    assert_trees(np.testing.assert_array_equal, divided, whole)

    # Each step from the same state, so that rounding does not add up.
    state, calls = replicas.replicate(start), feed()
    for batch, row in zip(four, whole[1], strict=True):
        looped, _ = steps(state, replicas.shard(calls.fetch(1)), data)
        state, metrics = single(state, replicas.shard(batch))
        assert_trees(np.testing.assert_allclose, looped, state, rtol=1e-5, atol=1e-6)
        assert_trees(np.testing.assert_allclose, row, metrics, rtol=1e-4)


# --- Whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_is_to_the_bit_that_of_the_hosts_data(on_host, tmp_path, capsys):
    outcome = run(config_of("device"), tmp_path)
    assert "reading 1,437 images, which stay on the device ..." in capsys.readouterr().err
    assert_same_bits(tmp_path, on_host[0])
    assert figures_of(tmp_path) == figures_of(on_host[0])
    assert outcome.result == on_host[1].result
    position = {"position": STEPS * 48, "seed": 0, "examples": 1437}
    saved = tmp_path / "checkpoints" / str(STEPS) / "data" / "metadata"
    assert json.loads(saved.read_text()) == position


@pytest.mark.parametrize("order", [("host", "device"), ("device", "host")])
def test_a_run_may_change_places_at_a_resume(on_host, tmp_path, monkeypatch, order):
    with monkeypatch.context() as patch:
        stop_after_batch(7, patch)
        assert run(config_of(order[0]), tmp_path).step == 6
    run(config_of(order[1]), tmp_path)
    assert_same_bits(tmp_path, on_host[0])


@pytest.mark.usefixtures("several_steps_a_call")
def test_calls_of_several_steps_train_evaluate_and_resume_bit_for_bit(on_host, tmp_path, monkeypatch):
    config = config_of("device")
    config.log_every_steps = 5
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after_batch(8, patch)
        stopped = run(config, tmp_path / "parts")
    # Calls end at 3, 4 (a checkpoint), 5 (a record), 6 (an evaluation), 8 (a checkpoint): half of the last was fetched.
    assert not stopped.completed and stopped.step == 6
    run(config, tmp_path / "parts")
    assert figures_of(tmp_path / "parts") == figures_of(tmp_path / "whole")
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")
    rows, expected = figures_of(tmp_path / "whole"), figures_of(on_host[0])
    assert [row["step"] for row in rows if "loss" in row] == [5, 10, 12]
    evaluated, there = ([row for row in lines if "eval_loss" in row] for lines in (rows, expected))
    assert [(row["step"], row["eval_count"]) for row in evaluated] == [(6, 360), (12, 360)]
    assert evaluated[0]["eval_loss"] == pytest.approx(there[0]["eval_loss"], rel=0.05)
    first, here = arrays_of(tmp_path / "whole", STEPS), arrays_of(on_host[0], STEPS)
    assert first.keys() == here.keys()
    (key,) = (name for name in here if "key" in name)
    np.testing.assert_array_equal(first[key], here[key])


@pytest.mark.usefixtures("several_steps_a_call")
def test_a_loss_that_is_not_finite_is_refused_with_its_step(tmp_path):
    config = config_of("device", backend="pmap", devices=2)
    config.optim.schedule, config.optim.decay_factor, config.optim.boundaries = "step", 1e30, (6 / (1437 / 48),)
    config.optim.weight_decay, config.checkpoint.every_steps = 0.0, 4
    with pytest.raises(UserError, match=r"at step 8; the last good checkpoint is .*/checkpoints/4"):
        run(config, tmp_path)


# --- What is refused, and what auto chooses ---------------------------------------------------------------------------


def test_an_unknown_place_names_the_closest():
    with pytest.raises(UserError, match=r"data.place='devices' is not known; closest: device"):
        check_settings(Data(place="devices"))


def test_images_that_are_cropped_anew_cannot_live_on_the_device():
    text = (
        r"data.place='device' keeps images that are the same in every epoch, but data.train_crop='random_resized' "
        r"crops each one anew on the host; use data.place='host', or data.train_crop='resize'"
    )
    with pytest.raises(UserError, match=text):
        check_settings(Data(place="device", train_crop="random_resized"))


def splits_of(count):
    """As many images of one pixel, which take no memory."""
    images = np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (count, 1, 1, 3))
    source = ArraySource(images, np.broadcast_to(np.int32(0), (count,)), "none")
    return DataSplits(source, source, ("a",))


class Accelerator:
    """A device that tells what memory it has."""

    platform, process_index = "gpu", 0

    def __init__(self, limit, used=0):
        self.stats = {"bytes_limit": limit, "bytes_in_use": used} if limit else None

    def memory_stats(self):
        return self.stats


def chosen(device, *, epochs=10.0, count=100, **settings):
    replicas = dataclasses.replace(make_replicas("shard_map", 1), devices=(device, device))
    return lives_on_devices(Data(image_size=10, batch_size=20, **settings), splits_of(count), replicas, epochs)


# 100 training images and half of as many for evaluation, 304 bytes each: 45,600 on each of two devices.
def test_auto_keeps_what_takes_a_quarter_of_an_accelerators_memory():
    assert chosen(Accelerator(182_400))
    assert not chosen(Accelerator(182_399))
    assert not chosen(Accelerator(None)), "unknown memory"
    assert not chosen(Accelerator(10**9), train_crop="random_resized")
    assert not chosen(Accelerator(10**9), epochs=0.9), "would read images that the run does not need"
    assert not chosen(Accelerator(10**9), place="host")
    assert not chosen(jax.devices()[0]), "a CPU"


def test_data_that_does_not_fit_is_refused_with_both_sizes():
    assert chosen(Accelerator(100_000, used=54_400), place="device")
    assert chosen(Accelerator(None), place="device")
    text = (
        r"data.place='device', but the data set takes 45,600 bytes on a device \(100 training images of 10 x 10 "
        r"pixels, and its share of the evaluation's\) and 45,599 bytes are free there; use data.place='host'"
    )
    with pytest.raises(UserError, match=text):
        chosen(Accelerator(100_000, used=54_401), place="device")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the free memory of a CPU is read from Linux")
def test_a_cpu_has_the_hosts_memory():
    assert chosen(jax.devices()[0], place="device")
    with pytest.raises(UserError, match=r"takes 456,000,000,000,000,000 bytes on a device"):
        replicas, splits = make_replicas("shard_map", 2), splits_of(10**15)
        lives_on_devices(Data(image_size=10, batch_size=20, place="device"), splits, replicas, 1.0)
