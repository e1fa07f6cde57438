"""What must be settled before JAX is imported: eight devices on one CPU, and programs that compile quickly.

The tests compile thousands of programs and run each a few times, so LLVM does not optimise them, fusions are emitted
without MLIR (JAX 0.10), and each program in one piece: together less than half of the time to compile. What XLA fuses,
and so the flops and bytes that it counts, stays. The tests of whole runs compile the same step again and again, in
several processes; their cache lives as long as the test run, so no result depends on an earlier one.
"""

import ctypes
import gc
import os
import random
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if version("jax").startswith("0.10."):  # XLA ends the process where it does not know a flag, as later ones do
    FLAGS["xla_cpu_use_fusion_emitters"] = "false"
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}".strip()
_OWN = "PYTEST_XDIST_WORKER" not in os.environ
if _OWN:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="se-flax-xla-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
# Tracing makes millions of objects of which few are garbage: looking for it so often takes a quarter of the time.
gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Marks what `make test-fast` leaves out (`tools/slow_tests.py` writes the list); with SE_FLAX_ORDER, shuffles.

    Files in random order, and the tests of each file: one by one they would build the fixtures of a file again and
    again.
    """
    if order := os.environ.get("SE_FLAX_ORDER"):
        random.Random(order).shuffle(items)
        files = {path: number for number, path in enumerate(dict.fromkeys(item.path for item in items))}
        items.sort(key=lambda item: files[item.path])
    slow = set((Path(__file__).parent / "slow.txt").read_text().split())
    for item in items:
        if f"{item.path.name}::{getattr(item, 'originalname', item.name)}" in slow:
            item.add_marker(pytest.mark.slow)


# Bytes in use after a test, from which on memory that was freed goes back to the system: glibc keeps most of it.
_LARGE = 3e9


def pytest_runtest_teardown():
    statistics = Path("/proc/self/statm")
    if statistics.exists() and int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _LARGE:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def pytest_unconfigure():
    if _OWN:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


# The command lines' tables are as wide as the terminal says; without it, as in a pipe, they are whole.
os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True)
def _memory_goes_back(monkeypatch):
    """Many small runs in one process must not each leave their peak behind; processes of their own keep theirs."""
    for name in {"train.run.loop", "train.ctr.loop", "se_flax.cli.images"} & sys.modules.keys():
        monkeypatch.setattr(sys.modules[name], "keep_memory", lambda: False)
