"""Evaluation that counts every example of a split exactly once, whatever the batch size and the number of devices."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from train.run.stopping import Stop

# Batches under way at once: the device always has the next one, and a signal waits for no more than these.
LAG = 2
_SUMS = ("count", "top1", "top5", "loss")


@dataclass(frozen=True)
class Result:
    """Counts over a split.

    Attributes:
      count: examples.
      top1: of them, those whose class has the highest logit.
      top5: those whose class is among the five highest; None where there are no more than five classes.
      loss: mean cross-entropy.
    """

    count: int
    top1: int
    top5: int | None
    loss: float

    def metrics(self) -> dict[str, float | int]:
        """Counts and shares under the names that `metrics.jsonl` has."""
        counts = self.counts()
        shares = {f"eval_{name}": hits / self.count for name, hits in counts.items()}
        return {
            "eval_loss": self.loss,
            **shares,
            **{f"eval_{name}_count": hits for name, hits in counts.items()},
            "eval_count": self.count,
        }

    def counts(self) -> dict[str, int]:
        """Right answers by name, `top1` and `top5`, as far as they say something."""
        return {"top1": self.top1} | ({} if self.top5 is None else {"top5": self.top5})

    def __str__(self) -> str:
        return ", ".join(
            f"top-{name[3:]} {100 * hits / self.count:.2f} % ({hits:,} of {self.count:,})"
            for name, hits in self.counts().items()
        )


def padded_size(batch_size: int, replicas: int) -> int:
    """The smallest multiple of `replicas` that holds `batch_size` examples."""
    return -(-batch_size // replicas) * replicas


def evaluate(
    step: Callable[[Any, Any], Mapping[str, jax.Array]],
    variables: Any,
    batches: Iterable[Mapping[str, jax.Array]],
    num_classes: int,
    stop: Stop,
) -> Result:
    """Runs a spread evaluation step over a split.

    Args:
      step: `replicas.spread(make_eval_step(...))`.
      variables: replicated `{"params", "batch_stats"}`.
      batches: of `image`, `label`, `mask`, on the devices (`replicas.shard`); the same number on every host.
      num_classes: of the data.
      stop: whether to give up between two batches.

    Returns:
      The counts over all hosts.

    Raises:
      Stopped: the run was asked to stop.
    """
    totals: dict[str, Any] = dict.fromkeys(_SUMS, 0)
    under_way: deque[Mapping[str, jax.Array]] = deque()

    def add_up(keep: int) -> None:
        while len(under_way) > keep:
            sums = under_way.popleft()
            # Added on the host, where integers do not overflow and a mean over the split has float64's precision.
            for name in _SUMS:
                totals[name] += np.asarray(sums[name]).item()

    for batch in stop.between(batches):
        under_way.append(step(variables, batch))
        add_up(keep=LAG)
    add_up(keep=0)
    count = int(totals["count"])
    top5 = int(totals["top5"]) if num_classes > 5 else None
    return Result(count, int(totals["top1"]), top5, totals["loss"] / max(count, 1))
