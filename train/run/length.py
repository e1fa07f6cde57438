"""Length of a run, and the effect of another length at a resume."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from train.config import Config
from train.optim.optimizers import Updates

# Steps at which two schedules are compared; they differ over ranges, not at single steps.
_COMPARED = 64


def total_steps(steps: int, epochs: float, per_epoch: float) -> int:
    """Updates of a run.

    Args:
      steps: as set; 0 takes the epochs.
      epochs: as set; 0 trains nothing beside what is fitted before the first step.
      per_epoch: updates in an epoch.
    """
    return steps or (max(1, round(epochs * per_epoch)) if epochs else 0)


def length_change(
    saved: Mapping[str, Any], config: Config, updates: Updates, per_epoch: float, done: int
) -> str | None:
    """Says what a length that was changed at a resume does to the learning rate.

    Length is the only setting of the schedule that may change; `train.config.check_same_run` refuses others, such as
    the batch size, accumulation or warm-up.

    Args:
      saved: flattened settings of the checkpoint.
      config: the settings now.
      updates: of its `optim`.
      per_epoch: updates in an epoch, then and now.
      done: updates of the checkpoint.

    Returns:
      One sentence, or None where the length is the same.
    """
    before = total_steps(saved["steps"], saved["epochs"], per_epoch)
    now = total_steps(config.steps, config.epochs, per_epoch)
    if before == now:
        return None
    said = f"the run is {now:,} steps long now and was {before:,} when the checkpoint was written"
    if done >= now:
        return f"{said}: its {done:,} steps are all that is trained"
    old, new = (updates.schedule(per_epoch, total) for total in (before, now))
    first, last = min(done, before), min(before, now)
    compared = np.unique(np.linspace(first, last, _COMPARED).astype(np.int32))
    name = config.optim.schedule
    if all(float(old(step)) == float(new(step)) for step in compared):
        return f"{said}; the learning rate ({name}) does not change by that"
    return (
        f"{said}: from here on the learning rate is that of the {name} schedule over {now:,} steps, "
        f"{float(new(done)):.4g} at this step instead of {float(old(done)):.4g}"
    )
