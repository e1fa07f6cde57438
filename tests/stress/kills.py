"""Kills trainings at random and at named moments, starts them again, and compares the end with a run left alone.

Command: make stress, which is python -m tests.stress.kills --kills=200 --write=docs/reliability.md

A run is a training program in a process of its own (`multiprocessing`'s fork server has imported it before), which is
ended several times by SIGKILL and once by SIGTERM, started again each time, and left alone at last. After each end the
newest whole checkpoint must be at least the last one whose digests were written, and the next start must go on from it;
after SIGTERM it must be the step that the run had reached. At the end everything it left must be that of a run that was
left alone (`compare`). All is drawn from the seed and the run's number: --only=N repeats run N.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import recipes, table
from .child import HALF, MOMENTS, End, train
from .compare import Difference, Left, differences, journal_of, left, whole_steps

KINDS = ("images", "tables", "workers")
NAMED, RANDOM = 5, 2  # SIGKILLs of a run; one SIGTERM is added
GRACE = 30.0  # seconds that SIGTERM leaves, as Kubernetes and Slurm do by default
HANGS = 900.0
ONE, GROUP = "random, the program alone", "random, with its data workers"
TERM = "SIGTERM"
PRELOADED = ["train.cli", "train.run.loop", "train.ctr.loop", "sklearn.datasets", "matplotlib.pyplot", __name__]


@dataclass(frozen=True)
class Ended:
    """One end of a process.

    Attributes:
      kind: of the run.
      moment: where it was ended.
      lost: steps done since the checkpoint that the next start goes on from.
      seconds: from SIGTERM to the end.
      faults: what should not be.
    """

    kind: str
    moment: str
    lost: int
    seconds: float = 0.0
    faults: tuple[str, ...] = ()


@dataclass
class Reference:
    """A run that was left alone.

    Attributes:
      left: what it left.
      calls: how often each moment came.
      startup: seconds from the begin to the first step, of the quickest start so far.
      seconds: from there to the end.
      steps: of the run.
    """

    left: Left
    calls: dict[str, int]
    startup: float
    seconds: float
    steps: int


@dataclass
class Run:
    """A work directory, and the processes that were started in it.

    Attributes:
      kind: of the run.
      workdir: of the run.
      words: of the command line.
      starts: so far.
      ended: when the newest process did, as `time.time`.
    """

    kind: str
    workdir: Path
    words: list[str]
    starts: int = 0
    ended: float = 0.0
    _process: Any = field(default=None)

    @property
    def journals(self) -> list[Path]:
        """Of its processes, in their order."""
        return [Path(f"{self.workdir}.journal{number}") for number in range(1, self.starts + 1)]

    @property
    def output(self) -> Path:
        """What the newest process said."""
        return Path(f"{self.workdir}.output{self.starts}")

    def start(self, end: End | None = None) -> None:
        """Starts the training program."""
        self.starts += 1
        context = multiprocessing.get_context("forkserver")
        arguments = (self.words, self.workdir, self.journals[-1], self.output, end)
        self._process = context.Process(target=train, args=arguments)
        self._process.start()

    def wait(self, until: str = "") -> int | None:
        """Waits for a line of the journal or for the end; the exit code if that came first."""
        deadline = time.monotonic() + HANGS
        while self._process.is_alive():
            if until and self.time_of(until):
                return None
            if time.monotonic() > deadline:
                self.end(signal.SIGKILL, group=True)
                return 1000  # no program's code: it hung
            self._process.join(0.01)
        self.ended = time.time()
        return int(self._process.exitcode)

    def end(self, number: int, *, group: bool) -> None:
        """Sends a signal to the newest process, or to it and its data workers."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self._process.pid, number)

    def events(self) -> list[tuple[float, list[str]]]:
        """The newest journal."""
        return journal_of(self.journals[-1])

    def time_of(self, word: str) -> float:
        """When the newest process wrote a line that begins so; 0 if it did not."""
        return next((at for at, words in self.events() if words[0] == word), 0.0)

    def numbers(self, word: str, *, newest: bool = False) -> list[int]:
        """The numbers in lines that begin so, of all processes or of the newest."""
        journals = self.journals[-1:] if newest else self.journals
        return [int(words[1]) for path in journals for _, words in journal_of(path) if words[0] == word]

    def remaining(self) -> list[int]:
        """Processes of the newest start's group that still run a little later."""
        deadline = time.monotonic() + 60
        while (there := _group(self._process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return there


def _group(number: int) -> list[int]:
    """Members of a process group; one that has ended and that nobody waited for is none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == number and state != "Z":
            found.append(int(path.parent.name))
    return found


class Stress:
    """Runs of one seed.

    Args:
      folder: for work directories.
      seed: of everything that is drawn.
      kinds: of runs, in turn.
      cache: compiled programs.
    """

    def __init__(self, folder: Path, seed: int, kinds: Sequence[str], cache: Path | None = None):
        self._folder, self._seed, self._kinds = folder, seed, kinds
        self._cache = cache or folder / "cache"
        self._references: dict[str, Reference] = {}
        recipes.write_table(folder / "table.csv")
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)

    def run(self, kind: str, name: str) -> Run:
        """A run that was not started yet."""
        recipe = Path(recipes.__file__)
        words = [f"--config={recipe}:{kind}", f"--config.compilation_cache={self._cache}"]
        if kind == "tables":
            words.append(f"--config.data.train=csv:{self._folder / 'table.csv'}")
        workdir = self._folder / name
        return Run(kind, workdir, [*words, f"--workdir={workdir}"])

    def reference(self, kind: str) -> Reference:
        """The run of a kind that is left alone, made once."""
        if kind not in self._references:
            run = self.run(kind, f"alone-{kind}")
            run.start()
            if code := run.wait():
                raise SystemExit(f"a run that was left alone ended with {code}:\n{run.output.read_text()}")
            times = [at for at, words in run.events() if words[0] in ("begin", "step", "calls")]
            calls = {" ".join(words[2:]): int(words[1]) for _, words in run.events() if words[0] == "calls"}
            made = left(run.workdir, run.journals)
            parts = ("params", "opt_state", *(() if kind == "tables" else ("batch_stats", "ema")))
            if missing := [part for part in parts if not any(f"['{part}']" in name for name in made.arrays)]:
                raise SystemExit(f"nothing would compare {', '.join(missing)}")
            steps = max(run.numbers("step"))
            self._references[kind] = Reference(made, calls, times[1] - times[0], times[-1] - times[1], steps)
        return self._references[kind]

    def kind_of(self, number: int) -> str:
        """Of a run."""
        return self._kinds[number % len(self._kinds)]

    def ends(self, number: int) -> list[tuple[str, End | None]]:
        """What ends the processes of a run, in order: a name, and the moment if it has one; of those, each in turn."""
        kind, calls = self.kind_of(number), self.reference(self.kind_of(number)).calls
        names = [name for name in MOMENTS if calls.get(name)]
        turn = sum(self.kind_of(earlier) == kind for earlier in range(number))
        order = np.random.default_rng((self._seed, KINDS.index(kind))).permutation(len(names))
        rng = np.random.default_rng((self._seed, number))
        ends: list[tuple[str, End | None]] = [(str(rng.choice([ONE, GROUP])), None) for _ in range(RANDOM)]
        for place in range(NAMED):
            name = names[order[(turn * NAMED + place) % len(names)]]
            ends.append((name, _drawn(name, calls[name], rng)))
        name = str(rng.choice([name for name in names if name != HALF]))  # which only a kill leaves
        ends.append((TERM, None if rng.random() < 0.5 else _drawn(name, calls[name], rng, signal.SIGTERM)))
        shuffled = [ends[i] for i in rng.permutation(len(ends))]
        return sorted(shuffled, key=lambda end: MOMENTS[end[1].moment].order if end[1] else 0)

    def once(
        self, number: int, ends: Sequence[tuple[str, End | None]] | None = None
    ) -> tuple[list[Ended], list[Difference]]:
        """One run, killed on its way.

        Args:
          number: of the run.
          ends: what ends its processes; drawn if not given.

        Returns:
          Its ends, and how it differs from one that was left alone.
        """
        kind = self.kind_of(number)
        reference, run = self.reference(kind), self.run(self.kind_of(number), f"run{number}")
        rng = np.random.default_rng((self._seed, number, 1))
        ended: list[Ended] = []
        expected = 0
        found: list[Difference] = []
        for name, end in [*(self.ends(number) if ends is None else ends), ("", None)]:
            if expected == reference.steps and name and not (end and MOMENTS[end.moment].order == 1):
                continue  # nothing else comes in a run that is over
            run.start(end)
            code = self._wait(run, name, end, reference, expected, rng)
            started = run.numbers("restored", newest=True)
            if run.time_of("step"):
                reference.startup = min(reference.startup, run.time_of("step") - run.time_of("begin"))
            wrong = [f"run {number}: {text}" for text in _wrong_start(run, started, expected)]
            if code == 0 and not name:  # the last start
                found += [Difference(text) for text in wrong]
                break
            signalled = run.time_of("signal")
            if code == 0 and not (name == TERM and signalled):  # the run was over before the moment came
                found += [Difference(text) for text in wrong]
                expected = newest_whole(run.workdir)
                continue
            result, expected = self._judged(run, name, code, signalled, started)
            wrong += [f"run {number}: {text}" for text in result.faults]
            ended.append(Ended(kind, name, result.lost, result.seconds, tuple(wrong)))
            if result.faults and code not in (-signal.SIGKILL, 0, 130):
                break
        if not any(each.faults for each in ended):
            stopped = any(each.moment == TERM for each in ended)
            found += differences(left(run.workdir, run.journals), reference.left, stopped=stopped)
        if not found and not any(each.faults for each in ended):
            shutil.rmtree(run.workdir)
            for path in self._folder.glob(f"run{number}.*"):
                path.unlink()
        return ended, found

    def _wait(
        self, run: Run, name: str, end: End | None, reference: Reference, done: int, rng: np.random.Generator
    ) -> int:
        """Waits for the end of a process; where no moment says when, sends the signal itself at a random time."""
        if not name or end is not None:
            return int(run.wait() or 0)
        share = rng.random()
        code = run.wait("begin")
        if code is not None:
            return code
        rest = reference.seconds * (1 - done / reference.steps) / 2  # more kills are to come
        time.sleep(share * (reference.startup + rest))
        number = signal.SIGTERM if name == TERM else signal.SIGKILL
        sent = time.time()
        run.end(number, group=name == GROUP)
        code = int(run.wait() or 0)
        if code != 0:
            with run.journals[-1].open("a") as stream:
                stream.write(f"{sent:.6f} signal\n")
        return code

    def _judged(self, run: Run, name: str, code: int, signalled: float, started: list[int]) -> tuple[Ended, int]:
        """What an end left: a verdict, and the step that the next start must go on from."""
        steps = run.numbers("step", newest=True)
        reached = max([*steps, *started], default=0)
        newest, sealed = newest_whole(run.workdir), max(run.numbers("sealed"), default=0)
        seconds = max(0.0, run.ended - signalled) if name == TERM else 0.0
        faults = []
        if not signalled or code not in ((0, 130, -signal.SIGTERM) if name == TERM else (-signal.SIGKILL,)):
            said = " / ".join(run.output.read_text().splitlines()[-3:]) if run.output.exists() else ""
            faults.append(f"start {run.starts} ended with {code}: {said}")
        if newest < sealed:
            faults.append(f"the checkpoint of step {sealed} was whole before {name} and is not any more")
        if name == TERM and newest < reached:
            faults.append(f"SIGTERM at step {reached} left a checkpoint of step {newest}")
        if seconds > GRACE:
            faults.append(f"the run ended {seconds:.0f} s after SIGTERM")
        if remaining := run.remaining():
            faults.append(f"{len(remaining)} processes outlive the program")
        return Ended(run.kind, name, max(0, reached - newest), seconds, tuple(faults)), newest


def newest_whole(workdir: Path) -> int:
    """Step of the checkpoint that the next start must go on from, 0 without one.

    One that waits for its replacement counts, and where none has digests, so does the newest without.
    """
    waiting = [int(path.name.partition("-")[0]) for path in (workdir / ".old").glob("*-replaced")]
    others = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    return max([*whole_steps(workdir), *waiting] or others, default=0)


def _wrong_start(run: Run, started: list[int], expected: int) -> Iterator[str]:
    if started and started[0] != expected:
        yield f"start {run.starts} went on from step {started[0]} instead of {expected}"


def _drawn(name: str, calls: int, rng: np.random.Generator, number: int = signal.SIGKILL) -> End:
    """A call of a moment that a run in its middle still makes, and where in it."""
    positions = ["before", "within"] if ":" not in MOMENTS[name].where else ["before", "within", "after"]
    position = "within" if name == HALF else str(rng.choice(positions))
    # Among the first: each start has a part of the run left.
    return End(name, int(rng.integers(1, max(1, calls // 6) + 1)), position, float(rng.exponential(0.02)), number)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 1 if anything was lost or differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs and SIGTERMs that reach a training")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new run after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one run to make")
    parser.add_argument("--runs", default=",".join(KINDS), help=f"kinds of runs, of {','.join(KINDS)}")
    parser.add_argument("--cache", type=Path, help="folder that keeps compiled programs for the next call")
    parser.add_argument("--write", type=Path, help="page that gets the table")
    options = parser.parse_args(argv)
    kinds = options.runs.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"unknown --runs={','.join(sorted(unknown))}; allowed: {', '.join(KINDS)}")
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="se-flax-kills-"))
    stress = Stress(folder, options.seed, kinds, options.cache)
    ended: list[Ended] = []
    wrong: dict[int, list[Difference]] = {}
    number, runs = options.only or 0, 0
    print(f"seed {options.seed}, in {folder}", flush=True)
    while len(ended) < options.kills and (time.monotonic() - begun) < 60 * options.minutes:
        ends, found = stress.once(number)
        ended += ends
        runs += 1
        faults = [Difference(text) for each in ends for text in each.faults]
        if faults or found:
            wrong[number] = [*faults, *found]
        print(f"run {number} ({stress.kind_of(number)}): {', '.join(each.moment for each in ends)}; ", end="")
        print(f"{len(wrong.get(number, ()))} differences; {len(ended)} kills after {time.monotonic() - begun:.0f} s")
        for difference in wrong.get(number, ()):
            print(f"  {difference.text} (--seed={options.seed} --only={number} --runs={options.runs})")
        sys.stdout.flush()
        number += 1
        if options.only is not None:
            break
    text = table.of(ended, runs, wrong, seed=options.seed, minutes=(time.monotonic() - begun) / 60)
    print(text)
    if options.write:
        table.write(options.write, text)
    if not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
