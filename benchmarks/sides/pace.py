"""Timing loop of a process in a comparison, which takes a turn for every line that it reads."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

# Least seconds of a turn: enough for caches, clock rates and threads to be as in steady use.
TURN = 0.5


def serve(work: Callable[[], Any], **about: Any) -> None:
    """Warms up, prints `about`, and takes one turn for every line on standard input.

    A turn is one call that is not timed, then calls for half a second, whose mean time in seconds is printed.

    Args:
      work: makes one call; returns when the result is ready.
      **about: versions and settings, for the record.
    """
    for _ in range(3):
        work()
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        work()
        begun, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - begun < TURN:
            work()
            calls += 1
        print((time.perf_counter() - begun) / calls, flush=True)
