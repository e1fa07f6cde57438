"""A worker process that answers every line of JSON with one."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

# Freed memory stays in the process (mallopt(3)), on every side: what `se_flax.runtime.keep_memory` does for ours.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)}


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
