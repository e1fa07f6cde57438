"""The training loop for tables: data, ids, network, restore, step, evaluate, checkpoint, report."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import optax

from se_flax.errors import UserError
from se_flax.runtime import keep_memory
from train.config import check_same_run, flatten
from train.ctr.config import Config, check
from train.ctr.encode import Encoder, fit
from train.ctr.metrics import auc, log_loss
from train.ctr.sources import Splits, Table, open_splits
from train.ctr.step import State, build_model, init_state, make_eval_step, make_train_step
from train.ctr.stream import Batch, batches, encoded, shuffled
from train.run.checkpoint import Checkpoints
from train.run.non_finite import Skips
from train.run.report import Metrics, ending, say, write_settings, write_whole
from train.run.runtime import use_compilation_cache
from train.run.stopping import Stop, Stopped, stop_signals
from train.run.store import Store
from train.run.workdir import opened

ENCODER = "encoder.json"
_METRIC = "eval_auc"


@dataclass(frozen=True)
class Result:
    """Figures of one whole set: area under the ROC curve, log loss in nats, rows."""

    auc: float
    log_loss: float
    rows: int

    def __str__(self) -> str:
        return f"AUC {self.auc:.4f}, log loss {self.log_loss:.4f} ({self.rows:,} rows)"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: updates done.
      completed: False when it was asked to stop early.
      epoch: whose parameters are the best ones, counted from 1.
      parameters: of the network.
      eval: the best evaluation.
      test: the test rows under its parameters, if there are any.
      checkpoint: where the last checkpoint lies.
      seconds: that this process took.
      skips: updates that were left out.
      bad_images: always None; part of what the command line asks of an outcome.
    """

    step: int
    completed: bool
    epoch: int
    parameters: int
    eval: Result | None
    test: Result | None
    checkpoint: str
    seconds: float
    skips: Skips
    bad_images: str | None = None

    def __str__(self) -> str:
        sets = {"evaluation": self.eval, "test": self.test}
        figures = [f"{name} {result}" for name, result in sets.items() if result is not None]
        return ending(
            self.step,
            self.seconds,
            self.checkpoint,
            best=f"best epoch {self.epoch}",
            figures=figures + self.skips.ending(self.step),
            completed=self.completed,
        )


@dataclass
class Progress:
    """Where a run stands beside its parameters; a checkpoint holds it as JSON.

    Attributes:
      epoch: epochs done.
      batch: batches done of the next one.
      best_auc: of the best evaluation.
      best_log_loss: of the same evaluation.
      best_epoch: after which it was, counted from 1.
      worse: evaluations since then.
      losses: of the steps since the last record, those left out excepted.
      skipped: updates since the last record that were left out.
      skips: those of the whole run.
    """

    epoch: int = 0
    batch: int = 0
    best_auc: float = 0.0
    best_log_loss: float = 0.0
    best_epoch: int = 0
    worse: int = 0
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    skips: Skips = field(default_factory=Skips)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Progress":
        """That of a checkpoint."""
        return cls(**{**data, "skips": Skips(**data.get("skips", {}))})

    def over(self, config: Config) -> bool:
        """Whether the run has done all its epochs, or stopped getting better."""
        return self.epoch >= config.epochs or 0 < config.optim.patience <= self.worse


def run(config: Config, workdir: str | Path) -> Outcome:
    """Trains, or goes on training, in a work directory.

    Args:
      config: the settings.
      workdir: where checkpoints and figures go; a checkpoint of the same run there is continued.

    Returns:
      How it ended.

    Raises:
      UserError: settings, data or work directory are not usable; the loss is not finite; a file cannot be written.
    """
    started = time.monotonic()
    keep_memory()
    check(config)
    if config.compilation_cache:
        use_compilation_cache(config.compilation_cache)
    with opened(workdir) as store:
        return _run(config, store, str(workdir), started)


def _run(config: Config, store: Store, name: str, started: float) -> Outcome:
    splits = open_splits(config.data)
    settings = config.checkpoint
    checkpoints = Checkpoints(store, keep_last=settings.keep_last, keep_best=settings.keep_best, metric=_METRIC)
    saved = checkpoints.newest_run()
    if saved is not None:
        check_same_run(saved["config"], config, name)
    encoder = _encoder(config, splits.train, store.folder, known=saved is not None)

    model = build_model(config.model, encoder.num_ids)
    optimizer = optax.adam(config.optim.learning_rate)
    state = init_state(model, optimizer, len(encoder.fields), config.seed)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    say(
        f"{config.model.name}: {parameters:,} parameters; {len(encoder.fields)} fields with {encoder.num_ids:,} ids; "
        f"{jax.devices()[0].device_kind}"
    )
    restored = checkpoints.restore(state)
    progress = Progress()
    if restored is not None:
        state, progress = restored.state, Progress.of(restored.data)
        for line in restored.lines():
            say(line)
    write_settings(store.folder, flatten(config))
    step = restored.step if restored else 0
    # An epoch that has begun is evaluated at its end, which may be this step.
    steps = progress.losses or progress.skipped
    unrecorded = {"loss": steps, "skipped": steps, _METRIC: progress.batch} if restored else {"epoch": True}

    trainer = Trainer(
        config=config,
        splits=splits,
        encoder=encoder,
        state=state,
        step=step,
        saved=step if restored else None,
        progress=progress,
        train_step=make_train_step(model, optimizer, config.optim.l2, config.optim.non_finite == "skip"),
        eval_step=make_eval_step(model),
        checkpoints=checkpoints,
        log=Metrics(store.folder / "metrics.jsonl", step, [name for name, open_ in unrecorded.items() if open_]),
    )
    try:
        completed = trainer.train()
        checkpoints.close()
    except OSError as error:
        raise checkpoints.explained(error) from error
    store.push()
    test = trainer.evaluate(splits.test, trainer.state.best) if completed and splits.test else None
    best = Result(progress.best_auc, progress.best_log_loss, trainer.eval_rows)
    if completed and trainer.eval_rows == 0:  # a run that was complete already
        best = trainer.evaluate(splits.eval, trainer.state.best)
    return Outcome(
        step=trainer.step,
        completed=completed,
        epoch=progress.best_epoch,
        parameters=parameters,
        eval=best if completed else None,
        test=test,
        checkpoint=checkpoints.newest(),
        seconds=time.monotonic() - started,
        skips=progress.skips,
    )


def _encoder(config: Config, train: Table, workdir: Path, *, known: bool) -> Encoder:
    """Learns the ids, or reads what the run that is continued has learned."""
    path = workdir / ENCODER
    if known:
        try:
            return Encoder.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} belongs to the checkpoints beside it and cannot be read; restore it, or start anew with "
                "another --workdir"
            ) from error
    begun = time.monotonic()
    encoder = fit(train, config.data)
    say(f"ids of {len(encoder.fields)} fields in {time.monotonic() - begun:.1f} s")
    write_whole(path, (json.dumps(encoder.to_json()) + "\n").encode())
    return encoder


@dataclass
class Trainer:
    """A run under way: what changes from step to step, and the parts that it drives."""

    config: Config
    splits: Splits
    encoder: Encoder
    state: State
    step: int
    progress: Progress
    train_step: Any
    eval_step: Any
    checkpoints: Checkpoints
    log: Metrics
    saved: int | None = None
    eval_rows: int = 0
    _losses: list[jax.Array] = field(default_factory=list)

    def train(self) -> bool:
        """Runs to the last epoch, or until it stops getting better, and returns when its checkpoint is whole.

        Returns:
          False when a signal stopped it before.
        """
        with stop_signals() as stop:
            try:
                while not self.progress.over(self.config):
                    for batch in stop.between(self._rest_of_epoch()):
                        self._advance(batch)
                    self._end_epoch(stop)
                completed = True
            except Stopped:
                if self.saved != self.step:
                    self._save()
                completed = False
            self.checkpoints.finish()  # here, where the first signal does not end the program
        return completed

    def _advance(self, batch: Batch) -> None:
        """One step, and what is due after it."""
        self.state, loss = self.train_step(self.state, batch)
        self._losses.append(loss)
        self.step += 1
        self.progress.batch += 1
        if self.step % self.config.log_every_steps == 0:
            self._write_losses()
        every = self.config.checkpoint.every_steps
        if every and self.step % every == 0:
            self._save()

    def _rest_of_epoch(self) -> Iterator[Batch]:
        """The batches of this epoch that are not done yet. Its order follows from the seed and its number alone."""
        data, progress = self.config.data, self.progress
        rows = shuffled(
            encoded(self.splits.train, self.encoder), data.shuffle_rows, (self.config.seed, progress.epoch, 1)
        )
        done, any_ = progress.batch, False
        for i, batch in enumerate(batches(rows, data.batch_size)):
            any_ = True
            if i >= done:
                yield batch
        if not any_:
            raise UserError(
                f"{self.splits.train.name} has no rows to train on; give a file with some, or lower data.eval_fraction"
            )

    def _end_epoch(self, stop: Stop) -> None:
        self._write_losses()
        result = self.evaluate(self.splits.eval, self.state.params, stop)
        progress = self.progress
        progress.epoch, progress.batch = progress.epoch + 1, 0
        self.eval_rows = result.rows
        if result.auc > progress.best_auc:
            progress.best_auc, progress.best_log_loss = result.auc, result.log_loss
            progress.best_epoch, progress.worse = progress.epoch, 0
            self.state = self.state.keep()
        else:
            progress.worse += 1
        figures = {"eval_auc": result.auc, "eval_log_loss": result.log_loss}
        self.log.write(self.step, progress.epoch, figures)
        say(f"epoch {progress.epoch}: {result}" + (f", best in epoch {progress.best_epoch}" if progress.worse else ""))
        self._save(metrics=figures)

    def _look_at_losses(self) -> dict[str, float]:
        """The figures since the last record; refuses to go on from losses that are not finite."""
        progress, skip = self.progress, self.config.optim.non_finite == "skip"
        fetched = [float(loss) for loss in jax.device_get(self._losses)]
        self._losses.clear()
        for step, loss in enumerate(fetched, self.step - len(fetched) + 1):
            skipped = skip and not math.isfinite(loss)
            if progress.skips.count(skipped):
                self._refuse(step - progress.skips.in_a_row, progress.skips.why(step))
            progress.skipped += skipped
            progress.losses += [] if skipped else [loss]
        figures: dict[str, float] = {"skipped": progress.skipped} if skip else {}
        if not progress.losses:
            return figures
        losses = np.asarray(progress.losses, np.float32)
        loss = float(np.mean(losses))
        if not math.isfinite(loss):
            bad = self.step - len(losses) + int(np.argmin(np.isfinite(losses)))  # updates done in the first such state
            self._refuse(bad, f"the loss became {losses[bad - self.step]} at step {bad + 1}")
        return {"loss": loss, **figures}

    def _refuse(self, bad: int, what: str) -> NoReturn:
        """Ends the run; `bad` is the first step whose state gives numbers that are not finite."""
        raise UserError(
            f"{what}; {self.checkpoints.last_good(bad)}; lower "
            f"optim.learning_rate={self.config.optim.learning_rate} and start in a new --workdir"
        )

    def _write_losses(self) -> None:
        """Records the mean loss since the last record, if there were steps."""
        progress = self.progress
        if not self._losses and not progress.losses and not progress.skipped:
            return
        figures = self._look_at_losses()
        progress.losses, progress.skipped = [], 0
        self.log.write(self.step, progress.epoch, figures)
        said = [f"{name} {value:.4f}" if name == "loss" else f"{value} {name}" for name, value in figures.items()]
        say(f"epoch {progress.epoch + 1}, step {self.step:,}: {', '.join(said)}")

    def evaluate(self, table: Table, params: dict, stop: Stop | None = None) -> Result:
        """Exact figures of a whole table: every row counts once.

        Raises:
          Stopped: the run was asked to stop.
        """
        size = self.config.data.eval_batch_size or self.config.data.batch_size
        logits, labels = [], []
        rows = batches(encoded(table, self.encoder), size)
        for batch in stop.between(rows) if stop else rows:
            count = int(batch["weights"].sum())
            logits.append(np.asarray(self.eval_step(params, batch["ids"]))[:count])
            labels.append(batch["labels"][:count])
        if not logits:
            raise UserError(f"{table.name} has no rows to evaluate on; give a file with some, or raise its share")
        x, y = np.concatenate(logits), np.concatenate(labels)
        if not np.isfinite(x).all():
            self._refuse(self.step, f"the evaluation after step {self.step} has logits that are not finite")
        return Result(auc(x, y), log_loss(x, y), len(y))

    def _save(self, metrics: Mapping[str, float] | None = None) -> None:
        if self._losses:
            self._look_at_losses()
        self.log.sync()
        self.checkpoints.save(
            self.step,
            self.state,
            data=asdict(self.progress),
            run={"config": flatten(self.config)},
            metrics=metrics,
        )
        self.saved = self.step
