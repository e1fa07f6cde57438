"""The loop over training steps: batches in, figures out, evaluation and checkpoints when they are due."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from se_flax.errors import UserError
from train.config import Config
from train.run.checkpoint import Checkpoints, Restored
from train.run.evaluate import Result
from train.run.feed import Feed
from train.run.non_finite import ADVICE, MOST_ROLLBACKS, NonFinite
from train.run.parallel import Replicas
from train.run.progress import Due, Progress
from train.run.report import Report, epoch_line
from train.run.step import TrainState
from train.run.stopping import Stop, Stopped, stop_signals

# Losses are looked at this many calls late, so that the host does not wait for a step it has only just started.
LAG = 2
# A profile skips the compilation and the first steps, and stays small enough for a browser.
_PROFILE_STEPS = (10, 15)


@dataclass
class Trainer:
    """A run under way: what changes from step to step, and the parts that it drives.

    Attributes:
      config: the completed settings.
      workdir: for a profile.
      replicas: where steps run.
      feed: the training data.
      train_step: `feed.spread` of the step: from state and what a call reads to the next state and the steps' figures.
      evaluation: from the state's variables, and what says when to give it up, to a result.
      checkpoints: of the run.
      report: of the run.
      run_info: what a checkpoint says of its run.
      total: steps of the run.
      per_epoch: steps of an epoch.
      state: the training state; its memory goes to the next one.
      step: updates done.
      progress: what else a checkpoint holds.
      saved: step and `due` of the newest checkpoint.
      result: the last evaluation, if any was due.
    """

    config: Config
    workdir: Path
    replicas: Replicas
    feed: Feed
    train_step: Any
    evaluation: Callable[[Any, Stop], Result]
    checkpoints: Checkpoints
    report: Report
    run_info: dict[str, Any]
    total: int
    per_epoch: float
    state: TrainState
    step: int = 0
    progress: Progress = field(default_factory=Progress)
    saved: tuple[int, Due] | None = None
    result: Result | None = None
    _pending: deque[tuple[int, int, dict[str, jax.Array]]] = field(default_factory=deque, init=False)
    _position: dict[str, Any] = field(init=False)  # in the data, after the last step: a batch may wait that none took
    _compiled: Callable[..., Any] | None = field(default=None, init=False)
    _done: int = field(default=0, init=False)  # steps of this process, those included that it went back over
    _good: int = field(default=-1, init=False)  # the last step whose state gave finite figures in the next one

    def __post_init__(self) -> None:
        self._position = self.feed.loader.get_state()

    def train(self) -> bool:
        """Runs to the last step, and returns when its checkpoint is whole; False when a signal stopped it before."""
        with stop_signals() as stop:
            completed = False
            try:
                while not completed:
                    with self._rolling_back():
                        self._train(stop)
                        completed = True
            except Stopped:
                with self._rolling_back():
                    if self.saved != (self.step, self.progress.left()):
                        self.save(None)
            self.checkpoints.finish()  # here, where the first signal does not end the program
        return completed

    def _train(self, stop: Stop) -> None:
        if self.step >= self.total and not self.saved:  # a run of no steps
            self.progress.due = Due(evaluation=True, checkpoint=True)
        self._do_what_is_due(stop)
        if self.step >= self.total and self.result is None:  # a finished run, which has recorded this step
            self.evaluate(stop, record=False)
        while self.step < self.total:
            before = self.step
            self._profile()
            steps = self._steps_of_call()
            with stop.waiting():
                batch = self._next_batch(steps)
            if self._compiled is None:
                self._compiled = self.compile(batch)
                stop.look()
            self._advance(self._compiled, batch, steps)
            last = self.step == self.total
            self.progress.due = Due(
                evaluation=last or self._passed(self._evaluate_every, before, self.step),
                checkpoint=last or self._passed(self._save_every, before, self.step),
            )
            stop.look()
            self._do_what_is_due(stop)

    def _do_what_is_due(self, stop: Stop) -> None:
        due = self.progress.due
        result = self.evaluate(stop) if due.evaluation else None
        self.progress.due = Due()
        if self.step == self.total:
            self._look_at_losses(keep=0)
            self._record(self.step)
        if due.checkpoint:
            self.save(result)

    @property
    def _evaluate_every(self) -> float:
        return self.config.eval_every_epochs * self.per_epoch

    @property
    def _save_every(self) -> float:
        settings = self.config.checkpoint
        return settings.every_steps or settings.every_epochs * self.per_epoch

    def _steps_of_call(self) -> int:
        """Steps to the next one after which the host has something to do, or as many as a call may do."""
        before, most = self.step, self.feed.most_steps

        def ends(step: int) -> bool:
            return (
                step == self.total
                or step % self.config.log_every_steps == 0
                or (self.config.profile and self._done + step - before in _PROFILE_STEPS)
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
        self.progress.window.start_clock()
        return compiled

    def evaluate(self, stop: Stop, *, record: bool = True) -> Result:
        """Evaluates the state; without `record` the figures are only said.

        Raises:
          Stopped: the run was asked to stop.
        """
        self._look_at_losses(keep=0)
        begun = time.monotonic()
        with self.report.paused(), self.progress.window.paused():
            result = self.result = self.evaluation(self.state.variables(), stop)
            if not math.isfinite(result.loss):
                what = f"the loss of the evaluation became {result.loss} at step {self.step}"
                self._refuse(self.step, what, self.step)
            self.progress.best_top1 = max(self.progress.best_top1, result.top1 / result.count)
            if record:
                self.report.write(self.step, self._epoch(self.step), result.metrics())
            self.report.say(epoch_line(self._epoch(self.step), result, time.monotonic() - begun))
            self.report.draw()
        return result

    def save(self, result: Result | None) -> None:
        """Starts writing a checkpoint; `result` is the evaluation of this step, if there was one."""
        self._look_at_losses(keep=0)  # no state follows a loss that was not looked at
        with self.report.paused(), self.progress.window.paused():
            self.report.sync()
            self.checkpoints.save(
                self.step,
                self.state,
                data=self._position,
                run={**self.run_info, **self.progress.saved()},
                metrics=result.metrics() if result else None,
            )
        self.saved = (self.step, self.progress.left())

    def _advance(self, compiled: Callable[..., Any], batch: Any, steps: int) -> None:
        """One call of the compiled step, and figures of earlier ones."""
        self.state, metrics = compiled(self.state, batch, *self.feed.shared)
        self._pending.append((self.step, steps, metrics))
        self.step += steps
        self._done += steps
        self._position = self.feed.loader.get_state()
        self._look_at_losses(keep=LAG)

    def _next_batch(self, steps: int) -> Any:
        """What the next call reads, on the devices."""
        asked = time.monotonic()
        batch = self.feed.fetch(steps)
        self.progress.window.waited(time.monotonic() - asked)
        return self.replicas.shard(batch)

    def _passed(self, every: float, before: int, step: int) -> bool:
        """Whether a multiple of `every` steps (a fraction when epochs are) is reached after `before`, by `step`."""
        return every > 0 and math.floor(step / every + 1e-9) > math.floor(before / every + 1e-9)

    def _epoch(self, step: int) -> float:
        return step / self.per_epoch

    def _profile(self) -> None:
        done = self._done
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
                self._look_at(before + row + 1, {name: float(values[row]) for name, values in rows.items()})

    def _look_at(self, step: int, figures: dict[str, float]) -> None:
        """The figures of one step."""
        progress, skipped = self.progress, figures.get("skipped", 0.0) > 0
        if not skipped:
            if not all(map(math.isfinite, figures.values())):
                said = f"the loss became {figures['loss']} and the gradient's norm {figures['grad_norm']}"
                self._refuse(step - 1, f"{said} at step {step}", step)
            self._good = step - 1
        if progress.skips.count(skipped):
            self._refuse(step - progress.skips.in_a_row, progress.skips.why(step), step)
        progress.window.add(figures)
        self.report.advance(None if skipped else (figures["loss"], figures["accuracy"]), progress.skips.total)
        if step % self.config.log_every_steps == 0:
            self._record(step)

    def _record(self, step: int) -> None:
        """Writes the mean figures since the last record, if there are any."""
        if self.progress.window.steps:
            figures = self.progress.window.close(self.config.data.batch_size)
            self.report.write(step, self._epoch(step), figures)

    def _refuse(self, bad: int, what: str, step: int) -> NoReturn:
        """Ends the run, or sends it back to an earlier state.

        Args:
          bad: the first step whose state gives numbers that are not finite.
          what: happened, in words.
          step: at which it was seen; the images up to this step have been used.

        Raises:
          NonFinite: always.
        """
        before = bad + 1 if bad <= self._good else bad  # other images gave finite numbers with this very state
        ahead = (self.step - step) * self.config.data.batch_size
        position = {**self._position, "position": self._position["position"] - ahead}
        raise NonFinite(what, f"{self.checkpoints.last_good(before)}; {ADVICE}", before, position)

    @contextmanager
    def _rolling_back(self) -> Iterator[None]:
        """Goes back to the last good checkpoint where numbers are not finite, if `optim.non_finite` says so.

        The data is not rolled back: training goes on with the images after those of the fault. Images of the steps in
        between are passed over with them. Until the next checkpoint a killed run does the same steps again, comes to
        the same fault and goes back to the same state, so no checkpoint is needed here.
        """
        try:
            yield
        except NonFinite as fault:
            if self.config.optim.non_finite != "rollback":
                raise
            self._pending.clear()
            position = fault.position or self._position
            # The shapes in place of the arrays, whose memory the restored ones need.
            self.state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)
            restored = self.checkpoints.restore(self.state, before=fault.before)
            if restored is None:
                raise
            if not self.progress.rollbacks.go(restored.step):
                raise UserError(f"{fault}; {MOST_ROLLBACKS} rollbacks to it did not help") from fault
            self._go_back(restored, position)
            self.report.say(
                f"{fault.what}; back to step {restored.step:,} and on with other images "
                f"(rollback {self.progress.rollbacks.count} of {MOST_ROLLBACKS})"
            )

    def _go_back(self, restored: Restored, position: dict[str, Any]) -> None:
        """Takes the state of a checkpoint, with a position in the data of its own."""
        self.state, self.step, self.result = restored.state, restored.step, None
        rollbacks, self.progress = self.progress.rollbacks, Progress.of(restored.run)
        self.progress.rollbacks = rollbacks
        self.saved, self._good = (self.step, self.progress.due), self.step
        self.feed.loader.set_state(position)
        self._position = position
        self.report.go_back(self.step, self.progress.unrecorded())
        for text in restored.skipped:
            self.report.say(f"warning: {text}")
        self.progress.window.start_clock()
