"""The loop over training steps: batches in, figures out, evaluation and checkpoints when they are due."""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from se_flax.errors import UserError
from train.config import Config
from train.run.checkpoint import Checkpoints
from train.run.evaluate import Result
from train.run.feed import Feed
from train.run.parallel import Replicas
from train.run.report import Report, epoch_line
from train.run.runtime import stop_signals
from train.run.step import TrainState

# Losses are looked at this many calls late, so that the host does not wait for a step it has only just started.
LAG = 2
# A profile skips the compilation and the first steps, and stays small enough for a browser.
_PROFILE_STEPS = (10, 15)
_MEANS = ("loss", "accuracy", "grad_norm")


@dataclass
class _Window:
    """Figures of the steps since the last record, and the time that they took."""

    figures: list[dict[str, float]] = field(default_factory=list)
    started: float = 0.0
    waited: float = 0.0  # seconds of these in which the loop had no batch to go on with

    def restart_clock(self) -> None:
        """What came before is no part of the window's time."""
        self.started, self.waited = time.monotonic(), 0.0

    def close(self, batch_size: int) -> dict[str, float]:
        """Mean figures, and a new window."""
        count = len(self.figures)
        seconds = max(time.monotonic() - self.started, 1e-9)
        means = {name: sum(figures[name] for figures in self.figures) / count for name in _MEANS}
        record = {
            **means,
            "learning_rate": self.figures[-1]["learning_rate"],
            "images_per_second": round(count * batch_size / seconds, 2),
            "data_wait": round(min(1.0, self.waited / seconds), 4),
        }
        self.figures.clear()
        self.restart_clock()
        return record


@dataclass
class Trainer:
    """A run under way: what changes from step to step, and the parts that it drives.

    Attributes:
      config: the completed settings.
      workdir: for a profile.
      replicas: where steps run.
      feed: the training data.
      train_step: `feed.spread` of the step: from state and what a call reads to the next state and the steps' figures.
      evaluation: from the state's variables to a result.
      checkpoints: of the run.
      report: of the run.
      run_info: what a checkpoint says of its run.
      total: steps of the run.
      per_epoch: steps of an epoch.
      state: the training state; its memory goes to the next one.
      step: updates done.
      best_top1: share of the best evaluation.
      result: the last evaluation, if any was due.
    """

    config: Config
    workdir: Path
    replicas: Replicas
    feed: Feed
    train_step: Any
    evaluation: Callable[[Any], Result]
    checkpoints: Checkpoints
    report: Report
    run_info: dict[str, Any]
    total: int
    per_epoch: float
    state: TrainState
    step: int = 0
    best_top1: float = 0.0
    result: Result | None = None
    _pending: deque[tuple[int, int, dict[str, jax.Array]]] = field(default_factory=deque, init=False)
    _window: _Window = field(default_factory=_Window, init=False)

    def train(self) -> bool:
        """Runs to the last step; False when a signal stopped it before."""
        if self.step >= self.total:
            new = not self.checkpoints.newest()  # a run of no steps; any other recorded this step when it reached it
            self.evaluate(record=new)
            if new:
                self.save(self.result)
            return True
        first, calls, compiled = self.step, itertools.count(1), None
        with stop_signals() as stop:
            while self.step < self.total:
                before = self.step
                self._profile(before - first)
                steps = self._steps_of_call(first)
                batch = self._next_batch(steps)
                if compiled is None:
                    compiled = self.compile(batch)
                self._advance(compiled, batch, steps)
                last = self.step == self.total
                stopping = stop(next(calls)) and not last
                evaluating = (last or self._passed(self._evaluate_every, before, self.step)) and not stopping
                if evaluating:
                    self.evaluate()
                if last or stopping or self._passed(self._save_every, before, self.step):
                    self.save(self.result if evaluating else None)
                if stopping:
                    return False
        return True

    @property
    def _evaluate_every(self) -> float:
        return self.config.eval_every_epochs * self.per_epoch

    @property
    def _save_every(self) -> float:
        settings = self.config.checkpoint
        return settings.every_steps or settings.every_epochs * self.per_epoch

    def _steps_of_call(self, first: int) -> int:
        """Steps to the next one after which the host has something to do, or as many as a call may do."""
        before, most = self.step, self.feed.most_steps

        def ends(step: int) -> bool:
            return (
                step == self.total
                or step % self.config.log_every_steps == 0
                or (self.config.profile and step - first in _PROFILE_STEPS)
                or self._passed(self._evaluate_every, before, step)
                or self._passed(self._save_every, before, step)
            )

        return next((steps for steps in range(1, most) if ends(before + steps)), most)

    def compile(self, batch: Any) -> Callable[..., Any]:
        """Compiles the training step and says what the first wait is for.

        Args:
          batch: on the devices.

        Returns:
          The step, which takes batches of these shapes alone.
        """
        begun = time.monotonic()
        self.report.say("compiling the training step ...")
        compiled: Callable[..., Any] = self.train_step.lower(self.state, batch, *self.feed.shared).compile()
        self.report.say(f"compiled in {time.monotonic() - begun:.1f} s")
        self.report.start()
        self._window.restart_clock()
        return compiled

    def evaluate(self, *, record: bool = True) -> None:
        """Evaluates the state; without `record` the figures are only said."""
        self._look_at_losses(keep=0)
        begun = time.monotonic()
        with self.report.paused():
            result = self.result = self.evaluation(self.state.variables())
            if not math.isfinite(result.loss):
                self._refuse(self.step, f"the loss of the evaluation became {result.loss} at step {self.step}")
            self.best_top1 = max(self.best_top1, result.top1 / result.count)
            if record:
                self.report.write(self.step, self._epoch(self.step), result.metrics())
            self.report.say(epoch_line(self._epoch(self.step), result, time.monotonic() - begun))
            self.report.draw()
        self._window.restart_clock()

    def save(self, result: Result | None) -> None:
        """Starts writing a checkpoint; `result` is the evaluation of this step, if there was one."""
        # No state follows a loss that was not looked at, and a resumed run starts its averages where this one does.
        self._look_at_losses(keep=0)
        self._record(self.step)
        with self.report.paused():
            self.checkpoints.save(
                self.step,
                self.state,
                data=self.feed.loader.get_state(),
                run={**self.run_info, "best_top1": self.best_top1},
                metrics=result.metrics() if result else None,
            )
        self._window.restart_clock()

    def _advance(self, compiled: Callable[..., Any], batch: Any, steps: int) -> None:
        """One call of the compiled step, and figures of earlier ones."""
        self.state, metrics = compiled(self.state, batch, *self.feed.shared)
        self._pending.append((self.step, steps, metrics))
        self.step += steps
        self._look_at_losses(keep=LAG)

    def _next_batch(self, steps: int) -> Any:
        """What the next call reads, on the devices."""
        asked = time.monotonic()
        batch = self.feed.fetch(steps)
        self._window.waited += time.monotonic() - asked
        return self.replicas.shard(batch)

    def _passed(self, every: float, before: int, step: int) -> bool:
        """Whether a multiple of `every` steps (a fraction when epochs are) is reached after `before`, by `step`."""
        return every > 0 and math.floor(step / every + 1e-9) > math.floor(before / every + 1e-9)

    def _epoch(self, step: int) -> float:
        return step / self.per_epoch

    def _profile(self, done: int) -> None:
        if not self.config.profile or done not in _PROFILE_STEPS:
            return
        folder = self.workdir / "profile"
        if done == _PROFILE_STEPS[0]:
            jax.profiler.start_trace(str(folder))
        else:
            jax.block_until_ready(self.state.step)
            jax.profiler.stop_trace()
            self.report.say(f"profile of steps {_PROFILE_STEPS[0]} to {_PROFILE_STEPS[1]}: {folder}")

    def _look_at_losses(self, keep: int) -> None:
        """Fetches the metrics of all calls but the last `keep`, and refuses to go on from a loss that is not finite."""
        while len(self._pending) > keep:
            before, steps, metrics = self._pending.popleft()
            rows = {name: np.atleast_1d(values) for name, values in jax.device_get(metrics).items()}
            for row in range(steps):
                step, figures = before + row + 1, {name: float(values[row]) for name, values in rows.items()}
                if not all(map(math.isfinite, figures.values())):
                    said = f"the loss became {figures['loss']} and the gradient's norm {figures['grad_norm']}"
                    self._refuse(step - 1, f"{said} at step {step}")
                self._window.figures.append(figures)
                self.report.advance(figures["loss"], figures["accuracy"])
                if step % self.config.log_every_steps == 0:
                    self._record(step)

    def _record(self, step: int) -> None:
        """Writes the mean figures since the last record, if there are any."""
        if self._window.figures:
            self.report.write(step, self._epoch(step), self._window.close(self.config.data.batch_size))

    def _refuse(self, bad: int, what: str) -> None:
        """Ends the run; `bad` is the first step whose state gives numbers that are not finite."""
        raise UserError(
            f"{what}; {self.checkpoints.last_good(bad)}; "
            "lower optim.learning_rate, lengthen optim.warmup_epochs or set optim.clip_norm, "
            "and start in a new --workdir"
        )
