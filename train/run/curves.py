"""`curves.png`: the figures of a run over its epochs."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator

CROSS_ENTROPY = "cross-entropy"
_MIXED = ("mixup", "CutMix")
_TRAINING = {"color": "tab:blue", "alpha": 0.8, "lw": 1.2}
_HELD_OUT = {"color": "tab:orange", "marker": "o", "ms": 3.5, "lw": 1.6, "label": "held-out data"}
_DIGITS = (
    (1, 2, 3, 4, 5, 6, 7, 8, 9),
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    (1, 1.5, 2, 3, 4, 6, 8),
    (1, 2, 3, 4, 6, 8),
    (1, 2, 3, 5),
    (1, 2, 5),
    (1, 3),
    (1,),
)
_TITLE = 50  # letters that the title of one of two columns has room for
_GAP = 0.1  # of the axis: what a label takes, and as much again, where two panels share the figure's height


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path, training_loss: str = CROSS_ENTROPY) -> None:
    """Draws loss and accuracy over epochs; nothing where there are no figures yet.

    Args:
      rows: lines of a `metrics.jsonl`.
      path: of the PNG.
      training_loss: as for `curves`.
    """
    figure = curves(rows, training_loss)
    if figure is None:
        return
    partial_ = path.with_suffix(".partial.png")
    figure.savefig(partial_, dpi=110)
    # Someone may have the picture open: it is replaced whole.
    partial_.replace(path)


def curves(rows: Sequence[Mapping[str, Any]], training_loss: str = CROSS_ENTROPY) -> Figure | None:
    """Loss and accuracy over epochs. Two losses share axes only where they are the same quantity.

    Args:
      rows: lines of a `metrics.jsonl`.
      training_loss: what training minimises, in words (`train.build.training_loss`). The loss on held-out data is the
        plain cross-entropy; training's stands beside it if it is that too, else in axes of its own.

    Returns:
      The figure; None without figures to draw.
    """
    train = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    if not train and not evals:
        return None
    mixed = any(word in training_loss for word in _MIXED)
    of_training = {**_TRAINING, "label": "training batches (mixed images)" if mixed else "training batches"}
    panels = [(CROSS_ENTROPY, train, evals)]
    if training_loss != CROSS_ENTROPY:
        panels = [(f"training loss: {training_loss}", train, []), (f"{CROSS_ENTROPY} of held-out data", [], evals)]
        panels = [panel for panel in panels if panel[1] or panel[2]]
    figure = Figure(figsize=(10, 3 + len(panels)), layout="constrained")
    grid = figure.add_gridspec(len(panels), 2)
    end = max(row["epoch"] for row in (*train, *evals))
    for i, (title, of_batches, of_epochs) in enumerate(panels):
        axes = figure.add_subplot(grid[i, 0])
        _plot(axes, of_batches, "loss", of_training)
        _plot(axes, of_epochs, "eval_loss", _HELD_OUT)
        _finish(axes, textwrap.fill(title, _TITLE), end, legend=len(panels) == 1)
        _scale_logarithmically(axes)
        if i < len(panels) - 1:
            axes.tick_params(labelbottom=False)
            axes.set_xlabel("")
    axes = figure.add_subplot(grid[:, 1])
    _plot(axes, train, "accuracy", of_training, times=100)
    _plot(axes, evals, "eval_top1", _HELD_OUT, times=100)
    title = "top-1"
    if evals:
        best = 100 * max(row["eval_top1"] for row in evals)
        axes.axhline(best, color=_HELD_OUT["color"], lw=0.8, ls=":")
        title = f"top-1: best {best:.2f} %, last {100 * evals[-1]['eval_top1']:.2f} %"
    axes.set_ylabel("%")
    _finish(axes, title, end, legend=True)
    return figure


def _plot(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, style: Mapping[str, Any], times: float = 1) -> None:
    if rows:
        axes.plot([row["epoch"] for row in rows], [times * row[key] for row in rows], **style)


def _finish(axes: Axes, title: str, end: float, *, legend: bool) -> None:
    axes.set_title(title)
    axes.set_xlim(0, 1.02 * end or 1)  # a run of no epochs has one point
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=end > 2))
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False)


def _scale_logarithmically(axes: Axes) -> None:
    """A logarithmic axis whose labels are few enough to read, whether the loss spans a tenth or six decades."""
    values = np.concatenate([np.zeros(0), *(np.asarray(line.get_ydata(), float) for line in axes.lines)])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):  # nothing that has a logarithm: exact zeros, or no figures yet
        return
    ratio = float(values.max() / values.min())
    margin = max(ratio**0.06, (1.1 / ratio) ** 0.5)
    low, high = float(values.min()) / margin, float(values.max()) * margin
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(list(logarithmic_ticks(low, high))))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())


def logarithmic_ticks(low: float, high: float) -> np.ndarray:
    """Round numbers for a logarithmic axis, so far apart that their labels do not overlap.

    Args:
      low: lower end of the axis, above 0.
      high: upper end, above `low`.

    Returns:
      float64 [k], at least 2 of them within the ends, neighbours at least a tenth of the axis apart.
    """
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    candidates: list[Any] = [np.outer(10.0**decades, digits).ravel() for digits in _DIGITS]
    candidates += [10.0 ** decades[::step] for step in range(2, len(decades))]
    candidates += [MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(low, high) for count in range(9, 1, -1)]
    best = np.zeros(0)
    for ticks in candidates:
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        gaps = np.diff(np.log(ticks)) / np.log(high / low)
        if len(ticks) > len(best) and np.all(gaps >= _GAP):
            best = ticks
    return best
