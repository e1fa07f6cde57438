"""Training figures between two records, and the time that their steps took."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_MEANS = ("loss", "accuracy", "grad_norm")


class Window:
    """Sums of the figures since the last record. A checkpoint holds them, so a resumed run records the same means.

    Args:
      saved: from `saved` of a window, to go on from.

    Attributes:
      count: steps that the sums are of.
      skipped: steps whose update was left out and whose figures are not finite; None where none ever is.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None):
        saved = saved or {}
        self.count: int = saved.get("count", 0)
        self.skipped: int | None = saved.get("skipped")
        self._sums: dict[str, float] = dict(saved.get("sums") or dict.fromkeys(_MEANS, 0.0))
        self._learning_rate: float = saved.get("learning_rate", 0.0)
        self._seconds: float = saved.get("seconds", 0.0)
        self._waited: float = saved.get("waited", 0.0)
        self._since: float | None = None

    def start_clock(self) -> None:
        """Training goes on from here; what came before is no part of the window's time."""
        self._since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For work between training steps, which is no part of the window's time."""
        running = self._since is not None
        self._stop_clock()
        try:
            yield
        finally:
            if running:
                self.start_clock()

    def add(self, figures: Mapping[str, float]) -> None:
        """The figures of one step."""
        self._learning_rate = figures["learning_rate"]
        if "skipped" in figures:
            self.skipped = (self.skipped or 0) + int(figures["skipped"])
            if figures["skipped"]:
                return
        # Not `sum` over a list: that rounds in another way on Python 3.12, and a saved window has the sums alone.
        for name in _MEANS:
            self._sums[name] += figures[name]
        self.count += 1

    @property
    def steps(self) -> int:
        """Steps since the last record."""
        return self.count + (self.skipped or 0)

    def waited(self, seconds: float) -> None:
        """The loop had no batch to go on with."""
        if self._since is not None:
            self._waited += seconds

    def close(self, batch_size: int) -> dict[str, float]:
        """Figures of at least one step, means over those that count, and a new window."""
        running = self._since is not None
        self._stop_clock()
        seconds = max(self._seconds, 1e-9)
        record = {
            **({name: total / self.count for name, total in self._sums.items()} if self.count else {}),
            "learning_rate": self._learning_rate,
            "images_per_second": round(self.steps * batch_size / seconds, 2),
            "data_wait": round(min(1.0, self._waited / seconds), 4),
            **({} if self.skipped is None else {"skipped": self.skipped}),
        }
        Window.__init__(self)
        if running:
            self.start_clock()
        return record

    def saved(self) -> dict[str, Any]:
        """The window as JSON; floats survive it to the bit."""
        with self.paused():
            return {
                "count": self.count,
                "skipped": self.skipped,
                "sums": dict(self._sums),
                "learning_rate": self._learning_rate,
                "seconds": self._seconds,
                "waited": self._waited,
            }

    def _stop_clock(self) -> None:
        if self._since is not None:
            self._seconds += time.monotonic() - self._since
            self._since = None
