"""Network, optimizer and compiled steps of a run, built from the settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import optax

from train.build import build_model, loss_margin
from train.config import Config
from train.optim.optimizers import Updates
from train.optim.param_groups import Frozen, frozen_parts, rate_factors
from train.run.init import TracedNetwork, init_state, trace
from train.run.step import TrainState, make_eval_step, make_train_step
from train.run.tta import VIEWS


@dataclass(frozen=True)
class Program:
    """The parts of a run that do not depend on data or devices.

    Attributes:
      network: the network with the shapes of its variables.
      updates: optimizer and schedule, as set.
      optimizer: the network's optimizer.
      rate: the optimizer's learning rate by number of updates.
      frozen: what training leaves as it is.
      train_step: of one replica, see `train.run.step.make_train_step`.
      eval_step: of one replica, see `train.run.step.make_eval_step`.
      init: the state before the first step; takes `variables` to start from, None draws them.
    """

    network: TracedNetwork
    updates: Updates
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    frozen: Frozen
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    init: Callable[..., TrainState]


def make_program(
    config: Config,
    num_classes: int,
    per_epoch: float,
    total: int,
    *,
    updates: Updates | None = None,
    network: TracedNetwork | None = None,
) -> Program:
    """Builds the program of a run.

    Args:
      config: the settings, completed (`train.optim.finetune.complete`).
      num_classes: of the data.
      per_epoch: updates per epoch.
      total: updates of the run; 0 for one that only fits its classifier.
      updates: of `config.optim`, where they were checked already.
      network: the settings' own, where it was traced already, or one to train in its place, called like it.

    Returns:
      The program.

    Raises:
      UserError: a setting that a network, an optimizer or a step cannot have.
    """
    updates = updates or Updates(config.optim)
    network = network or trace(build_model(config, num_classes), config.data.image_size)
    model, shapes = network.model, network.shapes
    # A run of no steps (`epochs=0`) has no schedule, and may be shorter than its warm-up.
    rate = updates.schedule(per_epoch, total) if total else optax.constant_schedule(config.optim.learning_rate)
    frozen = frozen_parts(config.optim, model, shapes)
    optimizer = updates.optimizer(rate, rate_factors(config.optim, model, shapes))
    pixels = {"mean": config.data.mean, "std": config.data.std}
    train_step = make_train_step(
        model,
        optimizer,
        rate,
        **pixels,
        settings=config.augment,
        num_classes=num_classes,
        label_smoothing=config.optim.label_smoothing,
        margin=loss_margin(config),
        ema_decay=config.optim.ema_decay,
        accumulate=config.optim.accumulate,
        frozen=frozen,
        examples=round(per_epoch * config.data.batch_size),
        skip=config.optim.non_finite == "skip",
    )
    eval_step = make_eval_step(model, **pixels, views=VIEWS[config.eval_tta])
    ema = config.optim.ema_decay > 0
    init = partial(init_state, network, optimizer, config.seed, ema=ema, frozen=frozen.params)
    return Program(network, updates, optimizer, rate, frozen, train_step, eval_step, init)
