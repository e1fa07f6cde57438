"""Network, optimizer and compiled steps of a run, built from the settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import optax

from train.build import build_model, loss_margin
from train.config import Config
from train.optim import optimizers
from train.optim.param_groups import Frozen, declared, frozen_parts, layer_depths, trace
from train.run.step import TrainState, init_state, make_eval_step, make_train_step


@dataclass(frozen=True)
class Program:
    """The parts of a run that do not depend on data or devices.

    Attributes:
      model: the network.
      optimizer: its optimizer.
      rate: the optimizer's learning rate by number of updates.
      frozen: what training leaves as it is.
      train_step: of one replica, see `train.run.step.make_train_step`.
      eval_step: of one replica, see `train.run.step.make_eval_step`.
      init: the state before the first step; takes `variables` to start from, None draws them.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    frozen: Frozen
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    init: Callable[..., TrainState]


def make_program(
    config: Config, num_classes: int, per_epoch: float, total: int, model: nn.Module | None = None
) -> Program:
    """Builds the program of a run.

    Args:
      config: the settings, completed (`train.optim.finetune.complete`).
      num_classes: of the data.
      per_epoch: updates per epoch.
      total: updates of the run.
      model: network to train in place of the settings' own, called like it.

    Returns:
      The program.

    Raises:
      UserError: a setting that a network, an optimizer or a step cannot have.
    """
    model = build_model(config, num_classes) if model is None else model
    rate = optimizers.schedule(config.optim, per_epoch, total)
    shapes = trace(model, config.data.image_size)
    frozen = frozen_parts(config.optim, model, shapes)
    slowed = optimizers.by_layer(config.optim)
    depths = layer_depths(declared(model, f"optim.{slowed}"), shapes["params"]) if slowed else None
    optimizer = optimizers.make_optimizer(config.optim, rate, depths)
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
    )
    init = partial(
        init_state,
        model,
        optimizer,
        config.data.image_size,
        config.seed,
        ema=config.optim.ema_decay > 0,
        frozen=frozen.params,
    )
    return Program(model, optimizer, rate, frozen, train_step, make_eval_step(model, **pixels), init)
