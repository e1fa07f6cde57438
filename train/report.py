"""What a person sees of a run: progress bar, `metrics.jsonl`, TensorBoard events, `curves.png`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
from tensorboardX import SummaryWriter
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt


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


# Seconds between two progress lines where there is no terminal.
_LOG_INTERVAL = 20.0


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

    Args:
      workdir: where the files go.
      total_steps: length of the run.
      batch_size: global, for images per second.
      start_step: where the run starts; what an interrupted run wrote of later steps is dropped, so that the files are
        those of an uninterrupted run.
      primary: whether this host writes.
    """

    def __init__(self, workdir: Path, total_steps: int, batch_size: int, start_step: int, *, primary: bool):
        self._primary = primary
        self._path = workdir / "metrics.jsonl"
        self._curves = workdir / "curves.png"
        self._batch_size = batch_size
        if not primary:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self._path) if row["step"] <= start_step]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._events = SummaryWriter(str(workdir / "events"), purge_step=start_step + 1 if start_step else None)
        self._bar = tqdm(
            total=total_steps * batch_size,
            initial=start_step * batch_size,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            smoothing=0.1,
            # A log file gets whole lines, one now and then, instead of a bar drawn over and over.
            mininterval=0.2 if sys.stderr.isatty() else _LOG_INTERVAL,
            maxinterval=10.0 if sys.stderr.isatty() else _LOG_INTERVAL,
            file=sys.stderr if sys.stderr.isatty() else _Lines(),
        )

    def advance(self, loss: float | None = None, accuracy: float | None = None) -> None:
        """One step is done."""
        if self._primary:
            if loss is not None and accuracy is not None:
                self._bar.set_postfix_str(f"loss {loss:.3f}, acc {100 * accuracy:.1f} %", refresh=False)
            self._bar.update(self._batch_size)

    def write(self, step: int, epoch: float, figures: Mapping[str, float | int]) -> None:
        """Records figures of a step."""
        if not self._primary:
            return
        with self._path.open("a") as stream:
            stream.write(json.dumps({"step": step, "epoch": round(epoch, 4), **figures}) + "\n")
        for name, value in figures.items():
            self._events.add_scalar(
                name.replace("eval_", "eval/") if name.startswith("eval_") else f"train/{name}", value, step
            )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._primary and sys.stderr.isatty():
            tqdm.write(text, file=sys.stderr)
        elif self._primary:
            print(text, file=sys.stderr, flush=True)

    def draw(self) -> None:
        """Draws `curves.png` anew."""
        if self._primary:
            draw_curves(read_metrics(self._path), self._curves)

    def close(self) -> None:
        """Flushes and frees everything."""
        if self._primary:
            self._bar.close()
            self._events.close()


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots loss and accuracy over epochs.

    Args:
      rows: lines of a `metrics.jsonl`.
      path: of the PNG.
    """
    train = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    if not train and not evals:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in train]
    left.plot(epochs, [row["loss"] for row in train], color="tab:blue", alpha=0.8, lw=1.2, label="training batches")
    right.plot(
        epochs, [100 * row["accuracy"] for row in train], color="tab:blue", alpha=0.8, lw=1.2, label="training batches"
    )
    if evals:
        marks = {"color": "tab:orange", "marker": "o", "ms": 3.5, "lw": 1.6, "label": "held-out data"}
        at = [row["epoch"] for row in evals]
        left.plot(at, [row["eval_loss"] for row in evals], **marks)
        right.plot(at, [100 * row["eval_top1"] for row in evals], **marks)
        best = max(evals, key=lambda row: row["eval_top1"])
        right.axhline(100 * best["eval_top1"], color="tab:orange", lw=0.8, ls=":")
        right.set_title(f"top-1: best {100 * best['eval_top1']:.2f} %, last {100 * evals[-1]['eval_top1']:.2f} %")
    left.set_title("cross-entropy")
    left.set_yscale("log")
    for axis_ticks in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        axis_ticks(matplotlib.ticker.FormatStrFormatter("%g"))
    right.set_ylabel("%")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    partial_ = path.with_suffix(".partial.png")
    figure.savefig(partial_, dpi=110)
    plt.close(figure)
    # Someone may have the picture open: it is replaced whole.
    partial_.replace(path)
