"""A training run: prepare, train, save."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax

from se_flax.runtime import keep_memory
from train.config import Config
from train.run.evaluate import Result
from train.run.hosts import of_all
from train.run.non_finite import Skips
from train.run.report import ending, say, write_settings
from train.run.runtime import MODEL, join_hosts, leaving_with_a_lost_host, use_compilation_cache
from train.run.save_model import save_model
from train.run.setup import Setup, continuation, introduction, make_trainer, prepare


@dataclass(frozen=True)
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
      skips: updates that were left out.
    """

    step: int
    completed: bool
    result: Result | None
    best_top1: float
    checkpoint: str
    seconds: float
    bad_images: str | None
    skips: Skips

    def __str__(self) -> str:
        evaluated = self.result is not None
        return ending(
            self.step,
            self.seconds,
            self.checkpoint,
            best=f"best top-1 {100 * self.best_top1:.2f} %" if evaluated else "",
            figures=[*([str(self.result)] if evaluated else []), *self.skips.ending(self.step)],
            completed=self.completed,
        )


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
    if config.compilation_cache:
        use_compilation_cache(config.compilation_cache)
    if config.parallel.distributed:
        join_hosts(config.parallel.heartbeat_seconds)
    with leaving_with_a_lost_host(), ExitStack() as held:
        return _run(prepare(config, workdir, held), started)


def _run(setup: Setup, started: float) -> Outcome:
    primary = jax.process_index() == 0
    for line in introduction(setup) if primary else ():
        say(line)
    trainer, restored = make_trainer(setup)
    try:
        for line in continuation(setup, restored) if restored else ():
            trainer.report.say(line)
        if primary:
            write_settings(setup.store.folder, trainer.run_info["config"])
        completed = trainer.train()
        trainer.report.draw()  # with what was recorded after the last evaluation
        setup.checkpoints.close()
        if completed and primary:
            variables, names = trainer.state.variables(), setup.splits.class_names
            save_model(setup.store.folder / MODEL, setup.config, variables, names, trainer.result, trainer.step)
            setup.store.push()
    except OSError as error:
        raise setup.checkpoints.explained(error) from error
    finally:
        setup.loader.close()
        trainer.report.close()
    setup.bad.train, setup.bad.eval = of_all(setup.bad.train), of_all(setup.bad.eval)
    return Outcome(
        step=trainer.step,
        completed=completed,
        result=trainer.result,
        best_top1=trainer.progress.best_top1,
        checkpoint=setup.checkpoints.newest(),
        seconds=time.monotonic() - started,
        bad_images=setup.bad.report(),
        skips=trainer.progress.skips,
    )
