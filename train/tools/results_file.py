"""A file of an ablation's finished runs, one line of JSON each, that grows over days and machines.

Files of several machines are merged by concatenation (`cat a.jsonl b.jsonl > all.jsonl`): a run that is in the file
twice counts once, and runs of other settings are refused.
"""

import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from se_flax.errors import UserError
from train.config import SAME_NUMBERS, changed_settings

Result = dict[str, Any]
Run = tuple[str, int]
"""Cell and seed."""

# What may differ between machines: where the data lies. The number of its images is compared instead.
_ELSEWHERE = ("data.source",)
# Of a cell and of a run, so that the runs of a study differ in them.
_OWN = ("model.attention.", "seed")
_POINTS = 100


def read(path: Path) -> list[Result]:
    """All lines of a file; none if there is no file.

    Raises:
      UserError: a line other than the last is no JSON, or has no study, cell and seed. A last line that was cut off by
        the end of its process is left out.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "study": row["study"], "cell": row["cell"], "seed": row["seed"]})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and isinstance(error, ValueError):
                break
            raise UserError(
                f"line {number} of {path} is no result of an ablation; remove it, or give another --results file"
            ) from error
    return rows


def runs_of(rows: list[Result], study: str, title: str = "the results") -> dict[Run, Result]:
    """The runs of one study, each once.

    Args:
      rows: lines of one or several files.
      study: its name.
      title: of the rows, for the message.

    Raises:
      UserError: runs of the study have different settings, or were evaluated on different numbers of images.
    """
    found: dict[Run, Result] = {}
    first: Result | None = None
    for row in rows:
        if row["study"] != study:
            continue
        first = first or row
        check_same_study(first, row["config"], title, free=_OWN)
        if "count" in row and "count" in first and row["count"] != first["count"]:
            raise UserError(
                f"{title} mix evaluations on {first['count']:,} and {row['count']:,} images in the study {study}; "
                "merge only results on the same data"
            )
        found.setdefault((row["cell"], row["seed"]), row)
    return found


def check_same_study(row: Result, config: Mapping[str, Any], title: str, free: tuple[str, ...] = ()) -> None:
    """Refuses settings other than those of a result.

    Args:
      row: the result.
      config: flattened settings.
      title: where the result is, for the message.
      free: settings that may differ.

    Raises:
      UserError: they differ.
    """
    changed = changed_settings(row["config"], config, (*SAME_NUMBERS, *_ELSEWHERE, *free))
    if changed:
        raise UserError(
            f"{title} have runs of other settings in the study {row['study']} ({'; '.join(changed[:3])}); give every "
            "set of settings its own --results file"
        )


def append(path: Path, study: str, run: Run, result: Result, folder: Path) -> None:
    """Adds a finished run.

    Args:
      path: of the file.
      study: its name.
      run: cell and seed.
      result: figures and settings, as in `result.json`.
      folder: of the run, whose `metrics.jsonl` gives the curves.
    """
    import jax

    cell, seed = run
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "cores": cores}
    versions = {"jax": jax.__version__, "python": platform.python_version()}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    row = {"study": study, "cell": cell, "seed": seed, "date": date, **result, "machine": machine, "versions": versions}
    row["curves"] = curves_of(folder / "metrics.jsonl")
    kind, _, source = result["config"]["data.source"].partition(":")
    if kind == "folder":  # the file is shared, and where the folder lay helps nobody
        row["config"] = {**result["config"], "data.source": f"folder:{Path(source).name}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:  # one write, so that two processes do not mix their lines
        stream.write(json.dumps(row) + "\n")


def curves_of(metrics: Path) -> dict[str, list[list[float]]]:
    """Pairs of epoch and training loss, and of epoch and share of right answers, of at most 100 points each."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    rows = [json.loads(line) for line in lines]
    train = [[row["epoch"], row["loss"]] for row in rows if "loss" in row]
    held_out = [[row["epoch"], row["eval_top1"]] for row in rows if "eval_top1" in row]
    return {"train_loss": _thinned(train), "eval_top1": _thinned(held_out)}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Every n-th point, counted from the last one."""
    step = -(-len(points) // _POINTS) or 1
    kept = points[::-1][::step][::-1]
    return [[round(epoch, 4), round(value, 6)] for epoch, value in kept]
