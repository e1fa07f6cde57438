"""Decays of the learning rate by name, from settings that `train.optim.optimizers.Updates` has checked.

- `constant`: `learning_rate`.
- `step`: times `decay_factor` from each of `boundaries` on (Hu et al., "Squeeze-and-Excitation Networks", section 5.1:
  0.6, divided by ten every 30 epochs).
- `cosine`: half a cosine from `learning_rate` at step 0 to `final_learning_rate` at `total_steps` (Loshchilov and
  Hutter, "SGDR", equation 5, without restarts).
- `exponential`: times `decay_factor` once in every `decay_every_epochs` (Tan and Le, "EfficientNet", section 5.2: 0.97
  every 2.4 epochs).
- `triangular`: a line from `first_learning_rate` at step 0 to `learning_rate` at the share `peak` of the run, and one
  from there to `final_learning_rate` at `total_steps` (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds", section 2).
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.config import Optim


def _staircase(rate: float, factor: float, at_steps: Iterable[float]) -> optax.Schedule:
    """`rate * factor**k` after k of the given steps (fractional ones count from the next whole step)."""
    # Integers and values are settled here in float64: a division of float32 steps on the device would put some
    # boundaries one step off. The small slack keeps epoch 1.1 of 100 steps, 110.00000000000001, at 110.
    steps = np.array([math.ceil(step - 1e-6) for step in at_steps], np.int32)
    rates = (rate * np.power(float(factor), np.arange(len(steps) + 1, dtype=np.float64))).astype(np.float32)
    return lambda step: jnp.asarray(rates)[jnp.sum(jnp.asarray(step) >= steps, dtype=jnp.int32)]


def _constant(settings: Optim, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    del steps_per_epoch, total_steps
    return _staircase(settings.learning_rate, 1.0, ())


def _step(settings: Optim, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    del total_steps
    at_steps = (epoch * steps_per_epoch for epoch in settings.boundaries)
    return _staircase(settings.learning_rate, settings.decay_factor, at_steps)


def _exponential(settings: Optim, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    every = settings.decay_every_epochs * steps_per_epoch
    at_steps = (k * every for k in range(1, int(total_steps / every) + 1))
    return _staircase(settings.learning_rate, settings.decay_factor, at_steps)


def _cosine(settings: Optim, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    del steps_per_epoch
    first, final = settings.learning_rate, settings.final_learning_rate

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / total_steps, 0.0, 1.0)
        return final + (first - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    return rate


def _triangular(settings: Optim, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    del steps_per_epoch
    at = (0.0, settings.peak * total_steps, float(total_steps))
    rates = (settings.first_learning_rate, settings.learning_rate, settings.final_learning_rate)
    return lambda step: jnp.interp(jnp.asarray(step, jnp.float32), jnp.asarray(at), jnp.asarray(rates))


SCHEDULES: dict[str, Callable[[Optim, float, int], optax.Schedule]] = {
    "constant": _constant,
    "step": _step,
    "cosine": _cosine,
    "exponential": _exponential,
    "triangular": _triangular,
}
