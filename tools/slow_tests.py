"""Writes tests/slow.txt, the tests that `make test-fast` leaves out, from the durations of a whole run.

make test PYTEST_ADDOPTS=--junitxml=durations.xml
python tools/slow_tests.py durations.xml
"""

import collections
import sys
import xml.etree.ElementTree
from pathlib import Path

SLOW = Path(__file__).resolve().parents[1] / "tests" / "slow.txt"
# Most seconds of a test function, with all its parameters and their set-up.
LIMIT = 0.5


def slow_tests(report: str) -> list[str]:
    """Tests over the limit, as `test_file.py::test_name`.

    Args:
      report: of pytest, in JUnit's format.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    for case in xml.etree.ElementTree.fromstring(report).iter("testcase"):
        file = case.attrib["classname"].removeprefix("tests.")
        seconds[f"{file}.py::{case.attrib['name'].partition('[')[0]}"] += float(case.attrib["time"])
    return sorted(test for test, taken in seconds.items() if taken > LIMIT)


if __name__ == "__main__":
    found = slow_tests(Path(sys.argv[1]).read_text())
    SLOW.write_text("\n".join(found) + "\n")
    print(f"{SLOW}: {len(found)} tests")
