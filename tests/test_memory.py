"""Memory that stays in a process: the pages of a freed block are there when the next one of its size is taken."""

import platform
import subprocess
import sys

import pytest

from train import memory

# Page faults of the second of two blocks of 256 MB, taken and freed one after the other.
PROBE = """
import resource, sys
import numpy as np
from train.memory import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 25)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(after - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is what the settings are for")
def test_a_second_block_touches_no_new_pages():
    faults = {}
    for mode in ("keep", "free"):
        done = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    assert faults["keep"] < 100 < faults["free"]


def test_other_systems_are_left_alone(monkeypatch):
    class Libc:
        pass

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Libc())
    assert not memory.keep_memory()
