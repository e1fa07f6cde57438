"""What the sides of a comparison share: one process each, taking a turn whenever the other end says so."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

# Seconds of a turn at least. Caches, clocks and threads are as in steady use then, whoever had the turn before.
TURN = 0.5


def serve(work: Callable[[], Any], **about: Any) -> None:
    """Warms up, says what it is, and takes one turn for every line on standard input.

    A turn is one call that is not timed, then calls until half a second is over; it prints their mean time in seconds.

    Args:
      work: one call; returns when its result is there.
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
