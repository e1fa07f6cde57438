"""The result of the stress program, as a table in Markdown."""

import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

BEGIN, FINISH = "<!-- written by make stress -->\n", "<!-- end of what make stress writes -->\n"


_TITLES = {
    "jax": "JAX",
    "orbax-checkpoint": "Orbax",
    "torch": "PyTorch",
    "tensorstore": "TensorStore",
    "pillow": "Pillow",
    "numpy": "NumPy",
}


def heading(*packages: str) -> str:
    """Date, machine, and the versions of Python and of those packages that are installed."""
    machine = describe()
    versions = [f"Python {platform.python_version()}"]
    for name in packages:
        try:
            versions.append(f"{_TITLES.get(name, name)} {version(name)}")
        except PackageNotFoundError:
            continue
    where = f"{machine['cores']} cores of an {machine['processor']}, shared"
    return f"{datetime.datetime.now(datetime.UTC).date()}, {where}; {', '.join(versions)}"


def of(ended: Sequence[Any], runs: int, wrong: Mapping[int, Sequence[Any]], *, seed: int, minutes: float) -> str:
    """Sums up ends (`kills.Ended`) and differences (`compare.Difference`) by run.

    Args:
      ended: every end of a process.
      runs: trained to their end.
      wrong: differences by number of the run.
      seed: of the program.
      minutes: that it took.
    """
    found = [difference for each in wrong.values() for difference in each]
    lines = [
        f"{heading('jax', 'orbax-checkpoint')};",
        f"seed {seed}, {minutes:.0f} minutes: **{len(ended)} ends in {runs} runs, {len(found)} differences, "
        f"{sum(each.lost for each in found)} bytes lost.**",
        "",
        "| the process ended in or at | image runs | table runs | wrong | most steps done again |",
        "|---|---|---|---|---|",
    ]
    for moment in sorted({each.moment for each in ended}, key=lambda name: (name == "SIGTERM", name)):
        here = [each for each in ended if each.moment == moment]
        tables = sum(each.kind == "tables" for each in here)
        faults = sum(bool(each.faults) for each in here)
        lines.append(f"| {moment} | {len(here) - tables} | {tables} | {faults} | {max(each.lost for each in here)} |")
    seconds = [each.seconds for each in ended if each.moment == "SIGTERM"]
    if seconds:
        lines += ["", f"From SIGTERM to the end of the process: {max(seconds):.1f} s at most."]
    return "\n".join(lines) + "\n"


def write(page: Path, text: str, first: str = BEGIN, last: str = FINISH) -> None:
    """Replaces the part of a page between two lines."""
    head, begin, rest = page.read_text().partition(first)
    _, finish, tail = rest.partition(last)
    if not begin or not finish:
        raise SystemExit(f"{page} has no place for the table: the lines {first.strip()} and {last.strip()}")
    page.write_text(f"{head}{first}\n{text}\n{last}{tail}")
