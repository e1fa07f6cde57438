"""Records of benchmarks: figures, command, date and machine."""

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def processor() -> str:
    """Name of the processor, if the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """Processor, cores, memory in GiB, system and Python, for a benchmark's record."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def command_line(module: str) -> str:
    """The running command, for a benchmark's record; absolute paths are shortened to their last parts."""

    def short(word: str) -> str:
        parts = Path(word).parts
        return word if not Path(word).is_absolute() else str(Path(*parts[-3 if parts[-2:-1] == ("bin",) else -1 :]))

    return shlex.join(["python", "-m", module, *map(short, sys.argv[1:])])


def record(path: Path, command: str, row: Mapping[str, Any]) -> None:
    """Appends a result to a file as one line of JSON: the command, today's date (UTC) and the figures.

    Args:
      path: of the file.
      command: the command that measured the figures.
      row: the figures.
    """
    line = {"command": command, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), **row}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
