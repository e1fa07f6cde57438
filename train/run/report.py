"""Reporting: progress bar, `metrics.jsonl`, TensorBoard events, `curves.png`."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from train.run.curves import CROSS_ENTROPY, draw_curves
from train.run.evaluate import Result

# Seconds between two progress lines where there is no terminal.
_LOG_INTERVAL = 20.0
_LOG_WIDTH = 79
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Metrics:
    """A run's `metrics.jsonl`.

    Args:
      path: of the file.
      start_step: where the run starts; what an interrupted run wrote of later steps is dropped, so that the file is
        that of an uninterrupted run.
    """

    def __init__(self, path: Path, start_step: int):
        self._path = path
        kept = [row for row in read_metrics(path) if row["step"] <= start_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, epoch: float, figures: Mapping[str, float | int]) -> None:
        """Adds one line."""
        with self._path.open("a") as stream:
            stream.write(json.dumps({"step": step, "epoch": epoch, **figures}) + "\n")


def write_settings(workdir: Path, settings: Mapping[str, Any]) -> None:
    """Writes `config.json`.

    Args:
      workdir: of the run.
      settings: flattened.
    """
    (workdir / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def say(text: str) -> None:
    """A line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def epoch_line(epoch: float, r: Result, seconds: float) -> str:
    """An evaluation in at most 80 columns; the exact counts are in `metrics.jsonl` and at the run's end."""
    shares = ", ".join(f"{name[:3]}-{name[3:]} {100 * right / r.count:.2f} %" for name, right in r.counts().items())
    taken = f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"
    return f"epoch {epoch:6.2f}: loss {r.loss:.4f}, {shares} of {r.count:,} ({taken} s)"


def ending(step: int, seconds: float, checkpoint: str, *, best: str, figures: Iterable[str], completed: bool) -> str:
    """A run's last words: lines of at most 80 columns, and the checkpoint's path on one of its own.

    Args:
      step: updates done.
      seconds: that this process took.
      checkpoint: where the last one lies.
      best: the best evaluation, in a few words; empty without one.
      figures: a line for each set that was evaluated at the end.
      completed: False when it was asked to stop early; nothing was evaluated then.
    """
    taken = f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if not completed:
        lines = [f"stopped at step {step} after {taken}; run the same command to resume"]
    else:
        lines = [f"done in {taken}" + (f"; {best}" if best else ""), *figures]
    return "\n".join([*lines, f"checkpoint: {checkpoint}"])


class _Lines:
    """A stream that turns a bar's redrawing into lines on stderr."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


class Report:
    """Writes one run's figures; a second host of the same run writes nothing.

    The bar begins when training does (`start`): the time that is left follows from all that came since, evaluations
    included. Its rate is of the training steps alone, without what happens in `paused`.

    Args:
      workdir: where the files go.
      total_steps: length of the run.
      batch_size: global, for images per second.
      start_step: where the run starts; what an interrupted run wrote of later steps is dropped, so that the files are
        those of an uninterrupted run.
      training_loss: what training minimises, in words (`train.build.training_loss`).
      primary: whether this host writes.
    """

    def __init__(
        self,
        workdir: Path,
        total_steps: int,
        batch_size: int,
        start_step: int,
        *,
        training_loss: str = CROSS_ENTROPY,
        primary: bool,
    ):
        self._primary = primary
        self._path = workdir / "metrics.jsonl"
        self._curves = workdir / "curves.png"
        self._batch_size = batch_size
        self._total_steps, self._start_step = total_steps, start_step
        self._training_loss = training_loss
        self._bar: tqdm[Any] | None = None
        self._since = self._paused = 0.0
        if not primary:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._metrics = Metrics(self._path, start_step)
        self._events = SummaryWriter(str(workdir / "events"), purge_step=start_step + 1 if start_step else None)

    def start(self) -> None:
        """Training begins: what came before, compilation above all, is no part of its rate."""
        if not self._primary:
            return
        terminal = sys.stderr.isatty()
        self._since, self._paused = time.monotonic(), 0.0
        self._bar = tqdm(
            total=self._total_steps * self._batch_size,
            initial=self._start_step * self._batch_size,
            unit_scale=True,
            bar_format=_BAR,
            dynamic_ncols=terminal,
            ncols=None if terminal else _LOG_WIDTH,
            smoothing=0,  # the mean, which an evaluation every so often does not throw about
            # A log file gets whole lines, one now and then, instead of a bar drawn over and over.
            mininterval=0.2 if terminal else _LOG_INTERVAL,
            maxinterval=10.0 if terminal else _LOG_INTERVAL,
            file=sys.stderr if terminal else _Lines(),
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For work between training steps, which the bar's rate leaves out."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - begun

    def advance(self, loss: float, accuracy: float) -> None:
        """One step is done."""
        if self._bar is None:
            return
        images = self._bar.n + self._batch_size - self._start_step * self._batch_size
        seconds = max(time.monotonic() - self._since - self._paused, 1e-9)
        rate = tqdm.format_sizeof(images / seconds)
        self._bar.set_postfix_str(f"{rate} img/s, loss {loss:.3f}, acc {100 * accuracy:.1f} %", refresh=False)
        self._bar.update(self._batch_size)

    def write(self, step: int, epoch: float, figures: Mapping[str, float | int]) -> None:
        """Records figures of a step."""
        if not self._primary:
            return
        self._metrics.write(step, round(epoch, 4), figures)
        for name, value in figures.items():
            self._events.add_scalar(
                name.replace("eval_", "eval/") if name.startswith("eval_") else f"train/{name}", value, step
            )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._primary and sys.stderr.isatty():
            tqdm.write(text, file=sys.stderr)
        elif self._primary:
            say(text)

    def draw(self) -> None:
        """Draws `curves.png` anew."""
        if self._primary:
            draw_curves(read_metrics(self._path), self._curves, self._training_loss)

    def close(self) -> None:
        """Flushes and frees everything."""
        if self._bar is not None:
            self._bar.close()
        if self._primary:
            self._events.close()
