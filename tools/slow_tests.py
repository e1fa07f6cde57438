"""Writes tests/slow.txt, the tests that `make test-fast` leaves out, from the durations of a whole run.

make test PYTEST_ADDOPTS=--durations=0 > durations.log
python tools/slow_tests.py durations.log
"""

import collections
import re
import sys
from pathlib import Path

SLOW = Path(__file__).resolve().parents[1] / "tests" / "slow.txt"
# Most seconds of a test function, with all its parameters and their set-up.
LIMIT = 0.5


def slow_tests(log: str) -> list[str]:
    """Tests over the limit, as `test_file.py::test_name`.

    Args:
      log: output of pytest with `--durations=0`.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    for match in re.finditer(r"^([\d.]+)s (?:call|setup|teardown)\s+tests/(\S+?)(?:\[.*)?$", log, re.MULTILINE):
        seconds[match[2]] += float(match[1])
    return sorted(test for test, taken in seconds.items() if taken > LIMIT)


if __name__ == "__main__":
    found = slow_tests(Path(sys.argv[1]).read_text())
    SLOW.write_text("\n".join(found) + "\n")
    print(f"{SLOW}: {len(found)} tests")
