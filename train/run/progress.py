"""Where a run stands beside its state and its position in the data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from train.run.non_finite import Rollbacks, Skips
from train.run.window import Window


@dataclass(frozen=True)
class Due:
    """What is still to be done at the step that a run has reached.

    Attributes:
      evaluation: of the state.
      checkpoint: with the figures of that evaluation, if it is due too.
    """

    evaluation: bool = False
    checkpoint: bool = False


@dataclass
class Progress:
    """A checkpoint holds it as JSON.

    Attributes:
      best_top1: share of the best evaluation.
      due: what is to be done before the next step.
      window: figures since the last record.
      skips: updates that were left out.
      rollbacks: how often the run went back.
    """

    best_top1: float = 0.0
    due: Due = Due()
    window: Window = field(default_factory=Window)
    skips: Skips = field(default_factory=Skips)
    rollbacks: Rollbacks = field(default_factory=Rollbacks)

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> "Progress":
        """What `saved` gave; a new run's for an empty mapping."""
        due, skips, rollbacks = (run.get(name, {}) for name in ("due", "skips", "rollbacks"))
        return cls(
            run.get("best_top1", 0.0), Due(**due), Window(run.get("window")), Skips(**skips), Rollbacks(**rollbacks)
        )

    def left(self) -> Due:
        """What a run that stops here leaves to the next one: the checkpoint alone it has then."""
        return self.due if self.due.evaluation else Due()

    def saved(self) -> dict[str, Any]:
        """As JSON, for a run that goes on from a checkpoint of this step."""
        return {
            "best_top1": self.best_top1,
            "due": asdict(self.left()),
            "window": self.window.saved(),
            "skips": asdict(self.skips),
            "rollbacks": asdict(self.rollbacks),
        }

    def unrecorded(self) -> list[str]:
        """Figures of this step that are still to be recorded, by a name that their line has."""
        steps = self.window.steps
        figures = {"loss": steps, "skipped": steps, "eval_loss": self.due.evaluation}
        return [name for name, still in figures.items() if still]
