"""Interleaved (round-robin) timing of the libraries in a comparison, so that machine drift cancels."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import command_line, describe, record
from benchmarks.worker import Worker

Task = tuple[str, int]
# Seconds between turns: OpenMP's threads spin for a while after PyTorch's turn.
PAUSE = 0.05


def task(words: str) -> Task:
    """Parses a value of `--tasks`, such as `infer:16`, into task and number of images.

    Raises:
      argparse.ArgumentTypeError: the value is invalid.
    """
    kind, _, batch = words.partition(":")
    if kind not in ("infer", "train") or not batch.isdigit() or not int(batch):
        raise argparse.ArgumentTypeError(f"got the task {words!r}; give infer:N or train:N, N images")
    return kind, int(batch)


def take_turns(
    what: str, commands: Mapping[str, Sequence[str]], environment: Mapping[str, str], count: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Times processes one after the other in every round, so that machine drift cancels.

    Args:
      what: name of the comparison, for messages on standard error.
      commands: commands that start the processes (`benchmarks.sides.pace`), by name.
      environment: as for `Worker`.
      count: number of rounds.

    Returns:
      Seconds per call of every turn, by name, for the processes that started; and the versions that they print.
    """
    sides: dict[str, Worker] = {}
    for name, command in commands.items():
        print(f"{what}: starting {name}", file=sys.stderr, flush=True)
        side = Worker(command, environment)
        if side.wait():
            sides[name] = side
        else:
            side.close()
            print(f"{what}: {name} broke, see above", file=sys.stderr)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(count):
        for name, side in sides.items():
            time.sleep(PAUSE)
            seconds[name].append(side.ask("turn"))
    for side in sides.values():
        side.close()
    return seconds, {key: value for side in sides.values() for key, value in side.about.items()}


def turn_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median over the turns of the first process's time over the second's."""
    return round(statistics.median(b / a for b, a in zip(slow, fast, strict=True)), 3)


def record_rows(
    module: str,
    path: Path,
    models: Iterable[str],
    tasks: Sequence[Task],
    measure: Callable[[str, str, int], Mapping[str, Any]],
    *,
    dry_run: bool,
) -> None:
    """Measures networks and tasks, prints each row and appends it to the results, with the machine.

    Args:
      module: of the benchmark, for the recorded command.
      path: of the results.
      models: names of networks.
      tasks: from `task`.
      measure: from network, task and batch size to a row with `milliseconds` by process.
      dry_run: appends nothing.
    """
    for model in models:
        for kind, batch in tasks:
            row = measure(model, kind, batch)
            cells = [f"{name} {value} ms" for name, value in row["milliseconds"].items()]
            cells += [f"{key.replace('_', ' ')} {row[key]}" for key in row if key.endswith(("ratio", "fastest_other"))]
            print(f"{model:22} {kind}:{batch:<4} {', '.join(cells)}", flush=True)
            if not dry_run:
                record(path, command_line(module), {**row, "machine": describe()})
