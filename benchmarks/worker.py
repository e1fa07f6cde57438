"""A worker process that answers every line of JSON with a line of JSON."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

# Keeps freed memory in the process (mallopt(3)), for all libraries, as `se_flax.runtime.keep_memory` does for ours.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)}


class Worker:
    """A worker process, for the measuring process.

    Args:
      command: the command that starts the worker.
      environment: variables added to this process's own and to `KEEP_MEMORY`.
      quiet: drops the worker's standard error.
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
        """Waits for the worker's first line, `about`; returns False if the worker failed."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        self.about = json.loads(line) if line else {}
        return bool(line)

    def send(self, message: Any) -> None:
        """Sends a line without an answer."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def ask(self, message: Any) -> Any:
        """Sends a line and returns the answer."""
        assert self._process.stdout
        self.send(message)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the worker."""
        self._process.communicate()
