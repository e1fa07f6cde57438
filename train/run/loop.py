"""The training loop: data, network, restore, step, evaluate, checkpoint, report."""

import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from se_flax.errors import UserError
from se_flax.runtime import keep_memory
from train.build import training_loss
from train.config import Config, check_same_run, flatten
from train.data.loader import BadImages, eval_batches, steps_per_epoch, train_loader
from train.data.sources import open_data
from train.optim import finetune
from train.optim.param_groups import Frozen, split, trace
from train.run.checkpoint import Checkpoints
from train.run.evaluate import Result, evaluate, padded_size
from train.run.length import length_change, total_steps
from train.run.parallel import Replicas, make_replicas
from train.run.program import make_program
from train.run.report import Report
from train.run.runtime import join_hosts, prepare_workdir, stop_signals, use_compilation_cache
from train.run.save_model import MODEL, save_model
from train.run.step import TrainState
from train.validate import check_batch, check_classes, check_same_classes, check_settings_of_run, check_start

# Losses are looked at this many steps late, so that the host does not wait for a step it has only just started.
_LAG = 2
# A profile skips the compilation and the first steps, and stays small enough for a browser.
_PROFILE_STEPS = (10, 15)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: updates done.
      completed: False when it was asked to stop early.
      result: the last evaluation, if any was due.
      best_top1: share of the best evaluation.
      checkpoint: where the last checkpoint lies.
      seconds: that this process took.
      bad_images: what could not be read, in words, or None.
    """

    step: int
    completed: bool
    result: Result | None
    best_top1: float
    checkpoint: str
    seconds: float
    bad_images: str | None

    def __str__(self) -> str:
        taken = f"{self.seconds // 60:.0f} min {self.seconds % 60:.0f} s"
        if not self.completed:
            text = f"stopped at step {self.step} after {taken}"
            return f"{text}; checkpoint: {self.checkpoint}; run the same command to resume"
        text = f"done in {taken}"
        if self.result is not None:
            text += f": {self.result}, best top-1 {100 * self.best_top1:.2f} %"
        return f"{text}; checkpoint: {self.checkpoint}"


def _epoch_line(epoch: float, r: Result, seconds: float) -> str:
    """An evaluation in at most 80 columns; the exact counts are in `metrics.jsonl` and at the run's end."""
    shares = ", ".join(f"{name[:3]}-{name[3:]} {100 * right / r.count:.2f} %" for name, right in r.counts().items())
    taken = f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"
    return f"epoch {epoch:6.2f}: loss {r.loss:.4f}, {shares} of {r.count:,} ({taken} s)"


def run(config: Config, workdir: str | Path) -> Outcome:
    """Trains, or goes on training, in a work directory.

    Args:
      config: the settings.
      workdir: where checkpoints and figures go; a checkpoint of the same run there is continued.

    Returns:
      How it ended.

    Raises:
      UserError: settings, data or work directory are not usable; the loss is not finite; the disk is full.
    """
    started = time.monotonic()
    keep_memory()
    if config.compilation_cache:
        use_compilation_cache(config.compilation_cache)
    if config.parallel.distributed:
        join_hosts()
    check_settings_of_run(config)
    check_start(config)
    workdir = prepare_workdir(workdir)
    splits = open_data(config.data)
    num_classes = check_classes(config, splits.class_names, config.data.source)
    replicas = make_replicas(config.parallel.backend, config.parallel.devices)
    check_batch(config, replicas)

    checkpoints = Checkpoints(workdir, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best)
    saved = checkpoints.newest_run()
    # A run that is continued has its weights in the checkpoint: what it once started from need not be there any more.
    loaded = finetune.load(config, num_classes) if config.init_from and saved is None else None
    config = finetune.complete(config, saved["config"] if saved else None, loaded)
    if saved is not None:
        check_same_run(saved["config"], config, str(workdir))
        check_same_classes(saved["class_names"], splits.class_names, str(workdir))

    per_epoch = steps_per_epoch(len(splits.train), config.data.batch_size)
    total = total_steps(config.steps, config.epochs, per_epoch)
    program = make_program(config, num_classes, per_epoch, total)
    variables = None
    if saved is not None:  # `restore` fills them in, so nothing need be drawn
        variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), trace(program.model, config.data.image_size))
    elif loaded is not None:
        finetune.check_fit(config, program.model, loaded)
        variables = finetune.as_arrays(loaded.variables)
    state = replicas.replicate(program.init(variables=variables))
    bad = BadImages(splits, config.data)
    loader = train_loader(splits, config.data, seed=config.seed, bad=bad)
    restored = checkpoints.restore(state)
    if restored is not None:
        state = restored.state
        loader.set_state(restored.data)
        checkpoints.forget_after(restored.step)
    start = restored.step if restored else 0

    def batches_for_evaluation() -> Iterator[Mapping[str, np.ndarray]]:
        size = padded_size(config.data.eval_batch_size or config.data.batch_size, replicas.count)
        return eval_batches(splits, config.data, batch_size=size, bad=bad)

    primary = jax.process_index() == 0
    loss = training_loss(config)
    report = Report(workdir, total, config.data.batch_size, start, training_loss=loss, primary=primary)
    trainer = _Trainer(
        config=config,
        workdir=workdir,
        state=state,
        step=start,
        total=total,
        per_epoch=per_epoch,
        num_classes=num_classes,
        loader=loader,
        batches_for_evaluation=batches_for_evaluation,
        train_step=replicas.spread(program.train_step, donate=True),
        eval_step=replicas.spread(program.eval_step),
        replicas=replicas,
        checkpoints=checkpoints,
        report=report,
        best_top1=restored.run.get("best_top1", 0.0) if restored else 0.0,
        run_info={"config": flatten(config), "class_names": list(splits.class_names)},
    )
    try:
        for line in _introduction(config, state, replicas, len(splits.train), len(splits.eval), total, program.frozen):
            report.say(line)
        if restored is not None:
            for text in restored.skipped:
                report.say(f"warning: {text}; an older one is used")
            report.say(f"resuming from step {restored.step:,}")
            if change := length_change(restored.run["config"], config, per_epoch, start):
                report.say(change)
        elif loaded is not None:
            for line in (*finetune.describe(config, loaded), *finetune.describe_classes(loaded, splits.class_names)):
                report.say(line)
        if primary:
            (workdir / "config.json").write_text(json.dumps(flatten(config), indent=2) + "\n")
        completed = trainer.train()
        report.draw()  # with what was recorded after the last evaluation
        checkpoints.close()
        if completed and primary:
            save_model(
                workdir / MODEL, config, trainer.state.variables(), splits.class_names, trainer.result, trainer.step
            )
    finally:
        loader.close()
        report.close()
    newest = checkpoints.path(checkpoints.steps()[-1])
    seconds = time.monotonic() - started
    return Outcome(trainer.step, completed, trainer.result, trainer.best_top1, str(newest), seconds, bad.report())


def _introduction(
    config: Config,
    state: TrainState,
    replicas: Replicas,
    train_size: int,
    eval_size: int,
    total: int,
    frozen: Frozen,
) -> Iterator[str]:
    """What a person wants to know before the bar starts moving."""
    params = sum(x.size for x in jax.tree.leaves(state.params))
    yield f"{config.model.name}: {params:,} parameters; {config.data.source}: {train_size:,} + {eval_size:,} images"
    kind = replicas.devices[0].device_kind
    yield (
        f"{total:,} steps of {config.data.batch_size} images on {replicas.count} x {kind} "
        f"({replicas.backend}, {config.precision})"
    )
    if frozen.params:
        trained = sum(x.size for x in jax.tree.leaves(split(state.params, frozen.params)[0]))
        yield f"training {trained:,} of the {params:,} parameters"


@dataclasses.dataclass
class _Trainer:
    """A run under way: what changes from step to step, and the parts that it drives."""

    config: Config
    workdir: Path
    state: TrainState
    step: int
    total: int
    per_epoch: float
    num_classes: int
    loader: Any
    batches_for_evaluation: Callable[[], Iterator[Mapping[str, np.ndarray]]]
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[..., Any]
    replicas: Replicas
    checkpoints: Checkpoints
    report: Report
    run_info: dict[str, Any]
    result: Result | None = None
    best_top1: float = 0.0

    def __post_init__(self) -> None:
        settings = self.config.checkpoint
        self._save_every = float(settings.every_steps) or settings.every_epochs * self.per_epoch
        self._eval_every = self.config.eval_every_epochs * self.per_epoch
        self._pending: deque[tuple[int, dict[str, jax.Array]]] = deque()
        self._window: list[dict[str, float]] = []
        self._start_clock()

    def train(self) -> bool:
        """Runs to the last step; False when a signal stopped it before."""
        first = self.step
        if first >= self.total:
            self._evaluate(record=False)  # the run itself recorded this step
            return True
        with stop_signals() as stop:
            while self.step < self.total:
                self._profile(self.step - first)
                batch = self.replicas.shard(self._next_batch())
                if self.step == first:
                    self._compile(batch)
                self.state, metrics = self.train_step(self.state, batch)
                self.step += 1
                self._pending.append((self.step, metrics))
                self._look_at_losses(keep=_LAG)
                last = self.step == self.total
                stopping = stop(self.step) and not last
                evaluating = last or self._due(self._eval_every)
                if evaluating and not stopping:
                    self._evaluate()
                if last or stopping or self._due(self._save_every):
                    self._save(with_metrics=evaluating and not stopping)
                if stopping:
                    return False
        return True

    def _start_clock(self) -> None:
        self._window_started = time.monotonic()
        self._waited = 0.0  # seconds of these in which the loop had no batch to go on with

    def _next_batch(self) -> Mapping[str, np.ndarray]:
        asked = time.monotonic()
        batch = next(self.loader)
        self._waited += time.monotonic() - asked
        return batch

    def _due(self, every: float) -> bool:
        """Whether a multiple of `every` steps (a fraction when epochs are) was reached by this step."""
        return every > 0 and math.floor(self.step / every + 1e-9) > math.floor((self.step - 1) / every + 1e-9)

    def _epoch(self, step: int) -> float:
        return step / self.per_epoch

    def _compile(self, batch: Any) -> None:
        """Says what the first wait is for."""
        begun = time.monotonic()
        self.report.say("compiling the training step ...")
        if hasattr(self.train_step, "lower"):
            self.train_step = self.train_step.lower(self.state, batch).compile()
        self.report.say(f"compiled in {time.monotonic() - begun:.1f} s")
        self.report.start()
        self._start_clock()

    def _profile(self, done: int) -> None:
        if self.config.profile and done in _PROFILE_STEPS:
            if done == _PROFILE_STEPS[0]:
                jax.profiler.start_trace(str(self.workdir / "profile"))
            else:
                jax.block_until_ready(self.state.step)
                jax.profiler.stop_trace()
                self.report.say(
                    f"profile of steps {_PROFILE_STEPS[0]} to {_PROFILE_STEPS[1]}: {self.workdir / 'profile'}"
                )

    def _look_at_losses(self, keep: int) -> None:
        """Fetches the metrics of all steps but the last `keep`, and refuses to go on from a loss that is not finite."""
        while len(self._pending) > keep:
            step, metrics = self._pending.popleft()
            figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not all(math.isfinite(figures[name]) for name in ("loss", "grad_norm")):
                self._refuse(step, figures)
            self._window.append(figures)
            self.report.advance(figures["loss"], figures["accuracy"])
            if step % self.config.log_every_steps == 0:
                self._write_window(step)

    def _write_window(self, step: int) -> None:
        """Records the mean figures since the last record."""
        if not self._window:
            return
        means = {
            name: sum(figures[name] for figures in self._window) / len(self._window)
            for name in ("loss", "accuracy", "grad_norm")
        }
        seconds = max(time.monotonic() - self._window_started, 1e-9)
        images = len(self._window) * self.config.data.batch_size
        rate = self._window[-1]["learning_rate"]
        timings = {
            "images_per_second": round(images / seconds, 2),
            "data_wait": round(min(1.0, self._waited / seconds), 4),
        }
        self.report.write(step, self._epoch(step), {**means, "learning_rate": rate, **timings})
        self._window.clear()
        self._start_clock()

    def _refuse(self, step: int, figures: Mapping[str, float]) -> None:
        self.checkpoints.finish()
        steps = self.checkpoints.steps()
        good = (
            f"the last good checkpoint is {self.checkpoints.path(steps[-1])}"
            if steps
            else "no checkpoint was written yet"
        )
        raise UserError(
            f"the loss became {figures['loss']} and the gradient's norm {figures['grad_norm']} at step {step}; {good}; "
            "lower optim.learning_rate, lengthen optim.warmup_epochs or set optim.clip_norm, "
            "and start in a new --workdir"
        )

    def _evaluate(self, *, record: bool = True) -> None:
        self._look_at_losses(keep=0)
        begun = time.monotonic()
        with self.report.paused():
            self.result = evaluate(
                self.eval_step, self.state.variables(), self.batches_for_evaluation(), self.replicas, self.num_classes
            )
            r = self.result
            self.best_top1 = max(self.best_top1, r.top1 / r.count)
            if record:
                self.report.write(self.step, self._epoch(self.step), r.metrics())
            self.report.say(_epoch_line(self._epoch(self.step), r, time.monotonic() - begun))
            self.report.draw()
        self._start_clock()

    def _save(self, *, with_metrics: bool) -> None:
        # No state follows a loss that was not looked at, and a resumed run starts its averages where this one does.
        self._look_at_losses(keep=0)
        self._write_window(self.step)
        metrics = self.result.metrics() if with_metrics and self.result else None
        with self.report.paused():
            self.checkpoints.save(
                self.step,
                self.state,
                data=self.loader.get_state(),
                run={**self.run_info, "best_top1": self.best_top1},
                metrics=metrics,
            )
        self._start_clock()
