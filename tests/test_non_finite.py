"""Steps without a finite loss or gradient: left out, or gone back over; on many devices, stopped, killed, resumed."""

import json
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_device_data import Small
from test_run import STEPS, assert_same_bits, figures_of, make_config
from test_step import CLASSES, MEAN, STD, batches

import train.run.loop
import train.run.program
import train.validate
from se_flax import BatchNorm
from se_flax.errors import UserError
from train.config import Augment, Model, Optim
from train.optim.optimizers import Updates
from train.run import seal
from train.run.feed import Feed
from train.run.init import init_state, trace
from train.run.loop import run
from train.run.non_finite import MOST_ROLLBACKS, MOST_SKIPPED, Rollbacks
from train.run.parallel import make_replicas
from train.run.step import make_steps, make_train_step
from train.run.trainer import Trainer

BAD, STEEP = -1, -2  # labels that make the loss NaN, and the gradient alone


def margin(logits, labels):
    steep = jnp.any(labels == STEEP)
    root = jnp.sqrt(jnp.where(steep, jnp.sum(0 * logits), 1.0))
    return logits * jnp.where(jnp.any(labels == BAD), jnp.nan, 1.0) + root


# --- One step ---------------------------------------------------------------------------------------------------------


def step_of(optimizer, rate, **settings):
    fixed = {"mean": MEAN, "std": STD, "settings": Augment(), "num_classes": CLASSES, "margin": margin}
    return make_train_step(Small(), optimizer, rate, ema_decay=0.9, **fixed, **settings)


@pytest.mark.parametrize(("backend", "devices", "label"), [("shard_map", 8, BAD), ("pmap", 2, STEEP)])
def test_a_skipped_update_leaves_everything_but_the_clocks(backend, devices, label):
    """One bad example on the last of several devices, in calls of several steps too."""
    replicas, rate = make_replicas(backend, devices), optax.linear_schedule(0.05, 0.01, 4)
    optimizer = Updates(Optim(name="adamw")).optimizer(rate)
    three = list(batches(3))
    three[1]["label"][-1] = label
    step, state = step_of(optimizer, rate, skip=True), init_state(trace(Small(), 8), optimizer, seed=3, ema=True)
    state = replicas.replicate(state)
    if backend == "pmap":
        compiled, calls, shared = replicas.spread(step), three, ()
    else:
        table = {key: np.concatenate([batch[key] for batch in three]) for key in three[0]}
        shared = (replicas.copy({"image": table["image"].reshape(48, -1), "label": table["label"]}),)
        compiled = replicas.spread(make_steps(step, 8), shared=1)
        columns = np.arange(48, dtype=np.int32).reshape(3, 16)
        calls = [
            {"index": np.stack([columns[i], columns[j] if j else np.full(16, -1)], 1).astype(np.int32)}
            for i, j in ((0, 0), (1, 0), (1, 2))
        ]
    first, before = compiled(state, replicas.shard(calls[0]), *shared)
    second, bad = compiled(first, replicas.shard(calls[1]), *shared)
    # The call of two steps does the bad one again.
    third, after = compiled(first if shared else second, replicas.shard(calls[2]), *shared)
    assert [float(np.ravel(metrics["skipped"])[0]) for metrics in (before, bad)] == [0, 1]
    assert np.isfinite(np.ravel(bad["loss"])[0]) == (label == STEEP)
    assert not np.isfinite(np.ravel(bad["grad_norm"])[0])
    assert np.ravel(after["skipped"])[-1] == 0 and np.isfinite(np.ravel(after["loss"])[-1])

    was, now = (jax.tree_util.tree_leaves_with_path(jax.device_get(x)) for x in (first, second))
    clocks = []
    for (path, old), (_, new) in zip(was, now, strict=True):
        if np.array_equal(old, new):
            continue
        clocks.append(jax.tree_util.keystr(path))
        assert (int(old), int(new)) == (1, 2)
    # Adam's own count of its updates stays.
    assert len(clocks) == 2 and clocks[0] == ".step" and clocks[1].startswith(".opt_state") and "count" in clocks[1]
    assert int(third.step) == 3
    for old, new in zip(jax.tree.leaves(second.params), jax.tree.leaves(third.params), strict=True):
        assert np.isfinite(new).all() and not np.array_equal(old, new)


@pytest.mark.program
def test_the_step_that_stops_has_no_test_in_it():
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda: init_state(trace(Small(), 8), optimizer, seed=3, ema=True))
    replicas = make_replicas("shard_map", 1)
    for skip in (False, True):
        step = step_of(optimizer, optax.constant_schedule(0.1), skip=skip)
        program, (_, metrics) = jax.make_jaxpr(replicas.spread(step), return_shape=True)(state, next(batches(1)))
        assert ("is_finite" in str(program)) is skip
        assert ("skipped" in metrics) is skip


# --- Runs -------------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Compiles quickly and has statistics."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(BatchNorm()(nn.Conv(4, (3, 3))(x), train=train))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@pytest.fixture
def config(monkeypatch):
    """Settings of runs of a network of a few parameters, for which the label `BAD` gives NaN."""
    monkeypatch.setattr(train.validate, "build_model", lambda config, classes: Tiny())
    monkeypatch.setattr(train.run.program, "loss_margin", lambda config: margin)
    monkeypatch.setattr(train.run.loop, "save_model", lambda *arguments: None)
    config = make_config()
    config.model = Model(name="seresnet20")
    config.augment, config.optim.label_smoothing = Augment(flip=True), 0.0
    return config


def spoil(monkeypatch, numbers):
    """Makes one example bad in the batches of these numbers, counted from 1 along the data."""
    original = Feed.fetch

    def fetch(self, steps):
        batch = dict(original(self, steps))
        if self.loader.get_state()["position"] // 48 in numbers:
            batch["label"] = np.where(np.arange(48) == 5, BAD, batch["label"])
        return batch

    monkeypatch.setattr(Feed, "fetch", fetch)


def losses_of(monkeypatch):
    """Losses of the steps that are looked at, by step."""
    original, found = Trainer._look_at, {}

    def look_at(self, step, figures):
        found[step] = figures["loss"]
        original(self, step, figures)

    monkeypatch.setattr(Trainer, "_look_at", look_at)
    return found


class KilledError(Exception):
    """Stands for a signal that cannot be handled."""


def interrupt(monkeypatch, when, action):
    original = Trainer._advance

    def advance(self, *arguments):
        original(self, *arguments)
        if when(self):
            action()

    monkeypatch.setattr(Trainer, "_advance", advance)


def kill():
    raise KilledError


def test_skipped_steps_are_counted_across_a_stop(config, tmp_path, monkeypatch):
    config.optim.non_finite = "skip"
    spoil(monkeypatch, {3, 4, 9})
    with monkeypatch.context() as patch:
        losses = losses_of(patch)
        outcome = run(config, tmp_path / "whole")
    assert "\n3 of 12 updates left out: the loss or the gradient was not finite\n" in str(outcome)
    lines = [row for row in figures_of(tmp_path / "whole") if "learning_rate" in row]
    assert [(row["step"], row["skipped"]) for row in lines] == [(2, 0), (4, 2), (6, 0), (8, 0), (10, 1), (12, 0)]
    for row in lines:
        counted = [x for x in (losses[row["step"] - 1], losses[row["step"]]) if np.isfinite(x)]
        assert ("loss" in row) is bool(counted)
        assert not counted or row["loss"] == pytest.approx(np.mean(counted), rel=1e-12)
    assert "NaN" not in (tmp_path / "whole" / "metrics.jsonl").read_text()
    with monkeypatch.context() as patch:
        interrupt(patch, lambda trainer: trainer.step == 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(config, tmp_path / "parts").step == 3
    again = run(config, tmp_path / "parts")
    assert again.skips == outcome.skips
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")
    assert figures_of(tmp_path / "parts") == figures_of(tmp_path / "whole")


def test_too_many_skipped_in_a_row_end_the_run(config, tmp_path, monkeypatch):
    config.optim.non_finite, config.steps, config.checkpoint.keep_last = "skip", 40, 6
    spoil(monkeypatch, {3, *range(6, 100)})
    with pytest.raises(UserError) as caught:
        run(config, tmp_path)
    assert MOST_SKIPPED == 20
    # The state of step 5 gave the first of them; that of step 4 gave finite numbers.
    assert str(caught.value) == (
        "the loss or the gradient's norm was not finite in 20 steps in a row, up to step 25; the last good checkpoint "
        f"is {tmp_path}/checkpoints/4; lower optim.learning_rate, lengthen optim.warmup_epochs or set "
        "optim.clip_norm, and start in a new --workdir"
    )


def test_a_run_goes_back_and_on_with_the_next_images(config, tmp_path, monkeypatch, capsys):
    """The seventh batch is bad, and the next one too, at the step after the checkpoint that the run went back to."""
    config.optim.non_finite = "rollback"
    whole, killed, expected = (tmp_path / name for name in ("whole", "killed", "expected"))
    with monkeypatch.context() as patch:
        spoil(patch, {7, 8})
        assert run(config, whole).completed
        assert [line for line in capsys.readouterr().err.splitlines() if "back to" in line] == [
            f"the loss became nan and the gradient's norm nan at step {step}; back to step 4 and on with other images "
            f"(rollback {count} of 3)"
            for step, count in ((7, 1), (5, 2))
        ]
        # Killed when it has done the step after the second rollback, it does all of it again, rollbacks included.
        with patch.context() as inner:
            interrupt(inner, lambda trainer: (trainer.progress.rollbacks.count, trainer.step) == (2, 6), kill)
            with pytest.raises(KilledError):
                run(config, killed)
        assert run(config, killed).completed
        assert "at step 5; back to step 4" in capsys.readouterr().err
    # The same by hand: the state of step 4, with the ninth batch next, and no batch that is bad.
    config.optim.non_finite = "stop"
    with monkeypatch.context() as patch:
        interrupt(patch, lambda trainer: trainer.step == 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(config, expected).step == 4
    checkpoint = expected / "checkpoints" / "4"
    place = checkpoint / "data" / "metadata"
    assert json.loads(place.read_text())["position"] == 4 * 48
    place.write_text(json.dumps({**json.loads(place.read_text()), "position": 8 * 48}))
    seal.seal(checkpoint)
    assert run(config, expected).completed
    for workdir in (whole, killed):
        assert_same_bits(workdir, expected)
        assert figures_of(workdir) == figures_of(expected)
        assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"8", str(STEPS)}


def test_a_run_does_not_go_back_for_ever(config, tmp_path, monkeypatch):
    """The checkpoint of step 8 gives no finite loss either: it is no new one to go back to, and is deleted."""
    config.optim.non_finite = "rollback"
    spoil(monkeypatch, {7, 12, *range(13, 99)})
    with pytest.raises(UserError) as caught:
        run(config, tmp_path)
    # Batches 8 to 11 make the steps 5 to 8; then batches 12, 13 and 14 are bad.
    assert MOST_ROLLBACKS == 3
    assert str(caught.value) == (
        "the loss became nan and the gradient's norm nan at step 5; the last good checkpoint is "
        f"{tmp_path}/checkpoints/4; lower optim.learning_rate, lengthen optim.warmup_epochs or set optim.clip_norm, "
        "and start in a new --workdir; 3 rollbacks to it did not help"
    )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(config, tmp_path, monkeypatch):
    config.optim.non_finite = "rollback"
    spoil(monkeypatch, {2})
    with pytest.raises(UserError, match=r"at step 2; no good checkpoint was written yet; lower optim\.learning_rate"):
        run(config, tmp_path)


def test_rollbacks_are_counted_until_there_is_a_later_checkpoint():
    rollbacks = Rollbacks()
    assert [rollbacks.go(step) for step in (8, 4, 4, 12, 12, 8, 8)] == [True] * 6 + [False]
