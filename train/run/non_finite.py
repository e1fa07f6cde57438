"""What a run does about losses and gradients that are not finite, as `optim.non_finite` says."""

from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from se_flax.errors import UserError

PyTree = TypeVar("PyTree")

# More in a row are no accident of the data.
MOST_SKIPPED = 20
MOST_ROLLBACKS = 3
ADVICE = "lower optim.learning_rate, lengthen optim.warmup_epochs or set optim.clip_norm, and start in a new --workdir"


class NonFinite(UserError):
    """Figures, an evaluation or a state that are not finite.

    Args:
      what: happened, in words.
      advice: the rest of the sentence.
      before: checkpoints of earlier steps than this are good.
      position: in the data, after the images of the fault; None where the caller knows it.
    """

    def __init__(self, what: str, advice: str, before: int, position: dict[str, Any] | None = None):
        super().__init__(f"{what}; {advice}")
        self.what, self.before, self.position = what, before, position


@dataclass
class Skips:
    """Updates that were left out (`skip`); a checkpoint holds it as JSON."""

    total: int = 0
    in_a_row: int = 0

    def count(self, skipped: bool) -> bool:
        """Counts a step; True when so many were left out in a row that the run must end."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        return self.in_a_row >= MOST_SKIPPED

    def why(self, step: int) -> str:
        """Why the run ends at a step, in words."""
        return f"the loss or the gradient's norm was not finite in {self.in_a_row} steps in a row, up to step {step}"

    def ending(self, steps: int) -> list[str]:
        """A line for the end of a run of so many steps; none if nothing was left out."""
        updates = f"{self.total:,} of {steps:,} updates"
        return [f"{updates} left out: the loss or the gradient was not finite"] if self.total else []


@dataclass
class Rollbacks:
    """How often a run went back to the same checkpoint, or to earlier ones (`rollback`); a checkpoint holds it as JSON.

    A later checkpoint to go back to is one of a state whose next loss was finite, so the run has come further.
    """

    to: int = -1
    count: int = 0

    def go(self, step: int) -> bool:
        """Counts a rollback to the checkpoint of a step; False when it is one too many."""
        self.count = self.count + 1 if step <= self.to else 1
        self.to = step
        return self.count <= MOST_ROLLBACKS


def keep_if_not(finite: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """The new values where `finite`, else the old ones. The counts of learning-rate schedules go on in both cases.

    Unlike `optax.apply_if_finite` this also serves what is not the optimizer's: batch statistics and moving averages.

    Args:
      finite: bool scalar, equal on all replicas.
      new: tree of arrays.
      old: the same tree before the step.
    """

    def is_clock(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def leaf(new: Any, old: Any) -> Any:
        return new if is_clock(new) else jnp.where(finite, new, old)

    chosen: PyTree = jax.tree.map(leaf, new, old, is_leaf=is_clock)
    return chosen
