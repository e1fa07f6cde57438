"""Optimizers, their learning rate and the moving average of the weights, from the settings in `config.Optim`.

Names are strings only here: `OPTIMIZERS` and `train.optim.schedules.SCHEDULES` map them to builders. Everything in this
module counts *updates*; the training step accumulates micro-batches.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from se_flax.errors import UserError, closest
from train.config import Optim
from train.optim.param_groups import Path, by_layer, scale_layers
from train.optim.schedules import SCHEDULES

PyTree: TypeAlias = Any

# --- Validation -------------------------------------------------------------------------------------------------------


class _Limit(NamedTuple):
    """The condition on a number, with its words for error messages."""

    holds: Callable[[float], bool]
    allowed: str
    remedy: str


NON_FINITE = ("stop", "skip", "rollback")


def _at_least_zero(remedy: str) -> _Limit:
    return _Limit(lambda x: 0 <= x < math.inf, "0 or a positive number", remedy)


def _positive(remedy: str) -> _Limit:
    return _Limit(lambda x: 0 < x < math.inf, "a positive number", remedy)


def _below_one(remedy: str) -> _Limit:
    return _Limit(lambda x: 0 <= x < 1, "at least 0 and below 1", remedy)


_LIMITS = {
    "learning_rate": _at_least_zero("the update is subtracted, so the rate has no sign"),
    "warmup_epochs": _at_least_zero("0 starts at the full rate"),
    "decay_factor": _positive("the paper's is 0.1 for step, EfficientNet's 0.97 for exponential"),
    "decay_every_epochs": _positive("EfficientNet's is 2.4"),
    "first_learning_rate": _at_least_zero("0 starts at rest"),
    "peak": _Limit(lambda x: 0 < x < 1, "above 0 and below 1", "it is a share of the run, 0.25 is usual"),
    "final_learning_rate": _at_least_zero("0 lets the schedule end at zero"),
    "momentum": _below_one("0.9 is usual, 0 turns it off"),
    "b1": _below_one("0.9 is usual"),
    "b2": _below_one("0.999 is usual"),
    "eps": _positive("1e-8 is usual for adamw, 1e-3 for rmsprop"),
    "rmsprop_decay": _below_one("0.9 is usual"),
    "weight_decay": _at_least_zero("0 turns it off"),
    "clip_norm": _at_least_zero("0 turns clipping off"),
    "accumulate": _Limit(
        lambda x: x >= 1 and float(x).is_integer(), "a whole number from 1", "1 turns accumulation off"
    ),
    "ema_decay": _below_one("0.9999 is usual, 0 turns the average off"),
    "label_smoothing": _below_one("0.1 is usual, 0 turns it off"),
    "layer_decay": _Limit(lambda x: 0 < x <= 1, "above 0 and at most 1", "0.8 is usual, 1 gives all layers one rate"),
    "backbone_multiplier": _positive("0.1 is usual, 1 turns it off; optim.train_only='head' freezes the backbone"),
    "norm_bias_multiplier": _positive("64 is Jordan's, 1 turns it off"),
}


def _check_name(field: str, given: str, allowed: Collection[str]) -> None:
    if given not in allowed:
        raise UserError(f"optim.{field} is {given!r}, which does not exist; {closest(given, allowed)}")


def check(settings: Optim) -> None:
    """Validates the optimizer's settings, before anything is compiled.

    Args:
      settings: the run's `optim` section.

    Raises:
      UserError: a name is unknown, or a number out of range.
    """
    _check_name("name", settings.name, OPTIMIZERS)
    _check_name("schedule", settings.schedule, SCHEDULES)
    _check_name("non_finite", settings.non_finite, NON_FINITE)
    for field, limit in _LIMITS.items():
        value = getattr(settings, field)
        if not limit.holds(value):  # also refuses NaN
            raise UserError(f"optim.{field} is {value}; it must be {limit.allowed} ({limit.remedy})")
    _check_boundaries(settings.schedule, tuple(settings.boundaries))
    if settings.train_only not in ("", "head"):
        raise UserError(
            f"optim.train_only is {settings.train_only!r}; it must be 'head', or empty to train every parameter"
        )
    slowed = by_layer(settings)
    if settings.train_only and slowed:
        raise UserError(
            f"optim.train_only is 'head' and optim.{slowed} is {getattr(settings, slowed)}, which slows down "
            "layers that do not move at all; leave one of the two out"
        )


def _check_boundaries(schedule_name: str, boundaries: tuple[float, ...]) -> None:
    rising = all(a < b for a, b in zip((0.0, *boundaries), (*boundaries, math.inf), strict=True))
    if not rising:
        raise UserError(
            f"optim.boundaries is {boundaries}; it must hold positive epochs in rising order, such as (30, 60, 90)"
        )
    if schedule_name == "step" and not boundaries:
        raise UserError(
            "optim.schedule is 'step' but optim.boundaries is empty; name the epochs at which the rate drops, "
            "such as (30, 60, 90), or set optim.schedule to 'constant'"
        )


# --- Selection of parameters ------------------------------------------------------------------------------------------


def _leaf_name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)


def kernels(params: PyTree) -> PyTree:
    """Marks the leaves that weight decay and LAMB's layer-wise rate apply to by default.

    Args:
      params: tree of arrays, named as Linen names them.

    Returns:
      The same tree of bool: True for leaves called `kernel` with at least two axes, the weights of convolutions and
      dense layers. Biases and scales of norms are False (He et al., "Bag of Tricks", section 3.1), and so are leaves
      with other names, such as embeddings.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: _leaf_name(path) == "kernel" and x.ndim >= 2, params)


def _all(params: PyTree) -> PyTree:
    return jax.tree.map(lambda _: True, params)


def muon_labels(params: PyTree) -> PyTree:
    """Labels the leaves for Muon; AdamW updates the others.

    Args:
      params: tree of arrays, named as Linen names them.

    Returns:
      The same tree of labels: `"muon"` for dense kernels [in, out] and for convolution kernels [h, w, in, out] (HWIO)
      with more than one input channel; `"adamw"` for biases, norms, one-dimensional convolutions (ECA's) and kernels
      with one input channel, since a depthwise kernel is a set of independent filters, not a matrix.
    """

    def label(path: tuple[Any, ...], x: jax.Array) -> str:
        matrix = x.ndim == 2 or (x.ndim == 4 and x.shape[2] > 1)
        return "muon" if matrix and _leaf_name(path) == "kernel" else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


# --- Optimizers -------------------------------------------------------------------------------------------------------

Mask: TypeAlias = Callable[[PyTree], PyTree]


def _sgd(settings: Optim, rate: optax.Schedule, decay: Mask) -> optax.GradientTransformation:
    # As in PyTorch, the rate multiplies the momentum buffer. In Caffe, which trained the paper's networks, and in
    # TensorFlow the buffer includes the rate; the two differ only after the rate changes.
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=decay),
        optax.trace(settings.momentum, nesterov=settings.nesterov),
        optax.scale_by_learning_rate(rate),
    )


def _adamw(settings: Optim, rate: optax.Schedule, decay: Mask) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps),
        optax.add_decayed_weights(settings.weight_decay, mask=decay),
        optax.scale_by_learning_rate(rate),
    )


def _lamb(settings: Optim, rate: optax.Schedule, decay: Mask) -> optax.GradientTransformation:
    # Leaves without weight decay keep Adam's step, as in timm and in the authors' code (there
    # `exclude_from_layer_adaptation`). `optax.lamb` scales them by their norm too, so that a bias with the initial
    # value zero hardly changes.
    return optax.chain(
        optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps),
        optax.add_decayed_weights(settings.weight_decay, mask=decay),
        optax.masked(optax.scale_by_trust_ratio(), decay),
        optax.scale_by_learning_rate(rate),
    )


def _rmsprop(settings: Optim, rate: optax.Schedule, decay: Mask) -> optax.GradientTransformation:
    # `tf.compat.v1.train.RMSPropOptimizer`: epsilon inside the root, a mean square initialised to one, and a momentum
    # of updates that include the rate. PyTorch's has none of the three.
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=decay),
        optax.scale_by_rms(decay=settings.rmsprop_decay, eps=settings.eps, initial_scale=1.0, eps_in_sqrt=True),
        optax.scale_by_learning_rate(rate),
        optax.trace(settings.momentum, nesterov=False),
    )


def _matrix_axes(x: jax.Array) -> optax.contrib.MuonDimensionNumbers:
    """A kernel as a matrix, for HWIO and [in, out]: the last axis is the output, all others the input."""
    return optax.contrib.MuonDimensionNumbers(reduction_axis=tuple(range(x.ndim - 1)), output_axis=x.ndim - 1)


def _match_adam_rms(updates: PyTree) -> PyTree:
    """Scales orthogonal updates by `0.2 * sqrt(max(in, out))`, about the root mean square of an Adam update."""
    return jax.tree.map(lambda x: 0.2 * math.sqrt(max(x.size // x.shape[-1], x.shape[-1])) * x, updates)


def _muon(settings: Optim, rate: optax.Schedule, decay: Mask) -> optax.GradientTransformation:
    # Both parts have one rate, since the orthogonal updates are scaled to the size of Adam's (Liu et al., "Muon is
    # Scalable for LLM Training", section 2.2). Not `optax.contrib.muon`, whose AdamW part would have Muon's Nesterov
    # setting and no mask for the weight decay.
    muon = optax.contrib.scale_by_muon(
        beta=settings.momentum,
        nesterov=settings.nesterov,
        weight_dimension_numbers=lambda updates: jax.tree.map(_matrix_axes, updates),
    )
    adam = optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps)
    return optax.chain(
        optax.partition(
            {"muon": optax.chain(muon, optax.stateless(lambda u, _: _match_adam_rms(u))), "adamw": adam}, muon_labels
        ),
        optax.add_decayed_weights(settings.weight_decay, mask=decay),
        optax.scale_by_learning_rate(rate),
    )


OPTIMIZERS: dict[str, Callable[[Optim, optax.Schedule, Mask], optax.GradientTransformation]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lamb": _lamb,
    "rmsprop": _rmsprop,
    "muon": _muon,
}
"""Optimizers by name.

- `sgd`: momentum or Nesterov's, as in PyTorch. Weight decay is added to the gradient before the momentum.
- `adamw`: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2; as in PyTorch the decay is
  multiplied by the learning rate.
- `lamb`: You et al., "Large Batch Optimization for Deep Learning", algorithm 2; leaves without weight decay keep Adam's
  update. The paper clips the gradient's global norm at 1 (`clip_norm`) and has `eps` 1e-6.
- `rmsprop`: as in TensorFlow 1, for EfficientNet and MobileNetV3, which set `eps` to 1e-3. Weight decay is added to the
  gradient.
- `muon`: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", for the kernels that `muon_labels`
  names, AdamW for the rest, at one common rate of AdamW's size; decoupled weight decay. The kernel of a grouped
  convolution is orthogonalised as one matrix: its shape does not tell the groups.
"""


@dataclass(frozen=True)
class Updates:
    """How a run updates its parameters: learning rate and optimizer, from settings that are checked once, here.

    Attributes:
      settings: the run's `optim` section.

    Raises:
      UserError: a setting is out of range.
    """

    settings: Optim

    def __post_init__(self) -> None:
        check(self.settings)

    def schedule(self, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
        """The learning rate as a function of the number of updates made so far.

        It decays as `train.optim.schedules` says of the schedule's name. The first `warmup_epochs` rise linearly
        instead, from zero at step 0 towards `learning_rate`. The decay's clock runs from step 0 all the same, as in
        EfficientNet's published code: the warm-up replaces the beginning of the decay and does not move its end, so a
        boundary at epoch 30 means epoch 30.

        Args:
          steps_per_epoch: updates in an epoch; need not be whole.
          total_steps: updates in the run.

        Returns:
          A function of an integer scalar (the step, traced or not) that returns a float32 scalar. Past `total_steps`
          it stays where it ended.

        Raises:
          UserError: a run shorter than its warm-up, or without a step.
        """
        s = self.settings
        if not (steps_per_epoch > 0 and total_steps > 0):
            raise UserError(
                f"the run has {total_steps} steps of {steps_per_epoch} an epoch; both must be positive "
                "(is the batch larger than the data set?)"
            )
        warmup_steps = s.warmup_epochs * steps_per_epoch
        if total_steps < warmup_steps:
            raise UserError(
                f"optim.warmup_epochs is {s.warmup_epochs}, which is {warmup_steps:g} steps, but the run has only "
                f"{total_steps}; train longer or warm up for at most {total_steps / steps_per_epoch:g} epochs"
            )
        decayed = SCHEDULES[s.schedule](s, steps_per_epoch, total_steps)
        if not warmup_steps:
            return decayed

        def rate(step: jax.typing.ArrayLike) -> jax.Array:
            now = jnp.asarray(step, jnp.float32)
            return jnp.where(now < warmup_steps, s.learning_rate * now / warmup_steps, decayed(step))

        return rate

    def optimizer(
        self, schedule: optax.Schedule, factors: Mapping[Path, float] | None = None
    ) -> optax.GradientTransformation:
        """The optimizer that the settings name (`OPTIMIZERS`), with clipping before it and weight decay inside it.

        Weight decay reaches the leaves that `kernels` marks, or every parameter with `decay_norm_and_bias`. The global
        norm is clipped first of all, on the gradient as it comes. The factors multiply the updates last of all,
        which is to give every part a rate of its own: the rate multiplies all of an update in each of the five.

        Args:
          schedule: learning rate by number of updates, from `schedule`.
          factors: by path of the parameter, from `train.optim.param_groups.rate_factors`; None or none for one rate.

        Returns:
          A transformation whose `update` needs the parameters as its third argument.
        """
        s = self.settings
        optimizer = OPTIMIZERS[s.name](s, schedule, _all if s.decay_norm_and_bias else kernels)
        if s.clip_norm:
            optimizer = optax.chain(optax.clip_by_global_norm(s.clip_norm), optimizer)
        return optax.chain(optimizer, scale_layers(factors)) if factors else optimizer


# --- Moving average ---------------------------------------------------------------------------------------------------


def ema_update(ema_tree: PyTree, new_tree: PyTree, decay: float, step: jax.typing.ArrayLike) -> PyTree:
    """One step of the moving average of parameters and batch statistics.

    `average -= (1 - d) * (average - value)` with `d = min(decay, (1 + step) / (10 + step))`, the warm-up of
    TensorFlow's `ExponentialMovingAverage(decay, num_updates)`, which lets the average forget the initial weights.

    Args:
      ema_tree: the average so far, a tree of arrays.
      new_tree: the new values, the same tree.
      decay: in [0, 1).
      step: integer scalar, the number of previous updates of the average.

    Returns:
      The new average, computed in float32, with the dtypes of `ema_tree`. Leaves that are not floating-point (counters)
      are copied from `new_tree`.
    """
    count = jnp.asarray(step, jnp.float32)
    forget = 1.0 - jnp.minimum(decay, (1.0 + count) / (10.0 + count))

    def leaf(average: jax.Array, value: jax.Array) -> jax.Array:
        if not jnp.issubdtype(average.dtype, jnp.floating):
            return value
        old = average.astype(jnp.float32)
        return (old - forget * (old - value.astype(jnp.float32))).astype(average.dtype)

    return jax.tree.map(leaf, ema_tree, new_tree)
