"""Times the start of a training, with an empty compilation cache and with a filled one.

    python -m benchmarks.startup                             # the table, about a quarter of an hour
    python -m benchmarks.startup --models seresnet50 --rounds 3

A start is a new process, from its first line to the end of the first update of two images: import, initialisation of
the parameters, tracing and compilation of the step, one update. Every round has a new, empty cache folder: the first
start fills it (cold), the second reads it (warm). Figures are medians over the rounds. Every row is appended as one
line to `benchmarks/results/startup.jsonl` with the command, the date, the machine and the versions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import se_flax
from benchmarks.machine import command_line, describe, record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "startup.jsonl"
MODELS = ("seresnet50", "seresnet152", "efficientnet_b4")
BATCH = 2


def start(model: str, side: int, cache: str) -> dict[str, Any]:
    """Makes one start in a new process; returns its seconds by phase and its versions."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.sides.start", model, str(side), str(BATCH), cache]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Cold and warm starts of one network.

    Args:
      model: name of the network.
      rounds: pairs of starts.

    Returns:
      Seconds by phase and in total, cold and warm, and the ratios of cold to warm in total and for the compilation.
    """
    side = se_flax.get_variant(model).input_size
    starts: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    versions: dict[str, str] = {}
    for i in range(rounds):
        with tempfile.TemporaryDirectory(prefix="se-flax-start-") as cache:
            for which, found in starts.items():
                line = start(model, side, cache)
                versions = line["versions"]
                found.append({**line["phases"], "all": sum(line["phases"].values())})
                print(f"{model}, round {i + 1} of {rounds}, {which}: {found[-1]['all']:.1f} s", file=sys.stderr)
    seconds = {
        which: {phase: round(statistics.median(one[phase] for one in found), 2) for phase in found[0]}
        for which, found in starts.items()
    }
    pairs = list(zip(starts["cold"], starts["warm"], strict=True))
    ratios = {
        "all": statistics.median(cold["all"] / warm["all"] for cold, warm in pairs),
        "compile": statistics.median(_compiling(cold) / _compiling(warm) for cold, warm in pairs),
    }
    return {
        "model": model,
        "image_size": side,
        "batch": BATCH,
        "rounds": rounds,
        "seconds": seconds,
        "ratios": {name: round(value, 2) for name, value in ratios.items()},
        "versions": versions,
    }


def _compiling(phases: dict[str, float]) -> float:
    """Seconds of the phases that the cache can shorten: initialisation of parameters and compilation of the step."""
    return phases["parameters"] + phases["compile"]


def main() -> int:
    """Measures and records the rows of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"networks ({' '.join(MODELS)})")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of a cold and a warm start (3)")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    for model in options.models:
        row = measure(model, options.rounds)
        for which, seconds in row["seconds"].items():
            print(f"{model:18} {which}  " + "  ".join(f"{phase} {value} s" for phase, value in seconds.items()))
        print(f"{model:18} warm is {row['ratios']['all']} times faster, its compilation {row['ratios']['compile']}")
        if not options.dry_run:
            record(RESULTS, command_line("benchmarks.startup"), row | {"machine": describe()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
