"""Writes docs/trained.md, networks trained to the end with and without attention, from results of `train.ablation`.

    python -m benchmarks.trained                               # the page and its picture from the project's results
    python -m benchmarks.trained --results FILE --page FILE    # from another file

`python -m train.ablation --results=benchmarks/results/trained.jsonl` trains what is not in the file; the page has the
command.

Differences are paired: the error of a cell minus that of `none` with the same seed. Their 95 % confidence interval is
Student's t over the seeds.
"""

import argparse
import math
import runpy
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from train.tools import results_file
from train.tools.ablation_table import Cell, Paper

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "trained.jsonl"
PAGE = ROOT / "docs" / "trained.md"
PICTURE = ROOT / "docs" / "curves" / "trained.png"
# 97.5 % quantile of Student's t, by degrees of freedom (a table of any textbook); more degrees take the last one.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
PLAIN = "none"
STUDIES = ROOT / "configs" / "ablation.py"
HEAD = """# Trained to the end

Compare networks with and without channel attention, trained to the end on real images. Written by
`python -m benchmarks.trained` from `benchmarks/results/trained.jsonl`.

- **Error**: top-1 error of the last evaluation, not of the best one: mean ± standard deviation over the seeds.
- **Difference**: error minus that of the network without attention and the same seed, with the 95 % confidence interval
  of the mean (Student's t). An interval without zero is a difference beyond the spread of the seeds; one seed has no
  interval, and its difference may be chance.
- **Paper**: Hu et al. 2020, tables 10 to 16: error of SE-ResNet-50 on ImageNet and the difference from ResNet-50. On
  CIFAR-10 (table 4) SE lowers the error of ResNet-110 from 6.37 to 5.21 %.

"""


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean of normally distributed values; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = _T[min(len(values) - 1, len(_T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def errors(runs: Mapping[results_file.Run, results_file.Result], cell: str) -> dict[int, float]:
    """Top-1 errors in per cent by seed, of the runs that did not diverge."""
    return {
        seed: 100 * (1 - r["top1"] / r["count"])
        for (name, seed), r in sorted(runs.items())
        if name == cell and "top1" in r
    }


def paper_of(study: str) -> dict[str, Paper]:
    """The paper's figures of a study's cells, by name, as far as it has them."""
    cells: Sequence[Cell] = runpy.run_path(str(STUDIES))["get_cells"](study)
    return {cell.name: cell.paper for cell in cells if cell.paper is not None}


def section(study: str, runs: Mapping[results_file.Run, results_file.Result]) -> str:
    """The table of one study."""
    last = list(runs.values())[-1]
    config = last["config"]
    length = f"{config['steps']:,} steps" if config["steps"] else f"{config['epochs']:g} epochs"
    text = f"## {config['model.name']}, {length}: `{study}`\n\n"
    text += "| cell | seeds | error, % | difference | 95 % interval | parameters | minutes a run | paper |\n"
    text += "|---|---:|---:|---:|---:|---:|---:|---:|\n"
    plain, paper = errors(runs, PLAIN), paper_of(study)
    for cell in dict.fromkeys(name for name, _ in runs):
        found = errors(runs, cell)
        paired = [found[seed] - plain[seed] for seed in found if seed in plain] if cell != PLAIN else []
        rows = [r for (name, _), r in runs.items() if name == cell]
        bounds = interval(paired)
        diverged = sum("diverged" in r for r in rows)
        cells = (
            f"`{cell}`",
            f"{len(found)}" + (f" ({diverged} diverged)" if diverged else ""),
            _mean_and_spread(list(found.values())),
            f"{statistics.fmean(paired):+.2f}" if paired else "",
            f"{bounds[0]:+.2f} to {bounds[1]:+.2f}" if bounds else "",
            f"{rows[0]['params']:,}",
            f"{statistics.median(r['seconds'] for r in rows) / 60:.1f}",
            f"{paper[cell].top1:.2f} ({paper[cell].top1 - paper[PLAIN].top1:+.2f})" if cell in paper else "",
        )
        text += "| " + " | ".join(cells) + " |\n"
    where = dict.fromkeys(
        f"{r['date']}, {r['machine']['devices']} x {r['machine']['device']} "
        f"({_counted(r['machine']['cores'], 'core')}), JAX {r['versions']['jax']}"
        for r in runs.values()
    )
    evaluated = f"evaluated on {last['count']:,} images" if "count" in last else ""
    return text + f"\nData: {Path(config['data.source']).name}, {evaluated}. Runs: {'; '.join(where)}.\n"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def _mean_and_spread(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def picture(runs: Mapping[results_file.Run, results_file.Result], cells: Sequence[str] = (PLAIN, "se")) -> Figure:
    """Training loss and held-out error over epochs, one thin line per seed and a thick one for their mean.

    After figure 5 of Hu et al. 2020, whose curves are of ResNet-50 on ImageNet.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, axes, label in zip(
        ("train_loss", "eval_top1"), panels, ("training loss", "error on held-out images, %"), strict=True
    ):
        for cell, colour in zip(cells, ("tab:gray", "tab:blue"), strict=True):
            curves = [r["curves"][name] for (c, _), r in sorted(runs.items()) if c == cell and r["curves"][name]]
            lines = [[(x, 100 * (1 - y) if name == "eval_top1" else y) for x, y in curve] for curve in curves]
            for line in lines:
                axes.plot(*zip(*line, strict=True), color=colour, lw=0.8, alpha=0.35)
            if lines and len({tuple(x for x, _ in line) for line in lines}) == 1:
                means = [
                    statistics.fmean(values) for values in zip(*([y for _, y in line] for line in lines), strict=True)
                ]
                label_ = {PLAIN: "without attention", "se": "squeeze-and-excitation"}.get(cell, cell)
                seeds = _counted(len(lines), "seed")
                axes.plot([x for x, _ in lines[0]], means, color=colour, lw=2, label=f"{label_}, {seeds}")
        axes.set_xlabel("epoch")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3, which="both", lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def page(rows: list[dict[str, Any]]) -> str:
    """The page of all studies in a file."""
    studies = dict.fromkeys(row["study"] for row in rows)
    if not studies:
        return HEAD + "`make trained` trains `none` and `se` with one seed. No run is recorded yet.\n"
    sections = [section(study, results_file.runs_of(rows, study, str(RESULTS.name))) for study in studies]
    curves = f"![Training loss and error over epochs with and without SE]({PICTURE.relative_to(PAGE.parent)})\n\n"
    command = (
        "`make trained` trains `none` and `se` with one seed. To continue the study, or to repeat it in another file:"
        "\n\n"
        "    python -m train.ablation "
        f"--config=configs/ablation.py:{next(iter(studies))} \\\n        --workdir=runs/trained "
        "--results=benchmarks/results/trained.jsonl --seeds=5\n\n"
    )
    return HEAD + command + curves + "\n".join(sections)


def main() -> None:
    """Writes the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of results (default: the project's)")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write the page; the picture goes beside it")
    options = parser.parse_args()
    rows = results_file.read(options.results)
    options.page.write_text(page(rows))
    if rows:
        target = options.page.parent / PICTURE.relative_to(PAGE.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        runs = results_file.runs_of(rows, rows[0]["study"], options.results.name)
        picture(runs).savefig(target, dpi=110)


if __name__ == "__main__":
    main()
