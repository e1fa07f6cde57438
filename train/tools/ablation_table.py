"""The result table of an ablation."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.config import Attention

Results = Mapping[tuple[str, int], dict[str, Any] | None]
"""Results of the finished runs, by cell and seed; None for the others."""


@dataclass(frozen=True)
class Paper:
    """The paper's figures for a cell.

    Attributes:
      top1: error in per cent.
      top5: error in per cent.
      params: as printed.
      gflops: as printed; None if not printed.
    """

    top1: float
    top5: float
    params: str = ""
    gflops: float | None = None


@dataclass(frozen=True)
class Cell:
    """One network of a study.

    Attributes:
      name: unique within the study.
      attention: settings of the network's attention.
      paper: the paper's figures.
    """

    name: str
    attention: Attention = field(default_factory=Attention)
    paper: Paper | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """The attention's settings, to tell whether two cells are the same network."""
        return tuple(asdict(self.attention).items())


@dataclass(frozen=True)
class Row:
    """A row of the table, for one cell; errors and differences in per cent.

    Attributes:
      cell: the cell.
      top1: top-1 errors by seed.
      top5: top-5 errors by seed; empty for five classes or fewer.
      difference: difference of the top-1 error from that of the cell `none`, by seed.
      diverged: number of runs that diverged.
      params: number of trainable parameters.
      macs_paper: multiply-adds as the paper counts them.
    """

    cell: Cell
    top1: tuple[float, ...]
    top5: tuple[float, ...]
    difference: tuple[float, ...]
    diverged: int
    params: int | None
    macs_paper: int | None


def make_rows(cells: Sequence[Cell], seeds: Sequence[int], results: Results) -> list[Row]:
    """The rows of the table, from the finished runs.

    Args:
      cells: in the order of the table.
      seeds: of each cell.
      results: of the finished runs.
    """

    def error(name: str, seed: int, figure: str) -> float | None:
        result = results.get((name, seed))
        if result is None or figure not in result:
            return None
        return 100 * (1 - result[figure] / result["count"])

    rows = []
    for cell in cells:
        finished = [r for seed in seeds if (r := results.get((cell.name, seed))) is not None]
        pairs = [(error(cell.name, seed, "top1"), error("none", seed, "top1")) for seed in seeds]
        top5 = [error(cell.name, seed, "top5") for seed in seeds]
        rows.append(
            Row(
                cell=cell,
                top1=tuple(mine for mine, _ in pairs if mine is not None),
                top5=tuple(mine for mine in top5 if mine is not None),
                difference=tuple(mine - plain for mine, plain in pairs if mine is not None and plain is not None),
                diverged=sum("diverged" in result for result in finished),
                params=finished[0]["params"] if finished else None,
                macs_paper=finished[0]["macs_paper"] if finished else None,
            )
        )
    return rows


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1); None for too few values."""
    return (
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


_HEAD = (
    "cell", "runs", "top-1 error %", "top-5 error %", "top-1 minus none", "parameters", "MMACs",
    "paper top-1 %", "paper top-5 %", "paper parameters", "paper GFLOPs",
)  # fmt: skip


def write_tables(folder: Path, title: str, cells: Sequence[Cell], seeds: Sequence[int], results: Results) -> None:
    """Writes `table.md` and `table.csv`, without the figures of unfinished runs.

    Args:
      folder: the folder to write into.
      title: of `table.md`.
      cells: in the order of the table.
      seeds: of each cell.
      results: of the finished runs.
    """
    rows = make_rows(cells, seeds, results)
    lines = [
        f"# {title}",
        "",
        "Error of each run's last evaluation, mean ± standard deviation over the runs (one per seed). Multiply-adds as "
        "the paper counts. The paper's columns are SE-ResNet-50 on ImageNet (Hu et al. 2020, tables 10 to 16).",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|" + "---|" * len(_HEAD),
    ]
    table = []
    for row in rows:
        paper = row.cell.paper
        runs = f"{len(row.top1)}" + (f" and {row.diverged} diverged" if row.diverged else "")
        columns = [
            row.cell.name,
            runs,
            _both(row.top1),
            _both(row.top5),
            _both(row.difference, signed=True),
            "" if row.params is None else f"{row.params:,}",
            "" if row.macs_paper is None else f"{row.macs_paper / 1e6:.2f}",
            "" if paper is None else f"{paper.top1:.2f}",
            "" if paper is None else f"{paper.top5:.2f}",
            "" if paper is None else paper.params,
            "" if paper is None or paper.gflops is None else f"{paper.gflops:.2f}",
        ]
        lines.append("| " + " | ".join(columns) + " |")
        table.append(_csv_row(row))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    with (folder / "table.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def _both(values: Sequence[float], *, signed: bool = False) -> str:
    mean, spread = mean_and_spread(values)
    if mean is None:
        return ""
    text = f"{mean:+.2f}" if signed else f"{mean:.2f}"
    return text if spread is None else f"{text} ± {spread:.2f}"


def _csv_row(row: Row) -> dict[str, Any]:
    paper = row.cell.paper
    figures: dict[str, Any] = {"cell": row.cell.name, "runs": len(row.top1), "diverged": row.diverged}
    for name in ("top1", "top5", "difference"):
        mean, spread = mean_and_spread(getattr(row, name))
        figures[f"{name}_mean"] = "" if mean is None else round(mean, 6)
        figures[f"{name}_std"] = "" if spread is None else round(spread, 6)
    figures["top1_by_seed"] = " ".join(f"{value:.6g}" for value in row.top1)
    figures["params"], figures["macs_paper"] = row.params, row.macs_paper
    for name in ("top1", "top5", "params", "gflops"):
        figures[f"paper_{name}"] = "" if paper is None else getattr(paper, name)
    return figures
