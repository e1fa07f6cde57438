"""A side of a comparison in a process of its own, which answers every line of JSON with one."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

# Freed memory stays in the process (mallopt(3)), on every side: what `se_flax.memory.keep_memory` does for ours.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)}

# Seconds between turns: OpenMP's threads go on spinning for a while after PyTorch's.
PAUSE = 0.05


class Worker:
    """One such process, seen from the one that measures.

    Args:
      command: that starts it.
      environment: variables added to this process's own and to `KEEP_MEMORY`.
      quiet: its standard error is dropped.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, quiet: bool = False):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env={**os.environ, **KEEP_MEMORY, **environment},
        )
        self.about: dict[str, Any] = {}

    def wait(self) -> bool:
        """Until it has said in its first line, `about`, that it is ready; False when it broke."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        self.about = json.loads(line) if line else {}
        return bool(line)

    def send(self, message: Any) -> None:
        """A line that it does not answer."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def ask(self, message: Any) -> Any:
        """The answer to a line."""
        assert self._process.stdout
        self.send(message)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def take_turns(
    what: str, commands: Mapping[str, Sequence[str]], environment: Mapping[str, str], count: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Sides of a comparison, timed one after the other in every round, so that all meet the same machine.

    Args:
      what: is compared, for what is said on standard error.
      commands: that start the sides (`benchmarks.sides.pace`), by name.
      environment: as for `Worker`.
      count: rounds.

    Returns:
      Seconds per call of every turn, by side, of those that started; and what they say of themselves, their versions.
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
    """The median of the first side's time over the second's, turn by turn."""
    return round(statistics.median(b / a for b, a in zip(slow, fast, strict=True)), 3)
