"""Gives the readers of foreign files mutated inputs: coverage-guided by atheris where it is installed, else at random.

Command: make fuzz, which is python -m tests.stress.fuzz --inputs=10000 --write=docs/reliability.md

Each format (`fuzz_targets`) has a process of its own (`fuzz_child`), with little memory and an audit hook. A finding
is any exception but `UserError`, a message of several lines, memory or time beyond the bounds, a crash, and whatever
starts a program, executes code, connects, or writes outside the input's folder. Its input and traceback are files in
--findings. All formats take long, so those of a run replace their own rows in --results, and the page has all rows.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from . import table
from .fuzz_child import SECONDS_PER_INPUT
from .fuzz_targets import TARGETS, missing

BEGIN, FINISH = "<!-- written by make fuzz -->\n", "<!-- end of what make fuzz writes -->\n"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.jsonl"
PACKAGES = ("safetensors", "h5py", "torch", "orbax-checkpoint", "tensorstore", "pillow", "numpy")
CRASHES = 20  # of one target
INPUTS = 1_000  # of one process: libraries lose some memory with every file that they refuse


@dataclass
class Result:
    """Of one target.

    Attributes:
      name: of the target.
      inputs: that its reader got.
      accepted: those that it read.
      refused: those that it refused with one sentence.
      findings: a line each.
      mib: most memory that an input took.
      seconds: of the slowest input.
      skipped: why there were no inputs.
      conditions: date, machine, versions, seed, and what guided the mutations.
    """

    name: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    findings: list[str] = field(default_factory=list)
    mib: float = 0.0
    seconds: float = 0.0
    skipped: str = ""
    conditions: str = ""


def merged(results: Sequence[Result], file: Path) -> list[Result]:
    """Results with those of other formats in a file, which then has all of them; in the order of the targets."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = {row["name"]: Result(**row) for row in map(json.loads, lines)} | {each.name: each for each in results}
    found = [rows[name] for name in TARGETS if name in rows]
    file.write_text("".join(json.dumps(dataclasses.asdict(each)) + "\n" for each in found))
    return found


def _memory_folder() -> str | None:
    """Where files are kept in memory, on Linux."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def fuzz(name: str, options: argparse.Namespace) -> Result:
    """Feeds one target, in one process after the other where it crashes."""
    result = Result(name)
    if module := missing(TARGETS[name]):
        result.skipped = f"{module} is not installed"
        return result
    deadline = time.monotonic() + options.seconds
    for start in itertools.count():
        left = deadline - time.monotonic()
        if result.inputs >= options.inputs or left < 1 or start >= CRASHES + result.inputs // INPUTS:
            break
        work = Path(tempfile.mkdtemp(prefix="se-flax-fuzz-", dir=_memory_folder()))
        words = {"target": name, "inputs": min(INPUTS, options.inputs - result.inputs), "seconds": left, "work": work}
        words |= {"seed": options.seed + start, "findings": options.findings.absolute()}
        command = [
            sys.executable,
            "-m",
            "tests.stress.fuzz_child",
            *(f"--{key}={value}" for key, value in words.items()),
        ]
        command += ["--random"] * options.random + [f"--known={key}" for key in result.findings]
        with (work / "output").open("wb") as output:
            limit = left + 3 * SECONDS_PER_INPUT
            try:
                code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=limit).returncode
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
        _add(result, work, code, options.findings / f"{name.replace(' ', '_')}-crash-{start}")
        shutil.rmtree(work)
    return result


def _add(result: Result, work: Path, code: int, crash: Path) -> None:
    """Adds what a process did to the result; one that did not end by itself is a finding."""
    found = json.loads((work / "report.json").read_text()) if (work / "report.json").exists() else {}
    for key in ("inputs", "accepted", "refused"):
        setattr(result, key, getattr(result, key) + found.get(key, 0))
    result.mib, result.seconds = max(result.mib, found.get("mib", 0.0)), max(result.seconds, found.get("seconds", 0.0))
    result.findings += found.get("findings", [])
    if found.get("done"):
        return
    output = (work / "output").read_text(errors="replace")
    if not (work / "current").exists():
        raise SystemExit(f"the program could not begin with {result.name}:\n{output[-3000:]}")
    log = (work / "log").read_text(errors="replace")
    what = f"no answer for {SECONDS_PER_INPUT:.0f} s" if "Timeout" in log else f"the process ended with {code}"
    result.findings.append(f"{what} ({crash.name})")
    crash.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(work / "current", crash.with_suffix(".input"))
    crash.with_suffix(".txt").write_text(f"{what}\n\n{log}\n{output[-8000:]}")


def as_table(results: Sequence[Result]) -> str:
    """The results in Markdown."""
    inputs, findings = sum(each.inputs for each in results), sum(len(each.findings) for each in results)
    lines = [
        f"**{inputs:,} inputs, {findings} findings.**",
        "",
        "| format | inputs | accepted | refused | findings | most memory (bound), MiB | slowest input |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in results:
        if each.skipped:
            lines.append(f"| {each.name} | none: {each.skipped} | | | | | |")
            continue
        memory = f"{each.mib:.0f} ({TARGETS[each.name].mebibytes:,})"
        counts = f"{each.inputs:,} | {each.accepted:,} | {each.refused:,} | {len(each.findings)}"
        lines.append(f"| {each.name} | {counts} | {memory} | {each.seconds:.2f} s |")
    lines.append("")
    for conditions in dict.fromkeys(each.conditions for each in results):
        names = [each.name for each in results if each.conditions == conditions]
        line = f"- {conditions}: {', '.join(names)}."
        lines.append(textwrap.fill(line, 126, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 1 with findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="for each target")
    parser.add_argument("--seconds", type=float, default=1800, help="for each target, at most")
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"of {','.join(TARGETS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true", help="without coverage, also where atheris is installed")
    parser.add_argument(
        "--findings", type=Path, default=Path("runs/fuzz"), help="folder that gets inputs and tracebacks"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file whose rows of these targets are replaced")
    parser.add_argument("--write", type=Path, help="page that gets the table")
    options = parser.parse_args(argv)
    names = options.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"unknown --targets={','.join(unknown)}; allowed: {', '.join(TARGETS)}")
    guided = not options.random and find_spec("atheris") is not None
    how = f"coverage-guided (atheris {version('atheris')})" if guided else "at random, without coverage"
    begun, results = time.monotonic(), []
    for name in names:
        result = fuzz(name, options)
        result.conditions = f"{table.heading(*PACKAGES)}; {how}, seed {options.seed}"
        results.append(result)
        print(f"{name}: {result.skipped or f'{result.inputs} inputs, {len(result.findings)} findings'}", end="; ")
        print(f"{time.monotonic() - begun:.0f} s", flush=True)
        for finding in result.findings:
            print(f"  {finding}", flush=True)
        text = as_table(merged(results, options.results))
        if options.write:
            table.write(options.write, text, BEGIN, FINISH)
    print(text)
    return 1 if any(result.findings for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
