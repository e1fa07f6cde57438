"""The pictures of `se-flax gates`, after figures 6 and 7 of Hu et al. 2020."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from se_flax.analysis.gates import EVERY_LAYER, UNCHANGED, Answers, LayerGates

# Okabe and Ito's palette, which colour-blind readers can tell apart too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C564B", "#7F7F7F")
_CHANNELS = 50  # per curve, evenly spread, as in the paper
_COLUMNS = 3
_MOST_PANELS = 18
_MOST_SPREAD = 6
_DPI = 100
# Widths: a letter of the legend and of the title, in inches; the line before a label, in letters.
_LETTER, _TITLE_LETTER, _HANDLE = 0.08, 0.105, 6


def draw(
    folder: Path,
    found: Mapping[str, LayerGates],
    layers: Sequence[str],
    groups: Mapping[str, int],
    answers: Mapping[str, Answers],
) -> None:
    """Writes `groups.png`, `spread.png` and `layers.png`.

    Args:
      folder: the folder to write into.
      found: statistics by layer.
      layers: layers in the first two pictures; if there are too many, evenly spread ones are drawn.
      groups: number of images by the group's name, in the order of the statistics.
      answers: predictions with replaced gates, by layer; may be empty.
    """
    short = shortened(list(found))
    _group_curves(found, _thinned(layers, _MOST_PANELS), groups, short).savefig(folder / "groups.png", dpi=_DPI)
    _spread(found, _thinned(layers, _MOST_SPREAD), groups, short).savefig(folder / "spread.png", dpi=_DPI)
    _by_layer(found, answers, short).savefig(folder / "layers.png", dpi=_DPI)


def shortened(layers: Sequence[str]) -> dict[str, str]:
    """Names of layers without a common last part: `layer1_0` for `layer1_0/se`."""
    ends = {layer.rpartition("/")[2] for layer in layers}
    cut = len(ends) == 1 and all("/" in layer for layer in layers)
    return {layer: layer.rpartition("/")[0] if cut else layer for layer in layers}


def _thinned(layers: Sequence[str], most: int) -> list[str]:
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int))
    return [layers[i] for i in chosen]


def _panels(count: int) -> tuple[Figure, Iterator[Any]]:
    """A figure with `count` panels in rows of three, and the panels."""
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.3 * columns, 2.3 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    for i, axis in enumerate(axes.flat[:count]):
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        if i >= count - columns:
            axis.set_xlabel("channel")
        if i % columns == 0:
            axis.set_ylabel("gate")
    return figure, iter(axes.flat[:count])


def _sampled(channels: int) -> np.ndarray:
    return np.unique(np.linspace(0, channels - 1, min(_CHANNELS, channels)).round().astype(int))


def _limits(found: Mapping[str, LayerGates], layers: Sequence[str]) -> tuple[float, float]:
    """Limits of the axis: 0 to 1, or more if gates exceed them."""
    low = min(float(found[layer].minimum.min()) for layer in layers)
    high = max(float(found[layer].maximum.max()) for layer in layers)
    return min(low, 0.0) - 0.03, max(high, 1.0) + 0.03


def _group_curves(
    found: Mapping[str, LayerGates], layers: Sequence[str], groups: Mapping[str, int], short: Mapping[str, str]
) -> Figure:
    figure, axes = _panels(len(layers))
    for layer, axis in zip(layers, axes, strict=True):
        gates = found[layer]
        x = _sampled(len(gates.mean))
        axis.plot(x, gates.mean[x], color="black", linewidth=2.2, alpha=0.55, label="all pictures", zorder=1)
        for i, (name, count) in enumerate(groups.items()):
            colour = _COLOURS[i % len(_COLOURS)]
            style = "-" if i < len(_COLOURS) else "--"
            axis.plot(x, gates.group_means[i][x], style, color=colour, linewidth=1.1, label=f"{name} ({count})")
        axis.set_title(f"{short[layer]}  ({len(gates.mean)} channels)", fontsize=10)
        axis.set_ylim(*_limits(found, layers))
    _legend(figure, f"Mean gate of each group (at most {_CHANNELS} channels of a layer, evenly spread)")
    return figure


def _spread(
    found: Mapping[str, LayerGates], layers: Sequence[str], groups: Mapping[str, int], short: Mapping[str, str]
) -> Figure:
    figure, axes = _panels(len(layers))
    several = [i for i, count in enumerate(groups.values()) if count > 1][:2]
    names = list(groups)
    for layer, axis in zip(layers, axes, strict=True):
        gates = found[layer]
        x = _sampled(len(gates.mean))
        curves = [(names[i], gates.group_means[i], gates.group_std[i], _COLOURS[i % len(_COLOURS)]) for i in several]
        # Groups of a single picture have no spread; draw that of all pictures instead.
        for name, mean, std, colour in curves or [("all pictures", gates.mean, gates.std, "black")]:
            axis.plot(x, mean[x], color=colour, linewidth=1.2, label=f"{name}, mean ± standard deviation")
            axis.fill_between(x, (mean - std)[x], (mean + std)[x], color=colour, alpha=0.22, linewidth=0)
        axis.set_title(f"{short[layer]}  ({len(gates.mean)} channels)", fontsize=10)
        axis.set_ylim(*_limits(found, layers))
    _legend(figure, "Spread of the gates over the pictures of a group")
    return figure


def _legend(figure: Figure, title: str) -> None:
    """Adds the title above and the legend below, wrapped to the figure's width; increases the height for them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    width = figure.get_figwidth()
    figure.suptitle(textwrap.fill(title, int(width / _TITLE_LETTER)), fontsize=12)
    letters = int(width / _LETTER)
    labels = [textwrap.fill(label, letters - _HANDLE) for label in labels]
    widest = max(len(line) for label in labels for line in label.splitlines())
    columns = max(min(len(labels), letters // (widest + _HANDLE)), 1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    figure.set_figheight(figure.get_figheight() + 0.18 * lines)


def _by_layer(found: Mapping[str, LayerGates], answers: Mapping[str, Answers], short: Mapping[str, str]) -> Figure:
    """Statistics over depth: spread, variance between groups, closed and open gates, accuracy with constant gates.

    Undefined statistics have no panel: the variance between groups of one picture each, and the accuracy if `answers`
    is empty.
    """
    layers, x = list(found.values()), np.arange(len(found))
    panels = [_draw_deviations, _draw_between, _draw_thresholds]
    if not np.isfinite(layers[0].chance):
        panels.remove(_draw_between)
    count = len(panels) + bool(answers)
    figure = Figure(figsize=(max(7.5, 0.32 * len(layers) + 2.5), 2.15 * count + 0.6), layout="constrained")
    axes = figure.subplots(count, 1, sharex=True)
    for axis, draw_panel in zip(axes, panels, strict=False):
        draw_panel(axis, x, layers)
    if answers:
        _draw_answers(axes[-1], x, [answers[name] for name in found], answers)
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        top = axis.dataLim.y1 or 1.0
        ticks = np.asarray(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(0, top))
        axis.set_yticks(ticks[ticks <= 1.02 * top])
        axis.set_ylim(0, 1.3 * top)  # with room for the legend
        axis.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")
    axes[-1].set_xticks(x, [short[name] for name in found], rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    return figure


def _draw_deviations(axis: Any, x: np.ndarray, layers: Sequence[LayerGates]) -> None:
    over_images = [float(np.sqrt(np.square(gates.std).mean())) for gates in layers]
    axis.plot(x, over_images, "o-", color=_COLOURS[0], markersize=4, label="over pictures (root mean square)")
    over_channels = [gates.mean.std() for gates in layers]
    axis.plot(x, over_channels, "s-", color=_COLOURS[1], markersize=4, label="over channels")
    axis.set_ylabel("standard\ndeviation")


def _draw_between(axis: Any, x: np.ndarray, layers: Sequence[LayerGates]) -> None:
    axis.plot(x, [100 * gates.between for gates in layers], "o-", color=_COLOURS[2], markersize=4, label="groups")
    low, high = ([100 * f(gates.permuted) for gates in layers] for f in (np.min, np.max))
    axis.fill_between(x, low, high, color="gray", alpha=0.3, linewidth=0, label="groups drawn at random")
    axis.set_ylabel("variance between\ngroups, %")


def _draw_thresholds(axis: Any, x: np.ndarray, layers: Sequence[LayerGates]) -> None:
    closed, opened = ([100 * getattr(gates, name) for gates in layers] for name in ("closed", "open"))
    axis.bar(x - 0.2, closed, 0.38, color=_COLOURS[0], label="closed")
    axis.bar(x + 0.2, opened, 0.38, color=_COLOURS[5], label="open")
    axis.set_ylabel("gates, %")


def _draw_answers(axis: Any, x: np.ndarray, with_mean: Sequence[Answers], answers: Mapping[str, Answers]) -> None:
    own, every = answers[UNCHANGED], answers[EVERY_LAYER]
    share = 100 / own.count
    axis.bar(x - 0.2, [share * a.lost for a in with_mean], 0.38, color=_COLOURS[1], label="answers lost")
    axis.bar(x + 0.2, [share * a.gained for a in with_mean], 0.38, color=_COLOURS[2], label="gained")
    axis.set_ylabel("pictures, %\n(gates replaced)")
    axis.set_title(
        f"gates replaced by their mean, layer by layer; top-1 {share * own.top1:.1f} %, "
        f"{share * every.top1:.1f} % with all layers replaced",
        fontsize=9,
    )
