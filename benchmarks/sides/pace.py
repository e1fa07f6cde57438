"""What the sides of a comparison share: one process each, timing one repetition whenever the other end says so."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(work: Callable[[], Any], **about: Any) -> None:
    """Warms up, says what it is, and times `work` once for every line on standard input.

    Args:
      work: one repetition; returns when its result is there.
      **about: versions and settings, for the record.
    """
    for _ in range(3):
        work()
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        work()
        print(time.perf_counter() - begun, flush=True)
