"""Reporting: progress bar, `metrics.jsonl`, TensorBoard events, `curves.png`."""

import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from se_flax.checkpoints.files import replacing
from train.run.curves import CROSS_ENTROPY, draw_curves
from train.run.evaluate import Result

# Seconds between two progress lines where there is no terminal.
_LOG_INTERVAL = 20.0
_LOG_WIDTH = 79
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; damaged ones, such as a last one that a crash cut short, are left out."""
    rows = (_row(line) for line in _lines(path))
    return [row for row in rows if row is not None]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's figures; None for a line that no run has written."""
    try:
        row = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return None
    # `True` is an integer to Python.
    whole = isinstance(row, dict) and {"step", "epoch"} <= row.keys() and type(row["step"]) is int
    return row if whole and all(type(value) in (int, float) for value in row.values()) else None


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is the old one or the new one whatever happens meanwhile; nothing if that is what it holds."""
    if not path.exists() or path.read_bytes() != data:
        with replacing(path) as stream:
            stream.write(data)


class Metrics:
    """A run's `metrics.jsonl`.

    Damaged lines are dropped, and a warning says how many.

    Args:
      path: of the file.
      start_step: where the run starts; what an interrupted run wrote of later steps is dropped, so that the file is
        that of an uninterrupted run.
      unrecorded: figures of `start_step` itself that the run will still record, by a name that their line has: `loss`
        of training figures that go on, that of an evaluation that is due.

    Attributes:
      rows: the lines that were kept.
    """

    def __init__(self, path: Path, start_step: int, unrecorded: Collection[str] = ()):
        self._path = path
        self.rows: list[dict[str, Any]] = []
        kept, damaged = [], 0
        for line in _lines(path):
            row = _row(line)
            if row is None:
                damaged += 1
            elif row["step"] < start_step or (row["step"] == start_step and not row.keys() & set(unrecorded)):
                self.rows.append(row)
                kept.append(line + b"\n")
        if damaged:
            say(f"warning: {path} had {damaged} damaged {'line' if damaged == 1 else 'lines'}, now left out")
        if path.exists():
            write_whole(path, b"".join(kept))

    def write(self, step: int, epoch: float, figures: Mapping[str, float | int]) -> None:
        """Adds one line."""
        with self._path.open("a") as stream:
            stream.write(json.dumps({"step": step, "epoch": epoch, **figures}) + "\n")

    def sync(self) -> None:
        """Returns when all lines are on the disk."""
        if self._path.exists():
            with self._path.open("rb") as stream:
                os.fsync(stream.fileno())


def write_settings(workdir: Path, settings: Mapping[str, Any]) -> None:
    """Writes `config.json`.

    Args:
      workdir: of the run.
      settings: flattened.
    """
    write_whole(workdir / "config.json", (json.dumps(settings, indent=2) + "\n").encode())


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
      unrecorded: as for `Metrics`.
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
        unrecorded: Collection[str] = (),
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
        self._open(start_step, unrecorded)

    def _open(self, step: int, unrecorded: Collection[str]) -> None:
        """Opens the files as of a step."""
        self._metrics = Metrics(self._path, step, unrecorded)
        # A killed run loses the events that were not flushed, and leaves some of steps that are done again. So they are
        # made from `metrics.jsonl` at each start.
        events = self._path.parent / "events"
        for old in events.glob("events.out.tfevents.*"):
            old.unlink()
        self._events = SummaryWriter(str(events))
        for row in self._metrics.rows:
            self._show(row["step"], {name: value for name, value in row.items() if name not in ("step", "epoch")})

    def go_back(self, step: int, unrecorded: Collection[str]) -> None:
        """Training goes on from an earlier step: the files become those of a run that has come so far."""
        if not self._primary:
            return
        self._events.close()
        self._open(step, unrecorded)
        if self._bar is not None:
            images = step * self._batch_size - self._bar.n
            for name in ("n", "last_print_n", "initial"):  # its rate is of all images, those included
                setattr(self._bar, name, getattr(self._bar, name) + images)
            self._start_step += images // self._batch_size

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

    def advance(self, figures: tuple[float, float] | None, skipped: int = 0) -> None:
        """One step is done.

        Args:
          figures: its loss and accuracy; None when its update was left out.
          skipped: updates that were left out since the run began.
        """
        if self._bar is None:
            return
        images = self._bar.n + self._batch_size - self._start_step * self._batch_size
        seconds = max(time.monotonic() - self._since - self._paused, 1e-9)
        rate = tqdm.format_sizeof(images / seconds)
        said = [f"{rate} img/s"]
        if figures is not None:
            said += [f"loss {figures[0]:.3f}", f"acc {100 * figures[1]:.1f} %"]
        if skipped:
            said.append(f"{skipped} skipped")
        self._bar.set_postfix_str(", ".join(said), refresh=False)
        self._bar.update(self._batch_size)

    def write(self, step: int, epoch: float, figures: Mapping[str, float | int]) -> None:
        """Records figures of a step."""
        if not self._primary:
            return
        self._metrics.write(step, round(epoch, 4), figures)
        self._show(step, figures)

    def sync(self) -> None:
        """Returns when all figures are on the disk, as they must be before a checkpoint of their step."""
        if self._primary:
            self._metrics.sync()

    def _show(self, step: int, figures: Mapping[str, float | int]) -> None:
        """Figures of a step as events for TensorBoard."""
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
