"""Trains with several hosts, played by processes of this machine, against one; kills one of them; changes their number.

Command: python -m tests.stress.hosts --write=docs/reliability.md (a part of make stress)

The run is `recipes.hosts`: a small network, images from folders of which three are damaged, batch norm over all
devices. Compared are the figures of `metrics.jsonl` between numbers of hosts and devices, which differ by rounding, and
bit for bit what a run left that lost a host, started again with as many.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bucket_servers import free_port
from train.run.report import read_metrics

from . import recipes, table
from .compare import TIMINGS, differences, left, whole_steps

ROOT = Path(__file__).parents[2]
BEGIN, FINISH = "<!-- written by the stress program for hosts -->\n", "<!-- end of what it writes -->\n"
SECONDS = 900.0  # of a run, on a machine that may have other work
SLACK = 5  # seconds, from the time without a heartbeat to the end of a process that writes a stack trace
# How a host ends that has lost another: by our sentence if its collective breaks, or by JAX's, which aborts it.
LEAVES = ((1, "error: another host was lost"), (-signal.SIGABRT, "This most likely indicates that another task died"))
TOO_SLOW = "Gloo context initialization failed: DEADLINE_EXCEEDED"  # JAX's limit, for the CPU alone
ROUNDING = 1e-4  # of figures: sums over devices in another order, over twelve steps


@dataclass(frozen=True)
class Layout:
    """Hosts and the devices of each."""

    hosts: int
    devices: int

    def __str__(self) -> str:
        return f"{self.hosts} x {self.devices}"


ALONE = (Layout(1, 4), Layout(2, 2), Layout(1, 8), Layout(4, 2))
LOST = Layout(4, 2)
OTHERS = (*(Layout(1, n) for n in (1, 2, 4, 8)), Layout(2, 1), Layout(2, 2), Layout(4, 1))


@dataclass
class Ended:
    """The processes of a run that has ended, host by host: exit codes, what they said, seconds since one was killed."""

    codes: list[int]
    said: list[str]
    seconds: list[float]


def environments(count: int) -> list[dict[str, str]]:
    """What tells each of several processes of this machine about the others."""
    address = f"localhost:{free_port()}"
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [{**os.environ, **several, "JAX_PROCESS_ID": str(index)} for index in range(count)]


def start(workdir: Path, data: Path, layout: Layout) -> list[subprocess.Popen[bytes]]:
    """Starts the hosts of a run; what they say goes to files beside the work directory."""
    words = ["--config=tests/stress/recipes.py:hosts", f"--workdir={workdir}", f"--config.data.source=folder:{data}"]
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={layout.devices}"
    found = []
    for index, environment in enumerate(environments(layout.hosts)):
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        with Path(f"{workdir}.output{index}").open("wb") as output:
            command = [sys.executable, "-m", "train", *words]
            found.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output))
    return found


def wait(workdir: Path, hosts: Sequence[subprocess.Popen[bytes]], *, kill: int | None = None) -> Ended:
    """Waits for the end of all hosts, and kills one of them once a checkpoint is whole, if told so."""
    begun, first = time.monotonic(), 0.0
    ends: list[float] = [0.0] * len(hosts)
    while any(host.poll() is None for host in hosts):
        if kill is not None and not first and whole_steps(workdir):
            hosts[kill].send_signal(signal.SIGKILL)
            hosts[kill].wait()
            first = time.monotonic()
        for index, host in enumerate(hosts):
            if host.poll() is not None and not ends[index]:
                ends[index] = time.monotonic()
        if time.monotonic() - begun > SECONDS:
            for host in hosts:
                host.kill()
        time.sleep(0.02)
    codes = [host.wait() for host in hosts]
    said = [Path(f"{workdir}.output{index}").read_text() for index in range(len(hosts))]
    return Ended(codes, said, [max(0.0, (end or time.monotonic()) - first) for end in ends])


def figures(workdir: Path) -> list[dict[str, float]]:
    """Rows of `metrics.jsonl` without timings."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def largest_difference(here: list[dict[str, float]], there: list[dict[str, float]]) -> float:
    """Between the figures of two runs, relative; infinite if they do not have the same ones."""
    if [row.keys() for row in here] != [row.keys() for row in there]:
        return float("inf")
    pairs = [(mine[name], other[name]) for mine, other in zip(here, there, strict=True) for name in mine]
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


class Stress:
    """The whole program.

    Args:
      work: folder that gets everything.
    """

    def __init__(self, work: Path):
        self.work, self.data = work, work / "images"
        self.damaged = recipes.write_images(self.data)
        self.faults: list[str] = []
        self.rows: list[str] = []

    def train(self, name: str, layout: Layout, damaged: Sequence[str] = ()) -> Path:
        """Trains to the end; every host must name all damaged images, or those given, that the process has met."""
        print(f"{name}: {layout} ...", flush=True)
        workdir = self.work / name
        ended = wait(workdir, start(workdir, self.data, layout))
        if any(TOO_SLOW in said for said in ended.said):  # before the first step, on a machine with other work
            print(f"{name}: a host was late by more than 30 s; again ...", flush=True)
            ended = wait(workdir, start(workdir, self.data, layout))
        for index, (code, said) in enumerate(zip(ended.codes, ended.said, strict=True)):
            if code:
                raise SystemExit(f"{name}: host {index} of {layout} ended with {code}:\n{said[-3000:]}")
            if missing := [image for image in damaged or self.damaged if image not in said]:
                self.faults.append(f"{name}: host {index} of {layout} does not name the images {', '.join(missing)}")
        return workdir

    def row(self, what: str, layout: Layout, found: str) -> None:
        """A line of the table."""
        self.rows.append(f"| {what} | {layout} | {found} |")
        print(self.rows[-1], flush=True)

    def compare(self, what: str, layout: Layout, here: Path, there: Path) -> None:
        """A line of the table on the figures of two runs; a fault if they differ by more than rounding."""
        found = largest_difference(figures(here), figures(there))
        self.row(what, layout, f"{found:.1e}")
        if not found <= ROUNDING:
            self.faults.append(f"{what}, {layout}: the figures differ by {found:.1e}")

    def run(self) -> None:
        """Everything."""
        alone = {layout: self.train(f"alone-{layout.hosts}x{layout.devices}", layout) for layout in ALONE}
        base = alone[LOST]
        for layout in ALONE[1:]:
            self.compare(f"trained, against {ALONE[0]}", layout, alone[layout], alone[ALONE[0]])
        for victim in (LOST.hosts - 1, 0):
            self.lose(base, victim)
        for layout in OTHERS:
            self.move(base, layout)

    def lose(self, base: Path, victim: int) -> None:
        """Kills a host after the first checkpoint, and starts all again."""
        name = f"lost-{victim}"
        workdir = self.work / name
        print(f"{name} ...", flush=True)
        ended = wait(workdir, start(workdir, self.data, LOST), kill=victim)
        for index, (code, said) in enumerate(zip(ended.codes, ended.said, strict=True)):
            if index != victim and not any(code == end and text in said for end, text in LEAVES):
                self.faults.append(f"{name}: host {index} ended with {code} and said {said.splitlines()[-1:]}")
        slowest = max(seconds for index, seconds in enumerate(ended.seconds) if index != victim)
        if slowest > (limit := recipes.HEARTBEAT_SECONDS + SLACK):
            self.faults.append(f"{name}: the others left after {slowest:.1f} s, and not within {limit}")
        self.train(name, LOST)
        found = [each.text for each in differences(left(workdir, []), left(base, []))]
        self.faults += [f"{name}, resumed: {text}" for text in found]
        what = f"host {victim} killed, then resumed, against the run that was left alone"
        self.row(what, LOST, f"{len(found)} differences of a bit; the others left after {slowest:.1f} s")

    def move(self, base: Path, layout: Layout) -> None:
        """Goes on from a checkpoint with another number of hosts and devices."""
        workdir = self.work / f"moved-{layout.hosts}x{layout.devices}"
        shutil.copytree(base, workdir)
        steps = whole_steps(workdir)
        shutil.rmtree(workdir / "checkpoints" / str(steps[-1]))
        self.train(workdir.name, layout, self.damaged[-1:])  # the others were met before
        if f"resuming from step {steps[-2]}" not in Path(f"{workdir}.output0").read_text():
            self.faults.append(f"{workdir.name} did not go on from step {steps[-2]}")
        self.compare(f"saved on {LOST} at step {steps[-2]}", layout, workdir, base)


def as_table(rows: Sequence[str], faults: Sequence[str], minutes: float) -> str:
    """The result in Markdown."""
    lines = [
        f"{table.heading('jax', 'orbax-checkpoint')};",
        f"{minutes:.0f} minutes: **{len(faults)} faults.**",
        "",
        "| run | hosts x devices | largest relative difference of any figure |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command line; the exit code tells whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.hosts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, help="page that gets the table")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="se-flax-hosts-") as work:
        stress = Stress(Path(work))
        stress.run()
    text = as_table(stress.rows, stress.faults, (time.monotonic() - begun) / 60)
    print(text, *stress.faults, sep="\n")
    if options.write:
        table.write(options.write, text, BEGIN, FINISH)
    return bool(stress.faults)


if __name__ == "__main__":
    raise SystemExit(main())
