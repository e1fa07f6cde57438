"""Worker processes that read images: they end with the program, outlive its signals, and one that dies is named."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from se_flax.errors import UserError
from train.config import Data
from train.data.loader import open_data, train_loader
from train.data.workers import ends_explained

ROOT = Path(__file__).parents[1]
DATA = Data(source="digits", image_size=8, batch_size=16, workers=2)

PROGRAM = """
import multiprocessing, time
from train.config import Data
from train.data.loader import open_data, train_loader

if __name__ == "__main__":
    data = Data(source="digits", image_size=8, batch_size=16, workers=2)
    loader = train_loader(open_data(data), data, seed=0, process_index=0, process_count=1)
    next(loader), next(loader)
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""


def alive(pid):
    """Whether a process runs; one that ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_workers_end_when_the_program_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers))
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_group_signal_leaves_workers_alone_and_a_dead_one_is_one_sentence():
    loader = train_loader(open_data(DATA), DATA, seed=0, process_index=0, process_count=1)
    try:
        next(loader), next(loader)  # one from each: both have set up their signals
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        for _ in range(8):  # more than they had ready
            next(loader)
        assert all(worker.is_alive() for worker in workers)
        os.kill(workers[0].pid, signal.SIGKILL)
        with pytest.raises(UserError) as caught:
            for _ in range(100):
                next(loader)
        assert str(caught.value) == (
            "a data worker ended (SIGKILL; out of memory?); run the same command to resume, with a smaller "
            "data.workers if memory is short"
        )
    finally:
        loader.close()


def test_a_worker_that_ends_by_itself_is_named_and_other_errors_pass():
    text = r"a data worker ended \(exit code 3\); run the same command to resume"
    with pytest.raises(UserError, match=text), ends_explained():
        raise RuntimeError("Worker process was terminated unexpectedly with exit code 3. Search the logs above")
    with pytest.raises(RuntimeError, match="another"), ends_explained():
        raise RuntimeError("another")
