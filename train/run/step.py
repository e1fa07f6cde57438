"""One training step and one evaluation step of one replica: pure functions, which know nothing of files or devices.

Both run on every replica with the mapped axis `AXIS` bound (`train.run.parallel`), each on its own part of the batch.
Randomness is drawn per example from the example's index in the whole batch, so augmentation is the same on one device
and on many; only dropout and stochastic depth draw per replica.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from train.config import Augment
from train.data.alternate_flip import epochs, mirrored
from train.data.augment import augment, example_keys, mix
from train.optim.losses import cross_entropy, topk_correct
from train.optim.optimizers import ema_update
from train.optim.param_groups import NOTHING, Frozen, evaluation_mode, merge, split
from train.run.non_finite import keep_if_not
from train.run.tta import VIEWS, Views

AXIS = "replica"

Array = jax.Array
PyTree = Any
Batch = Mapping[str, Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and writes, and so everything that a checkpoint holds beside the data's position.

    Attributes:
      step: int32 scalar, updates done.
      params: float32 parameters.
      batch_stats: float32 running statistics.
      opt_state: the optimizer's.
      ema: moving average of `{"params", "batch_stats"}`, or None.
      key: uint32 key data, constant through the run; each step folds its number in.
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree
    key: Array

    def variables(self) -> dict[str, PyTree]:
        """What evaluation and deployment use: the moving average where there is one."""
        return {"params": self.params, "batch_stats": self.batch_stats} if self.ema is None else dict(self.ema)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    settings: Augment,
    num_classes: int,
    label_smoothing: float = 0.0,
    margin: Callable[[Array, Array], Array] | None = None,
    ema_decay: float = 0.0,
    accumulate: int = 1,
    frozen: Frozen = NOTHING,
    examples: int = 0,
    skip: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Builds the step of one replica.

    Args:
      model: the network.
      optimizer: its optimizer.
      schedule: the optimizer's learning rate, to report it.
      mean: per channel, of images in [0, 1].
      std: likewise.
      settings: augmentation; read while tracing only.
      num_classes: of the labels.
      label_smoothing: share of the target spread over all classes.
      margin: from logits and class indices to the logits that the loss sees (`train.optim.margins`); None leaves them.
        Not for mixed images.
      ema_decay: of the moving average; 0 for none.
      accumulate: micro-batches whose gradients make one update; each has its own batch statistics, in turn.
      frozen: parameters that keep their values, to the bit, and modules that run in evaluation mode. With any of
        these, no statistics are recorded.
      examples: training images, from which `augment.alternate_flip` knows the epoch of an image.
      skip: leave out updates whose loss or gradient norm is not finite on any replica: the step is counted, and all
        else stays as it was.

    Returns:
      `step(state, batch)` for a batch `{"image": uint8 [n, S, S, 3], "label": int32 [n]}` of this replica, giving the
      next state and the metrics `loss`, `accuracy` (share of top-1 on the augmented images, mixed ones by the
      label that weighs more), `grad_norm` (of what is trained), `learning_rate` (the head's): float32 scalars, equal
      on all replicas. With `skip` also `skipped`, 1 for an update that was left out and else 0.
    """
    if settings.alternate_flip and not examples:
        raise ValueError("alternate_flip needs the number of training examples, which tells the epoch of an image")
    mean_, std_ = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def loss_of(
        trained: PyTree, kept: PyTree, stats: PyTree, part: Batch, key: Array
    ) -> tuple[Array, tuple[PyTree, Array]]:
        keys = example_keys(key, part["index"])
        images = augment(part["image"].astype(jnp.float32) / 255.0, keys, settings, mean, part.get("mirrored"))
        targets = jax.nn.one_hot(part["label"], num_classes)
        images, targets = mix(images, targets, keys, settings.mixup, settings.cutmix)
        dropout_key = jax.random.fold_in(jax.random.fold_in(key, part["index"][0]), 1)
        with evaluation_mode(frozen.modules):
            logits, updated = model.apply(
                {"params": merge(trained, kept), "batch_stats": stats},
                (images - mean_) / std_,
                train=True,
                mutable=[] if frozen.modules else ["batch_stats"],
                rngs={"dropout": dropout_key},
            )
        scored = logits if margin is None else margin(logits, part["label"])
        loss = jnp.mean(cross_entropy(scored, targets, label_smoothing))
        # Of a mixed image, the label that weighs more is the right answer.
        correct = jnp.mean(topk_correct(logits, jnp.argmax(targets, axis=-1), 1).astype(jnp.float32))
        return loss, (updated.get("batch_stats", stats), correct)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        count = batch["label"].shape[0]
        index = jax.lax.axis_index(AXIS) * count + jnp.arange(count)
        whole = {"image": batch["image"], "label": batch["label"], "index": index}
        if settings.alternate_flip:
            epoch = epochs(state.step, index, count * jax.lax.axis_size(AXIS), examples)
            whole["mirrored"] = mirrored(batch["image"], jax.random.wrap_key_data(state.key), epoch)
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        trained, kept = split(state.params, frozen.params)
        parts = jax.tree.map(lambda x: x.reshape(accumulate, count // accumulate, *x.shape[1:]), whole)

        def one_part(stats: PyTree, part: Batch) -> tuple[PyTree, tuple[Array, Array, PyTree]]:
            (loss, (stats, correct)), grads = gradient(trained, kept, stats, part, key)
            return stats, (loss, correct, grads)

        if accumulate == 1:
            stats, (loss, correct, grads) = one_part(state.batch_stats, jax.tree.map(lambda x: x[0], parts))
        else:
            stats, (loss, correct, grads) = _mean_scan(one_part, state.batch_stats, parts, accumulate)
        loss, correct, grads = jax.lax.pmean((loss, correct, grads), AXIS)
        if not frozen.modules:  # the mean of equal values may differ from them in the last bit
            stats = jax.lax.pmean(stats, AXIS)

        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = merge(optax.apply_updates(trained, updates), kept)
        ema = state.ema
        if ema is not None:
            ema = ema_update(ema, {"params": params, "batch_stats": stats}, ema_decay, state.step)
        metrics = {
            "loss": loss,
            "accuracy": correct,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        new = state.replace(step=state.step + 1, params=params, batch_stats=stats, opt_state=opt_state, ema=ema)
        if skip:
            # Both are means over all replicas, so that all of them decide alike.
            finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
            new = keep_if_not(finite, new, state).replace(step=new.step)
            metrics["skipped"] = 1.0 - finite
        return new, metrics

    return train_step


def make_steps(
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]], image_size: int
) -> Callable[[TrainState, Batch, Batch], tuple[TrainState, dict[str, Array]]]:
    """Builds a call that runs several steps of one replica on data that lies on its device.

    The number of steps is a value, not a shape: one program does calls of every length, so the bits do not depend on
    how a run was divided into calls. XLA compiles the body of a loop otherwise than a program of its own, and no
    barrier or layout constraint prevents it: against the plain step, sums differ by rounding.

    Args:
      step: from `make_train_step`.
      image_size: S below.

    Returns:
      `steps(state, batch, data)` for `{"index": int32 [n, k]}`, of which column i says which examples make the i-th
      batch of this replica and columns of -1 at the end are no steps, and for
      `{"image": uint8 [N, S * S * 3], "label": int32 [N]}`. Gives the state after these steps and every metric as
      float32 [k], zeros where there was no step.
    """

    def steps(state: TrainState, batch: Batch, data: Batch) -> tuple[TrainState, dict[str, Array]]:
        index = batch["index"]
        length, most = index.shape

        def one(number: Array, carry: tuple[TrainState, dict[str, Array]]) -> tuple[TrainState, dict[str, Array]]:
            state, rows = carry
            at = jax.lax.dynamic_index_in_dim(index, number, axis=1, keepdims=False)
            chosen = {name: jnp.take(values, at, axis=0, mode="clip") for name, values in data.items()}
            chosen["image"] = chosen["image"].reshape(length, image_size, image_size, 3)
            state, metrics = step(state, chosen)
            return state, {name: rows[name].at[number].set(value) for name, value in metrics.items()}

        shapes = {
            "image": jax.ShapeDtypeStruct((length, image_size, image_size, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((length,), jnp.int32),
        }
        rows = {name: jnp.zeros((most,), x.dtype) for name, x in jax.eval_shape(step, state, shapes)[1].items()}
        return jax.lax.fori_loop(0, jnp.sum(index[0] >= 0), one, (state, rows))

    return steps


def _mean_scan(part_step: Callable[..., Any], stats: PyTree, parts: Batch, count: int) -> tuple[PyTree, PyTree]:
    """Runs the micro-batches one after another and averages what they return, holding one gradient at a time."""
    first = jax.eval_shape(partial(part_step, stats), jax.tree.map(lambda x: x[0], parts))[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

    def body(carry: tuple[PyTree, PyTree], part: Batch) -> tuple[tuple[PyTree, PyTree], None]:
        stats, total = carry
        stats, out = part_step(stats, part)
        return (stats, jax.tree.map(lambda t, o: t + o / count, total, out)), None

    (stats, mean), _ = jax.lax.scan(body, (stats, zeros), parts)
    return stats, mean


def make_eval_step(
    model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...], views: Views = VIEWS["none"]
) -> Callable[[PyTree, Batch], dict[str, Array]]:
    """Builds the evaluation of one batch.

    Args:
      model: the network.
      mean: per channel, of images in [0, 1].
      std: likewise.
      views: of the images, whose logits are averaged (`train.run.tta`).

    Returns:
      `step(variables, batch)` for `{"image": uint8 [n, S, S, 3], "label": int32 [n], "mask": bool [n]}`; padded
      examples have mask False. Gives sums over all replicas: `count`, `top1`, `top5` (int32) and `loss` (float32).
    """
    mean_, std_ = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def eval_step(variables: PyTree, batch: Batch) -> dict[str, Array]:
        images = (batch["image"].astype(jnp.float32) / 255.0 - mean_) / std_
        logits = jnp.asarray(sum(weight * jnp.asarray(model.apply(variables, view)) for weight, view in views(images)))
        mask = batch["mask"]
        sums = {
            "count": jnp.sum(mask, dtype=jnp.int32),
            "top1": jnp.sum(topk_correct(logits, batch["label"], 1) & mask, dtype=jnp.int32),
            "top5": jnp.sum(topk_correct(logits, batch["label"], 5) & mask, dtype=jnp.int32),
            "loss": jnp.sum(jnp.where(mask, cross_entropy(logits, batch["label"]), 0.0)),
        }
        return jax.lax.psum(sums, AXIS)

    return eval_step
